"""Every number of docs/findings.md, from the records kept in studies/records; no text and no model is needed.

    python studies/findings.py results
    python studies/findings.py results --map iterbatch/assets/evidence/map.json    # the map alone
    python studies/findings.py results --figure docs/findings.png      # the figure alone; .pdf for a paper

Unpacks each study below the folder and writes its report, then prints, for every cell, each arm against the
baseline, the contrasts that its study file registered (Holm over them), and last what study 1 says of prices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import price
import records
from scipy.stats import ttest_rel

from iterbatch.bench.map import WAYS, cells
from iterbatch.report import page, stats
from iterbatch.report.comparison import CellScores, Comparison, read_cells
from iterbatch.report.figures import PALETTE
from iterbatch.report.scores import ArmScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT = Path(__file__).parent / "records"
THREE = (("auto_spaced", "baseline"), ("auto_spaced", "random_spaced"), ("abr", "baseline"))
# Pairs of arms, by study; p-values are adjusted over the pairs of all its cells.
REGISTERED = {
    "repetition": THREE,
    "repetition-limited": THREE,
    "noise": (("excess", "abr"),),
    "controls": (("abr", "scaled_lr"), ("abr", "higher_lr")),
}
# Further pairs that the findings speak of, not adjusted.
ASKED = {
    "adaptive": (("abr", "profile"), ("abr", "spaced"), ("spaced", "small_batches"), ("spaced", "small4")),
    "repetition": (("auto_spaced", "abr"), ("auto_spaced", "small4"), ("window", "baseline")),
    "repetition-limited": (("auto_spaced", "two_at_once"), ("auto_spaced", "abr"), ("auto_spaced", "small4")),
}


# Studies of the map, and the arm that stands for each way to repeat (iterbatch/bench/map.py).
MAP = {
    "adaptive": {"at_once": "abr", "later": "spaced", "smaller": "small4"},
    "map": {"at_once": "two_at_once", "later": "two_spaced"},
    "map-real": {"at_once": "two_at_once", "later": "two_spaced"},
    "repetition": {"at_once": "abr", "later": "auto_spaced", "smaller": "small4"},
}
UNITS = {"FLOPs": "flops", "seconds": "train_seconds"}
MODELS = {"bundled": "bundled 4.3 M"}  # others: SmolLM2


def main() -> None:
    """Unpack, report and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--map", type=Path)
    parser.add_argument("--figure", type=Path)
    flags = parser.parse_args()
    if flags.map is not None:
        write_map(flags.results, flags.map)
        return
    if flags.figure is not None:
        draw(flags.results, flags.figure)
        return
    for file in sorted(KEPT.glob("*.parquet")):
        cells_of_study = page.write(_unpacked(file.stem, flags.results))
        for cell in cells_of_study:
            _print_cell(file.stem, cell)
            _print_texts(file.stem, cell)
        _print_registered(file.stem, cells_of_study)
    for name, plan in price.PLANS.items():
        if lines := price.read(KEPT / f"price-{name}.jsonl"):
            print(f"\n## price, {name}")
            price.report(plan, lines)


def _unpacked(study: str, results: Path) -> Path:
    if not (results / study).exists():
        records.unpack(KEPT / f"{study}.parquet", results / study)
    return results / study


def write_map(results: Path, file: Path) -> None:
    """Write what ``iterbatch price`` tells of every study of the map that has records."""
    there = [study for study in MAP if (KEPT / f"{study}.parquet").exists()]
    rows = [_map_row(study, cell) for study in there for cell in read_cells(_unpacked(study, results))]
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _print_cell(study: str, cell: CellScores) -> None:
    print(f"\n## {study} {cell.name}".rstrip())
    for arm in cell.arms:
        if arm.finished:
            print(_arm_line(cell, arm))
    for pair in ASKED.get(study, ()):
        if (each := cell.compare(*pair)) is not None and each.interval is not None:
            print("asked: " + _words(each))


def _print_texts(study: str, cell: CellScores) -> None:
    """What repeats did to the texts that are sampled, where a study has enough of them for MAUVE.

    MAUVE needs a model: its numbers are kept beside the records, as ``iterbatch report --mauve`` gave them.
    """
    if not (file := KEPT / f"{study}-mauve.json").exists():
        return
    mauve = json.loads(file.read_text(encoding="utf-8"))["sampled"]
    values: dict[str, dict[str, list[float]]] = {}
    for arm in cell.arms:
        texts = [each.result.text["sampled"] for each in arm.finished if each.result is not None]
        known = {name: [text[name] for text in texts] for name in ("distinct_2", "rep_4")}
        values[arm.name] = known | {"mauve": mauve[arm.name]}
    for arm, metrics in values.items():
        found = [f"{name} {statistics.fmean(each):.3f}" for name, each in metrics.items()]
        for name, each in metrics.items() if arm != "baseline" else ():
            test = ttest_rel(each, values["baseline"][name])
            low, high = test.confidence_interval()
            change = statistics.fmean(each) - statistics.fmean(values["baseline"][name])
            found.append(f"{name} - baseline {change:+.3f} [{low:+.3f}, {high:+.3f}]")
        print(f"texts of {arm}: " + ", ".join(found))


def _print_registered(study: str, cells_of_study: Sequence[CellScores]) -> None:
    pairs = [(cell, cell.compare(*pair)) for cell in cells_of_study for pair in REGISTERED.get(study, ())]
    found = [(cell, each) for cell, each in pairs if each is not None and each.interval is not None]
    adjusted = stats.holm([each.interval.p for _, each in found if each.interval is not None])
    for (cell, each), p in zip(found, adjusted, strict=True):
        print(f"registered, {study} {cell.name}: {_words(dataclasses.replace(each, p_adjusted=p))}")


