"""Checkpoints of one arm: a state as one safetensors file, whole or not at all, checked when it is read.

What lives here: how a state becomes a file and back, and when one is written. What does not: what
the parts of a state are, which each part says by ``state_dict`` and ``load_state_dict``.
"""

import base64
import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from iterbatch.errors import RunError, first_line
from iterbatch.language import _
from iterbatch.records.write import whole_or_not
from iterbatch.runtime.processes import agreed, count, from_main, gathered, is_main, rank

FORMAT = 1  # of the file; one of another number is not read
KEPT = 2  # checkpoints of an arm

Warn = Callable[[str], None]


class Part(Protocol):
    """Something whose state a checkpoint holds: plain values, tensors, and lists and dicts of them."""

    def state_dict(self) -> Any:
        """Its state."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Take a state over."""
        ...


# ------------------------------------------------------------------------------------------------------------
# A state and its file


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON can hold it, its tensors put aside under new names.

    Raises:
        TypeError: for a value that is none of those a :class:`Part` may have.
    """
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, np.ndarray):
        return {"$array": pack(value.tolist(), tensors), "dtype": value.dtype.str}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {"$items": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [pack(item, tensors) for item in value]
    if isinstance(value, np.generic):
        return pack(value.item(), tensors)
    raise TypeError(
        _(
            "a state_dict holds a {name}; allowed are numbers, strings, tensors, arrays, lists and dicts "
            "of them"
        ).format(name=type(value).__name__)
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that :func:`pack` was given; tuples come back as lists."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$array" in value:
        return np.array(unpack(value["$array"], tensors), dtype=np.dtype(value["dtype"]))
    if "$float" in value:
        return float(value["$float"])
    return {unpack(key, tensors): unpack(item, tensors) for key, item in value["$items"]}


def as_json(state: Any) -> dict[str, Any]:
    """A state as plain JSON, its tensors as safetensors in base64: for a file that somebody else writes."""
    tensors: dict[str, Tensor] = {}
    packed = pack(state, tensors)
    return {"state": packed, "tensors": base64.b64encode(save(tensors)).decode()}


def from_json(content: Mapping[str, Any]) -> Any:
    """The state that :func:`as_json` was given.

    Raises:
        ValueError: where it is damaged.
    """
    try:
        return unpack(content["state"], load(base64.b64decode(content["tensors"])))
    except (SafetensorError, KeyError, TypeError) as problem:
        raise ValueError(str(problem)) from problem


def write_state(path: Path, state: Any) -> None:
    """Write a state to a safetensors file: tensors, the rest as JSON in its metadata, a digest of both."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(state, tensors), allow_nan=False)
    with whole_or_not(path) as scratch:
        save_file(
            tensors,
            scratch,
            metadata={"format": str(FORMAT), "state": text, "sha256": _digest(text, tensors)},
        )


