"""What a run leaves: records of batches and evaluations, JSON Lines in and out, and files written whole or not at all."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO, TypeVar

from iterbatch.errors import DataError

SCRATCH = ".part"  # how the names of files that are being written end


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
    revisited: list[int] = field(default_factory=list)  # earlier batches that got a pass each while this was the current one


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
        self.path = path
        self._file: TextIO = path.open("a", encoding="utf-8", newline="\n")
        self.size = os.fstat(self._file.fileno()).st_size  # bytes

    def write(self, record: BatchRecord | EvalRecord) -> None:
        """Append one record."""
        line = json.dumps(_finite(dataclasses.asdict(record)), ensure_ascii=False) + "\n"
        self._file.write(line)
        self._file.flush()
        self.size += len(line.encode("utf-8"))

    def sync(self) -> None:
        """Have everything written so far on the disk itself, whatever happens to the machine."""
        os.fsync(self._file.fileno())

    def state_dict(self) -> dict[str, int]:
        """How far it has written."""
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Drop what was written after a state.

        Raises:
            ValueError: where the file has lost records since, or is another one.
        """
        size = state["size"]
        with self.path.open("rb") as file:
            file.seek(max(0, size - 1))
            whole = os.fstat(file.fileno()).st_size >= size and (size == 0 or file.read(1) == b"\n")
        if not whole:
            raise ValueError(f"{self.path.name} has lost records that it goes on from")
        self._file.truncate(size)
        self.size = size

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
    for record in read_lines(path, kind):
        if isinstance(record, DataError):
            raise record
        yield record


def read_lines(path: Path, kind: type[Record]) -> Iterator[Record | DataError]:
    """Yield a record for each line of a file, or what is wrong with that line."""
    allowed = {each.name: _ALLOWED[each.type] for each in dataclasses.fields(kind)}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = _not_null(json.loads(line.decode("utf-8")))
                for name, value in row.items():
                    if not isinstance(value, allowed[name]):
                        raise TypeError(f"{name} is {value!r}")
                record = kind(**row)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
                yield DataError(f"{path}, line {number}: not a {kind.__name__} ({str(problem)[:200]})")
            else:
                yield record


_ALLOWED: dict[Any, Any] = {int: int, float: (int, float), str: str, list[float]: list, list[int]: list}  # what JSON may hold for a field's type


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


@contextlib.contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """A neighbour to write to, a file or a folder: on the disk and under its own name when the block ends, gone when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}{SCRATCH}")
    try:
        yield scratch
        for file in [scratch, *scratch.rglob("*")] if scratch.is_dir() else [scratch]:
            _sync(file)
        if path.is_dir():  # no system replaces a folder that is not empty
            shutil.rmtree(path)
        os.replace(scratch, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if path.is_file() and os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed while writing have left."""
    for scratch in folder.rglob(f".*{SCRATCH}"):
        shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_or_not(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


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
