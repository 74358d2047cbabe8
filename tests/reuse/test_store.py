"""The activation store: what it serves, and everything that may go wrong with a folder on disk."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from filelock import FileLock

from iterbatch.errors import RunError
from iterbatch.reuse import store as store_module
from iterbatch.reuse.store import ENTRY, ActivationStore, Layout, clear_stores, list_stores, stores_folder

LENGTHS, WIDTH = [3, 5, 4, 5], 2
HEADER = {"key": {"cut": 2}, "model": "tiny", "items": len(LENGTHS)}


@pytest.fixture
def notes():
    return []


@pytest.fixture
def opened(tmp_path, notes):
    """A function that opens the store of this test, anew each time; all are closed at the end."""
    stores = []

    def open_store(folder=tmp_path / "store", header=HEADER, dtype="float32", limit=float("inf"), **options):
        stores.append(
            ActivationStore(folder, header, Layout(LENGTHS, WIDTH, dtype, limit), notes.append, **options)
        )
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def _item(number):
    return torch.arange(LENGTHS[number] * WIDTH, dtype=torch.float32).view(-1, WIDTH) + 100 * number


def _read(store, number):
    row = torch.full((LENGTHS[number], WIDTH), -1.0, dtype=store_module.DTYPES[store.layout.dtype])
    seconds = store.read_into(number, row)
    return None if seconds is None else (row.float(), seconds)


def _fill(store, numbers=None):
    for number in range(len(LENGTHS)) if numbers is None else numbers:
        store.write(number, _item(number), 0.5 + number)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_serves_what_was_written_also_to_a_later_run(opened, notes, dtype):
    first = opened(dtype=dtype)
    assert all(_read(first, number) is None for number in range(4))
    _fill(first, [2, 0])
    assert _read(first, 1) is None
    first.close()
    second = opened(dtype=dtype)
    for number in (0, 2):
        row, seconds = _read(second, number)
        assert torch.equal(row, _item(number).to(store_module.DTYPES[dtype]).float())
        assert seconds == 0.5 + number
    assert _read(second, 1) is None
    assert second.stored_bytes == (3 + 4) * WIDTH * store_module.DTYPES[dtype].itemsize
    assert not notes


@pytest.mark.skipif(os.name == "nt", reason="Windows has no small file systems to mount")
def test_a_full_file_system_ends_no_process(tmp_path):
    """To read a hole of a file through a map raises SIGBUS where there is no room for it."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    code = """
import sys
from pathlib import Path
import torch
from iterbatch.reuse.store import ActivationStore, Layout
folder, lengths = Path(sys.argv[1]), [8] * 3000
try:
    store = ActivationStore(folder, {}, Layout(lengths, 8, "float32"), print)
except OSError as problem:
    raise SystemExit(f"not opened: {problem}")
(folder / "filler").write_bytes(b"x" * 4096) if len(sys.argv) > 2 else None
for number in range(3000):
    store.write(number, torch.ones(8, 8), 1.0)
