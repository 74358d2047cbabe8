"""The report of a comparison: ``report.html``, ``report.md``, ``metrics.csv`` and its figures, from records alone.

What lives here: what is told, and in which words. What does not: numbers (:mod:`iterbatch.report.comparison`) and drawing (:mod:`iterbatch.report.figures`).
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iterbatch.report import figures
from iterbatch.report import mauve as mauve_score
from iterbatch.records.record import write_text
from iterbatch.report.summary import markdown, plain
from iterbatch.report.comparison import REFERENCE, ArmScores, CellScores, Comparison, SeedScores, read_cells

TEMPLATES = Path(__file__).parent.parent / "assets" / "report"
SAMPLES = 4  # prompts shown side by side
TEXT = {  # metric of generated text to its name and how to read it
    "distinct_1": ("distinct-1", "different tokens over all tokens; higher is more varied"),
    "distinct_2": ("distinct-2", "the same for pairs"),
    "distinct_3": ("distinct-3", "the same for triples"),
    "rep_4": ("rep-4", "share of repeated runs of four tokens within a text; lower is better"),
    "self_bleu": ("self-BLEU", "how much texts resemble each other, 0 to 100; lower is more varied"),
    "mauve": ("MAUVE", "how near the texts are to the human continuations, 0 to 1; higher is better"),
    "mean_length": ("length", "mean tokens a text, of at most 60"),
}


@dataclass(frozen=True)
class Section:
    """One cell as the templates see it."""

    cell: CellScores
    anchor: str
    answers: list[str]
    drawings: list[figures.Drawing]
    rows: list[dict[str, Any]]  # of the table of arms
    questions: list[dict[str, Any]]
    text: list[dict[str, Any]]
    memory: list[dict[str, Any]]
    seeds: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """Of the table of runs."""
        return list(SEED_COLUMNS)


def write(run_dir: Path, mauve_model: Path | None = None) -> list[CellScores]:
    """Write the report of a run or a comparison into its folder.

    Args:
        run_dir: Its folder.
        mauve_model: Local folder of a language model that embeds texts; default: MAUVE is left out.

    Raises:
        RunError: where there is nothing to report, or a file that is needed is damaged.
    """
    cells = read_cells(run_dir)
    if mauve_model is not None:
        mauve_score.add(cells, mauve_model)
    sections = [_section(cell, run_dir) for cell in cells]
    content = {"title": run_dir.resolve().name, "sections": sections, "map": _map(sections), "text_metrics": TEXT}
    for name in ("report.html", "report.md"):
        write_text(run_dir / name, _render(name, content))
    write_text(run_dir / "metrics.csv", _csv(cells))
    return cells


def _render(name: str, content: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    escape = select_autoescape(enabled_extensions=("html",))
    loader = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    loader.filters |= {"plain": plain, "markdown": markdown}
    return loader.get_template(name).render(**content)


# --------------------------------------------------------------------------------------------------------------------------------------
# Words for numbers


def number(value: float, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    if math.isnan(value):
        return "-"
    return f"{value:,.{digits}f}" if math.isfinite(value) else "∞"


def signed(value: float) -> str:
    """A difference of log perplexity."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return "-" if math.isnan(value) else f"{value:+.4f}"


def spread(values: list[float], digits: int = 3) -> str:
    """Mean, with the standard deviation where there are several."""
    if not values:
        return "-"
    more = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{more}"


def interval_words(comparison: Comparison) -> str:
    """An estimate with its interval, as text."""
    if comparison.interval is None:
        return signed(comparison.estimate)
    return f"{signed(comparison.estimate)} [{signed(comparison.interval.low)}, {signed(comparison.interval.high)}]"


def _percent(comparison: Comparison) -> str:
    """What a difference of log perplexity means for perplexity."""
    return f"{(math.exp(comparison.estimate) - 1) * 100:+.1f}%"


# --------------------------------------------------------------------------------------------------------------------------------------
# The answers, which come first


def answers(cell: CellScores) -> list[str]:
    """What the comparison says, a sentence each: which arm is best at this budget, what reaching the baseline takes, what controls leave of it."""
    if cell.arm(REFERENCE) is None:
        return [f"There is no arm '{REFERENCE}' to compare with; the table below stands alone."]
    said = [*_best(cell), _target_words(cell)]
    said += [f"{question} {_verdict(each)}" for question, each in cell.questions]
    return [*said, *_text_words(cell)]


