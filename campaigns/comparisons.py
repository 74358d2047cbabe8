"""Comparisons whose processes are killed, and must end as the comparison that was left alone.

    python -m campaigns.comparisons               # 60 kills
    python -m campaigns.comparisons --kills 6     # four minutes

A comparison of three arms by two seeds on a tiny model, by one, two or four workers. Its parent, a worker, or
both get SIGKILL, SIGTERM, SIGINT or SIGSTOP at a moment drawn from the whole length of such a comparison, or
SIGKILL at a sync or rename: within a claim, a checkpoint, a record, a result, a report. The same command is
given again at once, while orphans may still be there, or later; at last it is left to end. Then all records,
results, samples and adapters must equal the undisturbed comparison's, but for what a clock or memory says;
whatever ends with exit code 0 must have no pair open; and no worker may outlive its parent by more than its
time of grace.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from campaigns.crashes import content
from iterbatch.records import layout
from iterbatch.study.engines import worker

STUDY: dict[str, Any] = {
    "dtype": "float32",
    "max_length": 32,
    "max_train_tokens": 1024,
    "max_eval_tokens": 200,
    "epochs": 1,
    "batch_size": 2,
    "evals": 2,
    "lr": 0.01,
    "match": "flops",
    "loss_threshold": 3.0,
    "prompts": 1,
    "strategies": "baseline abr permuted",
    "seeds": "0 1",
    "checkpoint_every": "1u",
    "lora_layers": "top:1",
    "reuse": "epoch",
}
PAIRS = 6
STARTS = 4  # seconds before a worker is there
KILLS_A_COMPARISON = 8
WRITES = {"parent": 60, "worker": 400}  # about as many syncs and renames as one of them makes
IN_A_WRITE = 0.4  # share of lives that end at a sync or rename instead of at a moment
# In every process that is started: one of the kind that is named dies at its so-many-th sync or rename.
DIES = """
import os, signal, sys
who, number, marker = os.environ.get("CAMPAIGN_DIES", "::").split(":", 2)
if who and ("engines.worker" in " ".join(sys.orig_argv)) == (who == "worker"):
    left = [int(number)]
    def dying(operation):
        def wrapped(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                try:
                    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                    os.kill(os.getpid(), signal.SIGKILL)
                except FileExistsError:
                    pass
            return operation(*arguments, **options)
        return wrapped
    os.fsync, os.replace = dying(os.fsync), dying(os.replace)
"""


def command(model: Path, folder: Path, workers: int) -> list[str]:
    """The command line of a comparison."""
    settings = STUDY | {"model_name": model, "save_dir": folder, "run_name": "run", "workers": workers}
    flags = (word for name, value in settings.items() for word in (f"--{name}", *str(value).split()))
    return [sys.executable, "-m", "iterbatch", "compare", *flags]


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a comparison has left that must not depend on how often it was killed."""
    kept = content(run_dir)
    return {name: value for name, value in kept.items() if not name.startswith(layout.WORKERS)}


class Campaign:
    """Comparisons, kills, and what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.hook = folder / "hook"
        self.hook.mkdir()
        (self.hook / "sitecustomize.py").write_text(DIES, encoding="utf-8")
        subprocess.run(
            [sys.executable, "-c", f"from campaigns.tiny import make_tiny; make_tiny({str(self.model)!r})"],
            check=True,
        )
        self.kills: Counter[str] = Counter()
        self.problems: list[str] = []
        begun = time.monotonic()
        reference = self.start(folder / "reference", 1)
        if reference.wait():
            raise SystemExit((folder / "reference" / "log").read_text(encoding="utf-8"))
        self.length, self.expected = time.monotonic() - begun, outcome(folder / "reference" / "run")
        print(f"undisturbed: {self.length:.0f} s", flush=True)

    @property
    def model(self) -> Path:
        """The base, which all comparisons share."""
        return self.folder / "model"

    def start(self, folder: Path, workers: int, dies: str = "") -> subprocess.Popen[bytes]:
        """Start a comparison, or go on with it."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join([str(self.hook), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {
            "ITERBATCH_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": paths,
            "CAMPAIGN_DIES": dies,
        }
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                command(self.model, folder, workers), stdout=log, stderr=log, env=environment
            )

    def one(self, kills: int, workers: int) -> None:
        """One comparison, killed so many times."""
        folder = self.folder / "disturbed"
        shutil.rmtree(folder, ignore_errors=True)
        seen: set[psutil.Process] = set()
        for life in range(kills + 8):
            dies = ""
            if life < kills and self.random.random() < IN_A_WRITE:
                who = self.random.choice(list(WRITES))
                marker = folder / f"marker{life}"
                dies = f"{who}:{self.random.randrange(WRITES[who])}:{marker}"
            parent = self.start(folder, workers, dies)
            if life < kills and not dies:
                self._disturb(parent, folder, seen)
            code = parent.wait()
            if dies and marker.exists():
                self.kills[f"{who}, SIGKILL in a write"] += 1
            self._check(folder, code, life)
            if self.problems:
                return
            if life >= kills and code == 0 and not list((folder / "run").glob(f"*/*/{layout.FAILED}")):
                break
            if self.random.random() < 0.3:
                time.sleep(3)  # later: orphans have noticed
        else:
            self.problems.append("it did not come to its end")
        found = outcome(folder / "run")
        for name in sorted({*self.expected, *found}):
            if self.expected.get(name) != found.get(name):
                self.problems.append(f"{workers} workers: {name} differs from the undisturbed comparison's")
        _, outliving = psutil.wait_procs(list(seen), timeout=worker.GRACE + 10)
        self.problems += [f"worker {process.pid} outlived its parent" for process in outliving]

    def _disturb(self, parent: subprocess.Popen[bytes], folder: Path, seen: set[psutil.Process]) -> None:
        """Let a process of a comparison, or all of them, get a signal after some time."""
        done = sum(map(layout.ended, (folder / "run").glob("*/seed*")))
        time.sleep(self.random.uniform(STARTS, STARTS + (self.length - STARTS) * (1 - done / PAIRS)))
        if parent.poll() is not None:
            return
        workers = psutil.Process(parent.pid).children()
        seen.update(workers)
        who = self.random.choice(["parent", "worker", "both", "worker", "parent"])
        signum = self.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        chosen = [psutil.Process(parent.pid)] if who != "worker" else []
        if who != "parent" and workers:
            chosen.append(self.random.choice(workers))
        halted = who == "parent" and bool(workers) and self.random.random() < 0.5
        if halted:  # a worker that does not hear what comes next
            workers[0].suspend()
        for process in chosen:
            try:
                process.send_signal(signum)
            except psutil.NoSuchProcess:
                continue
        if chosen:
            self.kills[f"{who}, {signum.name}{', a worker halted' if halted else ''}"] += 1

    def _check(self, folder: Path, code: int, life: int) -> None:
        log = (folder / "log").read_text(encoding="utf-8")[-2000:]
        run = folder / "run"
        asked = {sign for signum in (signal.SIGTERM, signal.SIGINT) for sign in (-signum, 128 + signum)}
        if code not in {0, -signal.SIGKILL, *asked}:
            self.problems.append(f"life {life}: exit code {code}: {log}")
        if "Traceback" in log:
            self.problems.append(f"life {life}: a traceback: {log}")
        ended = [each for each in run.glob("*/seed*") if layout.ended(each)]
        if code == 0 and len(ended) != PAIRS:
            self.problems.append(f"life {life}: ended well with {len(ended)} of {PAIRS} pairs: {log}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begun, runs = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        campaign = Campaign(Path(scratch), arguments.seed)
        while campaign.kills.total() < arguments.kills and not campaign.problems:
            left = arguments.kills - campaign.kills.total()
            campaign.one(min(KILLS_A_COMPARISON, left), (1, 2, 4)[runs % 3])
            runs += 1
            print(f"{runs} comparisons, {dict(campaign.kills)}", flush=True)
    took = time.monotonic() - begun
    print(json.dumps({"kills": campaign.kills.total(), "comparisons": runs, "seconds": round(took)}))
    for problem in campaign.problems:
        print(problem)
    print("lost, doubled or unequal: " + (f"{len(campaign.problems)}" if campaign.problems else "none"))
    return bool(campaign.problems)


if __name__ == "__main__":
    raise SystemExit(main())
