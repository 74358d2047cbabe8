"""The first real study: four strategies, three seeds, the original experiment's defaults, on four texts.

    python studies/first_study.py --data ../shared/data --heldback pretrain/heldback            # trains what is missing, then prints the table
    python studies/first_study.py --report                                                      # the table from the committed records alone

Texts: pydocs, CaSiNo, and the fifths of WikiText-2 and STAR that the bundled base was not pretrained on. The folders ``results/first-<text>`` keep
the whole runs; ``studies/first_study/`` keeps their summaries.
"""

import argparse
import json
import math
import os
import statistics
from pathlib import Path

from iterbatch.bench import run as bench
from iterbatch.config import make_config
from iterbatch.records.record import write_json

SEEDS, TOKENS = (0, 1, 2), 49_152
RECORDS = Path(__file__).parent / "first_study"  # a summary a text
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, two-sided 95%, by number of seeds


def texts(data: Path, heldback: Path) -> dict[str, dict]:
    """Flags of each text."""
    return {
        "pydocs": {"dataset": "pydocs"},
        "casino": {"dataset": "dialogue", "data_dir": data / "dialogue" / "casino"},
        "wikitext-2-heldback": {"dataset": "wikitext", "data_dir": heldback / "wikitext-2"},
        "star-heldback": {"dataset": "dialogue", "data_dir": heldback / "star"},
    }


def train(names: list[str], match: str, data: Path, heldback: Path) -> None:
    for name in names:
        label = name if match == "epochs" else f"{name}-{match}"
        run_name = f"first-{label}"
        config = make_config(
            **texts(data, heldback)[name],
            epochs=3,
            match=match,
            seeds=SEEDS,
            max_train_tokens=TOKENS,
            max_eval_tokens=20_000,
            run_name=run_name,
            resume=(Path("results") / run_name / "config.yaml").exists(),
            log_with=["none"],
        )
        rows = json.loads((bench.run(config) / "summary.json").read_text(encoding="utf-8"))
        write_json(RECORDS / f"{label}.json", rows)


def paired(rows: list[dict], strategy: str, key: str) -> tuple[float, float]:
    """Mean difference to the baseline of the same seed, and the half-width of its 95% t interval."""
    base = {row["seed"]: row[key] for row in rows if row["strategy"] == "baseline"}
    differences = [row[key] - base[row["seed"]] for row in rows if row["strategy"] == strategy]
    return statistics.fmean(differences), T_975[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5


def report() -> None:
    columns = ("text", "strategy", "validation perplexity", "test perplexity", "Δ log test perplexity to baseline, 95%")
    columns += ("mean repeats", "x baseline FLOPs", "train seconds")
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for file in sorted(RECORDS.glob("*.json")):
        name, rows = file.stem, json.loads(file.read_text(encoding="utf-8"))
        for row in rows:
            row["log_test"] = math.log(row["test_ppl"])
        base_flops = statistics.fmean(row["flops"] for row in rows if row["strategy"] == "baseline")
        print(f"| {name} | before training | {rows[0]['base_val_ppl']:.2f} | | | | | |")
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            mine = [row for row in rows if row["strategy"] == strategy]

            def cell(key: str, mine: list[dict] = mine) -> str:
                values = [row[key] for row in mine]
                return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"

            mean, half = paired(rows, strategy, "log_test") if strategy != "baseline" else (0.0, 0.0)
            difference = "" if strategy == "baseline" else f"{mean:+.4f} ± {half:.4f}"
            ratio = statistics.fmean(row["flops"] for row in mine) / base_flops
            repeats = statistics.fmean(row["mean_repeats"] for row in mine)
            cells = [strategy, cell("val_ppl"), cell("test_ppl"), difference, f"{repeats:.2f}", f"{ratio:.2f}", cell("train_seconds")]
            print("| | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ITERBATCH_DATA", "../shared/data")))
    parser.add_argument("--heldback", type=Path, default=Path("pretrain/heldback"), help="written by studies/pretrain_base.py")
    parser.add_argument("--texts", nargs="+", default=["pydocs", "casino", "wikitext-2-heldback", "star-heldback"])
    parser.add_argument("--match", choices=["epochs", "flops"], default="epochs", help="what every arm may spend; the original: epochs")
    parser.add_argument("--report", action="store_true", help="print the table from the committed records, and train nothing")
    arguments = parser.parse_args()
    if not arguments.report:
        train(arguments.texts, arguments.match, arguments.data, arguments.heldback)
    report()


if __name__ == "__main__":
    main()
