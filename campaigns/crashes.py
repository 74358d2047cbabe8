"""Runs that are killed at random moments, again and again, and must end as the runs that were left alone.

    python -m campaigns.crashes               # 300 kills
    python -m campaigns.crashes --kills 20    # what the test suite does

Every run trains all strategies on a tiny model with a checkpoint after each pass. It gets SIGKILL,
SIGTERM or SIGINT at a moment drawn from the whole length of such a run, or SIGKILL at a sync or
rename, in the middle of writing a checkpoint, a report or a result; it is resumed, is killed
again, and is at last left to end. Then its records, evaluations, results, samples and adapters are
compared with those of a run of the same settings that nobody disturbed: all must be equal, but for
what a clock or the process's memory says.

Runs are forked from this process, which has imported everything and computed nothing, so that a
life takes a second.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers  # noqa: F401 - imported before the first fork

import iterbatch.evaluation.trained
import iterbatch.report.figures
import iterbatch.study.run
from campaigns.tiny import empty_figure, make_tiny
from iterbatch.cli.main import main as iterbatch_main
from iterbatch.strategy import STRATEGIES

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMED = {
    "seconds",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_mb",
    "seconds_saved",
    "seconds_charged",
    "store_gb",  # what others have stored by then counts
    "records",  # digests of what holds times, and of that
    "digest",
}
EVERY = {  # every strategy there is, each on a few batches
    "strategies": " ".join(STRATEGIES),
    "seeds": "0 1",
    "max_train_tokens": 640,
    "batch_size": 1,
    "grad_accum": 2,
    "epochs": 1,
    "gap": 2,
    "loss_threshold": "auto",
    "prompts": 1,
}
VARIANTS: list[dict[str, Any]] = [
    {"lora_layers": "all", "reuse": "batch"},
    {"lora_layers": "top:1", "reuse": "batch"},
    {"lora_layers": "top:1", "reuse": "epoch"},
    {"lora_layers": "top:1", "reuse": "epoch", "lora_dropout": 0.1, "grad_accum": 2},
    {"lora_layers": "all", "reuse": "off", "lora_dropout": 0.1, "match": "flops"},
    {**EVERY, "lora_layers": "top:1", "placement": "at_once"},
    {**EVERY, "lora_layers": "top:1", "placement": "spaced", "reuse": "epoch", "match": "flops"},
]
THERE = ("manifest.json", "config.yaml", "study.json", "lock")  # they hold times and paths
KILLS_A_RUN = 8
IN_A_WRITE = 0.4  # share of lives that end at a sync or rename instead of at a moment
WRITES = 600  # about as many syncs and renames as a run makes


def flags(model: Path, save_dir: Path, variant: dict[str, Any]) -> list[str]:
    """The command line of a run."""
    settings = {
        "model_name": model,
        "dtype": "float32",
        "max_length": 32,
        "max_train_tokens": 1536,
        "max_eval_tokens": 200,
        "epochs": 2,
        "batch_size": 3,
        "evals": 2,
        "lr": 0.01,
        "loss_threshold": 3.0,
        "probe_rate": 0.5,
        "probe_budget": 1.0,
        "log_with": "none",
        "checkpoint_every": "1u",
        "save_dir": save_dir,
        "run_name": "run",
        **variant,
    }
    return [
        "train",
        *(word for name, value in settings.items() for word in (f"--{name}", *str(value).split())),
    ]


def die_at(number: int) -> None:
    """Let this process be killed at its so-many-th sync or rename of a file: in the middle of writing."""
    operations = itertools.count()

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(operations) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return wrapped

    os.fsync, os.replace = dying(os.fsync), dying(os.replace)


def start(arguments: list[str], log: Path, cache: Path, dying_at: int | None = None) -> int:
    """Fork a run; returns its process number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["ITERBATCH_CACHE"] = str(cache)
    torch.set_num_threads(1)  # a model this small gains nothing from more
    if dying_at is not None:
        die_at(dying_at)
    code = 70
    try:
        code = iterbatch_main(arguments)
    except SystemExit as problem:
        code = int(problem.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(child: int) -> int:
    """Wait for a run; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(child: int) -> bool:
    """Whether a run is over, without taking its exit code."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def content(run_dir: Path) -> dict[str, Any]:
    """Everything a run has left that must not depend on how often it was killed."""
    kept: dict[str, Any] = {}
    for file in sorted(run_dir.rglob("*")):
        name = str(file.relative_to(run_dir))
        if file.is_dir() or name in THERE or file.suffix in (".md", ".png", ".pdf", ".html", ".csv", ".tex"):
            kept[name] = "there"
        elif file.suffix == ".jsonl":
            kept[name] = [untimed(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        elif file.suffix == ".json":
            kept[name] = untimed(json.loads(file.read_text(encoding="utf-8")))
            if "target_modules" in kept[name]:
                kept[name]["target_modules"].sort()  # PEFT writes a set
        else:
            kept[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return kept


def untimed(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in TIMED}
    return [untimed(item) for item in value] if isinstance(value, list) else value


class Campaign:
    """Runs, kills, and what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.model, self.random = folder, folder / "model", random.Random(seed)
        child = os.fork()  # building a model starts threads, which do not survive a fork: not in this process
        if not child:
            make_tiny(self.model)
            os._exit(0)
        end(child)
        self.references: dict[int, tuple[dict[str, Any], float]] = {}
        self.kills: Counter[str] = Counter()
        self.problems: list[str] = []

    def reference(self, number: int) -> tuple[dict[str, Any], float]:
        """What an undisturbed run of a variant leaves, and how long it takes."""
        if number not in self.references:
            folder = self.folder / f"reference{number}"
            begun = time.monotonic()
            code = end(
                start(
                    flags(self.model, folder, VARIANTS[number]),
                    self.folder / "reference.log",
                    folder / "cache",
                )
            )
            assert code == 0, (self.folder / "reference.log").read_text(encoding="utf-8")
            self.references[number] = content(folder / "run"), time.monotonic() - begun
        return self.references[number]

    def one(self, number: int, kills: int) -> None:
        """One run of a variant, killed so many times."""
        expected, length = self.reference(number)
        folder = self.folder / "disturbed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        log, run_dir = folder / "log", folder / "run"
        for life in range(200):
            going_on = (run_dir / "config.yaml").exists()
            arguments = (
                ["train", "--resume", str(run_dir)]
                if going_on
                else flags(self.model, folder, VARIANTS[number])
            )
            in_a_write = life < kills and self.random.random() < IN_A_WRITE
            child = start(
                arguments, log, folder / "cache", self.random.randrange(WRITES) if in_a_write else None
            )
            if in_a_write:
                code = end(child)
                if code == 0:
                    break
                self.kills[f"SIGKILL in a write: {code}"] += 1
                if code != -signal.SIGKILL:
                    self.problems.append(
                        f"variant {number}: gave {code}: {log.read_text(encoding='utf-8')[-2000:]}"
                    )
                    break
                continue
            if life >= kills:
                code = end(child)
                if code != 0:
                    self.problems.append(
                        f"variant {number}: ended with {code}: {log.read_text(encoding='utf-8')[-2000:]}"
                    )
                break
            chosen = self.random.choice(SIGNALS)
            time.sleep(self.random.uniform(0, length))
            if ended(child):
                break
            os.kill(child, chosen)
            code = end(child)
            self.kills[f"{chosen.name}: {code}"] += 1
            if code not in (
                0,
                -chosen,
                128 + chosen,
            ):  # 0: it came to its end before it came to a place to stop
                self.problems.append(
                    f"variant {number}: {chosen.name} gave {code}: {log.read_text(encoding='utf-8')[-2000:]}"
                )
                break
            if code == 0:
                break
        found = content(run_dir)
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                self.problems.append(f"variant {number}: {name} differs from the undisturbed run's")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    iterbatch.report.figures._save = empty_figure
    with tempfile.TemporaryDirectory() as scratch:
        campaign, runs, begun = Campaign(Path(scratch), arguments.seed), 0, time.monotonic()
        while campaign.kills.total() < arguments.kills and not campaign.problems:
            campaign.one(runs % len(VARIANTS), min(KILLS_A_RUN, arguments.kills - campaign.kills.total()))
            runs += 1
    print(
        f"{campaign.kills.total()} kills of {runs} runs in {time.monotonic() - begun:.0f} s (peft "
        f"{peft.__version__}): {dict(campaign.kills)}"
    )
    for problem in campaign.problems:
        print(problem)
    print(
        "records lost or doubled, or results unequal: "
        + (f"{len(campaign.problems)}" if campaign.problems else "none")
    )
    return bool(campaign.problems)


if __name__ == "__main__":
    raise SystemExit(main())
