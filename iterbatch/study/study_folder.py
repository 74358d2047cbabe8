"""What a study leaves in its folder, for its workers and for being resumed."""

import contextlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from iterbatch.bench.arm import make_arm
from iterbatch.checks import config_of
from iterbatch.errors import ConfigError, RunError, typed
from iterbatch.language import _
from iterbatch.plain_yaml import dump_yaml
from iterbatch.records import layout
from iterbatch.records.origin import read_places, write_places
from iterbatch.records.read import BAD_JSON, damaged_study, read_study
from iterbatch.records.tuning import read_curves, write_curves
from iterbatch.records.write import sweep, write_json, write_text
from iterbatch.runtime.run_folder import RESUMABLE, empty, run_content
from iterbatch.strategy import STRATEGIES
from iterbatch.study.pairs import Cell, Study

VERSIONED = ("iterbatch", "torch", "transformers", "peft")  # that decide what a pair comes to


def as_json(study: Study) -> dict[str, Any]:
    """The resolved study as its folder keeps it."""
    cells = {
        cell.name: {"config": cell.config.flat(), "arms": {arm.name: dict(arm.own) for arm in cell.arms}}
        for cell in study.cells
    }
    return {"name": study.name, "cells": cells}


def versions() -> dict[str, str]:
    """Of the code that trains here; a build for another device is the same version."""
    return {name: metadata.version(name).split("+")[0] for name in VERSIONED}


def from_folder(run_dir: Path) -> Study:
    """The study that a folder keeps.

    Raises:
        ConfigError: where it cannot be read.
    """
    return from_json(read_study(run_dir), run_dir)


def from_json(content: Mapping[str, Any], run_dir: Path) -> Study:
    """The study that :func:`as_json` was given; ``run_dir`` is named where it cannot be read.

    Raises:
        ConfigError: then.
    """
    try:
        cells = []
        for name, kept in content["cells"].items():
            config = config_of(kept["config"])
            arms = tuple(make_arm(arm, own, config) for arm, own in kept["arms"].items())
            cells.append(Cell(name, config, arms))
        return Study(content["name"], tuple(cells))
    except BAD_JSON as problem:
        raise damaged_study(run_dir, problem) from problem


def placed(study: Study, run_dir: Path) -> Study:
    """A study whose text and models are named by where they are, so that any folder may be worked from."""
    content = as_json(study)
    for name, cell in content["cells"].items():
        cell["config"] |= read_places(run_dir / name)
    return from_json(content, run_dir)


def check_joinable(run_dir: Path) -> None:
    """See that a folder holds a comparison that may be trained here.

    Raises:
        ConfigError: where it holds none, or has strategies of one's own that were not named.
        RunError: where it was begun by other versions.
    """
    if not (run_dir / layout.STUDY).is_file() or not (run_dir / layout.WORKERS).is_dir():
        raise ConfigError(
            _(
                "{run_dir} holds no comparison; give the folder of one, which `iterbatch compare STUDY.yaml "
                "--workers 0` begins"
            ).format(run_dir=run_dir)
        )
    content, ours = read_study(run_dir), versions()
    theirs = {name: content["versions"].get(name, version) for name, version in ours.items()}
    if theirs != ours:
        differing = [name for name in ours if theirs[name] != ours[name]]
        raise RunError(
            _(
                "the study in {run_dir} was begun with {theirs}, and this machine has {ours}; install here "
                "what it was begun with, or give its `iterbatch compare` again with what is here"
            ).format(run_dir=run_dir, theirs=_named(theirs, differing), ours=_named(ours, differing))
        )
    _check_strategies(content, run_dir)


def _named(versions: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in names)


def _check_strategies(content: Mapping[str, Any], run_dir: Path) -> None:
    """See that strategies of one's own have been named: their code is not looked for in a run's folder."""
    arms = [(name, own) for cell in content["cells"].values() for name, own in cell["arms"].items()]
    names = dict.fromkeys(str(dict(own or {}).get("strategy", name)) for name, own in arms)
    if missing := [name for name in names if name not in STRATEGIES]:
        files = [f"FILE.py:{name}" for name in missing]
        raise ConfigError(
            _("{folder} has strategies of your own, {names}; name their files again: {command}").format(
                folder=run_dir,
                names=", ".join(missing),
                command=typed("iterbatch", "worker", run_dir, "--strategies", *files),
            )
        )


