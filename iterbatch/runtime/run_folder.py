"""The run's folder: which one it is, whose it is, and that one process at a time writes to it."""

import contextlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from iterbatch.config import LAST, BenchConfig
from iterbatch.errors import RunError, typed
from iterbatch.language import _
from iterbatch.plain_yaml import dump_yaml
from iterbatch.records.layout import CONFIG, HOLDER, LOCK, TRACKING
from iterbatch.records.read import processes_of, read_config
from iterbatch.records.write import refuse_links, sweep, write_text
from iterbatch.runtime.processes import count

# May differ when a run is resumed.
RESUMABLE = ("strategies", "seeds", "save_dir", "log_with", "eval_batch_size", "checkpoint_every", "sharding")
PER_PROCESS = ("batch_size", "grad_accum")  # may differ where processes do, if the batch does not


def resume_folder(resume: Path, save_dir: Path, run_name: str | None) -> Path:
    """The folder that ``--resume`` means.

    The one given, or else that of ``--run_name``, or else the newest run in ``--save_dir``.

    Raises:
        RunError: where no run is there.
    """
    if resume != LAST:
        folder = resume
    elif run_name is not None:
        folder = save_dir / run_name
    else:
        runs = [file for file in save_dir.glob(f"*/{CONFIG}") if file.is_file()] if save_dir.is_dir() else []
        if not runs:
            raise RunError(
                _("there is no run in {save_dir} to resume; leave --resume out to start one").format(
                    save_dir=save_dir
                )
            )
        folder = max(runs, key=lambda file: file.stat().st_mtime).parent
    folder = folder.resolve()
    if not (folder / CONFIG).is_file():
        raise RunError(
            _("there is no run to resume at {folder}; leave --resume out to start it").format(folder=folder)
        )
    return folder


def find_folder(config: BenchConfig) -> Path:
    """The run's folder, checked before long work but not made yet.

    Raises:
        RunError: where it exists without ``--resume`` or ``--overwrite``, does not exist with
            ``--resume``, was made by another configuration, or cannot be written.
    """
    run = config.run
    if run.resume is not None:
        folder = resume_folder(run.resume, run.save_dir, run.run_name)
        _check_same_experiment(config, folder)
    else:
        name = (
            run.run_name
            or f"{re.sub(r'[^A-Za-z0-9._-]+', '-', config.data.dataset)}-{datetime.now():%Y%m%d-%H%M%S}"
        )
        folder = run.save_dir / name
        _check_free(folder, run.overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder if run.resume else folder.parent).close()
    except OSError as problem:
        raise RunError(
            _("{filename} cannot be written ({problem}); give another --save_dir").format(
                filename=problem.filename or folder, problem=problem.strerror
            )
        ) from problem
    return folder


def _check_free(folder: Path, overwrite: bool) -> None:
    """Whether a run may begin here: nothing is there, or a run that may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunError(_("{folder} is not a folder; give another --run_name").format(folder=folder))
    if not folder.exists() or not any(run_content(folder)):
        return
    if not overwrite:
        raise RunError(
            _(
                "{folder} exists already; resume it by {typed}, replace it by --overwrite, or give "
                "another --run_name"
            ).format(folder=folder, typed=typed("--resume", folder))
        )
    if not (folder / CONFIG).exists():
        raise RunError(
            _(
                "{folder} is not the folder of a run (it has no {config}), so --overwrite leaves it "
                "alone; give another --run_name"
            ).format(folder=folder, config=CONFIG)
        )


def run_content(folder: Path) -> list[Path]:
    """What is in a run's folder, but for what a run leaves that ended before it began."""
    return [
        entry
        for entry in folder.iterdir()
        if entry.name not in (LOCK, HOLDER) and not entry.name.startswith(".")
    ]


def _check_same_experiment(config: BenchConfig, folder: Path) -> None:
    then, now = read_config(folder), config.flat()
    free = RESUMABLE
    before = processes_of(folder)
    if (
        before is not None
        and before != count()
        and all(isinstance(then.get(key), int) for key in PER_PROCESS)
    ):
        _check_same_batch(folder, then, now, before)
        free = (*RESUMABLE, *PER_PROCESS)
    changed = [
        _("--{key} was {then}, now {value}").format(key=key, then=then.get(key), value=value)
        for key, value in now.items()
        if key not in free and then.get(key) != value and not _same_place(key, then.get(key), value)
    ]
    if changed:
        raise RunError(
            _(
                "{folder} was made with other settings, its arms could not be compared: {names}. Give "
                "another --run_name"
            ).format(folder=folder, names="; ".join(changed))
        )


def _check_same_batch(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any], before: int) -> None:
    """See that more or fewer processes than before share the same batch.

    Raises:
        RunError: with the settings under which they would.
    """
    rows = math.prod(then[key] for key in PER_PROCESS) * before
    if math.prod(now[key] for key in PER_PROCESS) * count() == rows:
        return
    mine, left = divmod(rows, count())
    if left:
        how = _("that many processes cannot share them evenly; take a number that divides {rows}").format(
            rows=rows
        )
    else:
        accum = math.gcd(then["grad_accum"], mine)
        how = _("give --batch_size {size} --grad_accum {accum} with --resume").format(
            size=mine // accum, accum=accum
        )
    raise RunError(
        _(
            "{folder} was made by {before} process(es) that shared {rows} blocks a batch, and is to be "
            "resumed by {count}: {how}"
        ).format(folder=folder, before=before, rows=rows, count=count(), how=how)
    )


def _same_place(key: str, then: object, now: object) -> bool:
    """Whether two words for a place mean the same."""
    if key not in ("data_dir", "model_name") or then is None or now is None:
        return False
    return Path(str(now)).exists() and Path(str(then)).resolve() == Path(str(now)).resolve()


# ------------------------------------------------------------------------------------------------------------
# One process at a time


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it against other processes.

    The lock is the system's: it ends with its process, however that ends. ``holder.json`` only says
    who to look for.

    Raises:
        RunError: where another process holds it, or something in it is a link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder, leaving=[TRACKING])
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as problem:
        raise RunError(
            _("{folder} is in use by {holder}; wait for it to end, or give another --run_name").format(
                folder=folder, holder=_holder(folder)
            )
        ) from problem
    try:
        write_text(folder / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def hold(folder: Path, config: BenchConfig) -> Iterator[None]:
    """Hold a run's folder, and write the configuration into it.

    Raises:
        RunError: where another process holds it.
    """
    with locked(folder):
        if config.run.resume is None:
            _check_free(
                folder, config.run.overwrite
            )  # another run may have begun and ended here in the meantime
            empty(folder)
        sweep(folder)
        if not (folder / CONFIG).exists():
            write_text(folder / CONFIG, dump_yaml(config.flat()))
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process holds a run's folder."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except (Timeout, OSError):
        return True


def _holder(folder: Path) -> str:
    try:
        who = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return _("process {int} on {host!r}").format(int=int(who["pid"]), host=str(who["host"]))
    except (OSError, ValueError, TypeError, KeyError):
        return _("another process")


def empty(folder: Path) -> None:
    """Delete a run, its configuration last: until then it is still known for what it is."""
    for entry in sorted(run_content(folder), key=lambda entry: entry.name == CONFIG):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
