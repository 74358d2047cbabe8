"""Figures, from records only."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from iterbatch.records.record import BatchRecord, EvalRecord, read_records, whole_or_not

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # told apart by colour-blind readers (Okabe, Ito)
MOST_POINTS = 20_000  # of a strategy in a scatter plot; of more, a random choice is drawn
Arms = dict[str, list[Path]]  # strategy to the folders of its seeds


def write(run_dir: Path, arms: Sequence[tuple[str, int]]) -> None:
    """Draw ``ppl_vs_flops.png`` and ``repeats.png`` for the given (strategy, seed) pairs."""
    folders: Arms = {}
    for strategy, seed in arms:
        folders.setdefault(strategy, []).append(run_dir / strategy / f"seed{seed}")
    _perplexity(folders, run_dir / "ppl_vs_flops.png")
    _repeats(folders, run_dir / "repeats.png")


def _figure(width: float, height: float, columns: int = 1):
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(1, columns)


def _save(figure, path: Path) -> None:
    with whole_or_not(path) as scratch:
        figure.savefig(scratch, format="png")


def _perplexity(arms: Arms, path: Path) -> None:
    figure, axes = _figure(6.4, 4.2)
    before = 0.0
    for (strategy, folders), colour in zip(arms.items(), _colours(arms), strict=False):
        scores = [[record for record in read_records(folder / "evals.jsonl", EvalRecord) if record.split == "validation"] for folder in folders]
        # The untrained base lies so far above that it would flatten everything else; it is named in a corner instead.
        curves = [[record for record in seed if record.fraction > 0] for seed in scores]
        before = scores[0][0].ppl if scores[0] else before
        points = list(zip(*curves, strict=False))  # one group a fraction of the budget, over seeds
        if not points:  # stopped before its first evaluation
            continue
        gflops = [statistics.fmean(record.flops / 1e9 for record in group) for group in points]
        values = np.array([[record.ppl for record in group] for group in points])
        axes.plot(gflops, values.mean(axis=1), marker="o", markersize=4, color=colour, label=strategy)
        if len(folders) > 1:
            axes.fill_between(gflops, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.text(0.02, 0.03, f"before training: {before:,.1f}", transform=axes.transAxes, fontsize="small")
    plain_ticks(axes)
    axes.set_xlabel("training compute, GFLOPs")
    axes.set_ylabel("validation perplexity (log scale)")
    seeds = max(len(folders) for folders in arms.values())
    axes.set_title("Perplexity against compute" + (f", mean and range of {seeds} seeds" if seeds > 1 else ""))
    axes.grid(alpha=0.25, which="both")
    if axes.lines:
        axes.legend(frameon=False)
    _save(figure, path)


def plain_ticks(axes) -> None:
    """A few plain numbers on an axis of perplexity, which is on a log scale."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=4))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _repeats(arms: Arms, path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    figure, (over_time, by_loss) = _figure(9.6, 4.0, columns=2)
    jitter, most = np.random.default_rng(0), 5
    for place, ((strategy, folders), colour) in enumerate(zip(arms.items(), _colours(arms), strict=False)):
        seeds = [_losses_and_repeats(folder / "batches.jsonl") for folder in folders]
        length = min(map(len, seeds))
        if not length:
            continue
        passes = np.stack([seed["repeats"][:length] for seed in seeds]).mean(axis=0)
        over_time.plot(np.arange(length), smooth(passes), color=colour, label=strategy)
        batches = np.concatenate(seeds)
        most = max(most, batches["repeats"].max(initial=1))
        shown = jitter.choice(batches, min(MOST_POINTS, len(batches)), replace=False)
        losses, done = shown["loss"], shown["repeats"]
        offset = (place - (len(arms) - 1) / 2) * 0.12  # strategies side by side, so that none hides another
        by_loss.scatter(losses, done + offset + jitter.uniform(-0.04, 0.04, len(done)), s=6, alpha=0.5, linewidths=0, color=colour)
    over_time.set(xlabel="batch", ylabel="repeats (mean of 15 batches)", title="Repeats over training")
    by_loss.set(xlabel="initial loss, nats a token", ylabel="repeats", title="Repeats against initial loss")
    for axes in (over_time, by_loss):
        axes.grid(alpha=0.25)
        axes.set_ylim(0.5, most + 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if over_time.lines:
        over_time.legend(frameon=False, loc="upper right")
    _save(figure, path)


def _losses_and_repeats(file: Path) -> np.ndarray:
    """Two numbers a batch, so that a million of them fit."""
    records = ((record.initial_loss, record.repeats_done) for record in read_records(file, BatchRecord))
    return np.fromiter(records, dtype=[("loss", "f8"), ("repeats", "i8")])


def smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """Centred moving mean; narrower at the ends."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones(len(values)), ones, mode="same")


def _colours(arms: Arms) -> list[str]:
    return [PALETTE[place % len(PALETTE)] for place in range(len(arms))]
