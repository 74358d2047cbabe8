"""Files written whole or not at all, and read back where they can be."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from iterbatch.errors import RunError
from iterbatch.language import _

SCRATCH = ".part"  # how the names of files that are being written end


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """See that what goes wrong with a file names it: a full disk does not by itself."""
    try:
        yield
    except OSError as problem:
        problem.filename = problem.filename or str(path)
        raise


@contextlib.contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """A neighbour to write to, a file or a folder.

    It is on the disk and under its own name when the block ends, and gone when the block fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}{SCRATCH}")
    try:
        with naming(path):
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


def refuse_links(folder: Path, leaving: Collection[str] = ()) -> None:
    """See that a folder holds no link, pipe or device: what is written or deleted there stays there.

    Args:
        folder: May itself be one; its user chose it.
        leaving: Names of folders within it that are not looked into.

    Raises:
        RunError: with its name.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found = Path(parent, name)
            relative = found.relative_to(folder)  # a junction of Windows is no link by name
            if found.is_symlink() or (os.name == "nt" and found.resolve() != folder.resolve() / relative):
                advice = _("nothing is written through one; put what it names in its place")
                raise RunError(_("{found} is a link, and {advice}").format(found=found, advice=advice))
            if not (found.is_file() or found.is_dir()):
                raise RunError(_("{found} is neither a file nor a folder; delete it").format(found=found))
        folders[:] = [name for name in folders if name not in leaving]


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_or_not(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> Any:
    """What a file of JSON holds; None where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def finite(value: Any) -> Any:
    """JSON has no NaN: a float that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value