# What is drawn of the real LLaMA: studies, and arms with their names.
DRAWN = {"repetition": "text enough", "repetition-limited": "8 batches, over and over"}
ARMS = {
    "abr": "abr, two passes at once",
    "window": "window, at once",
    "random_spaced": "random batches, spaced",
    "auto_spaced": "abr auto, spaced",
    "small4": "batches of 4",
}


def draw(results: Path, file: Path) -> None:
    """Every arm of the real LLaMA against its baseline, and what repeats were worth by batch and price."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_arms(left, results)
    _draw_map(right)
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)


def _draw_arms(axes: Axes, results: Path) -> None:
    there = [(study, title) for study, title in DRAWN.items() if (KEPT / f"{study}.parquet").exists()]
    for shift, (study, title) in enumerate(there):
        (cell,) = read_cells(_unpacked(study, results))
        found = [(place, each) for place, arm in enumerate(ARMS) if (each := cell.compare(arm)) is not None]
        places = [place + 0.25 * shift for place, _ in found]
        intervals = [each.interval for _, each in found if each.interval is not None]
        middles = [each.estimate for each in intervals]
        reach = [
            [each.estimate - each.low for each in intervals],
            [each.high - each.estimate for each in intervals],
        ]
        axes.errorbar(middles, places, xerr=reach, fmt="o", color=PALETTE[shift], capsize=2, label=title)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks([place + 0.125 for place in range(len(ARMS))], list(ARMS.values()), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("log test perplexity minus the baseline's, at equal FLOPs", fontsize=9)
    axes.set_title("SmolLM2 (135 M), a repeat at 0.41", fontsize=10, loc="left")


def _draw_map(axes: Axes) -> None:
    for number, (way, title) in enumerate(WAYS.items()):
        color, label = PALETTE[number], title
        for cell in cells():
            if (worth := cell.worth.get(way)) is None:
                continue
            axes.errorbar(
                cell.tokens * 1.06 ** (number - 1),
                worth.estimate,
                yerr=[[worth.estimate - worth.low], [worth.high - worth.estimate]],
                fmt="o" if cell.model in MODELS.values() else "D",
                mfc="white" if cell.price_ratio > 0.99 else color,
                color=color,
                capsize=2,
                label=label,
            )
            label = ""
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="tokens a batch")
    ticks = [512, 1024, 2048, 4096, 8192]
    axes.set_xticks(ticks, [f"{each:,}" for each in ticks])
    axes.set_xticks([], minor=True)
    worths = [0.3, 0.5, 0.7, 1, 1.4, 2]
    axes.set_yticks(worths, [f"{each:g}" for each in worths])
    axes.set_yticks([], minor=True)
    title = "Compute worth (diamonds: SmolLM2; hollow: full price)"
    axes.set_title(title, fontsize=10, loc="left")


def _map_row(study: str, cell: CellScores) -> dict[str, Any]:
    worth = {way: cell.worth(arm) for way, arm in MAP[study].items()}
    manifest = json.loads((cell.run_dir / "manifest.json").read_text(encoding="utf-8"))
    baseline = cell.arm("baseline")
    return {
        "study": f"{study} {cell.name}".rstrip(),
        "model": MODELS.get(cell.config["model_name"], "SmolLM2 135 M"),
        "text": "CaSiNo",
        "tokens": cell.config["batch_size"] * cell.config["max_length"],
        "price_ratio": round(manifest["plan"]["price_ratio"], 3),
        "seeds": len(baseline.finished) if baseline else 0,
        "worth": {
            way: [round(each, 3) for each in (found.estimate, found.low, found.high)]
            for way, found in worth.items()
            if found is not None
        },
    }


def _arm_line(cell: CellScores, arm: ArmScores) -> str:
    results = [each.result for each in arm.finished if each.result is not None]
    mean = {
        name: statistics.fmean(getattr(each, name) for each in results)
        for name in ("test_ppl", "mean_repeats", "tokens_unique", "flops")
    }
    line = (
        f"{arm.name}: {len(results)} seeds, test perplexity {mean['test_ppl']:.3f}, "
        f"{mean['mean_repeats']:.2f} passes a batch, {mean['tokens_unique']:,.0f} fresh tokens, "
        f"{mean['flops'] / 1e12:.2f} TFLOPs"
    )
    known = {each.arm: each for each in cell.against_baseline}
    if (each := known.get(arm.name)) is None or each.interval is None:
        return line
    found = {unit: cell.worth(arm.name, axis) for unit, axis in UNITS.items()}
    worth = [
        f", worth in {unit} {each.estimate:.2f} [{each.low:.2f}, {each.high:.2f}]"
        for unit, each in found.items()
        if each is not None
    ]
    return f"{line}; {_words(each)}{''.join(worth)}"


def _words(each: Comparison) -> str:
    found = each.interval
    assert found is not None
    p = f", p {each.p_adjusted:.3f} of Holm" if each.p_adjusted == each.p_adjusted else f", p {found.p:.3f}"
    return (
        f"{each.arm} - {each.reference} {each.estimate:+.4f} [{found.low:+.4f}, {found.high:+.4f}]{p}"
        f" (sd over seeds {each.deviation:.4f})"
    )


if __name__ == "__main__":
    main()