def _best(cell: CellScores) -> list[str]:
    unit = "FLOPs" if cell.unit == "flops" else cell.unit
    budget = "the same epochs, at different cost" if unit == "epochs" else f"the same {unit}"
    found = [each for each in cell.against_baseline if math.isfinite(each.estimate)]
    if not found:
        failed = [str(each.seed) for arm in cell.arms if arm.name == REFERENCE for each in arm.failures]
        why = f"the baseline failed with seed {', '.join(failed)}" if failed else "no other arm has finished a seed that the baseline has finished"
        return [f"There is nothing to compare: {why}."]
    best = min(found, key=lambda each: each.estimate)
    size = f"{interval_words(best)} nats a token against the baseline ({_percent(best)})"
    if best.estimate >= 0:
        said = f"For {budget}, no arm has a lower test perplexity than the baseline; nearest is {best.arm}, {size}."
    else:
        said = f"For {budget}, {best.arm} has the lowest test perplexity: {size}"
        said += {
            "no interval": "; with fewer than two seeds there is no interval, and this may be chance.",
            "better": f"; p = {best.p_adjusted:.3f} after Holm's correction.",
        }.get(best.verdict, f", which may be chance (p = {best.p_adjusted:.3f} after Holm's correction).")
    for verdict in ("better", "worse"):
        arms = [each.arm for each in found if each.verdict == verdict and (each.arm != best.arm or verdict == "worse")]
        said += f" {verdict.capitalize()} than the baseline beyond chance: {', '.join(arms)}." if arms else ""
    return [said]


def _target_words(cell: CellScores) -> str:
    reached_by, missed_by = [], []
    for arm in cell.arms:
        if arm.name == REFERENCE:
            continue
        interval, reached, of = cell.to_target(arm.name)
        if reached < of:
            missed_by.append(f"{arm.name} ({reached} of {of})")
        else:
            between = "" if math.isnan(interval.low) else f" [{1 / interval.high:.2f}, {1 / interval.low:.2f}]"
            reached_by.append(f"{arm.name} {1 / interval.estimate:.2f}{between}")
    level = f"{math.exp(cell.target):.2f}" if not math.isnan(cell.target) else "-"
    _, own, seeds = cell.to_target(REFERENCE)
    found = "; ".join([*reached_by, *([f"not reached with every seed: {', '.join(missed_by)}"] if missed_by else [])])
    return (
        f"FLOPs to reach the baseline's mean validation perplexity ({level}, which the baseline itself reaches with {own} of {seeds} seeds), as a "
        f"share of the baseline's: {found or 'no other arm'}."
    )


def _verdict(each: Comparison) -> str:
    what = f"{each.arm} minus {each.reference}: {interval_words(each)} nats a token"
    words = {
        "better": f"Yes: {what}, p = {each.p_adjusted:.3f}.",
        "worse": f"No, the other way round: {what}, p = {each.p_adjusted:.3f}.",
        "no difference found": f"No difference found: {what}, p = {each.p_adjusted:.3f}.",
        "no interval": f"Not decided, fewer than two seeds: {what}.",
        "trained alike": f"Not tested: {each.arm} and {each.reference} trained alike, to the last digit.",
        "reference failed": f"{each.reference} failed with a seed that {each.arm} finished.",
        "failed": f"{each.arm} failed with a seed that {each.reference} finished.",
    }
    return words[each.verdict]


def _text_words(cell: CellScores) -> list[str]:
    baseline = cell.arm(REFERENCE)
    compared = [arm for arm in cell.arms if arm.name != REFERENCE and arm.finished]
    if baseline is None or not baseline.finished or not compared:
        return []
    rep = {arm.name: arm.nested("text", "sampled", "rep_4") for arm in [baseline, *compared]}
    varied = {arm.name: arm.nested("text", "sampled", "distinct_2") for arm in [baseline, *compared]}
    within = [statistics.variance(values) for arm in cell.arms if len(values := _seed_values(arm, "distinct_2")) > 1]
    noise = math.sqrt(statistics.fmean(within)) if within else math.nan
    others = [name for name in rep if name != REFERENCE]
    least, most = (choose(others, key=lambda name: varied[name]) for choose in (min, max))
    low, high = (choose(rep[name] for name in others) for choose in (min, max))
    return [
        f"Sampled text: distinct-2 is {number(varied[REFERENCE])} for the baseline, and {number(varied[least])} ({least}) to "
        f"{number(varied[most])} ({most}) for the others, where seeds of one arm spread by {number(noise)}; rep-4 is {number(rep[REFERENCE])}, "
        f"and {number(low)} to {number(high)} for the others."
    ]


