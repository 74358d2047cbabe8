"""Block activations on disk: memory-mapped, checksummed, shared by arms, seeds and later runs.

A store is a folder with ``header.json`` (what it belongs to), ``activations.bin`` (one slot an
item, sparse) and ``index.bin`` (one entry an item). An item is served only when its entry is there
and its checksum, taken over its bytes, its number and its seconds, is right: a process that dies
between the two writes leaves an item that is missing, not one that is wrong.

What does not live here: when activations are computed or read (:mod:`iterbatch.reuse.prefix`).
"""

import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from iterbatch.data.cache import cache_folder
from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records.write import read_json, refuse_links, write_json

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ENTRY = np.dtype([("checksum", "<u8"), ("seconds", "<f8")])  # checksum 0: nothing stored
FILES_WITHIN = 10  # seconds a reader waits for the files that another process is making
PRESENT = 1 << 32  # added to the 32 bits of a checksum, so that none is 0

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Layout:
    """Which items a store has room for."""

    lengths: Sequence[int]  # tokens an item
    width: int  # hidden size
    dtype: str  # of DTYPES
    limit_bytes: float = float("inf")

    @property
    def offsets(self) -> np.ndarray:
        """Bytes before each item, and the total: (items + 1,)."""
        return (
            np.concatenate([[0], np.cumsum(np.asarray(self.lengths, dtype=np.int64))])
            * self.width
            * DTYPES[self.dtype].itemsize
        )

    @property
    def capacity(self) -> int:
        """The first so many items are stored: that depends on the limit alone, not on who is met first."""
        return int(np.searchsorted(self.offsets, self.limit_bytes, side="right")) - 1

    @property
    def bytes(self) -> int:
        """Disk space of a full store."""
        return int(self.offsets[self.capacity])


