"""Schedulers that runs have kept beside their adapters."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.write import write_json


def keep_scheduler(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a scheduler into the folder of its arm and seed."""
    write_json(folder / layout.SCHEDULER, content)


def read_scheduler(folder: Path) -> Mapping[str, Any]:
    """The scheduler of an arm and seed.

    Raises:
        RunError: where there is none, or it cannot be read.
    """
    file = folder / layout.SCHEDULER
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise RunError(
            _("{folder} holds no scheduler ({scheduler}); only learnable keeps one").format(
                folder=folder, scheduler=layout.SCHEDULER
            )
        ) from problem
    except (OSError, ValueError, RecursionError) as problem:
        raise RunError(
            _("{file} cannot be read ({problem}); train its arm again").format(
                file=file, problem=str(problem)[:200]
            )
        ) from problem
    if not isinstance(content, dict):
        raise RunError(
            _("{file} is damaged: it holds a {name}; train its arm again").format(
                file=file, name=type(content).__name__
            )
        )
    return content


def read_schedulers(run_dir: Path) -> list[Mapping[str, Any]]:
    """All schedulers of a run, or of one arm or seed of it.

    Raises:
        RunError: where there is none, or one cannot be read.
    """
    inside = ("", "seed*/", "*/seed*/", "*/*/seed*/")  # of a seed, an arm, a run, a study of several cells
    files = sorted(file for part in inside for file in run_dir.glob(f"{part}{layout.SCHEDULER}"))
    if not files:
        raise RunError(
            _(
                "{run_dir} holds no scheduler; give the folder of a run in which learnable has finished "
                "a seed"
            ).format(run_dir=run_dir)
        )
    return [read_scheduler(file.parent) for file in files]
