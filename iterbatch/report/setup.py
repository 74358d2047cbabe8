"""What a comparison was made with, as its records say: model, text, budget, adapters, arms, machine."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iterbatch.language import N_, _
from iterbatch.records import layout
from iterbatch.report.comparison import CellScores
from iterbatch.report.scores import ArmScores
from iterbatch.strategy import STRATEGIES, own_knobs

ONE = r"s\b"  # what a unit loses where there is one of it
DIGEST = 16  # hexadecimal digits that are shown of a SHA-256
UNITS = {"flops": "FLOPs", "tokens": N_("trained tokens")}


@dataclass(frozen=True)
class ArmSetUp:
    """One arm before it was trained."""

    arm: str
    strategy: str
    rate: str  # peak learning rate
    knobs: str
    tried: str  # how the rate was found


def setup_of(cell: CellScores) -> dict[str, str]:
    """What all arms had alike: a term and what it was."""
    settings, manifest = cell.config, _manifest(cell)
    parts = {
        _("Model"): _model(settings, manifest),
        _("Adapters"): _adapters(settings, manifest),
        _("Training text"): _text(settings, manifest),
        _("Scored text"): "; ".join(f"{split}: {text}" for split, text in cell.scored.items()),
        _("Budget"): _budget(settings, manifest),
        _("Batch"): _batch(settings, manifest),
        _("Optimizer"): _optimizer(settings),
        _("Seeds"): " ".join(map(str, manifest.get("seeds") or settings.get("seeds") or ())),
        _("Frozen prefix"): _prefix(settings, manifest),
        _("Machine"): _machine(manifest),
        _("Processes"): _processes(cell, manifest),
        _("Versions"): _versions(manifest),
        _("Date"): str(manifest.get("started", "")),
    }
    return {term: value for term, value in parts.items() if value}


def arms_setup(cell: CellScores) -> list[ArmSetUp]:
    """What each arm had of its own."""
    return [_arm(cell, arm) for arm in cell.arms]


def differences(cells: Mapping[str, CellScores]) -> list[tuple[str, list[str]]]:
    """Which settings of the cells are not alike: name, and the value of each."""
    names = sorted({name for cell in cells.values() for name in cell.config})
    rows = [(name, [_value(cell.config.get(name)) for cell in cells.values()]) for name in names]
    return [
        (name, values)
        for name, values in rows
        if len(set(values)) > 1 and name not in ("save_dir", "strategies")
    ]


def _manifest(cell: CellScores) -> dict[str, Any]:
    """Empty where there is none, or one that cannot be read: nothing that is scored depends on it."""
    try:
        content = json.loads((cell.run_dir / layout.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _part(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = manifest.get(name)
    return found if isinstance(found, dict) else {}


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _count(value: Any, unit: str) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return f"{value:,.0f} {unit if value != 1 else re.sub(ONE, '', unit, count=1)}"


def _digest(value: Any, of: str) -> str:
    return (
        _("SHA-256 of {of} {value}").format(of=of, value=value[:DIGEST])
        if isinstance(value, str) and value
        else ""
    )


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"


def _model(settings: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    model, plan, origin = (_part(manifest, name) for name in ("model", "plan", "origin"))
    name = str(model.get("name") or settings.get("model_name") or "")
    kind = f" ({model['type']})" if "type" in model else ""
    quantised = (
        _("frozen weights in {load_in}").format(load_in=settings["load_in"])
        if settings.get("load_in")
        else ""
    )
    weights = _digest(origin.get("weights"), _("its weights"))
    return _joined(
        f"{name}{kind}",
        _count(plan.get("parameters"), _("parameters")),
        str(model.get("dtype", "")),
        quantised,
        weights,
    )


def _adapters(settings: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    if "lora_rank" not in settings:
        return ""
    plan = _part(manifest, "plan")
    return _joined(
        _("LoRA of rank {lora_rank}, alpha {then}").format(
            lora_rank=settings["lora_rank"], then=settings.get("lora_alpha")
        ),
        _("layers {layers}").format(layers=settings.get("lora_layers")),
        _value(settings.get("lora_targets") or ""),
        _count(plan.get("trainable_parameters"), _("trained parameters")),
    )


def _text(settings: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    data, plan = _part(manifest, "data"), _part(manifest, "plan")
    documents = plan.get("documents") or _part(data, "documents").get("train")
    loss_on = plan.get("loss_on")
    asked = (
        ""
        if not isinstance(loss_on, dict) or set(loss_on) <= {"all"}
        else _("loss on {names}").format(names=", ".join(loss_on))
    )
    return _joined(
        str(data.get("source") or settings.get("dataset") or ""),
        _count(documents, _("documents")),
        _count(_of_an_epoch("tokens", settings, plan), _("tokens")),
        asked,
        _digest(_part(_part(manifest, "origin"), "text").get("train") or data.get("sha256"), _("the text")),
        _("licence: {licence}").format(licence=_(str(data["licence"]))) if data.get("licence") else "",
    )


def _of_an_epoch(name: str, settings: Mapping[str, Any], plan: Mapping[str, Any]) -> float | None:
    """Plans count tokens and batches over all epochs."""
    whole, epochs = plan.get(name), settings.get("epochs") or 1
    return whole / epochs if isinstance(whole, int | float) and isinstance(epochs, int) else None


def _budget(settings: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    unit, plan = str(settings.get("match", "epochs")), _part(manifest, "plan")
    epochs = _count(settings.get("epochs"), _("epochs"))
    if unit == "epochs":
        return _("{epochs} for every arm; what that costs differs").format(epochs=epochs)
    amount = settings.get("budget")
    given = isinstance(amount, int | float)
    what = f"{amount:,.0f}" if given else _("what the baseline needs for {epochs}").format(epochs=epochs)
    flops = None if given else plan.get("flops")
    size = f"{flops / 1e9:,.0f} GFLOPs" if unit == "flops" and isinstance(flops, int | float) else ""
    return _joined(
        _("the same {unit} for every arm: {what}").format(unit=_(UNITS.get(unit, unit)), what=what), size
    )


def _batch(settings: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    plan, size, micro = _part(manifest, "plan"), settings.get("batch_size"), settings.get("grad_accum") or 1
    if not isinstance(size, int) or not isinstance(micro, int):
        return ""
    size *= _began(manifest) or 1  # each process has as many
    blocks = _("{count} blocks").format(count=size * micro) + (
        _(" ({micro} micro-batches of {size})").format(micro=micro, size=size) if micro > 1 else ""
    )
    length = _count(plan.get("max_length") or settings.get("max_length"), _("tokens each"))
    return _joined(
        blocks + (_(" of {length}").format(length=length) if length else ""),
        _count(_of_an_epoch("batches", settings, plan), _("batches in the text")),
    )


def _optimizer(settings: Mapping[str, Any]) -> str:
    if "warmup" not in settings:
        return ""
    return _(
        "AdamW, weight decay {then}, gradient norm at most {then2}; the learning rate rises over "
        "{warmup:.0%} of the budget (ten updates at least) and falls along a cosine to 0"
    ).format(then=settings.get("weight_decay"), then2=settings.get("clip_norm"), warmup=settings["warmup"])


def _prefix(settings: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    price = _part(manifest, "plan").get("price_ratio")
    words = {
        "off": _("computed in every pass"),
        "batch": _("computed once a batch"),
        "epoch": _("kept for later epochs and arms"),
    }
    how = words.get(str(settings.get("reuse")), "")
    price = (
        _("a repeat costs {price:.2f} of a fresh pass").format(price=price)
        if isinstance(price, int | float)
        else ""
    )
    return _joined(how, price)


def _machine(manifest: Mapping[str, Any]) -> str:
    hardware = _part(manifest, "hardware")
    gpus = hardware.get("gpus") or []
    return _joined(
        str(manifest.get("platform", "")),
        str(hardware.get("cpu", "")),
        _count(hardware.get("cores"), _("cores")),
        _count(hardware.get("threads"), _("threads a process")),
        (", ".join(map(str, gpus)) or _("no GPU")) if hardware else "",
    )


def _began(manifest: Mapping[str, Any]) -> int:
    """How many processes began the run; 0 where an earlier version did not say so."""
    found = manifest.get("processes")
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0


def _processes(cell: CellScores, manifest: Mapping[str, Any]) -> str:
    """How many shared each batch, and how; all numbers where a run was resumed by another one."""
    results = [seed.result for arm in cell.arms for seed in arm.finished if seed.result is not None]
    numbers = sorted({_began(manifest), *(each.processes for each in results)} - {0})
    shares = _("layers sharded by FSDP") if manifest.get("sharding") == "fsdp" else ""
    return _joined(_(" and ").join(map(str, numbers)), shares)


def _versions(manifest: Mapping[str, Any]) -> str:
    named = [f"{name} {version}" for name, version in _part(manifest, "versions").items()]
    commit = manifest.get("git_commit")
    return _joined(
        *named,
        f"Python {manifest['python']}" if "python" in manifest else "",
        _("commit {commit}").format(commit=commit[:DIGEST]) if isinstance(commit, str) else "",
    )


def _arm(cell: CellScores, arm: ArmScores) -> ArmSetUp:
    own = {name: value for name, value in cell.own(arm.name).items() if name not in ("strategy", "lr")}
    known = own_knobs(arm.kind) if arm.kind in STRATEGIES else {}
    settings = {name: own.get(name, cell.config.get(name)) for name in known} | own
    placed = settings.get("placement") == "spaced"
    shown = {
        name: value
        for name, value in settings.items()
        if value is not None and (placed or name not in ("placement", "gap", "buffer"))
    }
    rate = f"{arm.rate:.3g}" if math.isfinite(arm.rate) else ""
    knobs = ", ".join(f"{name} {_value(value)}" for name, value in shown.items())
    return ArmSetUp(arm.name, arm.kind, rate, knobs, _tried(cell, arm))


def _tried(cell: CellScores, arm: ArmScores) -> str:
    curve = cell.tuning.get(arm.name)
    if curve is None:
        return _("not tuned")
    low, high = min(curve.rates), max(curve.rates)
    seeds = curve.table.shape[1]
    edge = _("; the best lies at the edge") if curve.best is not None and curve.at_edge(curve.best) else ""
    several = _(", {seeds} seeds each").format(seeds=seeds) if seeds > 1 else ""
    return _("{count} rates from {low:.3g} to {high:.3g}{several}{edge}").format(
        count=len(curve.rates), low=low, high=high, several=several, edge=edge
    )