def begin(study: Study, run_dir: Path, *, overwrite: bool = False, keep_arms: bool = False) -> None:
    """Write a study into its folder, or check that it is the one that is there.

    Args:
        study: To be trained.
        run_dir: Its folder, held by this process.
        overwrite: Delete an earlier study.
        keep_arms: Let arms that are there already and not in this study stay; they are not trained.

    Raises:
        RunError: where the folder holds something else.
    """
    file, content = run_dir / layout.STUDY, as_json(study)
    if overwrite and file.exists():
        _check_nobody_trains(run_dir)
        empty(run_dir)
    if file.exists():
        before = as_json(from_folder(run_dir))
        if keep_arms:
            for name, cell in content["cells"].items():
                cell["arms"] = before["cells"].get(name, cell)["arms"] | cell["arms"]
        _check_same(run_dir, before, content)
    elif run_content(run_dir):
        raise RunError(
            _("{run_dir} exists already and is not a comparison; give another --run_name").format(
                run_dir=run_dir
            )
        )
    sweep(run_dir)
    (run_dir / layout.WORKERS).mkdir(exist_ok=True)
    write_json(file, {**content, "versions": versions()})
    for cell in study.cells:
        write_text(run_dir / cell.name / layout.CONFIG, dump_yaml(cell.config.flat()))
        write_places(run_dir / cell.name, cell.config.flat())


def _check_nobody_trains(run_dir: Path) -> None:
    """See that no worker that has joined, from this machine or another, is training a pair."""
    for file in sorted((run_dir / layout.WORKERS).glob("*.lock")):
        try:
            with FileLock(file, blocking=False):
                continue
        except Timeout as problem:
            raise RunError(
                _("{name} in {run_dir} is being trained; stop its worker before --overwrite").format(
                    name=file.stem.replace("~", "/"), run_dir=run_dir
                )
            ) from problem


def keep(study: Study, run_dir: Path) -> None:
    """Write a run's study into its folder, with the arms that it was made with before."""
    content = as_json(study)
    with contextlib.suppress(ConfigError):  # an earlier version kept none; one that is damaged is of no use
        for name, cell in read_study(run_dir)["cells"].items():
            if name in content["cells"]:
                content["cells"][name]["arms"] = cell["arms"] | content["cells"][name]["arms"]
    write_json(run_dir / layout.STUDY, content)


def keep_tuning(run_dir: Path) -> None:
    """Take over the trials that the study's learning rates were chosen by, where they lie beside it."""
    if curves := read_curves(run_dir.with_name(f"{run_dir.name}-tune")):
        write_curves(run_dir, curves)


def _check_same(run_dir: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        _("cell '{name}' is gone").format(name=name) for name in then["cells"] if name not in now["cells"]
    ]
    for name, cell in now["cells"].items():
        before = then["cells"].get(name)
        if before is None:
            continue
        where = _("cell '{name}', ").format(name=name) if name else ""
        old, new = before["config"], cell["config"]
        settings = {key for key, value in new.items() if key not in RESUMABLE and old.get(key) != value}
        settings -= {"compile"} if new.get("compile") == "auto" else set()  # it goes on as it began
        changed += [
            _("{where}{key} was {then}, now {new}").format(
                where=where, key=key, then=old.get(key), new=new[key]
            )
            for key in sorted(settings)
        ]
        changed += [
            _("{where}arm '{arm}' was {own}, now {then}").format(
                where=where, arm=arm, own=own, then=cell["arms"].get(arm, "gone")
            )
            for arm, own in before["arms"].items()
            if cell["arms"].get(arm) != own
        ]
    if changed:
        advice = _("Give another --run_name, or --overwrite")
        raise RunError(
            _("{run_dir} was made with another study: {names}. {advice}").format(
                run_dir=run_dir, names="; ".join(changed), advice=advice
            )
        )
