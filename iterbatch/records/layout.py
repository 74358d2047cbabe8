"""The names of a run's files, each once.

A run's folder holds ``config.yaml``, ``manifest.json``, ``study.json``, the reports, and
``ARM/seedK/`` for every arm and seed. A study of several cells holds such a folder a cell,
``CELL/ARM/seedK/``.
"""

from collections.abc import Iterator
from pathlib import Path

# In the folder of a run, or of a cell
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
PLACES = "places.json"  # folders of this machine, not to be shared
TRACKING = "tracking"
BASE_LOSSES = "base_losses.json"  # where an arm has asked for them
FIGURES = "figures"

# In the folder of a run or a study
STUDY = "study.json"
TUNING = "tuning.json"  # of the trials that its learning rates were chosen by
SUMMARY, SUMMARY_PAGE = "summary.json", "summary.md"
REPORT, REPORT_TEXT, METRICS, TABLE = "report.html", "report.md", "metrics.csv", "table.tex"
LOCK, HOLDER = "lock", "holder.json"
WORKERS = ".workers"  # claims, locks and logs

# In the folder of one arm and seed
BATCHES, EVALS = "batches.jsonl", "evals.jsonl"
RESULT = "result.json"  # written last: the arm has ended
FAILED = "failed.json"  # instead: it crashed
DOCUMENTS = "documents.json"  # nats and tokens of every scored document
SAMPLES, SAMPLES_PAGE = "samples.json", "samples.md"
SCHEDULER = "scheduler.json"  # what learnable has learned
ADAPTER = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SEED = "seed"


def arm_folder(run_dir: Path, arm: str, seed: int) -> Path:
    """Where the records of an arm and seed are."""
    return run_dir / arm / f"{_SEED}{seed}"


def seed_of(folder: Path) -> int | None:
    """The seed of such a folder, by its name; None where it is not one."""
    number = folder.name.removeprefix(_SEED)
    return int(number) if folder.name.startswith(_SEED) and number.isdecimal() else None


def ended(folder: Path) -> bool:
    """Whether an arm and seed has a result, or has failed."""
    return (folder / RESULT).exists() or (folder / FAILED).exists()


def ended_folders(run_dir: Path) -> Iterator[tuple[str, int, Path]]:
    """Arm, seed and folder of all that has ended, by arm and seed."""
    found = [
        (folder.parent.name, seed_of(folder), folder)
        for folder in run_dir.glob(f"*/{_SEED}*")
        if ended(folder)
    ]
    numbered = [(arm, seed, folder) for arm, seed, folder in found if seed is not None]
    yield from sorted(numbered, key=lambda each: each[:2])