def _seed_values(arm: ArmScores, metric: str) -> list[float]:
    found = [(each.result or {}).get("text", {}).get("sampled", {}).get(metric) for each in arm.finished]
    return [float(value) for value in found if isinstance(value, int | float)]


# --------------------------------------------------------------------------------------------------------------------------------------
# Tables


def _section(cell: CellScores, run_dir: Path) -> Section:
    anchor = cell.name or "comparison"
    drawings = figures.draw(cell, cell.run_dir / "figures")
    drawings = [figures.Drawing(each.name, each.title, each.reading, _unique(each, anchor)) for each in drawings]
    compared = {each.arm: each for each in cell.against_baseline}
    rows = [_row(cell, arm, compared.get(arm.name)) for arm in cell.arms]
    questions = [{"question": question, "verdict": each.verdict, "words": _verdict(each)} for question, each in cell.questions]
    text, memory = [_text_row(arm) for arm in cell.arms if arm.finished], [_memory_row(arm) for arm in cell.arms if arm.finished]
    seeds = [_seed_row(arm, each, run_dir) for arm in cell.arms for each in arm.seeds]
    return Section(cell, anchor, answers(cell), drawings, rows, questions, text, memory, seeds, _samples(cell), _notes(cell))


def _unique(drawing: figures.Drawing, anchor: str) -> str:
    return drawing.svg.replace(f"{drawing.name}-", f"{quote(anchor)}-{drawing.name}-")


def _row(cell: CellScores, arm: ArmScores, compared: Comparison | None) -> dict[str, Any]:
    interval, reached, of = cell.to_target(arm.name)
    baseline = cell.arm(REFERENCE)
    ratio = arm.mean("flops") / baseline.mean("flops") if baseline and arm.finished and baseline.finished else math.nan
    return {
        "arm": arm.name,
        "seeds": f"{len(arm.finished)}" + (f" (+{len(arm.failures)} failed)" if arm.failures else ""),
        "val": spread(arm.values("val_ppl")) if not arm.failures else "∞",
        "test": spread(arm.values("test_ppl")) if not arm.failures else "∞",
        "delta": "" if compared is None else interval_words(compared),
        "p": "" if compared is None or compared.interval is None else f"{compared.p_adjusted:.3f}",
        "improvement": "" if compared is None else number(compared.improvement, 2),
        "verdict": "" if compared is None else compared.verdict,
        "target": _share(interval.estimate, reached, of) if arm.name != REFERENCE else "",
        "repeats": number(arm.mean("mean_repeats"), 2),
        "updates": number(arm.mean("updates"), 0),
        "fresh": number(arm.mean("tokens_unique"), 0),
        "gflops": number(arm.mean("flops") / 1e9, 0),
        "ratio": number(ratio, 2),
        "seconds": number(arm.mean("train_seconds"), 1),
    }


def _share(speed_up: float, reached: int, of: int) -> str:
    return f"{1 / speed_up:.2f}" if reached == of and speed_up > 0 else f"reached by {reached} of {of}"


def _text_row(arm: ArmScores) -> dict[str, Any]:
    return {"arm": arm.name, **{how: {metric: number(arm.nested("text", how, metric)) for metric in TEXT} for how in ("greedy", "sampled")}}


def _memory_row(arm: ArmScores) -> dict[str, Any]:
    def fall(group: str) -> float:
        return arm.nested("memorised", group, "loss") - arm.nested("memorised", group, "base_loss")

    losses = [math.log(value) for value in arm.values("val_ppl")]
    validation = statistics.fmean(losses) if losses else math.nan
    return {
        "arm": arm.name,
        "train": number(arm.nested("memorised", "all", "loss")),
        "gap": number(validation - arm.nested("memorised", "all", "loss")),
        "most_passes": number(arm.nested("memorised", "most", "passes"), 1),
        "most": number(fall("most")),
        "least_passes": number(arm.nested("memorised", "least", "passes"), 1),
        "least": number(fall("least")),
        "difference": number(fall("most") - fall("least")),
    }


def _seed_row(arm: ArmScores, each: SeedScores, run_dir: Path) -> dict[str, Any]:
    result = each.result or {}
    link = "/".join(quote(part) for part in each.folder.relative_to(run_dir).parts) + "/"

    def value(key: str, digits: int) -> str:
        found = result.get(key)
        return number(float(found), digits) if isinstance(found, int | float) else "∞" if key.endswith("ppl") else "-"

    return {
        "arm": arm.name,
        "seed": each.seed,
        "link": link,
        "failed": each.failed,
        "cells": [value(key, digits) for key, digits in SEED_COLUMNS.values()],
    }


