"""A run's summary, from its records alone, so that it can be redone at any time and while a run is going."""

import html
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iterbatch.runtime import run_folder as folder
from iterbatch.report import plots
from iterbatch.errors import RunError
from iterbatch.records.record import write_json, write_text

COLUMNS = (
    "strategy",
    "val. perplexity",
    "test perplexity",
    "batches",
    "updates",
    "mean repeats",
    "GFLOPs",
    "x baseline",
    "train seconds",
)


SHOWN = 5  # samples on a page
TEXT_METRICS = ("distinct_1", "distinct_2", "rep_4", "mean_length")


@dataclass(frozen=True)
class StrategySummary:
    """One strategy over its seeds."""

    strategy: str
    rows: list[dict[str, Any]]
    compute_ratio: float | None  # mean over seeds of FLOPs over the baseline's FLOPs; None without a baseline

    def mean(self, key: str) -> float:
        """Mean over seeds."""
        return statistics.fmean(row[key] for row in self.rows)

    def cell(self, key: str, digits: int) -> str:
        """Mean over seeds, with the standard deviation where there are several."""
        values = [row[key] for row in self.rows if row[key] is not None]
        if len(values) < len(self.rows):
            return "not finite"
        spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):,.{digits}f}{spread}"

    def cells(self) -> list[str]:
        """The row of the table at the end of a run."""
        return [
            self.strategy,
            self.cell("val_ppl", 3),
            self.cell("test_ppl", 3),
            f"{self.mean('batches'):,.0f}",
            f"{self.mean('updates'):,.0f}",
            f"{self.mean('mean_repeats'):.2f}",
            f"{self.mean('flops') / 1e9:,.0f}",
            f"{self.compute_ratio:.2f}" if self.compute_ratio is not None else "-",
            f"{self.mean('train_seconds'):,.1f}",
        ]


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """The result of every finished arm and seed, in the order of the configuration.

    Raises:
        RunError: where a result cannot be read.
    """
    files = sorted(run_dir.glob("*/seed*/result.json"))
    rows = [read_result(file.parent) for file in files if file.parent.name.removeprefix("seed").isdecimal()]
    order = _strategy_order(run_dir)
    return sorted(rows, key=lambda row: (order.get(row["strategy"], len(order)), row["strategy"], row["seed"]))


def read_result(arm: Path) -> dict[str, Any]:
    """The result in the folder of one arm and seed; the folder's names count, not what the result says.

    Raises:
        RunError: where it cannot be read.
    """
    file = arm / "result.json"
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        _check_row(row)
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise RunError(f"{file} is damaged ({problem!r}); delete its folder and train that arm again with --resume") from problem
    return row | {"strategy": arm.parent.name, "seed": int(arm.name.removeprefix("seed"))}


def _check_row(row: Any) -> None:
    """Whether a result has what a summary needs.

    Raises:
        ValueError: where it has not.
        TypeError: where it is not even a table.
        KeyError: where an entry is missing.
    """
    for name in ("batches", "updates", "mean_repeats", "flops", "train_seconds", "skipped_updates"):
        if not _is_number(row[name]):
            raise ValueError(f"{name} is {row[name]!r}")
    for name in ("val_ppl", "test_ppl", "base_val_ppl"):
        if row[name] is not None and not _is_number(row[name]):
            raise ValueError(f"{name} is {row[name]!r}")
    for name in ("text", "base_text"):
        for decoding in ("greedy", "sampled"):
            if not all(_is_number(row[name][decoding][metric]) for metric in TEXT_METRICS):
                raise ValueError(f"{name} has a metric that is no number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _strategy_order(run_dir: Path) -> dict[str, int]:
    names = folder.read_config(run_dir).get("strategies") if (run_dir / folder.CONFIG).exists() else []
    return {str(name): place for place, name in enumerate(names if isinstance(names, list) else [])}


def summarise(rows: list[dict[str, Any]]) -> list[StrategySummary]:
    """Group results by strategy; compute is compared with the baseline of the same seed."""
    baseline = {row["seed"]: row["flops"] for row in rows if row["strategy"] == "baseline"}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["strategy"], []).append(row)
    summaries = []
    for strategy, members in groups.items():
        ratios = [row["flops"] / baseline[row["seed"]] for row in members if row["seed"] in baseline]
        summaries.append(StrategySummary(strategy, members, statistics.fmean(ratios) if len(ratios) == len(members) else None))
    return summaries


def hint(summaries: list[StrategySummary]) -> str | None:
    """What the reader must keep in mind where the arms did not cost the same."""
    ratios = [summary.compute_ratio for summary in summaries if summary.compute_ratio is not None]
    if not ratios or max(ratios) < 1.02:
        return None
    return (
        "The arms spent different amounts of compute, so a lower perplexity here is no proof that repeating pays. "
        "`--match flops` gives every arm what the baseline costs."
    )


def write(run_dir: Path) -> list[StrategySummary]:
    """Write ``summary.json``, ``summary.md`` and the figures from what the run has left so far."""
    rows = read_results(run_dir)
    write_json(run_dir / "summary.json", rows)
    summaries = summarise(rows)
    write_text(run_dir / "summary.md", _page(run_dir, summaries))
    if rows:
        plots.write(run_dir, [(row["strategy"], row["seed"]) for row in rows])
    return summaries


