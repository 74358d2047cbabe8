"""The figures of a comparison's report, from its scores.

Each is drawn once and kept as SVG for the page, and as PDF and PNG for papers.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iterbatch.errors import RunError
from iterbatch.language import N_, _, in_use
from iterbatch.records.record import EvalRecord
from iterbatch.records.scheduler import read_scheduler
from iterbatch.records.write import whole_or_not
from iterbatch.report.comparison import AXES, CellScores
from iterbatch.report.scores import ArmScores
from iterbatch.report.wording import plain
from iterbatch.strategy import REFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by colour-blind readers (Okabe, Ito).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK = "#010203"  # drawn in this, shown in the page's own text colour
STYLES = ("-", "--", ":")
MANY = 6  # arms in a legend
# Fonts with Chinese letters, of Windows, macOS and Linux.
CHINESE = ("Microsoft YaHei", "SimHei", "PingFang SC", "Noto Sans CJK SC", "WenQuanYi Micro Hei")
POINTS = 4000  # of an arm in a scatter plot


@dataclass(frozen=True)
class Drawing:
    """One figure."""

    name: str  # of its files
    title: str
    reading: str  # how to read it, in a sentence
    svg: str


Paint = Callable[["Axes", CellScores], bool]  # False where the records do not allow it


def draw(cell: CellScores, folder: Path) -> list[Drawing]:
    """Draw everything the records allow, and keep PDF and PNG files in ``folder``."""
    drawings = []
    for name, title, reading, paint in FIGURES:
        figure, axes = _empty_figure(title)
        if paint(axes, cell):
            drawings.append(Drawing(name, _(title), _(reading), _keep(figure, folder, name)))
    return drawings


def draw_so_far(curves: Sequence[tuple[str, Sequence[EvalRecord]]]) -> Drawing | None:
    """Validation perplexity against FLOPs of runs that may not have ended; None where there is none yet."""
    from matplotlib.ticker import EngFormatter

    if not curves:
        return None
    title = N_("Validation perplexity so far")
    figure, axes = _empty_figure(title)
    names = list(dict.fromkeys(name for name, _ in curves))
    for name, records in curves:
        style = _look(names.index(name))
        if _literal(name) not in axes.get_legend_handles_labels()[1]:
            style["label"] = _literal(name)
        points = [each.flops for each in records], [each.ppl for each in records]
        axes.plot(*points, marker="o", markersize=3, linewidth=1.2, **style)
    axes.set(xlabel="FLOPs", ylabel=in_figure("validation perplexity"), yscale="log")
    _plain_ticks(axes)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _legend(axes)
    return Drawing(
        "so_far",
        title,
        in_figure("A line a run; those in training end where they stand."),
        _svg(figure, "so_far"),
    )


def draw_pictures(cell: CellScores, files: Mapping[str, Path]) -> None:
    """Some of the figures, each as one PNG under a name of its own, with or without anything to show."""
    for name, title, _reading, paint in FIGURES:
        if name in files:
            figure, axes = _empty_figure(title)
            paint(axes, cell)
            with whole_or_not(files[name]) as scratch:
                _save(figure, scratch, "png")


@cache
def _chinese_fonts() -> tuple[str, ...]:
    """Those of this machine that have Chinese letters."""
    from matplotlib import font_manager

    known = {each.name for each in font_manager.fontManager.ttflist}
    return tuple(name for name in CHINESE if name in known)


def in_figure(message: str) -> str:
    """A message in the language in use, or in English where no font here could write it."""
    return message if in_use() == "zh" and not _chinese_fonts() else _(message)


def _empty_figure(title: str) -> tuple[Figure, Axes]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if in_use() == "zh" and _chinese_fonts():
        mpl.rcParams["font.family"] = ["DejaVu Sans", *_chinese_fonts()]
    figure = Figure(figsize=(5.6, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(in_figure(title), color=INK, fontsize=11, loc="left")
    axes.grid(alpha=0.25, color=INK, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set(color=INK, visible=side in ("left", "bottom"), linewidth=0.8)
    return figure, axes


def _keep(figure: Figure, folder: Path, name: str) -> str:
    """Write PDF and PNG, and give the SVG."""
    for kind in ("pdf", "png"):
        with whole_or_not(folder / f"{name}.{kind}") as scratch:
            _save(figure, scratch, kind)
    return _svg(figure, name)


def _save(figure: Figure, to: Path | io.StringIO, kind: str, **look: Any) -> None:
    """Lay a figure out and write it, without a date or a version: the same records give the same file."""
    unsaid = {"pdf": ("CreationDate",), "png": ("Software",), "svg": ("Date", "Creator")}[kind]
    figure.savefig(to, format=kind, metadata=dict.fromkeys(unsaid), **look)


def _svg(figure: Figure, name: str) -> str:
    """As part of a page: its own ids, the page's text colour."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        _save(figure, buffer, "svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor")