def read_state(path: Path) -> Any:
    """Read a state.

    Raises:
        ValueError: where the file is damaged or of another format.
        OSError: where it cannot be read at all.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as problem:
        raise ValueError(str(problem)) from problem
    if metadata.get("format") != str(FORMAT):
        raise ValueError(
            _("its format is {then}, not {format}").format(then=metadata.get("format"), format=FORMAT)
        )
    if metadata.get("sha256") != _digest(metadata.get("state", ""), tensors):
        raise ValueError(_("its checksum is wrong"))
    return unpack(json.loads(metadata["state"]), tensors)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# When a checkpoint is made, and of what


class RandomStates:
    """Every global random state, of all processes.

    Args:
        seed: Of the arm.
        passes: Tells how many have been made.
        batch_rows: Blocks of a batch, over all processes.
        warn: Is notified where states cannot be carried over.
    """

    def __init__(self, seed: int, passes: Callable[[], int], batch_rows: int, warn: Warn) -> None:
        self._seed, self._passes, self._batch_rows, self._warn = seed, passes, batch_rows, warn

    def state_dict(self) -> dict[str, Any]:
        """Python's, NumPy's, torch's, and each GPU's, a process."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - a user's may draw from it
        mine = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}
        return {"processes": gathered(mine), "batch_rows": self._batch_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved states; from new ones where there were more or fewer processes.

        Raises:
            RunError: where these then share another batch.
        """
        saved = state["processes"]
        if len(saved) != count():
            self._begin_anew(len(saved), state.get("batch_rows"))
            return
        mine = saved[rank()]
        version, inner, gauss = mine["python"]
        random.setstate((version, tuple(inner), gauss))
        np.random.set_state(mine["numpy"])  # noqa: NPY002 - a user's may draw from it
        torch.set_rng_state(mine["torch"])
        if mine["cuda"]:
            torch.cuda.set_rng_state_all(mine["cuda"])

    def _begin_anew(self, before: int, rows: int | None) -> None:
        """States of their own for other processes, set by seed, passes and rank alone."""
        if rows != self._batch_rows:  # an earlier version did not keep it
            raise RunError(
                _(
                    "the run was made by {count} process(es) and cannot be resumed by {count2}, which would "
                    "share another batch; start it with as many as before"
                ).format(count=before, count2=count())
            )
        drawn = np.random.SeedSequence([self._seed, self._passes(), rank(), count()])
        first, second, third = (int(each) for each in drawn.generate_state(3, np.uint32))
        random.seed(first)
        np.random.seed(second)  # noqa: NPY002 - a user's may draw from it
        torch.manual_seed(third)  # each GPU's, too
        self._warn(
            _(
                "{count2} process(es) resume what {count} began: random states cannot be carried over, and "
                "are drawn anew from seed, pass and process. Dropout differs; all else is equal to "
                "rounding"
            ).format(count=before, count2=count())
        )


class Checkpoints:
    """The checkpoint files of one arm; the last two are kept.

    What ``at_start`` parts say is taken when a batch begins, what ``live`` parts say when the
    checkpoint is made: between two passes of that batch, or before the next one.

    Args:
        folder: Of the arm.
        at_start: Parts whose state goes back to the beginning of the batch: strategy, stream,
            records, progress.
        live: Parts whose state is that after the last pass: adapter, optimizer, ledger, step, random states.
        warn: Is notified of files that cannot be written or read.
    """

    def __init__(
        self, folder: Path, at_start: Mapping[str, Part], live: Mapping[str, Part], warn: Warn
    ) -> None:
        self.folder, self.at_start, self.live, self._warn = folder, at_start, live, warn
        self._start: dict[str, Any] = {}
        self._unwritable = False

    def begin(self) -> None:
        """A batch is about to begin."""
        self._start = {name: copy.deepcopy(part.state_dict()) for name, part in self.at_start.items()}

    def save(self) -> None:
        """Write one, and forget those before the last two.

        A full disk ends no training: there is one warning, and what is there stays.
        """
        state = {
            "at_start": self._start,
            "live": {name: part.state_dict() for name, part in self.live.items()},
        }
        if not is_main():
            return
        files = checkpoint_files(self.folder)
        number = _number(files[-1]) + 1 if files else 1
        try:
            write_state(self.folder / f"checkpoint-{number:06d}.safetensors", state)
        except TypeError as problem:
            raise RunError(_("no checkpoint can be made: {problem}").format(problem=problem)) from problem
        except (OSError, SafetensorError) as problem:
            if not self._unwritable:
                self._warn(
                    _(
                        "no checkpoint could be written to {folder} ({problem}); training continues, the "
                        "one before stays"
                    ).format(folder=self.folder, problem=problem)
                )
            self._unwritable = True
            return
        self._unwritable = False
        for old in files[: 1 - KEPT]:
            old.unlink(missing_ok=True)

    def restore(self) -> bool:
        """Give every part the last state that is whole.

        One that is damaged is named, and the one before it is taken.

        Returns:
            False where there is none. Parts may then hold anything.
        """
        return any(agreed(self._restore(file)) for file in reversed(from_main(checkpoint_files(self.folder))))

    def _restore(self, file: Path) -> bool:
        try:
            state = read_state(file)
            for group, parts in (("at_start", self.at_start), ("live", self.live)):
                for name, part in parts.items():
                    part.load_state_dict(state[group][name])
        except (
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            RuntimeError,
            OSError,
        ) as problem:
            # Whatever a damaged or foreign file may bring about in a part.
            self._warn(
                _(
                    "the checkpoint {file} cannot be used ({problem}); the one before it is taken, or "
                    "else the arm starts anew"
                ).format(file=file, problem=first_line(problem))
            )
            return False
        self._start = state["at_start"]
        return True


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of an arm, oldest first: by their numbers, whatever the clock said."""
    return sorted(
        (file for file in folder.glob("checkpoint-*.safetensors") if file.stem[11:].isdecimal()), key=_number
    )


def remove_checkpoints(folder: Path) -> None:
    """An arm is finished: what it leaves is its adapter."""
    for file in checkpoint_files(folder):
        file.unlink()


def _number(file: Path) -> int:
    return int(file.stem[11:])
