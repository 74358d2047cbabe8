"""What a run leaves: records of batches and evaluations, JSON Lines in and out, and files written whole or not at all."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO, TypeVar

from iterbatch.errors import DataError


@dataclass(frozen=True)
class BatchRecord:
    """What happened to one batch."""

    batch: int  # index in its arm, from 0
    epoch: int
    initial_loss: float  # nats a label token, before any update on this batch
    losses: list[float]  # loss of each pass; the first is the initial loss
    repeats_planned: int
    repeats_done: int
    learning_rate: float
    gradient_norm: float  # of the fresh pass, before clipping
    tokens: int  # label tokens of the batch
    flops: float  # of all its passes and probes
    seconds: float  # train-only
    skipped_updates: int = 0


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation, and what the arm had spent when it was made."""

    split: str
    fraction: float  # of the budget
    batches: int
    updates: int
    tokens_trained: int
    flops: float
    train_seconds: float
    nats: float
    tokens: int
    words: int
    bytes: int
    ppl: float
    word_ppl: float
    byte_ppl: float
    bits_per_byte: float


Record = TypeVar("Record", BatchRecord, EvalRecord)


class RecordWriter:
    """Appends records to a JSON Lines file, each flushed, so that an interrupted run has lost none."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8", newline="\n")

    def write(self, record: BatchRecord | EvalRecord) -> None:
        """Append one record."""
        self._file.write(json.dumps(_finite(dataclasses.asdict(record)), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Yield the records of a file; a null stands for a number that was not finite.

    Raises:
        DataError: naming the line that cannot be read.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield kind(**_not_null(json.loads(line)))
            except (ValueError, TypeError) as problem:
                raise DataError(f"{path}, line {number}: not a {kind.__name__} ({problem})") from problem


def _finite(value: Any) -> Any:
    """JSON has no NaN: a float that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _not_null(row: dict[str, Any]) -> dict[str, Any]:
    def number(value: Any) -> Any:
        return math.nan if value is None else value

    return {key: [number(item) for item in value] if isinstance(value, list) else number(value) for key, value in row.items()}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a neighbour first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")


def environment() -> dict[str, Any]:
    """Versions, hardware and the git commit, for the manifest. No host name, user name or path."""
    import torch

    packages = ("iterbatch", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
    versions = {name: metadata.version(name) for name in packages if _installed(name)}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus},
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name") or platform.processor() or "unknown")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


_PROC_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Start a new peak for :func:`peak_memory_mb`, where the system can; elsewhere the peak is that of the process so far."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> float:
    """Peak memory in MB: of the accelerator where there is one, else resident in this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if _PROC_STATUS.exists():
        line = next(line for line in _PROC_STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 1e6
