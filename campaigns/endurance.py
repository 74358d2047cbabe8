"""Long and large: what a long run, a large text and many records take of memory, files and time.

    python -m campaigns.endurance soak      # 20,000 tiny batches: memory and open files must stay as they are
    python -m campaigns.endurance text      # a text of 1 GB is prepared in less than 1.5 GB
    python -m campaigns.endurance records   # records of 2,000,000 batches: reported in 60 s and 2 GB
    python -m campaigns.endurance pairs     # 200 pairs of a tiny comparison, by two workers
    python -m campaigns.endurance crowd     # 50 runs at once share one cache, and are all alike

Each part runs in a process of its own, because a peak of memory is one of a process.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

BATCHES, GIGABYTE, RECORDS = 20_000, 1_000_000_000, 2_000_000


def soak(folder: Path, batches: int = BATCHES) -> bool:
    """A run of so many batches, sampled twenty times after its first tenth."""
    import iterbatch
    from campaigns.tiny import make_tiny
    from iterbatch.bench.listener import Listener
    from iterbatch.checks import make_config

    process, samples = psutil.Process(), []

    class Sampling(Listener):
        def batch_done(self, record, fraction):
            if record.batch >= batches // 10 and record.batch % (batches // 20) == 0:
                samples.append((process.memory_info().rss / 1e6, process.num_fds()))

    make_tiny(folder / "model")
    tokens, length = 150_000, 16
    epochs = -(-batches // (tokens // length // 2))
    settings = {
        "model_name": str(folder / "model"),
        "dtype": "float32",
        "max_length": length,
        "max_train_tokens": tokens,
        "max_eval_tokens": 500,
    }
    settings |= {
        "strategies": ["learnable"],
        "batch_size": 2,
        "epochs": epochs,
        "lr": 1e-3,
        "checkpoint_every": "100u",
        "log_with": ["none"],
    }
    iterbatch.run(make_config(**settings, save_dir=folder, run_name="soak"), Sampling())
    memory, files = zip(*samples, strict=True)
    growth = 100 * (max(memory) / memory[0] - 1)
    print(f"memory {min(memory):.0f}-{max(memory):.0f} MB, {growth:+.1f}% over the first sample at most")
    print(f"open files {min(files)}-{max(files)}")
    return max(memory) < 1.05 * memory[0] and max(files) <= files[0]


def text(folder: Path, size: int = GIGABYTE) -> bool:
    """One .txt file of real text, over and over with a number on each copy; a tenth each is held out."""
    from iterbatch.bench.prepare import prepare
    from iterbatch.checks import make_config
    from iterbatch.records.machine import peak_memory_mb

    data = Path(os.environ.get("ITERBATCH_DATA") or "../shared/data") / "wikitext-2" / "wiki.train.tokens"
    copy, file = data.read_text(encoding="utf-8"), folder / "large.txt"
    with file.open("w", encoding="utf-8") as out:
        number = 0
        while out.tell() < size:
            out.write(f"\n\n{number}\n\n{copy}")
            number += 1
    del copy
    begun = time.monotonic()
    prepared = prepare(make_config(data_dir=file, log_with=["none"]))
    tokens = prepared.blocks.ids.size + sum(each.tokens for each in prepared.texts.values())
    peak = peak_memory_mb()
    print(
        f"{file.stat().st_size / 1e9:.2f} GB, {tokens:,} tokens in {time.monotonic() - begun:.0f} s, peak "
        f"{peak:,.0f} MB"
    )
    return peak < 1500


def records(folder: Path, count: int = RECORDS) -> bool:
    """One arm's records, reported as at the end of a run."""
    from iterbatch.records.machine import peak_memory_mb
    from iterbatch.records.record import BatchRecord, EvalRecord, RecordWriter
    from iterbatch.records.write import write_json
    from iterbatch.report import page

    arm = folder / "run" / "abr" / "seed0"
    one = BatchRecord(0, 0, 3.21987654321, [3.21987654321, 3.1], 2, 2, 1.23e-4, 0.98765, 1020, 1.5e9, 0.0712)
    line = json.dumps(dataclasses.asdict(one))
    arm.mkdir(parents=True)
    with (arm / "batches.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(line.replace('"batch": 0', f'"batch": {number}') + "\n" for number in range(count))
    score = EvalRecord(
        "validation", 1.0, count, 2 * count, 1, 1.0, 1.0, 1e5, 10**4, 10**4, 10**5, 22.0, 22.0, 2.0, 1.0
    )
    with RecordWriter(arm / "evals.jsonl") as writer:
        for fraction in (0.0, 0.5, 1.0):
            writer.write(dataclasses.replace(score, fraction=fraction))
    text_metrics = dict.fromkeys(("distinct_1", "distinct_2", "rep_4", "mean_length"), 0.5)
    numbers = {
        "val_ppl": 22.0,
        "test_ppl": 22.0,
        "base_val_ppl": 99.0,
        "batches": count,
        "updates": 2 * count,
        "mean_repeats": 2.0,
    }
    numbers |= {"flops": 1.0, "train_seconds": 1.0, "skipped_updates": 0, "seed": 0}
    texts = {name: {"greedy": text_metrics, "sampled": text_metrics} for name in ("text", "base_text")}
    write_json(arm / "result.json", {"strategy": "abr", **numbers, **texts})
    begun = time.monotonic()
    page.write(folder / "run")
    seconds, peak = time.monotonic() - begun, peak_memory_mb()
    print(
        f"{count:,} records ({(arm / 'batches.jsonl').stat().st_size / 1e6:.0f} MB) reported in "
        f"{seconds:.0f} s, peak {peak:,.0f} MB"
    )
    return seconds < 60 and peak < 2000


TINY = {
    "dtype": "float32",
    "max_length": 16,
    "max_train_tokens": 256,
    "max_eval_tokens": 100,
    "batch_size": 4,
    "evals": 1,
    "prompts": 1,
    "lora_layers": "top:1",
    "log_with": "none",
}


def _command(command: str, model: Path, folder: Path, name: str, **settings: Any) -> list[str]:
    flags = {**TINY, "model_name": model, "save_dir": folder, "run_name": name, **settings}
    words = (word for key, value in flags.items() for word in (f"--{key}", *str(value).split()))
    return [sys.executable, "-m", "iterbatch", command, *words]


def pairs(folder: Path, seeds: int = 50) -> bool:
    """Four arms by so many seeds; nothing is left open, and the report is made."""
    _make_model(folder / "model")
    numbers = " ".join(map(str, range(seeds)))
    settings = {"strategies": "baseline abr fixed permuted", "seeds": numbers, "workers": 2}
    begun = time.monotonic()
    subprocess.run(_command("compare", folder / "model", folder, "run", **settings), check=True)
    ended = len(list((folder / "run").glob("*/*/result.json")))
    size = sum(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
    print(f"{ended} pairs in {time.monotonic() - begun:.0f} s, {size / 1e6:.0f} MB")
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "iterbatch", "report", str(folder / "run")], check=True)
    print(f"reported again in {time.monotonic() - begun:.0f} s")
    return ended == 4 * seeds