rows = [store.read_into(number, torch.empty(8, 8)) for number in range(3000)]
print(sum(row is not None for row in rows), "read")
"""
    try:
        for filler in (0, 100_000, 126_000):
            for file in small.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            (small / "filler").write_bytes(bytes(filler))
            ran = subprocess.run(
                [sys.executable, "-c", code, str(small / "store")],
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode in (0, 1), (filler, ran.returncode, ran.stderr[-500:])
            said = ran.stdout + ran.stderr
            assert "training continues without storing" in said or "not opened" in said, said
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_nothing_of_a_store_is_a_link(opened, notes, tmp_path, monkeypatch):
    thesis = tmp_path / "thesis"
    thesis.write_bytes(b"all of it")
    folder = tmp_path / "cache/activations/linked"
    folder.mkdir(parents=True)
    (folder / "index.bin").symlink_to(thesis)
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError, match=r"No such file|cannot"):
        opened(folder)
    (folder.parent / "whole").symlink_to(tmp_path)
    assert [each.key for each in list_stores()] == ["linked"]
    deleted, left = clear_stores()
    assert not deleted
    assert [each.key for each in left] == ["linked"]
    assert thesis.read_bytes() == b"all of it"


def test_a_full_store_keeps_serving_and_which_items_fit_depends_on_the_limit_alone(opened, tmp_path):
    limit = (3 + 5) * WIDTH * 4 + 1  # bytes of the first two items, and one more
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        store = opened(tmp_path / f"order{order[0]}", limit=limit)
        _fill(store, order)
        assert [_read(store, number) is not None for number in range(4)] == [True, True, False, False]
        assert store.stored_bytes == store.layout.bytes == (3 + 5) * WIDTH * 4
    assert Layout(LENGTHS, WIDTH, "float32", 3 * WIDTH * 4 - 1).capacity == 0


def test_a_larger_limit_later_keeps_what_is_there(opened, notes):
    small = opened(limit=3 * WIDTH * 4)
    _fill(small)
    small.close()
    large = opened()
    assert [_read(large, number) is not None for number in range(4)] == [True, False, False, False]
    _fill(large, [3])
    assert _read(large, 3) is not None
    assert not notes


@pytest.mark.parametrize("damage", ["data", "seconds", "swapped", "cut short", "index cut short"])
def test_what_was_changed_on_disk_is_never_served_and_is_built_anew_with_one_warning(opened, notes, damage):
    store = opened()
    _fill(store)
    store.close()
    data, index = store.folder / "activations.bin", store.folder / "index.bin"
    content, entries = bytearray(data.read_bytes()), np.fromfile(index, dtype=ENTRY)
    lost = [3]
    if damage == "data":
        content[-1] ^= 1
    elif damage == "seconds":
        entries[3]["seconds"] = 1e9
    elif damage == "swapped":  # both are well-formed, in each other's place
        entries[[1, 3]] = entries[[3, 1]]
        size = 5 * WIDTH * 4
        content[3 * WIDTH * 4 :][:size], lost = content[-size:], [1, 3]
    elif damage == "cut short":
        content = content[:-1]
    else:
        entries = entries[:3]
    data.write_bytes(content)
    entries.tofile(index)

    again = opened()
    assert [number for number in range(4) if _read(again, number) is None] == lost
    assert len(notes) == (damage != "index cut short")  # an entry that is not there is no damage
    _fill(again, lost)
    again.close()
    assert all(torch.equal(_read(opened(), number)[0], _item(number)) for number in lost)


def test_half_written_is_not_served(opened, monkeypatch):
    """A process that dies between the item and its entry."""
    store = opened()
    real = store_module._write_at

    def dies(file, position, data):
        if file is store._index_file:
            raise KeyboardInterrupt
        real(file, position, data[: len(data) // 2])

    monkeypatch.setattr(store_module, "_write_at", dies)
    with pytest.raises(KeyboardInterrupt):
        store.write(1, _item(1), 1.0)
    store.close()
    assert _read(opened(), 1) is None


@pytest.mark.slow
def test_killed_while_writing_leaves_whole_items_only(tmp_path, opened, notes):
    """A real process that writes without end and is killed at any moment.

    What is served afterwards is right.
    """
    script = f"""
import torch, itertools
from iterbatch.reuse.store import ActivationStore, Layout
from pathlib import Path
layout = Layout([20000] * 50, 2, "float32")
store = ActivationStore(Path({str(tmp_path / "store")!r}), {HEADER!r}, layout, print)
print("ready", flush=True)
for turn in itertools.count():
    for item in range(50):
        store.write(item, torch.full((20000, 2), float(item + 100 * (turn % 7))), 1.0)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.kill()
    process.wait()
    process.stdout.close()
    store = ActivationStore(tmp_path / "store", HEADER, Layout([20000] * 50, 2, "float32"), notes.append)
    row, served = torch.empty((20000, 2)), 0
    for item in range(50):
        if store.read_into(item, row) is not None:
            assert (row == row[0, 0]).all()
            assert int(row[0, 0]) % 100 == item
            served += 1
    store.close()
    assert served


