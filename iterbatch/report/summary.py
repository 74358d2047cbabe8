"""A run's summary: ``summary.json``, ``summary.md``, two pictures, and each arm's ``samples.md``.

A view of the comparison that is made after every arm, so that it can be read while a run is going.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from iterbatch.errors import RunError
from iterbatch.language import N_, _
from iterbatch.records import layout
from iterbatch.records.read import read_results, read_samples
from iterbatch.records.result import DECODINGS, TEXT_METRICS, ArmResult, TextMetrics
from iterbatch.records.write import write_json, write_text
from iterbatch.report import figures
from iterbatch.report.answers import cautions
from iterbatch.report.comparison import CellScores, cells_of
from iterbatch.report.scores import ArmScores
from iterbatch.report.wording import code, markdown, mean, number, spread

COLUMNS = (
    N_("strategy"),
    N_("val. perplexity"),
    N_("test perplexity"),
    N_("batches"),
    N_("updates"),
    N_("passes a batch"),
    N_("GFLOPs"),
    N_("x baseline"),
    N_("train seconds"),
)
NARROW = (
    N_("strategy"),
    N_("val. perplexity"),
    N_("test perplexity"),
    N_("passes a batch"),
    N_("x baseline"),
    N_("train seconds"),
)
SHOWN = 5  # samples on a page
PICTURES = {"perplexity_flops": "ppl_vs_flops.png", "repeats": "repeats.png"}  # a figure to its file


def write(run_dir: Path) -> None:
    """Write the summary of every cell from what the run has left so far.

    Raises:
        RunError: where a result is damaged.
    """
    write_cells([cell for cell in cells_of(run_dir) if cell.reportable])


def write_cells(cells: Iterable[CellScores]) -> None:
    """Write the summary of each cell, which has results."""
    for cell in cells:
        _write_cell(cell)


def _write_cell(cell: CellScores) -> None:
    results = read_results(cell.run_dir)
    write_json(cell.run_dir / layout.SUMMARY, [asdict(each) for each in results])
    write_text(cell.run_dir / layout.SUMMARY_PAGE, _page(cell, results))
    figures.draw_pictures(cell, {name: cell.run_dir / file for name, file in PICTURES.items()})
    for arm in cell.arms:
        for each in arm.seeds:
            if each.result is not None:
                _write_samples(each.folder, _("{arm}, seed {seed}").format(arm=arm.name, seed=each.seed))


def rows(cell: CellScores) -> list[list[str]]:
    """The table at the end of a run: a row an arm, as ``COLUMNS`` names its entries.

    Mean over seeds, with the standard deviation of perplexities where there are several.
    """
    return [_row(arm, cell.compute_ratio(arm.name)) for arm in cell.arms if _results(arm)]


def _results(arm: ArmScores) -> list[ArmResult]:
    return [each.result for each in arm.seeds if each.result is not None]


def _row(arm: ArmScores, ratio: float) -> list[str]:
    results = _results(arm)
    return [
        arm.name,
        _perplexity([each.val_ppl for each in results]),
        _perplexity([each.test_ppl for each in results]),
        f"{statistics.fmean(each.batches for each in results):,.0f}",
        f"{statistics.fmean(each.updates for each in results):,.0f}",
        f"{statistics.fmean(each.mean_repeats for each in results):.2f}",
        f"{statistics.fmean(each.flops for each in results) / 1e9:,.0f}",
        number(ratio, 2),
        f"{statistics.fmean(each.train_seconds for each in results):,.1f}",
    ]


def _perplexity(values: Sequence[float]) -> str:
    return spread(values) if all(map(math.isfinite, values)) else _("not finite")


SPLITS = {"validation": N_("validation"), "test": N_("test"), "train": N_("train")}


def scored_words(cell: CellScores) -> str:
    """How much text the table rests on; empty where it is not known."""
    return _("; ").join(
        _("of {split} {text}").format(split=_(SPLITS.get(split, split)), text=text)
        for split, text in cell.scored.items()
    )


# ------------------------------------------------------------------------------------------------------------
# Pages


def _page(cell: CellScores, results: Sequence[ArmResult]) -> str:
    seeds = max(len(_results(arm)) for arm in cell.arms)
    base = results[0].base_val_ppl
    before = f"{base:,.3f}" if math.isfinite(base) else _("not finite")
    several = _("Seeds: {seeds}. Where there are several, mean ± standard deviation over seeds.").format(
        seeds=seeds
    )
    lines = [f"# {markdown(cell.run_dir.name)}", ""]
    lines += [
        _(
            "Validation perplexity before training: {before}. Perplexity is exp(total nats / total tokens)."
        ).format(before=before),
        "",
    ]
    lines += [several, ""] if seeds > 1 else []
    lines += [_("Scored: {scored}.").format(scored=scored), ""] if (scored := scored_words(cell)) else []
    lines += ["| " + " | ".join(map(_, COLUMNS)) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join([markdown(name), *cells]) + " |" for name, *cells in rows(cell)]
    lines += ["", *_troubles(results)]
    for caution in cautions(cell):
        lines += [markdown(caution), ""]
    lines += [
        *_reuse_section(cell, results),
        "## Text",
        "",
        *_text_table(cell, results),
        "",
        "## Samples",
        "",
    ]
    for each in results:
        link = f"{quote(each.strategy)}/seed{each.seed}/{layout.SAMPLES_PAGE}"
        name = _("{arm}, seed {seed}").format(arm=markdown(each.strategy), seed=each.seed)
        lines.append(f"- [{name}]({link})")
    compute, passes = PICTURES.values()
    lines += [
        "",
        _("![Validation perplexity against compute]({compute})").format(compute=compute),
        "",
        _("![Passes over training]({passes})").format(passes=passes),
        "",
    ]
    return "\n".join(lines)


def _troubles(results: Sequence[ArmResult]) -> list[str]:
    lines = []
    for each in results:
        arm = _("{arm}, seed {seed}").format(arm=markdown(each.strategy), seed=each.seed)
        lines += (
            [_("**{arm}, stopped early**: {stopped}.").format(arm=arm, stopped=markdown(each.stopped)), ""]
            if each.stopped
            else []
        )
        lines += [f"**{arm}**: {'; '.join(faults)}.", ""] if (faults := _faults(each)) else []
    return lines


def _faults(result: ArmResult) -> list[str]:
    """What went wrong with the numbers of an arm."""
    undone = _("({flops_lost:,.1f} GFLOPs undone, and charged)").format(flops_lost=result.flops_lost / 1e9)
    counted = [
        (result.nonfinite_losses, _("passes with a loss that was not finite, their updates skipped")),
        (result.nonfinite_gradients, _("passes with a gradient that was not finite, their updates skipped")),
        (result.scaler_skips, _("updates skipped by the float16 scaler")),
        (
            result.rollbacks,
            _("returns to a checkpoint with half the learning rate {undone}").format(undone=undone),
        ),
    ]
    return [f"{count} {meaning}" for count, meaning in counted if count]


def _reuse_section(cell: CellScores, results: Sequence[ArmResult]) -> list[str]:
    if not any(each.flops_saved for each in results):
        return []
    columns = _("| strategy | GFLOPs saved | seconds saved | seconds charged for what another arm computed |")
    lines = [_("## Frozen prefix reused"), "", columns, "|" + " --- |" * 4]
    for arm in cell.arms:
        own = _results(arm)
        saved = mean([each.flops_saved / 1e9 for each in own]), mean([each.seconds_saved for each in own])
        cells = [f"{value:,.1f}" for value in (*saved, mean([each.seconds_charged for each in own]))]
        lines.append(f"| {markdown(arm.name)} | {' | '.join(cells)} |")
    note = _(
        "Means over seeds. Every arm is charged as if it ran alone; what is saved is what it neither "
        "computed nor paid for."
    )
    size = results[-1].store_gb
    return [
        *lines,
        "",
        note,
        "",
        *([_("Activations on disk: {size:.3f} GB.").format(size=size), ""] if size else []),
    ]


def _text_table(cell: CellScores, results: Sequence[ArmResult]) -> list[str]:
    lines = [
        _("| strategy | decoding | distinct-1 | distinct-2 | rep-4 | mean length, tokens |"),
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = results[0].base_text
    groups: list[tuple[str, list[TextMetrics]]] = [(_("before training"), [base] if base else [])]
    groups += [(arm.name, [each.text for each in _results(arm)]) for arm in cell.arms]
    for label, texts in groups:
        for decoding in DECODINGS if texts else ():
            values = [mean([text[decoding][metric] for text in texts]) for metric in TEXT_METRICS]
            cells = [*(f"{value:.3f}" for value in values[:3]), f"{values[3]:.1f}"]
            lines.append(f"| {markdown(label)} | {decoding} | {' | '.join(cells)} |")
    return [*lines, "", _("Five prompts an arm, unless --prompts says more: too few for more than a glance.")]


def _write_samples(folder: Path, title: str) -> None:
    """The continuations of the fixed prompts, base beside arm, as Markdown in which no text is live."""
    if (folder / layout.SAMPLES_PAGE).exists():
        return
    try:
        samples = read_samples(folder)
    except RunError:
        return  # of an earlier version
    how = _(
        "Each text continues the prompt. Greedy takes the likeliest token, sampled draws with a fixed seed."
    )
    lines = [f"# Samples: {markdown(title)}", "", how, ""]
    for place, prompt in enumerate(samples.prompts[:SHOWN]):
        lines += [f"## Prompt {place + 1}", "", *code(prompt), ""]
        for decoding in DECODINGS:
            for who, texts in (("base", samples.base), ("trained", samples.trained)):
                lines += [f"**{who}, {decoding}**", "", *code(texts[decoding][place]), ""]
    write_text(folder / layout.SAMPLES_PAGE, "\n".join(lines))
