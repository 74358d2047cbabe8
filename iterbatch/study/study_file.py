"""Arms, and the study files that list them.

What lives here: what an arm may set, how a study file is read and checked, with the line of every mistake. What does not: training its arms
(:mod:`iterbatch.study.compare`).
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from iterbatch.training.budget import UNITS
from iterbatch.config import NOT_SAVED, BenchConfig, StrategyConfig, check, knobs, make_config
from iterbatch.errors import ConfigError, UserError, did_you_mean
from iterbatch.flags import TrainFlags, cli, flag_words, from_flags
from iterbatch.strategy import STRATEGIES

REFERENCE = "baseline"  # the arm that all others are compared with
ARM_TRAINING = ("lr", "warmup", "weight_decay", "clip_norm")
ARM_KNOBS = (*ARM_TRAINING, *(knob.name for knob in dataclasses.fields(StrategyConfig) if knob.name != "strategies"))
DEFAULTS = {"match": "flops", "seeds": [0, 1, 2], "evals": 10, "prompts": 200, "log_with": "none"}  # where a comparison differs from a run
SECTIONS = ("about", "settings", "arms", "cells", "tune")
TUNING: dict[str, Any] = {"trials": 8, "low": 1e-4, "high": 3e-2, "seed": 1000, "arms": []}  # arms: those to tune; none named: all
Settings = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One strategy with its settings in a comparison."""

    name: str  # of its folder
    strategy: str  # a key of STRATEGIES
    config: BenchConfig  # the run's, with this arm's own learning rate and knobs
    own: Settings = field(default_factory=dict)  # what it sets for itself

    @property
    def source(self) -> str | None:
        """The arm whose records it needs."""
        return self.config.strategy.source if STRATEGIES[self.strategy].needs_source else None


@dataclass(frozen=True)
class Cell:
    """Arms by seeds under one model, text and budget; a study has one or several."""

    name: str  # of its folder in the study's; empty where it is the study's own
    config: BenchConfig
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Study:
    """A comparison, checked."""

    name: str
    cells: tuple[Cell, ...]
    tune: Settings = field(default_factory=lambda: dict(TUNING))


def arms_of(config: BenchConfig) -> list[Arm]:
    """The arms of a run without a study: each strategy by its own name."""
    return [Arm(name, name, config) for name in config.strategy.strategies]


def make_arm(name: str, own: Settings, config: BenchConfig) -> Arm:
    """An arm with what it sets for itself.

    Args:
        name: Of the arm; also its strategy where it names no other.
        own: ``strategy`` and any of ``ARM_KNOBS``.
        config: Of its cell.
    """
    settings = {key: value for key, value in own.items() if key != "strategy"}
    strategy = own.get("strategy", name)
    mine = make_config(**{**config.flat(), "strategies": [REFERENCE], **settings})
    return Arm(name, strategy, mine, own)


# --------------------------------------------------------------------------------------------------------------------------------------
# Study files