def _page(run_dir: Path, summaries: list[StrategySummary]) -> str:
    seeds = max((len(summary.rows) for summary in summaries), default=0)
    lines = [f"# {markdown(run_dir.name)}", ""]
    if not summaries:
        return "\n".join([*lines, "No arm is finished yet.", ""])
    base = summaries[0].rows[0]["base_val_ppl"]
    before = "not finite" if base is None else f"{base:,.3f}"
    lines += [f"Validation perplexity before training: {before}. Perplexity is exp(total nats / total tokens).", ""]
    lines += [f"Seeds: {seeds}. Where there are several, mean ± standard deviation over seeds.", ""] if seeds > 1 else []
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join([markdown(summary.strategy), *summary.cells()[1:]]) + " |" for summary in summaries]
    lines += ["", *_stopped(summaries)]
    if (note := hint(summaries)) is not None:
        lines += [note, ""]
    lines += _reuse_section(summaries)
    lines += ["## Text", "", *_text_table(summaries), ""]
    lines += ["## Samples", ""]
    arms = [(summary.strategy, row["seed"]) for summary in summaries for row in summary.rows]
    lines += [f"- [{markdown(strategy)}, seed {seed}]({quote(strategy)}/seed{seed}/samples.md)" for strategy, seed in arms]
    lines += ["", "![Validation perplexity against compute](ppl_vs_flops.png)", "", "![Repeats](repeats.png)", ""]
    return "\n".join(lines)


def _stopped(summaries: list[StrategySummary]) -> list[str]:
    lines = []
    for row in [row for summary in summaries for row in summary.rows]:
        arm = f"{markdown(row['strategy'])}, seed {row['seed']}"
        lines += [f"**{arm}, stopped early**: {markdown(str(row['stopped']))}."] if row.get("stopped") else []
        lines += [f"**{arm}**: {'; '.join(faults)}."] if (faults := _faults(row)) else []
    return [line for text in lines for line in (text, "")]


def _faults(row: dict[str, Any]) -> list[str]:
    """What went wrong with the numbers of an arm."""
    words = {
        "nonfinite_losses": "passes with a loss that was not finite, their updates skipped",
        "nonfinite_gradients": "passes with a gradient that was not finite, their updates skipped",
        "scaler_skips": "updates skipped by the float16 scaler",
        "rollbacks": f"returns to a checkpoint with half the learning rate ({row.get('flops_lost', 0) / 1e9:,.1f} GFLOPs undone, and charged)",
    }
    return [f"{row[name]} {meaning}" for name, meaning in words.items() if row.get(name)]


def _reuse_section(summaries: list[StrategySummary]) -> list[str]:
    if not any(row.get("flops_saved") for summary in summaries for row in summary.rows):
        return []
    columns = "| strategy | GFLOPs saved | seconds saved | seconds charged for what another arm computed |"
    lines = ["## Frozen prefix reused", "", columns, "|" + " --- |" * 4]
    for summary in summaries:
        saved = [f"{summary.mean(key) / scale:,.1f}" for key, scale in (("flops_saved", 1e9), ("seconds_saved", 1), ("seconds_charged", 1))]
        lines.append(f"| {markdown(summary.strategy)} | {' | '.join(saved)} |")
    size = summaries[-1].rows[-1]["store_gb"]
    kept = [f"Activations on disk: {size:.3f} GB.", ""] if size else []
    note = "Means over seeds. Every arm is charged as if it ran alone; what is saved is what it neither computed nor paid for."
    return [*lines, "", note, "", *kept]


def _text_table(summaries: list[StrategySummary]) -> list[str]:
    lines = ["| strategy | decoding | distinct-1 | distinct-2 | rep-4 | mean length, tokens |", "| --- | --- | --- | --- | --- | --- |"]
    groups = [("before training", [summaries[0].rows[0]["base_text"]])]
    groups += [(summary.strategy, [row["text"] for row in summary.rows]) for summary in summaries]
    for label, texts in groups:
        for decoding in ("greedy", "sampled"):
            values = [statistics.fmean(text[decoding][name] for text in texts) for name in TEXT_METRICS]
            lines.append(f"| {markdown(label)} | {decoding} | " + " | ".join(f"{value:.3f}" for value in values[:3]) + f" | {values[3]:.1f} |")
    return [*lines, "", "Five prompts an arm, unless --prompts says more: too few for more than a glance."]


def samples_page(title: str, content: dict[str, Any]) -> str:
    """The continuations of the fixed prompts, the base's beside the trained model's, as Markdown in which no text of theirs is live."""
    how = "Each text is the prompt's continuation. Greedy takes the likeliest token, sampled draws with a fixed seed."
    lines = [f"# Samples: {markdown(title)}", "", how, ""]
    for number, prompt in enumerate(content["prompts"][:SHOWN]):
        lines += [f"## Prompt {number + 1}", "", *_code(prompt), ""]
        for decoding in ("greedy", "sampled"):
            for who in ("base", "trained"):
                lines += [f"**{who}, {decoding}**", "", *_code(content[who][decoding]["texts"][number]), ""]
    return "\n".join(lines)


def _code(text: str) -> list[str]:
    """An indented code block: Markdown and HTML in it stay text."""
    return [f"    {line}" for line in plain(text).splitlines() or [""]]


def markdown(text: str) -> str:
    """A name as Markdown that shows it and does nothing else: no HTML, no links, no table cells."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", html.escape(plain(text).replace("\n", " ")))


def plain(text: str) -> str:
    """Text without control characters (but for line breaks), so that it is inert in a terminal too."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", " ", text)
