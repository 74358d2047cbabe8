"""Seconds to the validation perplexity of LoRA on all layers, for adapters on the top layers.

With the prefix reused across epochs.

    python benchmarks/time_to_target.py              # about 50 minutes on two cores; resumes where it stopped
    python benchmarks/time_to_target.py --report     # from benchmarks/time_to_target.json alone

Bundled base, CaSiNo. Every placement gets the same trials (ranks x learning rates, seed 0) and
about the same training seconds: fewer adapted layers get more epochs. The best trial of each, by
final validation perplexity, is then run with all seeds. The target is the mean final validation
perplexity of LoRA on all layers; an arm's time to it is that of its first evaluation at or below
it, infinite where there is none.
"""

import argparse
import json
import math
import os
import statistics
import warnings
from pathlib import Path

from scipy import stats as student

from iterbatch.checks import make_config
from iterbatch.records.record import EvalRecord, read_records
from iterbatch.records.write import write_text
from iterbatch.study.run import run as run_bench

RECORDS = Path(__file__).parent / "time_to_target.json"
EPOCHS = {"all": 3, "top:6": 4, "top:4": 5, "top:2": 8}  # about the same seconds, the prefix reused
RANKS, LEARNING_RATES, SEEDS = (8, 64), (2e-3, 5e-3, 1e-2), (0, 1, 2, 3, 4)
Curve = list[list[float]]  # seconds and validation loss in nats, of each evaluation


def run(data: Path, layers: str, rank: int, lr: float, seed: int) -> Curve:
    """Seconds and loss at each evaluation of the baseline."""
    name = f"target-{layers.replace(':', '')}-{rank}-{lr:g}-{seed}"
    config = make_config(
        data_dir=data,
        max_train_tokens=98_304,
        max_eval_tokens=10_000,
        strategies=["baseline"],
        lora_layers=layers,
        lora_rank=rank,
        lora_alpha=2.0 * rank,
        lr=lr,
        seeds=[seed],
        epochs=EPOCHS[layers],
        evals=4 * EPOCHS[layers],
        reuse="epoch",
        run_name=name,
        overwrite=True,
        log_with=["none"],
    )
    records = read_records(run_bench(config) / "baseline" / f"seed{seed}" / "evals.jsonl", EvalRecord)
    return [
        [round(record.train_seconds, 2), round(record.nats / record.tokens, 5)]
        for record in records
        if record.split == "validation"
    ]


def collect(data: Path) -> dict[str, Curve]:
    """All trials, then the seeds of each placement's best; kept after each run."""
    curves = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}

    def ensure(layers: str, rank: int, lr: float, seed: int) -> None:
        key = f"{layers} r{rank} lr{lr:g} seed{seed}"
        if key not in curves:
            curves[key] = run(data, layers, rank, lr, seed)
            write_text(
                RECORDS,
                "{\n"
                + ",\n".join(f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items())
                + "\n}\n",
            )
            print(f"{key}: {curves[key][-1][1]:.4f} nats after {curves[key][-1][0]:.1f} s", flush=True)

    for rank in RANKS:
        for lr in LEARNING_RATES:
            for layers in EPOCHS:
                ensure(layers, rank, lr, 0)
    for seed in SEEDS:
        for layers in EPOCHS:  # placements take turns: a machine whose speed drifts treats them alike
            ensure(layers, *best(curves, layers), seed)
    return curves


def best(curves: dict[str, Curve], layers: str) -> tuple[int, float]:
    """Rank and learning rate of the lowest final validation loss among the trials."""
    return min(
        ((rank, lr) for rank in RANKS for lr in LEARNING_RATES),
        key=lambda pair: curves[f"{layers} r{pair[0]} lr{pair[1]:g} seed0"][-1][1],
    )


def time_to(curve: Curve, nats: float) -> float:
    """Seconds of training at the first evaluation at or below a loss; infinite where there is none."""
    return next((seconds for seconds, loss in curve if loss <= nats), math.inf)


def interval(values: list[float], digits: int) -> str:
    """Mean and 95% t interval; the geometric kind would differ little here."""
    if not all(map(math.isfinite, values)):
        return f"{sum(map(math.isfinite, values))} of {len(values)} reach it"
    t = float(student.t.ppf(0.975, len(values) - 1))
    half = t * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.{digits}f} ± {half:.{digits}f}"


def report(curves: dict[str, Curve]) -> None:
    print("\n| placement | trials: final validation loss, nats (rank, learning rate) |\n| --- | --- |")
    for layers in EPOCHS:
        trials = [
            f"{curves[f'{layers} r{rank} lr{lr:g} seed0'][-1][1]:.3f} ({rank}, {lr:g})"
            for rank in RANKS
            for lr in LEARNING_RATES
        ]
        print(f"| {layers}, {EPOCHS[layers]} epochs | {'; '.join(trials)} |")
    chosen = {
        layers: [curves["{} r{} lr{:g} seed{}".format(layers, *best(curves, layers), seed)] for seed in SEEDS]
        for layers in EPOCHS
    }
    target = statistics.fmean(curve[-1][1] for curve in chosen["all"])
    print(
        f"\nTarget: {target:.4f} nats, perplexity {math.exp(target):.3f} (mean over {len(SEEDS)} seeds of "
        "LoRA on all layers)\n"
    )
    print(
        "| placement | best (rank, lr) | final loss | train seconds | seconds to target + 0 / 0.01 / 0.03 / "
        "0.05 nats | all's over its |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for layers, group in chosen.items():
        times, ratios = [], []
        for slack in (0.0, 0.01, 0.03, 0.05):
            mine = [time_to(curve, target + slack) for curve in group]
            alls = [time_to(curve, target + slack) for curve in chosen["all"]]
            times.append(interval(mine, 1))
            ratios.append(
                interval(
                    [a / m for a, m in zip(alls, mine, strict=True)]
                    if all(map(math.isfinite, alls + mine))
                    else mine,
                    2,
                )
            )
        final, total = (
            interval([curve[-1][1] for curve in group], 4),
            interval([curve[-1][0] for curve in group], 1),
        )
        print(
            f"| {layers} | {best(curves, layers)} | {final} | {total} | {' / '.join(times)} | "
            f"{' / '.join(ratios)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="from the kept curves alone")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("ITERBATCH_DATA") or "../shared/data") / "dialogue" / "casino",
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    report(json.loads(RECORDS.read_text(encoding="utf-8")) if arguments.report else collect(arguments.data))


if __name__ == "__main__":
    main()
