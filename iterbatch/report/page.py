"""The report: ``report.html``, ``report.md``, ``metrics.csv``, ``table.tex`` and figures, from records alone.

What lives here: what is on the page, in which order. What does not: numbers
(:mod:`iterbatch.report.comparison`), the answers in words (:mod:`iterbatch.report.answers`), set-up
(:mod:`iterbatch.report.setup`), tables (:mod:`iterbatch.report.tables`) and drawing
(:mod:`iterbatch.report.figures`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iterbatch.errors import RunError
from iterbatch.language import _, in_use
from iterbatch.records import layout
from iterbatch.records.base_table import read_base_table
from iterbatch.records.write import refuse_links, write_text
from iterbatch.report import figures, mauve, summary, tables
from iterbatch.report.answers import Answer, answers, cautions, conclusion, glance, over_all, unfinished
from iterbatch.report.comparison import CellScores, open_pairs, read_cells
from iterbatch.report.setup import ArmSetUp, arms_setup, differences, setup_of
from iterbatch.report.wording import markdown, plain, spread
from iterbatch.strategy import REFERENCE

TEMPLATES = Path(__file__).parent.parent / "assets" / "report"
OUTCOMES = (
    "differences",
    "perplexity_flops",
    "perplexity_train_seconds",
    "perplexity_tokens_trained",
    "worth",
)
TUNING, SPLIT = "tuning", "compute"  # figures that have a place of their own


@dataclass(frozen=True)
class Section:
    """One cell as the templates see it."""

    cell: CellScores
    title: str  # empty where the report has one cell only
    anchor: str
    conclusion: str
    answers: list[Answer]
    cautions: list[str]
    setup: dict[str, str]
    arms: list[ArmSetUp]
    drawings: dict[str, figures.Drawing]
    folder: str  # of its figures, from the page
    rows: list[dict[str, str]]
    text: list[dict[str, str]]
    memory: list[dict[str, str]]
    runs: list[tables.Run]
    samples: list[dict[str, Any]]
    notes: list[str]

    def columns(self, name: str) -> dict[str, str]:
        """Those of a table, outcome, more, memory or text, that have something in them."""
        written = {metric: head for metric, (head, _) in tables.TEXT.items()}
        heads, rows = {
            "outcome": (tables.OUTCOME, self.rows),
            "more": (tables.MORE, self.rows),
            "memory": (tables.MEMORY, self.memory),
            "text": (written, self.text),
        }[name]
        return tables.shown(heads, rows)

    def figures(self, name: str) -> list[figures.Drawing]:
        """Those of a place: the first, the outcomes, tuning, the compute's split, or what strategies did."""
        places = {"first": (figures.FINAL,), "outcomes": OUTCOMES, "tuning": (TUNING,), "split": (SPLIT,)}
        placed = {each for names in places.values() for each in names}
        names = places.get(name) or [each for each in self.drawings if each not in placed]
        return [self.drawings[each] for each in names if each in self.drawings]


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
    named = {cell.name: cell for cell in cells}
    _write(run_dir, run_dir.resolve().name, named, banner=unfinished(left) if left else "")
    return cells


def write_several(run_dirs: Sequence[Path], folder: Path) -> list[CellScores]:
    """Write a report that sets several runs or comparisons side by side.

    Args:
        run_dirs: Their folders, which stay as they are.
        folder: For the report; made where it is not there.

    Raises:
        RunError: as :func:`write`, or where the folder holds something else.
    """
    if len(set(map(Path.resolve, run_dirs))) < len(run_dirs):
        raise RunError(_("one of the folders is named twice; give each run once"))
    if (
        folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
        and not (folder / layout.REPORT).is_file()
    ):
        raise RunError(
            _("{folder} exists and holds no report; give another folder by --out").format(folder=folder)
        )
    if (folder / layout.STUDY).exists() or (folder / layout.CONFIG).exists():
        raise RunError(_("{folder} is the folder of a run; give another one by --out").format(folder=folder))
    named: dict[str, CellScores] = {}
    for run, run_dir in zip(_labels(run_dirs), run_dirs, strict=True):
        refuse_links(run_dir, leaving=[layout.TRACKING])
        for cell in read_cells(run_dir):
            named[f"{run}/{cell.name}" if cell.name else run] = cell
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, " and ".join(run_dir.resolve().name for run_dir in run_dirs), named)
    return list(named.values())


