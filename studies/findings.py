"""Every number of docs/findings.md, from the records kept in studies/records; no text and no model is needed.

    python studies/findings.py results
    python studies/findings.py results --map iterbatch/assets/evidence/map.json    # the map alone

Unpacks each study below the folder and writes its report, then prints, for every cell, each arm against the
baseline, the contrasts that its study file registered (Holm over them), and last what study 1 says of prices.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import price
import records

from iterbatch.report import page, stats
from iterbatch.report.comparison import CellScores, Comparison, read_cells
from iterbatch.report.scores import ArmScores

KEPT = Path(__file__).parent / "records"
FOUR = (
    ("auto_spaced", "baseline"),
    ("auto_spaced", "random_spaced"),
    ("abr", "baseline"),
    ("frozen", "frozen_twin"),
)
# Pairs of arms, by study; p-values are adjusted over the pairs of a cell.
REGISTERED = {
    "repetition": FOUR,
    "repetition-limited": FOUR[:3],
    "noise": (("excess", "abr"),),  # of two cells: see its study file
    "controls": (("abr", "scaled_lr"), ("abr", "higher_lr")),
}
# Further pairs that the findings speak of, not adjusted.
ASKED = {
    "adaptive": (("abr", "profile"), ("abr", "spaced"), ("spaced", "small_batches"), ("spaced", "small4")),
    "repetition": (("auto_spaced", "two_at_once"), ("auto_spaced", "abr"), ("auto_spaced", "small4")),
    "repetition-limited": (("auto_spaced", "two_at_once"), ("auto_spaced", "abr"), ("auto_spaced", "small4")),
}


# Studies of the map, and the arm that stands for each way to repeat (iterbatch/bench/map.py).
MAP = {
    "adaptive": {"at_once": "fixed2", "later": "spaced", "smaller": "small4"},
    "map": {"at_once": "two_at_once", "later": "two_spaced"},
    "repetition": {"at_once": "two_at_once", "later": "auto_spaced", "smaller": "small4"},
}
MODELS = {"bundled": "bundled 4.8 M"}  # others: SmolLM2


def main() -> None:
    """Unpack, report and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--map", type=Path)
    flags = parser.parse_args()
    if flags.map is not None:
        write_map(flags.results, flags.map)
        return
    for file in sorted(KEPT.glob("*.parquet")):
        for cell in page.write(_unpacked(file.stem, flags.results)):
            _print_cell(file.stem, cell)
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
    registered = [cell.compare(*pair) for pair in REGISTERED.get(study, ())]
    found = [each for each in registered if each is not None and each.interval is not None]
    adjusted = stats.holm([each.interval.p for each in found if each.interval is not None])
    for each, p in zip(found, adjusted, strict=True):
        print("registered: " + _words(dataclasses.replace(each, p_adjusted=p)))
    for pair in ASKED.get(study, ()):
        if (each := cell.compare(*pair)) is not None and each.interval is not None:
            print("asked: " + _words(each))


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
    worth = cell.worth(arm.name)
    known_worth = "" if worth is None else f", worth {worth.estimate:.2f} [{worth.low:.2f}, {worth.high:.2f}]"
    return f"{line}; {_words(each)}{known_worth}"


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
