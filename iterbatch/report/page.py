"""The report: ``report.html``, ``report.md``, ``metrics.csv`` and figures, from records alone.

What lives here: tables and pages. What does not: numbers (:mod:`iterbatch.report.comparison`), the
answers in words (:mod:`iterbatch.report.answers`) and drawing (:mod:`iterbatch.report.figures`).
"""

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iterbatch.errors import RunError
from iterbatch.records import layout
from iterbatch.records.base_table import read_base_table
from iterbatch.records.read import Samples, read_samples
from iterbatch.records.result import DECODINGS, ArmResult
from iterbatch.records.write import refuse_links, write_text
from iterbatch.report import figures, mauve, summary
from iterbatch.report.answers import answers, unfinished, verdict_words
from iterbatch.report.comparison import CellScores, Comparison, open_pairs, read_cells
from iterbatch.report.scores import ArmScores, SeedScores
from iterbatch.report.stats import Interval
from iterbatch.report.wording import (
    cell_text,
    interval_of,
    interval_words,
    markdown,
    mean,
    number,
    plain,
    share_words,
    signed,
    spread,
)
from iterbatch.strategy import REFERENCE

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
        return list(COLUMNS)


def write(run_dir: Path, mauve_model: Path | None = None) -> list[CellScores]:
    """Write the report of a run or a comparison into its folder.

    Args:
        run_dir: Its folder.
        mauve_model: Local folder of a language model that embeds texts; default: MAUVE is left out.

    Raises:
        RunError: where there is nothing to report, or a file that is needed is damaged.
    """
    refuse_links(run_dir, leaving=[layout.TRACKING])
    cells = read_cells(run_dir)
    left = open_pairs(run_dir)
    if mauve_model is not None:
        cells = mauve.scored(cells, mauve_model)
    summary.write_cells(cells)
    sections = [_section(cell, run_dir) for cell in cells]
    content = {
        "title": run_dir.resolve().name,
        "unfinished": unfinished(left) if left else "",
        "sections": sections,
        "map": _map(sections),
        "text_metrics": TEXT,
    }
    for name in (layout.REPORT, layout.REPORT_TEXT):
        write_text(run_dir / name, _render(name, content))
    write_text(run_dir / layout.METRICS, _csv(cells))
    return cells