class _Source:
    """A study file: its content, and the line of every entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8-sig")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            self.content = yaml.safe_load(text)
        except OSError as problem:
            raise ConfigError(f"the study {path} cannot be read: {problem.strerror}") from problem
        except (yaml.YAMLError, ValueError, RecursionError) as problem:
            raise ConfigError(f"the study {path} is not valid YAML: {' '.join(str(problem).split())[:300]}") from problem
        self.lines: dict[tuple[str, ...], int] = {}
        self.problems: list[str] = []
        self._walk(node, ())

    def _walk(self, node: Any, place: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            here = (*place, str(key.value))
            if here in self.lines:
                self.complain(here, f"'{here[-1]}' is there twice", line=key.start_mark.line + 1)
            self.lines[here] = key.start_mark.line + 1
            self._walk(value, here)

    def complain(self, place: tuple[str, ...], message: str, line: int | None = None) -> None:
        line = line or next((self.lines[place[:size]] for size in range(len(place), 0, -1) if place[:size] in self.lines), None)
        problem = f"{self.path}{f', line {line}' if line else ''}: {message}"
        if problem not in self.problems:
            self.problems.append(problem)

    def table(self, *place: str) -> Settings:
        """The mapping at a place, empty where there is none."""
        value: Any = self.content
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.complain(place, f"'{'.'.join(place) or 'the file'}' holds a {type(value).__name__}; write one 'key: value' a line")
            return {}
        return {str(key): item for key, item in value.items()}

    def check_keys(self, place: tuple[str, ...], allowed: Iterable[str], what: str) -> None:
        allowed = list(allowed)
        for key in self.table(*place):
            if key not in allowed:
                self.complain((*place, key), f"unknown {what} '{key}'; allowed are {', '.join(allowed)}{did_you_mean(key, allowed)}")

    def stop(self) -> None:
        """Raise what has been found so far."""
        if self.problems:
            raise ConfigError("\n".join(self.problems))


def load_study(path: Path, arguments: Sequence[str] = ()) -> Study:
    """Read a study file and check all of it; flags override its settings in every cell.

    Raises:
        ConfigError: with every mistake, its line, and the nearest name that would be right.
    """
    source = _Source(path)
    source.check_keys((), SECTIONS, "section")
    if not source.table("arms"):
        source.complain(("arms",), f"a study needs arms: write 'arms:' with one name a line, {REFERENCE} among them")
    settings = [name for name in knobs() if name not in (*NOT_SAVED, "strategies", "save_dir")]
    source.check_keys(("settings",), settings, "setting")
    for cell in source.table("cells"):
        _check_name(source, ("cells", cell), cell)
        source.check_keys(("cells", cell), [*settings, "arms"], "setting")
        _check_unit(source, ("cells", cell, "match"), source.table("cells", cell).get("match"))
        for arm in source.table("cells", cell, "arms"):
            if arm not in source.table("arms"):
                near = did_you_mean(arm, source.table("arms"))
                source.complain(("cells", cell, "arms", arm), f"unknown arm '{arm}'; this study's are {', '.join(source.table('arms'))}{near}")
            source.check_keys(("cells", cell, "arms", arm), ("strategy", *ARM_KNOBS), "setting of an arm")
    _check_unit(source, ("settings", "match"), source.table("settings").get("match"))
    source.check_keys(("tune",), TUNING, "setting of tune")
    for cell in source.table("cells") or [""]:
        _check_arms(source, cell)
    tune = {**TUNING, **source.table("tune")}
    _check_tune(source, tune)
    source.stop()
    cells = [_cell(source, name, arguments) for name in source.table("cells") or [""]]
    return Study(path.stem, tuple(cells), tune)


def study_of_flags(arguments: Sequence[str]) -> Study:
    """A comparison without a file: the strategies of the flags."""
    flags = cli("compare", TrainFlags, [*_words(DEFAULTS), *arguments])
    config = from_flags(flags)
    if REFERENCE not in config.strategy.strategies:
        raise ConfigError(f"--strategies lacks '{REFERENCE}', which all others are compared with; add it")
    arms = tuple(make_arm(name, {}, config) for name in config.strategy.strategies)
    name = config.run.run_name or f"compare-{re.sub(r'[^A-Za-z0-9._-]+', '-', config.data.dataset)}"
    return Study(name, (Cell("", config, arms),))


def _words(settings: Settings) -> list[str]:
    """Settings as flags; ``${NAME}`` in a value stands for the environment's."""
    words = [os.path.expandvars(word) for key, value in settings.items() for word in flag_words(key, value)]
    if missing := [name for word in words for name in re.findall(r"\$\{(\w+)\}", word)]:
        raise ConfigError(f"the environment has no {missing[0]}, which a setting of the study names; set it")
    return words


