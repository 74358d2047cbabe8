"""A run's folder, read back: its settings, the results and scores of its arms, and why an arm failed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iterbatch.errors import ConfigError, RunError, first_line
from iterbatch.language import _
from iterbatch.plain_yaml import read_yaml
from iterbatch.records import layout
from iterbatch.records.origin import read_places
from iterbatch.records.result import ArmResult, read_result
from iterbatch.records.write import read_json

SCORED = ("test", "validation")  # splits
BAD_JSON = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)

DocumentScores = Mapping[str, tuple[np.ndarray, np.ndarray]]  # split to (nats, tokens) a document


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings a run was made with, by flag; places are absolute where they are known.

    Raises:
        RunError: where they cannot be read.
    """
    file = run_dir / layout.CONFIG
    try:
        content = read_yaml(file)
    except (OSError, ValueError) as problem:
        raise RunError(
            _("{file} cannot be read ({problem}); the run cannot be resumed").format(
                file=file, problem=first_line(problem)
            )
        ) from problem
    if not isinstance(content, dict):
        raise RunError(
            _("{file} is damaged: it holds a {name}; the run cannot be resumed").format(
                file=file, name=type(content).__name__
            )
        )
    return {**content, **read_places(run_dir)}


def processes_of(run_dir: Path) -> int | None:
    """How many processes began a run; None where its manifest is not there, or does not say so."""
    content = read_json(run_dir / layout.MANIFEST)
    found = content.get("processes") if isinstance(content, dict) else None
    return found if isinstance(found, int) and found > 0 else None


def settings_of(run_dir: Path) -> dict[str, Any]:
    """As :func:`read_config`; empty where there is no such file."""
    return read_config(run_dir) if (run_dir / layout.CONFIG).exists() else {}


def read_results(run_dir: Path) -> list[ArmResult]:
    """The result of every arm and seed that has one, in the order of the configuration.

    Raises:
        RunError: where a result cannot be read.
    """
    folders = [folder for _, _, folder in layout.ended_folders(run_dir) if (folder / layout.RESULT).exists()]
    names = settings_of(run_dir).get("strategies")
    order = {str(name): place for place, name in enumerate(names if isinstance(names, list) else [])}
    results = [read_result(folder) for folder in folders]
    return sorted(results, key=lambda each: (order.get(each.strategy, len(order)), each.strategy, each.seed))


def read_documents(folder: Path) -> DocumentScores:
    """Nats and tokens of every scored document of an arm and seed; empty where an earlier version kept none.

    Raises:
        RunError: where the file is damaged.
    """
    file = folder / layout.DOCUMENTS
    damaged = _("{file} is damaged{{}}; delete its folder and train that arm again").format(file=file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {
            split: (
                np.array(content[split]["nats"], dtype=float),
                np.array(content[split]["tokens"], dtype=float),
            )
            for split in SCORED
        }
    except FileNotFoundError:
        return {}
    except BAD_JSON as problem:
        raise RunError(damaged.format(f" ({str(problem)[:200]})")) from problem
    if any(
        nats.shape != tokens.shape or nats.ndim != 1 or not tokens.sum() > 0
        for nats, tokens in found.values()
    ):
        raise RunError(damaged.format(""))
    return found


@dataclass(frozen=True)
class Samples:
    """Continuations of the fixed prompts, by decoding."""

    prompts: list[str]
    human: list[str]  # what follows each prompt in its text
    base: Mapping[str, list[str]]
    trained: Mapping[str, list[str]]


def read_samples(folder: Path) -> Samples:
    """The samples of an arm and seed.

    Raises:
        RunError: where they cannot be read.
    """
    file = folder / layout.SAMPLES
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        texts = {
            who: {
                decoding: list(map(str, content[who][decoding]["texts"]))
                for decoding in ("greedy", "sampled")
            }
            for who in ("base", "trained")
        }
        return Samples(list(map(str, content["prompts"])), list(map(str, content["human"])), **texts)
    except BAD_JSON as problem:
        why = _("samples of an earlier version have no human continuations")
        raise RunError(
            _("{file} cannot be read ({problem!r}); {why}").format(file=file, problem=problem, why=why)
        ) from problem


def failure_of(folder: Path) -> str | None:
    """Why an arm and seed crashed, as its folder says; None where it has not."""
    file = folder / layout.FAILED
    if not file.exists():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["reason"])
    except BAD_JSON:
        return _("for a reason that cannot be read")


def read_study(run_dir: Path) -> dict[str, Any]:
    """The resolved study that a folder keeps: ``name``, and ``cells`` with ``config`` and ``arms``.

    With them ``versions`` of the code that it was begun by; none where an earlier version kept none.

    Raises:
        ConfigError: where it cannot be read.
    """
    file = run_dir / layout.STUDY
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for cell in content["cells"].values():
            if not isinstance(cell["config"], dict) or not isinstance(cell["arms"], dict):
                raise ValueError(_("a cell has no settings or no arms"))
        versions = {str(name): str(value) for name, value in content.get("versions", {}).items()}
        return {"name": str(content["name"]), "cells": dict(content["cells"]), "versions": versions}
    except BAD_JSON as problem:
        raise damaged_study(run_dir, problem) from problem


def damaged_study(run_dir: Path, problem: BaseException) -> ConfigError:
    """What to say of a study file that cannot be used."""
    reason, advice = (
        str(problem)[:200],
        _("start the study anew with --overwrite, or under another --run_name"),
    )
    return ConfigError(
        _("{run_dir} is damaged ({reason}); {advice}").format(
            run_dir=run_dir / layout.STUDY, reason=reason, advice=advice
        )
    )