def _render(name: str, content: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    escape = select_autoescape(enabled_extensions=("html",))
    loader = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loader.filters |= {"plain": plain, "markdown": markdown}
    return loader.get_template(name).render(**content)


# ------------------------------------------------------------------------------------------------------------
# Tables


def _section(cell: CellScores, run_dir: Path) -> Section:
    anchor = cell.name or "comparison"
    drawings = figures.draw(cell, cell.run_dir / layout.FIGURES)
    drawings = [
        figures.Drawing(each.name, each.title, each.reading, _unique(each, anchor)) for each in drawings
    ]
    compared = {each.arm: each for each in cell.against_baseline}
    rows = [_row(cell, arm, compared.get(arm.name)) for arm in cell.arms]
    questions = [
        {"question": question, "verdict": each.verdict, "words": verdict_words(each)}
        for question, each in cell.questions
    ]
    text, memory = (
        [_text_row(arm) for arm in cell.arms if arm.finished],
        [_memory_row(arm) for arm in cell.arms if arm.finished],
    )
    seeds = [_seed_row(arm, each, run_dir) for arm in cell.arms for each in arm.seeds]
    return Section(
        cell,
        anchor,
        answers(cell),
        drawings,
        rows,
        questions,
        text,
        memory,
        seeds,
        _samples(cell),
        _notes(cell),
    )


def _unique(drawing: figures.Drawing, anchor: str) -> str:
    return drawing.svg.replace(f"{drawing.name}-", f"{quote(anchor)}-{drawing.name}-")


def _row(cell: CellScores, arm: ArmScores, compared: Comparison | None) -> dict[str, Any]:
    interval, reached, of = cell.to_target(arm.name)
    worth = cell.worth(arm.name)
    baseline = cell.arm(REFERENCE)
    both = baseline is not None and arm.finished and baseline.finished
    spent = _flops(baseline) if both and baseline is not None else 0.0
    ratio = _flops(arm) / spent if spent else math.nan
    return {
        "arm": arm.name,
        "seeds": f"{len(arm.finished)}" + (f" (+{len(arm.failures)} failed)" if arm.failures else ""),
        "val": spread(arm.values(lambda result: result.val_ppl)) if not arm.failures else "∞",
        "test": spread(arm.values(lambda result: result.test_ppl)) if not arm.failures else "∞",
        "delta": "" if compared is None else interval_words(compared),
        "p": "" if compared is None or compared.interval is None else number(compared.p_adjusted, 3),
        "improvement": "" if compared is None else number(compared.improvement, 2),
        "verdict": "" if compared is None else compared.verdict,
        "target": _share(interval, reached, of) if arm.name != REFERENCE else "",
        "worth": "" if arm.name == REFERENCE or worth is None else interval_of(worth),
        "luck": "" if compared is None else number(compared.luck, 4),
        "repeats": number(arm.mean(lambda result: result.mean_repeats), 2),
        "updates": number(arm.mean(lambda result: result.updates), 0),
        "fresh": number(arm.mean(lambda result: result.tokens_unique), 0),
        "gflops": number(_flops(arm) / 1e9, 0),
        "ratio": number(ratio, 2),
        "seconds": number(arm.mean(lambda result: result.train_seconds), 1),
    }


def _flops(arm: ArmScores) -> float:
    return arm.mean(lambda result: result.flops)


def _share(speed_up: Interval, reached: int, of: int) -> str:
    return (
        share_words(speed_up) if reached == of and speed_up.estimate > 0 else f"reached by {reached} of {of}"
    )


def _text_row(arm: ArmScores) -> dict[str, Any]:
    metrics = {how: {metric: number(mean(arm.text(how, metric))) for metric in TEXT} for how in DECODINGS}
    return {"arm": arm.name, **metrics}


def _memory_row(arm: ArmScores) -> dict[str, Any]:
    def group(name: str, value: str) -> float:
        return arm.mean(lambda result: getattr((result.memorised or {}).get(name), value, None))

    def fall(name: str) -> float:
        return group(name, "loss") - group(name, "base_loss")

    losses = [math.log(value) for value in arm.values(lambda result: result.val_ppl)]
    return {
        "arm": arm.name,
        "train": number(group("all", "loss")),
        "gap": number(mean(losses) - group("all", "loss")),
        "most_passes": number(group("most", "passes"), 1),
        "most": number(fall("most")),
        "least_passes": number(group("least", "passes"), 1),
        "least": number(fall("least")),
        "difference": number(fall("most") - fall("least")),
    }


def _seed_row(arm: ArmScores, each: SeedScores, run_dir: Path) -> dict[str, Any]:
    link = "/".join(quote(part) for part in each.folder.relative_to(run_dir).parts) + "/"
    cells = [
        "-" if each.result is None else number(value(each.result), digits)
        for value, digits in COLUMNS.values()
    ]
    return {"arm": arm.name, "seed": each.seed, "link": link, "failed": each.failed, "cells": cells}


COLUMNS = {  # of the table of runs
    "validation perplexity": (lambda result: result.val_ppl, 3),
    "test perplexity": (lambda result: result.test_ppl, 3),
    "bits a byte": (lambda result: result.bits_per_byte, 4),
    "mean passes": (lambda result: result.mean_repeats, 2),
    "batches": (lambda result: result.batches, 0),
    "updates": (lambda result: result.updates, 0),
    "fresh tokens": (lambda result: result.tokens_unique, 0),
    "trained tokens": (lambda result: result.tokens_trained, 0),
    "FLOPs": (lambda result: result.flops, 0),
    "seconds": (lambda result: result.train_seconds, 1),
    "peak memory, MB": (lambda result: result.peak_memory_mb, 0),
    "skipped updates": (lambda result: result.skipped_updates, 0),
}


def _samples(cell: CellScores) -> list[dict[str, Any]]:
    """For the first prompts, what the base and each arm's first seed wrote."""
    found = {arm.name: _samples_of(arm.finished[0]) for arm in cell.arms if arm.finished}
    there = {name: samples for name, samples in found.items() if samples is not None}
    if not there:
        return []
    first = next(iter(there.values()))
    columns = {"before training": first.base, **{name: samples.trained for name, samples in there.items()}}
    return [
        {
            "prompt": prompt,
            "texts": [
                (name, texts["sampled"][at]) for name, texts in columns.items() if at < len(texts["sampled"])
            ],
        }
        for at, prompt in enumerate(first.prompts[:SAMPLES])
    ]


def _samples_of(scores: SeedScores) -> Samples | None:
    try:
        return read_samples(scores.folder)
    except RunError:
        return None


def _notes(cell: CellScores) -> list[str]:
    notes = []
    seeds = max((len(arm.finished) for arm in cell.arms), default=0)
    method, coverage = cell.method
    if seeds < 2:
        notes.append("There are fewer than two seeds, so there are no intervals: differences may be chance.")
    elif coverage:
        others = ", ".join(f"{name} {share:.1%}" for name, share in coverage.items() if name != method)
        notes.append(
            f"95% intervals by the method '{method}', chosen by simulation with this study's own numbers of "
            "seeds and documents and its own "
            f"variances: it held the truth in {coverage[method]:.1%} of simulated studies ({others}). Each "
            "interval is for its difference alone; "
            "p-values and verdicts are corrected for the number of arms, or of controls."
        )
    notes += [*_scored(cell), *_base_table(cell)]
    if cell.skipped_lines:
        notes.append(
            f"{cell.skipped_lines} lines of records could not be read (cut off, damaged, or of another "
            "version) and were skipped."
        )
    failed = [f"{arm.name}, seed {each.seed}: {each.failed}" for arm in cell.arms for each in arm.failures]
    notes += [f"Failed, and scored as infinity: {'; '.join(failed)}."] if failed else []
    bare = [arm.name for arm in cell.arms if any(not each.documents for each in arm.finished)]
    notes += (
        [
            "Without scores by document, as an earlier version kept none, and so not compared: "
            f"{', '.join(bare)}."
        ]
        if bare
        else []
    )
    return notes


def _scored(cell: CellScores) -> list[str]:
    """How much text the numbers rest on."""
    found = summary.scored_words(cell)
    return [f"Scored: {found}.", *summary.cautions(cell)] if found else []


def _base_table(cell: CellScores) -> list[str]:
    """What the base's losses cost, where an arm asked for them."""
    table, baseline = read_base_table(cell.run_dir), cell.arm(REFERENCE)
    if table is None:
        return []
    whole = _flops(baseline) if baseline is not None and baseline.finished else math.nan
    share = f", {table.flops / whole:.0%} of a baseline" if math.isfinite(whole) else ""
    cost = f"{table.flops / 1e9:,.0f} GFLOPs{share}, in no arm's budget"
    return [f"The base's losses on all training blocks were computed once for all arms and seeds: {cost}."]


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
                "baseline": spread(baseline.values(lambda result: result.test_ppl)) if baseline else "-",
                "cells": [
                    (signed(found[arm].estimate), found[arm].verdict) if arm in found else ("", "")
                    for arm in arms
                ],
                "arms": arms,
            }
        )
    return rows


def _csv(cells: Iterable[CellScores]) -> str:
    """One line for each arm and seed, every figure of its result that is one number."""
    lines = [
        {
            "cell": cell.name,
            "arm": arm.name,
            "seed": each.seed,
            "failed": each.failed is not None,
            **_numbers(each.result),
        }
        for cell in cells
        for arm in cell.arms
        for each in arm.seeds
    ]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writerow({column: cell_text(column) for column in columns})
    writer.writerows({column: cell_text(value) for column, value in line.items()} for line in lines)
    return buffer.getvalue()


def _numbers(result: ArmResult | None) -> dict[str, float]:
    return {} if result is None else dict(_flat(dataclasses.asdict(result)))


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and key != "seed" and math.isfinite(value):
            yield f"{prefix}{key}", value
