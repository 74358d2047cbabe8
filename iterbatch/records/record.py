"""Records of batches and evaluations, JSON Lines in and out."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from iterbatch.errors import DataError
from iterbatch.language import _
from iterbatch.records.write import finite, naming


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
    # Earlier batches that got a pass each while this was the current one.
    revisited: list[int] = field(default_factory=list)


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
        line = json.dumps(finite(dataclasses.asdict(record)), ensure_ascii=False) + "\n"
        with naming(self.path):
            self._file.write(line)
            self._file.flush()
        self.size += len(line.encode("utf-8"))

    def sync(self) -> None:
        """Have everything written so far on the disk itself, whatever happens to the machine."""
        with naming(self.path):
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
            raise ValueError(_("{name} has lost records that it continues from").format(name=self.path.name))
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


def passes_received(records: Iterable[BatchRecord]) -> list[int]:
    """Passes that each batch of an arm got, whenever they were made."""
    passes: dict[int, int] = {}
    for record in records:
        for batch, made in ((record.batch, record.repeats_done), *((held, 1) for held in record.revisited)):
            passes[batch] = passes.get(batch, 0) + made
    return [passes[batch] for batch in sorted(passes)]


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
                yield DataError(
                    _("{path}, line {number}: not a {name} ({problem})").format(
                        path=path, number=number, name=kind.__name__, problem=str(problem)[:200]
                    )
                )
            else:
                yield record


# What JSON may hold for a field's type.
_ALLOWED: dict[Any, Any] = {int: int, float: (int, float), str: str, list[float]: list, list[int]: list}


def _not_null(row: dict[str, Any]) -> dict[str, Any]:
    def number(value: Any) -> Any:
        return math.nan if value is None else value

    return {
        key: [number(item) for item in value] if isinstance(value, list) else number(value)
        for key, value in row.items()
    }


def tolerant(path: Path, kind: type[Record]) -> tuple[list[Record], int]:
    """The records of a file, and how many lines are none: cut off, damaged, of another version."""
    records: list[Record] = []
    skipped = 0
    try:
        for record in read_lines(path, kind):
            if isinstance(record, DataError):
                skipped += 1
            else:
                records.append(record)
    except OSError:
        return records, skipped
    return records, skipped