class ActivationStore:
    """The activations of one text at one cut of one model.

    Args:
        folder: Of this store alone, named after its key.
        header: What the key is made of, and what ``iterbatch cache list`` shows.
        layout: Items and sizes.
        warn: Is notified once of each kind of trouble; training continues.
        leader: Whether to take the lock. Other processes of the same run follow: they write where
            the leader may.
        writable: For a follower, whether its leader holds the lock.

    Raises:
        OSError: where the folder can neither be written nor read.
    """

    def __init__(
        self,
        folder: Path,
        header: dict[str, Any],
        layout: Layout,
        warn: Warn,
        *,
        leader: bool = True,
        writable: bool = True,
    ) -> None:
        self.folder, self.layout = folder, layout
        self.capacity, self._offsets = layout.capacity, layout.offsets
        self._warn, self._warned = warn, set[str]()
        self._lock: FileLock | None = None
        self.writable = writable
        if leader:
            self.writable = self._take_lock() and self._own(header)
        self._open()
        self._verified = np.zeros(self.capacity, dtype=bool)

    # -- opening ------------------------------------------------------------------------------------- -----

    def _take_lock(self) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_links(self.folder)
            lock = FileLock(self.folder / "lock", blocking=False)
            lock.acquire()
        except Timeout:
            self._wait_for_files()
            self._say(
                "busy",
                _("another run is filling {name}; this one reads what is there and stores nothing").format(
                    name=self.folder.name
                ),
            )
            return False
        except RunError as problem:
            self._say(
                "link",
                _("{problem}; the activation store is read, nothing is stored").format(problem=problem),
            )
            return False
        except OSError as problem:
            if not (self.folder / "header.json").exists():
                raise
            self._say(
                "read-only",
                _(
                    "the activation store {folder} cannot be written ({problem}); it is read, nothing is "
                    "stored"
                ).format(folder=self.folder, problem=problem.strerror),
            )
            return False
        self._lock = lock
        return True

    def _wait_for_files(self) -> None:
        """Who holds the lock may only just have taken it."""
        until = time.monotonic() + FILES_WITHIN
        while self._files_short() and time.monotonic() < until:
            time.sleep(0.02)

    def _files_short(self) -> bool:
        return any(
            not (file := self.folder / name).exists() or file.stat().st_size < size
            for name, size in self._sizes.items()
        )

    @property
    def _sizes(self) -> dict[str, int]:
        """Bytes of each file at least."""
        return {
            "index.bin": len(self.layout.lengths) * ENTRY.itemsize,
            "activations.bin": self.layout.bytes,
        }

    def _own(self, header: dict[str, Any]) -> bool:
        """Make the files this store's own, emptied where they belong to something else.

        They only ever grow.
        """
        file = self.folder / "header.json"
        if file.exists() and read_json(file) != header:
            self._say(
                "foreign",
                _(
                    "the activation store {folder} belongs to another key or its header is damaged; it "
                    "is built anew"
                ).format(folder=self.folder),
            )
            for name in self._sizes:
                (self.folder / name).unlink(missing_ok=True)
        write_json(file, header)
        for name, size in self._sizes.items():
            with (self.folder / name).open("ab") as content:
                # A file cut short is filled up with zeros, and the items that are lost fail their checksum.
                content.truncate(max(size, content.tell()))
                if name == "index.bin":  # all of it is read through a map; of the rest only what was written
                    _allocate(content.fileno(), size)
        return True

    def _open(self) -> None:
        mode = "r+b" if self.writable else "rb"
        self._index_file = (self.folder / "index.bin").open(mode, buffering=0)
        self._file = (self.folder / "activations.bin").open(mode, buffering=0)
        if self._files_short():  # a reader cannot repair it
            self.capacity = 0
            self._index, self._data = np.empty(0, dtype=ENTRY), np.empty(0, dtype=np.uint8)
            self._say(
                "short",
                _("the activation store {folder} is cut short and cannot be written; it is not used").format(
                    folder=self.folder
                ),
            )
            return
        # Reads go through the map, writes through the file: writing to a map kills the process when
        # the disk is full.
        items = len(self.layout.lengths)
        self._index = np.memmap(self.folder / "index.bin", dtype=ENTRY, mode="r", shape=(items,))
        self._data = np.memmap(self.folder / "activations.bin", dtype=np.uint8, mode="r")

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(message)

    # -- items --------------------------------------------------------------------------------------- -----

    def read_into(self, item: int, row: Tensor) -> float | None:
        """Copy an item into ``row``, (length, width) on the CPU in the store's dtype.

        Returns:
            The seconds it took to compute, or None where it is not there or damaged: ``row`` is
            then undefined.
        """
        if item >= self.capacity or not self._index[item]["checksum"]:
            return None
        entry, data = self._index[item], self._data[self._offsets[item] : self._offsets[item + 1]]
        if not self._verified[item]:
            if int(entry["checksum"]) != _checksum(item, data, entry["seconds"]):
                self._say(
                    "damaged",
                    _(
                        "the activation store {folder} has items that were changed or lost on disk; they "
                        "are computed again"
                    ).format(folder=self.folder),
                )
                return None
            self._verified[item] = True
        row.view(torch.uint8).numpy().reshape(-1)[:] = data
        return float(entry["seconds"])

    def write(self, item: int, activations: Tensor, seconds: float) -> None:
        """Keep an item: (length, width) on the CPU; ``seconds`` is what computing it took.

        Does nothing beyond the limit or after trouble.
        """
        if not self.writable or item >= self.capacity:
            return
        data = activations.to(DTYPES[self.layout.dtype]).contiguous().view(torch.uint8).numpy().reshape(-1)
        entry = np.array([(_checksum(item, data, np.float64(seconds)), seconds)], dtype=ENTRY)
        try:
            _write_at(self._file, int(self._offsets[item]), data.tobytes())
            _write_at(self._index_file, item * ENTRY.itemsize, entry.tobytes())
        except OSError as problem:
            self.writable = False
            self._say(
                "full",
                _(
                    "the activation store {folder} takes no more ({problem}); training continues without "
                    "storing"
                ).format(folder=self.folder, problem=problem.strerror),
            )
        else:
            self._verified[item] = True

    @property
    def stored_bytes(self) -> int:
        """Bytes of the items that are there."""
        present = self._index[: self.capacity]["checksum"] != 0
        return int(np.diff(self._offsets[: self.capacity + 1])[present].sum())

    def close(self) -> None:
        """Let go of files and lock."""
        if self._file.closed:
            return
        self._file.close()
        self._index_file.close()
        del self._data, self._index
        if self._lock is not None:
            self._lock.release()