def _check_name(source: _Source, place: tuple[str, ...], name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        source.complain(place, f"'{name}' cannot be a folder's name; use letters, digits, and . _ + - after the first")


def _check_unit(source: _Source, place: tuple[str, ...], unit: Any) -> None:
    if unit is not None and unit not in UNITS:
        source.complain(place, f"unknown unit '{unit}' of match; choose from {', '.join(UNITS)}{did_you_mean(str(unit), UNITS)}")


def _check_tune(source: _Source, tune: Settings) -> None:
    given = tune["arms"] or []
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    for name in names:
        if name not in source.table("arms"):
            allowed = source.table("arms")
            source.complain(("tune", "arms"), f"unknown arm '{name}' to tune; this study's are {', '.join(allowed)}{did_you_mean(name, allowed)}")
    tune["arms"] = names
    for name, default in TUNING.items():
        if name == "arms":
            continue
        value = tune[name]
        number = float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e[-+]?\d+", value) else value  # YAML takes 1e-4 for a word
        if isinstance(number, bool) or not isinstance(number, int | float) or number < 0 or (name in ("trials", "low", "high") and not number):
            source.complain(("tune", name), f"{name} is {value!r}; it must be a number above 0, like {default:g}")
            return
        tune[name] = type(default)(number)
    if tune["low"] >= tune["high"]:
        source.complain(("tune",), f"low ({tune['low']:g}) must be below high ({tune['high']:g})")


def _check_arms(source: _Source, cell: str) -> None:
    """The arms of a cell, with what it sets for them; what is wrong in every cell is told once."""
    before: list[str] = []
    for name in source.table("arms"):
        here = source.table("cells", cell, "arms", name)
        place = ("cells", cell, "arms", name) if here else ("arms", name)
        own = {**source.table("arms", name), **here}
        _check_name(source, ("arms", name), name)
        source.check_keys(("arms", name), ("strategy", *ARM_KNOBS), "setting of an arm")
        strategy = str(own.get("strategy", name))
        if strategy not in STRATEGIES:
            near = did_you_mean(strategy, STRATEGIES)
            source.complain((*place, "strategy"), f"unknown strategy '{strategy}' of arm '{name}'; choose from {', '.join(STRATEGIES)}{near}")
        elif name == REFERENCE and strategy != REFERENCE:
            source.complain((*place, "strategy"), f"arm '{REFERENCE}' has the strategy '{strategy}'; all others are compared with every batch once")
        elif STRATEGIES[strategy].needs_source:
            wanted = str(own.get("source", StrategyConfig().source))
            if wanted not in before:
                source.complain(
                    place, f"arm '{name}' is made from the passes of arm '{wanted}', which is not above it; add it there, or set source{_of(before)}"
                )
        before.append(name)
    if before and REFERENCE not in before:
        source.complain(("arms",), f"no arm is called '{REFERENCE}', which all others are compared with; add it")


def _of(names: Sequence[str]) -> str:
    return f" to one of {', '.join(names)}" if names else ""


def _cell(source: _Source, name: str, arguments: Sequence[str]) -> Cell:
    place = ("cells", name) if name else ("settings",)
    own = {key: value for key, value in source.table("cells", name).items() if key != "arms"} if name else {}
    settings = {**DEFAULTS, **source.table("settings"), **own}
    where = f"{source.path}{f', cell {name}' if name else ''}"
    try:
        config = from_flags(cli("compare", TrainFlags, [*_words(settings), "--strategies", REFERENCE, *arguments]))
    except SystemExit as ended:
        if ended.code:
            raise ConfigError(f"{where}: a setting has a value of another kind (see above)") from ended
        raise
    except UserError as problem:
        source.complain(place, str(problem))
        source.stop()
        raise
    arms = []
    for arm in source.table("arms"):
        merged = {**source.table("arms", arm), **(source.table("cells", name, "arms", arm) if name else {})}
        try:
            words = _words({key: value for key, value in merged.items() if key != "strategy"})
            checked = from_flags(cli("compare", TrainFlags, [*_words(settings), "--strategies", REFERENCE, *words, *arguments]))
            typed = {key: getattr(getattr(checked, knobs()[key]), key) for key in merged if key != "strategy"}
            arms.append(make_arm(arm, {**typed, **({"strategy": merged["strategy"]} if "strategy" in merged else {})}, config))
        except SystemExit as ended:
            raise ConfigError(f"{where}, arm {arm}: a setting has a value of another kind (see above)") from ended
        except UserError as problem:
            source.complain(("arms", arm), f"arm '{arm}': {problem}")
    source.stop()
    return Cell(name, config, tuple(arms))


# --------------------------------------------------------------------------------------------------------------------------------------
# What a study leaves in its folder, for its workers and for going on


def as_json(study: Study) -> Settings:
    """The resolved study as its folder keeps it."""
    cells = {cell.name: {"config": cell.config.flat(), "arms": {arm.name: arm.own for arm in cell.arms}} for cell in study.cells}
    return {"name": study.name, "cells": cells}


def from_json(path: Path) -> Study:
    """The study that a folder keeps.

    Raises:
        ConfigError: where it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = []
        for name, kept in content["cells"].items():
            config = make_config(**kept["config"])
            check(config)
            cells.append(Cell(name, config, tuple(make_arm(arm, own, config) for arm, own in kept["arms"].items())))
        return Study(str(content["name"]), tuple(cells))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise ConfigError(
            f"{path} is damaged ({str(problem)[:200]}); start the study anew with --overwrite, or under another --run_name"
        ) from problem