def _style(cell: CellScores, arm: str) -> dict[str, Any]:
    return {"label": _literal(arm), **_look([each.name for each in cell.arms].index(arm))}


def _look(place: int) -> dict[str, Any]:
    """Of the line of so manieth place."""
    colour = PALETTE[place % (len(PALETTE) - 1)]  # not black, which a dark page hides
    return {"color": colour, "linestyle": STYLES[place // (len(PALETTE) - 1) % len(STYLES)]}


def _literal(name: str) -> str:
    """A name from outside as it is: between two dollars matplotlib would set it as a formula."""
    return plain(name).replace("$", r"\$")


def _legend(axes: Axes, **more: Any) -> None:
    names = axes.get_legend_handles_labels()[1]
    if len(names) > MANY:  # below the axes, where it hides no curve
        more |= {"ncols": 4, "loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    if names:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, **more)


def _curves(axes: Axes, cell: CellScores, *, axis: str, label: str) -> bool:
    from matplotlib.ticker import EngFormatter

    for arm in cell.arms:
        curves = [[record for record in seed.validation if record.fraction > 0] for seed in arm.finished]
        points = list(zip(*curves, strict=False))
        if not points:
            continue
        cost = [statistics.fmean(getattr(record, axis) for record in group) for group in points]
        values = np.array([[record.ppl for record in group] for group in points])
        style = _style(cell, arm.name)
        axes.plot(cost, values.mean(axis=1), marker="o", markersize=3, linewidth=1.4, **style)
        if len(curves) > 1:
            axes.plot(
                cost, values, color=style["color"], linestyle=style["linestyle"], linewidth=0.5, alpha=0.4
            )
    axes.set(xlabel=in_figure(label), ylabel=in_figure("validation perplexity"), yscale="log")
    _plain_ticks(axes)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _legend(axes)
    return bool(axes.lines)


def _final(axes: Axes, cell: CellScores) -> bool:
    """Final perplexity of every arm against its compute, or a row an arm where all cost the same."""
    baseline = cell.arm(REFERENCE)
    shown = [arm for arm in cell.arms if arm is baseline or arm in cell.compared]
    known = {arm.name: arm.values(lambda result: result.test_ppl) for arm in shown}
    points = {name: values for name, values in known.items() if values}
    if not points:
        return False
    centre = statistics.fmean(points[REFERENCE]) if REFERENCE in points else None
    spans = {
        each.arm: (each.interval.low, each.interval.high)
        for each in cell.against_baseline
        if each.interval is not None and centre is not None and np.isfinite(each.estimate)
    }
    ratios = {name: cell.compute_ratio(name) for name in points}
    costs = [ratio for ratio in ratios.values() if np.isfinite(ratio)]
    apart = baseline is not None and len(costs) == len(points) and max(costs) > 1.05 * min(costs)
    painter = _against_compute if apart else _row_an_arm
    painter(axes, cell, points, ratios, {name: _around(centre, span) for name, span in spans.items()})
    if centre is not None:
        (axes.axhline if apart else axes.axvline)(centre, color=INK, linewidth=0.8, zorder=0)
    return True


Span = tuple[float, float]


def _around(centre: float | None, span: Span) -> Span:
    """An interval of log perplexity as perplexities."""
    return ((centre or 1.0) * float(np.exp(span[0])), (centre or 1.0) * float(np.exp(span[1])))


def _row_an_arm(
    axes: Axes,
    cell: CellScores,
    points: Mapping[str, Sequence[float]],
    ratios: Mapping[str, float],
    spans: Mapping[str, Span],
) -> None:
    whole: Any = axes.figure
    whole.set_size_inches(5.6, max(2.6, 1.3 + 0.3 * len(points)))
    names = [f"{name}  {ratios[name]:.2f}×" if np.isfinite(ratios[name]) else name for name in points]
    for place, (name, values) in zip(_rows(axes, names), points.items(), strict=True):
        colour = _style(cell, name)["color"]
        axes.plot(
            values, [place] * len(values), "o", markersize=4, color=colour, alpha=0.45, markeredgewidth=0
        )
        if name in spans:
            axes.plot(spans[name], [place, place], color=colour, linewidth=2)
        axes.plot([statistics.fmean(values)], [place], "s", markersize=6, color=colour)
    axes.set(xlabel=in_figure("test perplexity, lower is better"))
    _few_ticks(axes.xaxis)


def _against_compute(
    axes: Axes,
    cell: CellScores,
    points: Mapping[str, Sequence[float]],
    ratios: Mapping[str, float],
    spans: Mapping[str, Span],
) -> None:
    means = {name: statistics.fmean(values) for name, values in points.items()}
    reach, height = np.ptp([value for values in points.values() for value in values]), -np.inf
    for name in sorted(points, key=lambda name: means[name]):
        colour, cost = _style(cell, name)["color"], ratios[name]
        axes.plot(
            [cost] * len(points[name]),
            points[name],
            "o",
            markersize=4,
            color=colour,
            alpha=0.45,
            markeredgewidth=0,
        )
        if name in spans:
            axes.plot([cost, cost], spans[name], color=colour, linewidth=2)
        axes.plot([cost], [means[name]], "s", markersize=6, color=colour)
        height = max(means[name], height + 0.05 * reach)  # labels must not lie on one another
        place = {
            "xytext": (8, 0),
            "textcoords": "offset points",
            "verticalalignment": "center",
            "fontsize": 8,
        }
        axes.annotate(_literal(name), (cost, height), color=INK, **place)
    axes.set(
        xlabel=in_figure("compute, times the baseline's"),
        ylabel=in_figure("test perplexity, lower is better"),
    )
    axes.margins(x=0.18)
    _few_ticks(axes.yaxis)


def _few_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _rows(axes: Axes, names: Sequence[str]) -> np.ndarray:
    places = np.arange(len(names))[::-1]
    axes.set_yticks(places, list(map(_literal, names)))
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.grid(visible=False, axis="y")
    return places


def _forest(axes: Axes, cell: CellScores) -> bool:
    found = [each for each in cell.against_baseline if np.isfinite(each.estimate)]
    for place, each in zip(_rows(axes, [each.arm for each in found]), found, strict=True):
        colour = _style(cell, each.arm)["color"]
        if each.interval is not None:
            axes.plot([each.interval.low, each.interval.high], [place, place], color=colour, linewidth=2)
        axes.plot([each.estimate], [place], marker="s", color=colour, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel=in_figure("difference of log perplexity, nats a token, 95% interval"))
    return bool(found)


def _to_target(axes: Axes, cell: CellScores) -> bool:
    if cell.arm(REFERENCE) is None:
        return False
    for place, arm in zip(_rows(axes, [arm.name for arm in cell.compared]), cell.compared, strict=True):
        interval, reached, of = cell.to_target(arm.name)
        if reached == of and interval.estimate > 0:
            axes.barh(
                place, 1 / interval.estimate, height=0.6, color=_style(cell, arm.name)["color"], alpha=0.8
            )
            if np.isfinite(interval.low):
                axes.plot([1 / interval.high, 1 / interval.low], [place, place], color=INK, linewidth=1)
        else:
            axes.text(
                0.01,
                place,
                in_figure("reached with {reached} of {of} seeds").format(reached=reached, of=of),
                va="center",
                fontsize=8,
                color=INK,
            )
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set(xlabel=in_figure("FLOPs to target, share of its own baseline's"), xlim=(0, None))
    return bool(cell.compared)


def _worth(axes: Axes, cell: CellScores) -> bool:
    if (ladder := cell.exchange()) is None:
        return False
    shares, losses = ladder
    axes.plot(shares, losses, color=INK, marker="o", markersize=4, linewidth=1.2, label="baseline")
    found = sorted((each.estimate, each.arm) for each in cell.against_baseline if np.isfinite(each.estimate))
    reach = np.ptp([*losses, *(estimate for estimate, _ in found)])
    height = -np.inf  # of the last label; they must not lie on one another
    for estimate, arm in found:
        axes.plot(1, estimate, marker="s", markersize=6, linestyle="", color=_style(cell, arm)["color"])
        height = max(estimate, height + 0.045 * reach)
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": INK}
        place = {"xytext": (1.06, height), "verticalalignment": "center", "fontsize": 8, "color": INK}
        axes.annotate(_literal(arm), (1, estimate), arrowprops=line, **place)
    axes.set(
        xlabel=in_figure("budget, share of the cell's"),
        ylabel=in_figure("log test perplexity, to the baseline's"),
    )
    return True


def _tuning(axes: Axes, cell: CellScores) -> bool:
    for arm in cell.arms:
        curve = cell.tuning.get(arm.name)
        if curve is None:
            continue
        order = np.argsort(curve.rates)
        rates, losses = np.array(curve.rates)[order], curve.table[order]
        rates, losses = rates[np.isfinite(losses).all(axis=1)], losses[np.isfinite(losses).all(axis=1)]
        if len(rates):
            style = _style(cell, arm.name)
            axes.plot(rates, losses.mean(axis=1), marker="o", markersize=3, linewidth=1.4, **style)
            if losses.shape[1] > 1:
                low, high = losses.min(axis=1), losses.max(axis=1)
                axes.fill_between(rates, low, high, color=style["color"], alpha=0.1, linewidth=0)
    axes.set(
        xlabel=in_figure("learning rate"),
        ylabel=in_figure("validation loss of trials, nats a token"),
        xscale="log",
    )
    _legend(axes)
    return bool(axes.lines)


def _learned(axes: Axes, cell: CellScores) -> bool:
    """What a scheduler expected of each pass over training: middling losses, with high and low ones."""
    folder = next((found for arm in cell.arms if (found := _scheduler_of(arm)) is not None), None)
    if folder is None:
        return False
    course = read_scheduler(folder)["course"]
    batches = [point["batch"] for point in course]
    for place in range(len(course[0]["middling"])):
        colour = PALETTE[place]
        gains = [point["middling"][place] for point in course]
        axes.plot(
            batches,
            gains,
            color=colour,
            linewidth=1.6,
            marker="o" if len(course) == 1 else None,
            label=in_figure("pass {number}").format(number=place + 1),
        )
        low, high = ([point[name][place] for point in course] for name in ("low", "high"))
        axes.fill_between(batches, low, high, color=colour, alpha=0.15, linewidth=0)
    expected = [gain for point in course for gain in point["middling"]]
    axes.set(xlabel="batch", ylabel=in_figure("expected gain, nats a token of probe text"))
    if min(expected) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=max(map(abs, expected)) / 100 or 1.0)
        axes.axhline(0, color=INK, linewidth=0.8)
    _legend(axes, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return True


def _scheduler_of(arm: ArmScores) -> Path | None:
    """The first seed of an arm that kept a scheduler with a course."""
    for each in arm.finished:
        try:
            if read_scheduler(each.folder).get("course"):
                return each.folder
        except RunError:
            continue
    return None


def _passes(axes: Axes, cell: CellScores) -> bool:
    for arm in cell.arms:
        seeds = [seed.batches.received for seed in arm.finished if len(seed.batches.received)]
        if not seeds:
            continue
        length = min(map(len, seeds))
        passes = np.array([seed[:length] for seed in seeds], dtype=float).mean(axis=0)
        axes.plot(np.arange(length), smooth(passes), linewidth=1.4, **_style(cell, arm.name))
    axes.set(xlabel="batch", ylabel=in_figure("passes a batch"))
    _legend(axes)
    return bool(axes.lines)


def _by_loss(axes: Axes, cell: CellScores) -> bool:
    random = np.random.default_rng(0)
    for place, arm in enumerate(cell.arms):
        of = [np.stack([seed.batches.losses, seed.batches.passes], axis=1) for seed in arm.finished]
        points = np.concatenate(of) if of else np.empty((0, 2))
        if not len(points) or points[:, 1].min() == points[:, 1].max():
            continue  # the same for every batch: nothing to see
        points = points[random.permutation(len(points))[:POINTS]]
        offset = (place - (len(cell.arms) - 1) / 2) * 0.6 / len(cell.arms)
        height = points[:, 1] + offset + random.uniform(-0.04, 0.04, len(points))
        style = _style(cell, arm.name)
        axes.scatter(
            points[:, 0], height, s=5, alpha=0.5, linewidths=0, color=style["color"], label=style["label"]
        )
    axes.set(xlabel=in_figure("initial loss, nats a token"), ylabel="passes")
    _legend(axes, markerscale=3)
    return bool(axes.collections)


def _by_pass(axes: Axes, cell: CellScores) -> bool:
    for arm in cell.arms:
        deepest = max((len(seed.batches.falls) for seed in arm.finished), default=0)
        if not deepest:
            continue
        falls, fallen = np.zeros(deepest), np.zeros(deepest)
        for seed in arm.finished:
            falls[: len(seed.batches.falls)] += seed.batches.falls
            fallen[: len(seed.batches.fallen)] += seed.batches.fallen
        style = _style(cell, arm.name)
        axes.plot(range(1, deepest + 1), falls / fallen, marker="o", markersize=4, linewidth=1.4, **style)
    axes.set(xlabel="pass", ylabel=in_figure("loss before it, minus initial loss"))
    locator: Any = axes.xaxis.get_major_locator()
    locator.set_params(integer=True)
    _legend(axes)
    return bool(axes.lines)


def _split(axes: Axes, cell: CellScores) -> bool:
    arms = [arm for arm in cell.arms if arm.finished]
    places = _rows(axes, [arm.name for arm in arms])
    left = np.zeros(len(arms))
    for label, colour, figure in (
        ("fresh", PALETTE[0], lambda result: result.flops_fresh),
        ("repeated", PALETTE[1], lambda result: result.flops_repeat),
        ("overhead", PALETTE[2], lambda result: result.flops_probe + result.flops_lost),
    ):
        width = np.nan_to_num([arm.mean(figure) for arm in arms])
        axes.barh(places, width, left=left, height=0.6, color=colour, label=label)
        left += width
    _plain_x(axes)
    axes.set(xlabel=in_figure("FLOPs a run"), xlim=(0, max(left, default=0.0) * 1.02 or 1))
    _legend(axes, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return bool(arms)


def _plain_x(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """Centred moving mean; narrower at the ends."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones(len(values)), ones, mode="same")


def _plain_ticks(axes: Axes) -> None:
    """A few plain numbers on an axis of perplexity, which is on a log scale."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=4))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


_CURVES = N_(
    "Lower and further left is better. Thick lines are means over seeds, thin ones single seeds; the "
    "untrained base is left out."
)
FINAL = "final"  # the figure that a report begins with
# Name of its files, title, how to read it, and what paints it.
FIGURES: list[tuple[str, str, str, Paint]] = [
    (
        FINAL,
        N_("Final test perplexity and what it cost"),
        N_(
            "A small circle for each seed, a square for their mean; the bar is the 95% interval of the "
            "difference to the baseline, whose own mean is the line. × is compute, in the baseline's."
        ),
        _final,
    ),
    *(
        (f"perplexity_{axis}", title, _CURVES, partial(_curves, axis=axis, label=AXES[axis]))
        for axis, title in {
            "flops": N_("Perplexity against FLOPs"),
            "train_seconds": N_("Perplexity against seconds"),
            "tokens_trained": N_("Perplexity against trained tokens"),
        }.items()
    ),
    (
        "differences",
        N_("Difference to the baseline"),
        N_(
            "Log perplexity on the test split, arm minus baseline with the same seed. Left of 0 is "
            "better. Each bar is for its arm alone."
        ),
        _forest,
    ),
    (
        "time_to_target",
        N_("Compute to reach the baseline's perplexity"),
        N_(
            "FLOPs until an arm has the final validation loss of its own baseline, of the same seed, as "
            "a share of what that one spends; geometric mean over seeds, 95% interval. No bar: not "
            "reached with every seed."
        ),
        _to_target,
    ),
    (
        "worth",
        N_("What compute is worth"),
        N_(
            "Line: the baseline, decayed at several budgets. The share at which the line is as low as an "
            "arm is what the arm's compute was worth."
        ),
        _worth,
    ),
    (
        "tuning",
        N_("How the learning rates were found"),
        N_("Every arm's validation loss at every rate that was tried: mean and range over the tuning seeds."),
        _tuning,
    ),
    (
        "learned",
        N_("What learnable has learned"),
        N_(
            "Gain that the scheduler of the first seed expects of each pass, for a batch of middling "
            "loss; bands reach from losses a standard deviation below to one above. It is measured on "
            "text that is never trained on."
        ),
        _learned,
    ),
    ("repeats", N_("Passes over training"), N_("Passes a batch, mean over seeds and 15 batches."), _passes),
    (
        "repeats_by_loss",
        N_("Passes against initial loss"),
        N_("One point a batch: a rule that follows the loss rises to the right."),
        _by_loss,
    ),
    (
        "loss_by_pass",
        N_("Loss before each pass"),
        N_(
            "Loss before each pass on a batch minus its initial loss, mean over batches with that many "
            "passes. It falls there whether or not anything is learnt that helps elsewhere."
        ),
        _by_pass,
    ),
    (
        "compute",
        N_("What the compute went into"),
        N_(
            "FLOPs a run, mean over seeds: fresh passes, repeated ones, and overhead (probes, and what "
            "was undone)."
        ),
        _split,
    ),
]