def _allocate(handle: int, size: int) -> None:
    """Take the disk space of a file: to read a hole of it through a map ends the process on a full disk.

    Raises:
        OSError: where there is not as much.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)


def _write_at(file: Any, position: int, data: bytes) -> None:
    file.seek(position)
    view = memoryview(data)
    while view:  # an unbuffered file may take a part only
        view = view[file.write(view) :]


def _checksum(item: int, data: np.ndarray, seconds: np.float64) -> int:
    start = zlib.crc32(np.array([item], dtype="<i8").tobytes() + np.array([seconds], dtype="<f8").tobytes())
    return PRESENT | zlib.crc32(data.data, start)


# ------------------------------------------------------------------------------------------------------------
# All stores: ``iterbatch cache``


@dataclass(frozen=True)
class StoreInfo:
    """One store, as ``iterbatch cache list`` shows it."""

    key: str
    header: dict[str, Any]  # empty where it cannot be read
    stored: int  # items
    gigabytes: float  # disk space
    in_use: bool


def stores_folder() -> Path:
    """Where all stores are: ``activations`` in the cache folder."""
    return cache_folder() / "activations"


def list_stores() -> list[StoreInfo]:
    """Every store of this machine, whether its header can be read or not."""
    root = stores_folder()
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [_info(folder) for folder in folders if folder.is_dir() and not folder.is_symlink()]


def _info(folder: Path) -> StoreInfo:
    header = read_json(folder / "header.json")
    index = folder / "index.bin"
    entries = np.fromfile(index, dtype=ENTRY) if index.exists() else np.empty(0, dtype=ENTRY)
    size = sum(_disk_bytes(file) for file in folder.iterdir())
    lock = _free(folder)
    if lock is not None:
        lock.release()
    return StoreInfo(
        folder.name,
        header if isinstance(header, dict) else {},
        int((entries["checksum"] != 0).sum()),
        size / 1e9,
        lock is None,
    )


def _disk_bytes(file: Path) -> int:
    """Space a file takes; a sparse one takes less than its length."""
    status = file.stat()
    return getattr(status, "st_blocks", -(-status.st_size // 512)) * 512


def _free(folder: Path) -> FileLock | None:
    """The lock of a store that nobody is filling, taken; None where it is in use, or holds a link."""
    try:
        refuse_links(folder)
        lock = FileLock(folder / "lock", blocking=False)
        lock.acquire()
    except (Timeout, OSError, RunError):
        return None
    return lock


def chosen_stores(keys: Sequence[str] = ()) -> list[StoreInfo]:
    """Those that keys name, all of them where no key is given; a key may be shortened as long as it is clear.

    Raises:
        RunError: for a key that names none or several.
    """
    stores = list_stores()
    for key in keys:
        matches = [store.key for store in stores if store.key.startswith(key)]
        if len(matches) != 1:
            raise RunError(
                _("the key '{key}' names {count} stores; `iterbatch cache list` shows them").format(
                    key=key, count=len(matches)
                )
            )
    return [store for store in stores if not keys or any(store.key.startswith(key) for key in keys)]


def clear_stores(keys: Sequence[str] = ()) -> tuple[list[StoreInfo], list[StoreInfo]]:
    """Delete stores, as :func:`chosen_stores` chooses them.

    Returns:
        Those deleted, and those left because a run is filling them or they hold a link.
    """
    deleted, left = [], []
    for store in chosen_stores(keys):
        lock = _free(stores_folder() / store.key)
        if lock is None:
            left.append(store)
            continue
        lock.release()  # Windows deletes no file that is open
        shutil.rmtree(stores_folder() / store.key)
        deleted.append(store)
    return deleted, left