SEED_COLUMNS = {
    "validation perplexity": ("val_ppl", 3),
    "test perplexity": ("test_ppl", 3),
    "bits a byte": ("bits_per_byte", 4),
    "mean passes": ("mean_repeats", 2),
    "batches": ("batches", 0),
    "updates": ("updates", 0),
    "fresh tokens": ("tokens_unique", 0),
    "trained tokens": ("tokens_trained", 0),
    "FLOPs": ("flops", 0),
    "seconds": ("train_seconds", 1),
    "peak memory, MB": ("peak_memory_mb", 0),
    "skipped updates": ("skipped_updates", 0),
}


def _samples(cell: CellScores) -> list[dict[str, Any]]:
    """For the first prompts, what the base and each arm's first seed wrote."""
    columns: list[tuple[str, Any]] = []
    for arm in cell.arms:
        for each in arm.finished[:1]:
            try:
                content = json.loads((each.folder / "samples.json").read_text(encoding="utf-8"))
                if not columns:
                    columns.append(("before training", (content["prompts"], content["base"]["sampled"]["texts"])))
                columns.append((arm.name, (content["prompts"], content["trained"]["sampled"]["texts"])))
            except (OSError, ValueError, KeyError, TypeError):
                continue
    if not columns:
        return []
    prompts = columns[0][1][0][:SAMPLES]
    return [
        {"prompt": str(prompt), "texts": [(name, str(texts[place])) for name, (_, texts) in columns if place < len(texts)]}
        for place, prompt in enumerate(prompts)
    ]


def _notes(cell: CellScores) -> list[str]:
    notes = []
    seeds = max((len(arm.finished) for arm in cell.arms), default=0)
    method, coverage = cell.method
    if seeds < 2:
        notes.append("There are fewer than two seeds, so there are no intervals: differences may be chance.")
    elif coverage:
        others = ", ".join(f"{name} {share:.1%}" for name, share in coverage.items() if name != method)
        notes.append(
            f"95% intervals by the method '{method}', chosen by simulation with this study's own numbers of seeds and documents and its own "
            f"variances: it held the truth in {coverage[method]:.1%} of simulated studies ({others}). Each interval is for its difference alone; "
            "p-values and verdicts are corrected for the number of arms, or of controls."
        )
    if cell.skipped_lines:
        notes.append(f"{cell.skipped_lines} lines of records could not be read (cut off, damaged, or of another version) and were skipped.")
    failed = [f"{arm.name}, seed {each.seed}: {each.failed}" for arm in cell.arms for each in arm.failures]
    notes += [f"Failed, and scored as infinity: {'; '.join(failed)}."] if failed else []
    bare = [arm.name for arm in cell.arms if any(not each.documents for each in arm.finished)]
    notes += [f"Without scores by document, as an earlier version kept none, and so not compared: {', '.join(bare)}."] if bare else []
    return notes


def _map(sections: list[Section]) -> list[dict[str, Any]]:
    """A study of several cells at a glance: each arm's difference to the baseline in each."""
    if len(sections) < 2:
        return []
    arms = list(dict.fromkeys(each.arm for section in sections for each in section.cell.against_baseline))
    rows = []
    for section in sections:
        found = {each.arm: each for each in section.cell.against_baseline}
        baseline = section.cell.arm(REFERENCE)
        rows.append(
            {
                "cell": section.cell.name,
                "anchor": section.anchor,
                "baseline": spread(baseline.values("test_ppl")) if baseline else "-",
                "cells": [(signed(found[arm].estimate), found[arm].verdict) if arm in found else ("", "") for arm in arms],
                "arms": arms,
            }
        )
    return rows


def _csv(cells: Iterable[CellScores]) -> str:
    """One line for each pair of arm and seed, every figure of its result that is one number."""
    lines = [
        {"cell": cell.name, "arm": arm.name, "seed": each.seed, "failed": each.failed is not None, **_numbers(each.result or {})}
        for cell in cells
        for arm in cell.arms
        for each in arm.seeds
    ]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _numbers(result: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in result.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= _numbers(value, f"{name}.")
        elif isinstance(value, int | float) and name != "seed":
            found[name] = value
    return found