def crowd(folder: Path, runs: int = 50) -> bool:
    """So many runs begin at the same moment with the same text, activations kept; all must end alike."""
    _make_model(folder / "model")
    settings = {"strategies": "baseline", "reuse": "epoch", "epochs": 2}
    begun = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    there = [
        subprocess.Popen(
            _command("train", folder / "model", folder, f"run{number}", **settings),
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        for number in range(runs)
    ]
    codes = {each.wait() for each in there}
    results = [
        json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("run*/baseline/*/result.json")
    ]
    losses = [each["test_ppl"] for each in results]
    spread = max(losses) / min(losses) - 1
    seconds = time.monotonic() - begun
    print(f"{len(losses)} runs in {seconds:.0f} s, exit codes {codes}; perplexities differ by {spread:.2g}")
    return len(losses) == runs and codes == {0} and spread == 0


def _make_model(folder: Path) -> None:
    code = f"from campaigns.tiny import make_tiny; make_tiny({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


PARTS = {"soak": soak, "text": text, "records": records, "pairs": pairs, "crowd": crowd}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    part = PARTS[parser.parse_args().part]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ITERBATCH_CACHE"] = str(Path(scratch) / "cache")
        held = part(Path(scratch))
    print("as promised" if held else "NOT as promised")
    return not held


if __name__ == "__main__":
    raise SystemExit(main())