def _labels(run_dirs: Sequence[Path]) -> list[str]:
    """A name for each, told apart where several folders have one."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]


def write_growing(run_dir: Path, cells: Mapping[str, CellScores], now: Any, reload: int) -> None:
    """Write the report of a study that is still being trained.

    Args:
        run_dir: Of the study.
        cells: Those that have a result already, by name.
        now: What is in training, as :class:`iterbatch.report.growing.Now`.
        reload: Seconds after which the page asks for itself anew; 0: not at all.
    """
    left = open_pairs(run_dir)
    _write(run_dir, run_dir.resolve().name, cells, unfinished(left) if left else "", now, reload)


def _write(
    folder: Path,
    title: str,
    cells: Mapping[str, CellScores],
    banner: str = "",
    now: Any = None,
    reload: int = 0,
) -> None:
    sections = [
        _section(f"c{number}", name, cell, folder) for number, (name, cell) in enumerate(cells.items(), 1)
    ]
    content = {
        "title": title,
        "unfinished": banner,
        "now": now,
        "reload": reload,
        "conclusion": over_all(cells) if len(cells) > 1 else "",
        "sections": sections,
        "map": _map(sections),
        "differences": differences(cells) if len(cells) > 1 else [],
        "text_metrics": tables.TEXT,
        "run_columns": [_(head) for head in tables.RUNS],
    }
    for name in (layout.REPORT, layout.REPORT_TEXT):
        write_text(folder / name, _render(name, content))
    write_text(folder / layout.METRICS, tables.metrics_csv(cells))
    write_text(folder / layout.TABLE, tables.tex_tables(cells))


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
    loader.globals |= {"_": _, "language": in_use()}
    loader.filters |= {"plain": plain, "markdown": markdown, "combine": lambda one, two: one | two}
    return loader.get_template(name).render(**content)


def _section(anchor: str, title: str, cell: CellScores, folder: Path) -> Section:
    drawn_in = cell.run_dir / layout.FIGURES
    if not cell.run_dir.resolve().is_relative_to(folder.resolve()):  # of a run that stays as it is
        drawn_in = folder / layout.FIGURES / anchor
    drawn = figures.draw(cell, drawn_in)
    return Section(
        cell=cell,
        title=title,
        anchor=anchor,
        conclusion=conclusion(cell),
        answers=answers(cell),
        cautions=cautions(cell),
        setup=setup_of(cell),
        arms=arms_setup(cell),
        drawings={each.name: replace(each, svg=_unique(each, anchor)) for each in drawn},
        folder=tables.link(drawn_in, folder),
        rows=tables.arm_rows(cell),
        text=tables.text_rows(cell),
        memory=tables.memory_rows(cell),
        runs=tables.runs(cell, folder),
        samples=tables.samples(cell),
        notes=_notes(cell),
    )


def _unique(drawing: figures.Drawing, anchor: str) -> str:
    return drawing.svg.replace(f"{drawing.name}-", f"{anchor}-{drawing.name}-")


def _notes(cell: CellScores) -> list[str]:
    """How the numbers were made, where that depends on the records."""
    seeds = max((len(arm.finished) for arm in cell.arms), default=0)
    method, coverage = cell.method
    notes = []
    if seeds < 2:
        notes.append(
            _("There are fewer than two seeds, so there are no intervals: differences may be chance.")
        )
    elif coverage:
        others = ", ".join(f"{name} {share:.1%}" for name, share in coverage.items() if name != method)
        notes.append(
            _(
                "95% intervals by the method '{method}', chosen by simulation with this study's own "
                "numbers of seeds and documents and its own variances: it held the truth in "
                "{coverage:.1%} of simulated studies ({others}). Each interval is for its difference "
                "alone; p-values and verdicts are corrected for the number of arms, or of controls, by "
                "Holm's method."
            ).format(method=method, coverage=coverage[method], others=others)
        )
    if (ladder := cell.exchange()) is not None:
        shares = ", ".join(f"{share:.3g}" for share in ladder[0])
        notes.append(
            _("Compute worth is read off baselines that decayed at {shares} of the budget.").format(
                shares=shares
            )
        )
        if min(ladder[1]) < ladder[1][-1]:
            notes.append(
                _(
                    "The largest of these budgets does not end lowest: more compute does not make the "
                    "baseline better here. An arm that ends lower than its best has no compute worth."
                )
            )
    notes += _base_table(cell)
    if cell.skipped_lines:
        notes.append(
            _(
                "{skipped_lines} lines of records could not be read (cut off, damaged, or of another "
                "version) and were skipped."
            ).format(skipped_lines=cell.skipped_lines)
        )
    bare = [arm.name for arm in cell.arms if any(not each.documents for each in arm.finished)]
    if bare:
        notes.append(
            _(
                "Without scores by document, as an earlier version kept none, and so not compared: {names}."
            ).format(names=", ".join(bare))
        )
    return notes


def _base_table(cell: CellScores) -> list[str]:
    """What the base's losses cost, where an arm asked for them."""
    table, baseline = read_base_table(cell.run_dir), cell.arm(REFERENCE)
    if table is None:
        return []
    whole = baseline.mean(lambda result: result.flops) if baseline is not None else math.nan
    share = _(", {flops:.0%} of a baseline").format(flops=table.flops / whole) if math.isfinite(whole) else ""
    cost = _("{flops:,.0f} GFLOPs{share}, in no arm's budget").format(flops=table.flops / 1e9, share=share)
    return [
        _(
            "The base's losses on all training blocks were computed once for all arms and seeds: {cost}."
        ).format(cost=cost)
    ]


def _map(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Several cells at a glance: each arm's difference to the baseline in each."""
    if len(sections) < 2:
        return []
    arms = list(dict.fromkeys(each.arm for section in sections for each in section.cell.against_baseline))
    return [_map_row(section, arms) for section in sections]


def _map_row(section: Section, arms: Sequence[str]) -> dict[str, Any]:
    found = {each.arm: each for each in section.cell.against_baseline}
    baseline = section.cell.arm(REFERENCE)
    return {
        "cell": section.title,
        "anchor": section.anchor,
        "baseline": spread(baseline.values(lambda result: result.test_ppl)) if baseline else "-",
        "cells": {
            arm: (glance(found[arm].estimate, found[arm].verdict), found[arm].verdict)
            if arm in found
            else ("", "")
            for arm in arms
        },
    }