def test_a_folder_of_another_key_is_built_anew(opened, notes):
    other = opened(header={**HEADER, "key": {"cut": 3}})
    _fill(other)
    other.close()
    store = opened()
    assert all(_read(store, number) is None for number in range(4))
    assert "belongs to another key" in notes[0]
    (store.folder / "header.json").write_text("{ not json", encoding="utf-8")
    store.close()
    opened()
    assert len(notes) == 2


def test_a_second_run_reads_but_does_not_write(opened, notes):
    first = opened()
    _fill(first, [0])
    second = opened()
    assert "another run is filling" in notes[0]
    assert _read(second, 0) is not None
    _fill(second, [1])
    assert _read(second, 1) is None
    _fill(first, [2])  # what the first one stores from now on is seen
    assert torch.equal(_read(second, 2)[0], _item(2))
    first.close()
    third = opened()
    assert third.writable
    assert len(notes) == 1


def test_a_second_run_waits_for_files_that_are_being_made(opened, notes, tmp_path):
    """The first run has taken the lock a moment ago."""
    folder = tmp_path / "store"
    folder.mkdir()
    with FileLock(folder / "lock"):
        for name, size in (("index.bin", 0), ("activations.bin", 0)):
            (folder / name).write_bytes(bytes(size))

        def make():
            for name in ("index.bin", "activations.bin"):
                (folder / name).write_bytes(bytes(1000))

        threading.Timer(0.2, make).start()
        second = opened(folder)
    assert second.capacity == len(LENGTHS)
    assert len(notes) == 1


def test_a_full_disk_ends_storing_not_training(opened, notes, monkeypatch):
    store = opened()
    _fill(store, [0])
    real = store_module._write_at

    def full(file, position, data):
        if file is store._file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, position, data)

    monkeypatch.setattr(store_module, "_write_at", full)
    _fill(store, [1, 2, 3])
    assert [_read(store, number) is not None for number in range(4)] == [True, False, False, False]
    assert len(notes) == 1
    assert "No space left" in notes[0]


@pytest.mark.slow
def test_a_really_full_disk(tmp_path, notes):
    """The same on a file system of one megabyte, where the user may mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.name != "posix"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True
        ).returncode
    ):
        pytest.skip("a small file system can only be mounted by root on Linux")
    try:
        store = ActivationStore(mount / "store", HEADER, Layout([20000] * 50, 2, "float32"), notes.append)
        row = torch.empty((20000, 2))
        for item in range(50):
            store.write(item, torch.full((20000, 2), float(item)), 1.0)
        served = [
            item for item in range(50) if store.read_into(item, row) is not None and (row == item).all()
        ]
        assert served == list(range(len(served)))
        assert 0 < len(served) < 10
        assert len(notes) == 1
        store.close()
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_folder_that_cannot_be_written_is_read(opened, notes, monkeypatch):
    store = opened()
    _fill(store)
    store.close()

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(store_module.FileLock, "acquire", denied)
    reader = opened()
    assert all(torch.equal(_read(reader, number)[0], _item(number)) for number in range(4))
    assert "cannot be written" in notes[0]
    assert "Permission denied" in notes[0]


def test_list_and_clear(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path))
    assert list_stores() == []
    for name in ("aa11", "aa22", "bb33"):
        store = opened(stores_folder() / name)
        _fill(store, [0, 1])
        store.close()
    busy = opened(stores_folder() / "bb33")
    (stores_folder() / "aa22" / "header.json").write_text("damaged", encoding="utf-8")
    stores = {store.key: store for store in list_stores()}
    assert {key: (store.stored, store.in_use, bool(store.header)) for key, store in stores.items()} == {
        "aa11": (2, False, True),
        "aa22": (2, False, False),
        "bb33": (2, True, True),
    }
    assert stores["aa11"].gigabytes > 0
    with pytest.raises(RunError, match="names 2 stores"):
        clear_stores(["aa"])
    with pytest.raises(RunError, match="names 0 stores"):
        clear_stores(["zz"])
    deleted, left = clear_stores(["aa1"])
    assert ([s.key for s in deleted], left) == (["aa11"], [])
    deleted, left = clear_stores()
    assert ([s.key for s in deleted], [s.key for s in left]) == (["aa22"], ["bb33"])
    assert json.loads((busy.folder / "header.json").read_text(encoding="utf-8")) == HEADER
