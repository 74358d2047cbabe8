"""Study files: read and checked, with the line of every mistake, and how rates are written into one."""

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iterbatch.bench.arm import make_arm
from iterbatch.checks import check_placement, unknown_strategy, with_probe_text
from iterbatch.checks import settings as all_settings
from iterbatch.config import NOT_SAVED, UNITS
from iterbatch.errors import ConfigError, UserError, did_you_mean, first_line
from iterbatch.flags import CompareFlags, named, parse, words_of
from iterbatch.language import _
from iterbatch.plain_yaml import editor, key_lines, parse_yaml, read_text
from iterbatch.records.write import write_text
from iterbatch.strategy import REFERENCE, STRATEGIES, knobs, needs_source, own_knobs, register, source_of
from iterbatch.strategy.own import is_named
from iterbatch.study.pairs import Cell, Study

ARM_TRAINING = ("lr", "warmup", "weight_decay", "clip_norm", "budget_share")
# Where a comparison differs from a run.
DEFAULTS = {"match": "flops", "seeds": [0, 1, 2], "evals": 10, "prompts": 200, "log_with": "none"}
SECTIONS = ("about", "environment", "settings", "arms", "cells", "tune", "worth")
# Settings in which ${name} stands for the environment's value, and the names that may stand there undeclared.
EXPANDED = ("data_dir", "model_name")
OWN_NAMES = "ITERBATCH_"
SECRET = re.compile(r"token|secret|passw|key|credential", re.IGNORECASE)  # in names that may not be declared
# Of the arms to tune; where none is named, all.
TUNING: dict[str, Any] = {
    "trials": 8,
    "seeds": 3,
    "low": 1e-4,
    "high": 3e-2,
    "seed": 1000,
    "max_eval_tokens": 0,  # that a trial is scored on; 0: as many as its arm
    "arms": [],
}
Settings = dict[str, Any]


def arm_settings() -> tuple[str, ...]:
    """What an arm may set for itself."""
    return (*ARM_TRAINING, *knobs(), "source")


# ------------------------------------------------------------------------------------------------------------
# The file


class _Source:
    """A study file: its content, and the line of every entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[str, ...], int] = {}
        self.problems: list[str] = []
        self.declared: list[str] = []  # variables of the environment that it may use
        try:
            text = read_text(path)
            self.content = parse_yaml(text, duplicates=True)
        except OSError as problem:
            raise ConfigError(
                _("the study {path} cannot be read: {problem}").format(path=path, problem=problem.strerror)
            ) from problem
        except ValueError as problem:
            raise ConfigError(
                _("the study {path} is not valid YAML: {problem}").format(
                    path=path, problem=first_line(problem)
                )
            ) from problem
        for place, line in key_lines(text):
            if place in self.lines:
                self.complain(place, _("'{place}' is there twice").format(place=place[-1]), line=line)
            self.lines[place] = line

    def complain(self, place: tuple[str, ...], message: str, line: int | None = None) -> None:
        near = (self.lines[place[:size]] for size in range(len(place), 0, -1) if place[:size] in self.lines)
        line = line or next(near, None)
        problem = _("{path}, line {line}: {message}").format(path=self.path, line=line, message=message)
        if not line:
            problem = f"{self.path}: {message}"
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
            where = ".".join(place) or "the file"
            self.complain(
                place,
                _("'{where}' holds a {name}; write one 'key: value' a line").format(
                    where=where, name=type(value).__name__
                ),
            )
            return {}
        return {str(key): item for key, item in value.items()}

    def check_keys(self, place: tuple[str, ...], allowed: Iterable[str], what: str) -> None:
        allowed = list(allowed)
        for key in self.table(*place):
            if key not in allowed:
                near = did_you_mean(key, allowed)
                self.complain(
                    (*place, key),
                    _("unknown {what} '{key}'; allowed are {names}{near}").format(
                        what=what, key=key, names=", ".join(allowed), near=near
                    ),
                )

    def declare(self) -> None:
        """Note which variables of the environment the study may use."""
        given = self.content.get("environment") if isinstance(self.content, dict) else None
        for name in [] if given is None else given if isinstance(given, list) else [given]:
            if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
                message = _("environment holds {name!r}; write a list of variables' names").format(name=name)
                self.complain(("environment",), message)
            elif SECRET.search(name):
                message = _(
                    "environment names {name}, which looks like a secret; a study has no use for one"
                ).format(name=name)
                self.complain(("environment",), message)
            else:
                self.declared.append(name)

    def name_own_strategies(self) -> None:
        """Read the strategies of one's own that arms name, from beside the study or from here."""
        cells = self.table("cells")
        for place in [("arms",), *(("cells", cell, "arms") for cell in cells)]:
            for arm in self.table(*place):
                own: Any = self.table(*place, arm)
                word = own.get("strategy")
                if isinstance(word, str) and is_named(word):
                    try:
                        self._raw(*place)[arm]["strategy"] = register(word, self.path.parent)
                    except ConfigError as problem:
                        self.complain((*place, arm, "strategy"), str(problem))

    def _raw(self, *place: str) -> Any:
        value: Any = self.content
        for key in place:
            value = value[key]
        return value

    def words(self, settings: Settings) -> list[str]:
        """Settings as flags; ``${name}`` in a place of data or models stands for the environment's."""
        expanded = {
            key: self._expanded(key, value) if isinstance(value, str) else value
            for key, value in settings.items()
        }
        return words_of(expanded)

    def _expanded(self, key: str, word: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match.group(1)
            if key not in EXPANDED:
                places = " and ".join(EXPANDED)
                raise ConfigError(
                    _("{key} names ${{{name}}}; variables stand in {places} only").format(
                        key=key, name=name, places=places
                    )
                )
            if not name.startswith(OWN_NAMES) and name not in self.declared:
                raise ConfigError(
                    _(
                        "{key} names ${{{name}}}; a study may use variables whose names begin with "
                        "{own_names}, and those it lists in its section 'environment'"
                    ).format(key=key, name=name, own_names=OWN_NAMES)
                )
            if name not in os.environ:
                raise ConfigError(
                    _("the environment has no {name}, which {key} of the study names; set it").format(
                        name=name, key=key
                    )
                )
            return os.environ[name]

        return re.sub(r"\$\{(\w+)\}", value, word)

    def stop(self) -> None:
        """Raise what has been found so far."""
        if self.problems:
            raise ConfigError("\n".join(self.problems))


def load_study(path: Path, words: Sequence[str] = ()) -> Study:
    """Read a study file and check all of it.

    Args:
        path: The file.
        words: Of ``iterbatch compare``; its flags override the file's settings in every cell.

    Raises:
        ConfigError: with every mistake, its line, and the nearest name that would be right.
    """
    source, words = _Source(path), named(words)
    source.check_keys((), SECTIONS, "section")
    source.declare()
    source.name_own_strategies()
    if not source.table("arms"):
        source.complain(
            ("arms",),
            _("a study needs arms: write 'arms:' with one name a line, {reference} among them").format(
                reference=REFERENCE
            ),
        )
    allowed = [name for name in all_settings() if name not in (*NOT_SAVED, "strategies", "save_dir")]
    source.check_keys(("settings",), allowed, "setting")
    _check_unit(source, ("settings", "match"), source.table("settings").get("match"))
    for cell in source.table("cells"):
        _check_cell(source, cell, allowed)
    source.check_keys(("tune",), TUNING, "setting of tune")
    for cell in source.table("cells") or [""]:
        _check_arms(source, cell)
    tune = _checked_tune(source)
    _check_worth(source)
    source.stop()
    cells = [_cell(source, name, words) for name in source.table("cells") or [""]]
    return Study(path.stem, tuple(cells), tune)


def study_of_flags(words: Sequence[str]) -> Study:
    """A comparison without a file: the strategies of the flags.

    Raises:
        ConfigError: where they lack the baseline, or anything else is wrong.
    """
    config = _flags(words_of(DEFAULTS), named(words)).config()
    check_placement(config)
    if REFERENCE not in config.strategy.strategies:
        raise ConfigError(
            _("--strategies lacks '{reference}', which all others are compared with; add it").format(
                reference=REFERENCE
            )
        )
    arms = tuple(make_arm(name, {}, config) for name in config.strategy.strategies)
    name = config.run.run_name or f"compare-{re.sub(r'[^A-Za-z0-9._-]+', '-', config.data.dataset)}"
    return Study(name, (Cell("", config, arms),))


def write_rates(path: Path, rates: Mapping[str, Mapping[str, float]]) -> None:
    """Set the learning rate of arms, by cell, in a study file, which keeps its comments and order."""
    keeper = editor()
    content = keeper.load(path.read_text(encoding="utf-8-sig"))
    for cell, chosen in rates.items():
        arms = _entry(_entry(content["cells"], cell) if cell else content, "arms")
        for arm, rate in chosen.items():
            _entry(arms, arm)["lr"] = rate
    buffer = io.StringIO()
    keeper.dump(content, buffer)
    write_text(path, buffer.getvalue())


def _entry(table: Any, key: str) -> Any:
    """A table within a table, made where there is none."""
    if table.get(key) is None:
        table[key] = {}
    return table[key]


def _flags(file_words: Sequence[str], words: Sequence[str]) -> CompareFlags:
    """A file's settings, overridden by a command line's."""
    default = parse(CompareFlags, file_words, command="compare")
    return parse(CompareFlags, words, command="compare", default=default)


# ------------------------------------------------------------------------------------------------------------
# Its checks


def _check_cell(source: _Source, cell: str, allowed: Sequence[str]) -> None:
    _check_name(source, ("cells", cell), cell)
    source.check_keys(("cells", cell), [*allowed, "arms"], "setting")
    _check_unit(source, ("cells", cell, "match"), source.table("cells", cell).get("match"))
    arms = source.table("arms")
    for arm in source.table("cells", cell, "arms"):
        place = ("cells", cell, "arms", arm)
        if arm not in arms:
            message = _("unknown arm '{arm}'; this study's are {names}{near}").format(
                arm=arm, names=", ".join(arms), near=did_you_mean(arm, arms)
            )
            source.complain(place, message)
        source.check_keys(place, ("strategy", *arm_settings()), "setting of an arm")


def _check_name(source: _Source, place: tuple[str, ...], name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        message = _(
            "'{name}' cannot be a folder's name; use letters, digits, and . _ + - after the first"
        ).format(name=name)
        source.complain(place, message)


def _check_unit(source: _Source, place: tuple[str, ...], unit: Any) -> None:
    if unit is not None and unit not in UNITS:
        near = did_you_mean(str(unit), UNITS)
        source.complain(
            place,
            _("unknown unit '{unit}' of match; choose from {names}{near}").format(
                unit=unit, names=", ".join(UNITS), near=near
            ),
        )


def _checked_tune(source: _Source) -> Settings:
    """The section on tuning, with its defaults."""
    tune, arms = {**TUNING, **source.table("tune")}, source.table("arms")
    given = tune["arms"] or []
    tune["arms"] = [str(name) for name in (given if isinstance(given, list) else [given])]
    for name in tune["arms"]:
        if name not in arms:
            message = _("unknown arm '{name}' to tune; this study's are {names}{near}").format(
                name=name, names=", ".join(arms), near=did_you_mean(name, arms)
            )
            source.complain(("tune", "arms"), message)
    for name, default in TUNING.items():
        if name == "arms":
            continue
        value = tune[name]
        least = 0 if name in ("seed", "max_eval_tokens") else 1e-300
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e300:
            source.complain(
                ("tune", name),
                _("{name} is {value!r}; it must be a number above 0, like {default:g}").format(
                    name=name, value=value, default=default
                ),
            )
            return tune
        tune[name] = type(default)(value)
    if tune["low"] >= tune["high"]:
        source.complain(
            ("tune",),
            _("low ({low:g}) must be below high ({high:g})").format(low=tune["low"], high=tune["high"]),
        )
    return tune


def _check_worth(source: _Source) -> None:
    """The shares of the budget at which the baseline is trained too, for what compute is worth."""
    given = source.content.get("worth") if isinstance(source.content, dict) else None
    for share in [] if given is None else given if isinstance(given, list) else [given]:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 100 or share == 1:
            message = _(
                "worth holds {share!r}; write shares of the budget, for example [0.5, 0.71, 1.41]"
            ).format(share=share)
            source.complain(("worth",), message)


def _worth_arms(source: _Source, cell: str) -> Settings:
    """The baseline at other budgets: arms by name, with the baseline's own settings."""
    of_cell = source.table("cells", cell, "arms", REFERENCE) if cell else {}
    own = {**source.table("arms", REFERENCE), **of_cell}
    given = source.content.get("worth") or []
    shares = given if isinstance(given, list) else [given]
    return {
        f"{REFERENCE}-x{share:g}": {**own, "strategy": REFERENCE, "budget_share": share} for share in shares
    }


def _check_arms(source: _Source, cell: str) -> None:
    """The arms of a cell, with what it sets for them; what is wrong in every cell is told once."""
    before: list[str] = []
    for name in source.table("arms"):
        here = source.table("cells", cell, "arms", name)
        place = ("cells", cell, "arms", name) if here else ("arms", name)
        own = {**source.table("arms", name), **here}
        _check_name(source, ("arms", name), name)
        source.check_keys(("arms", name), ("strategy", *arm_settings()), "setting of an arm")
        strategy = str(own.get("strategy", name))
        if strategy not in STRATEGIES:
            source.complain(
                (*place, "strategy"), unknown_strategy(strategy, _(" of arm '{name}'").format(name=name))
            )
        elif name == REFERENCE and strategy != REFERENCE:
            other = _("arm '{reference}' has the strategy '{strategy}'").format(
                reference=REFERENCE, strategy=strategy
            )
            message = _("{other}; all others are compared with every batch once").format(other=other)
            source.complain((*place, "strategy"), message)
        elif foreign := [key for key in own if key in knobs() and key not in own_knobs(strategy)]:
            for key in foreign:
                has = ", ".join(own_knobs(strategy)) or "none"
                message = _("arm '{name}' sets {key}, which {strategy} has not; its own knobs: {has}").format(
                    name=name, key=key, strategy=strategy, has=has
                )
                source.complain((*place, key), message)
        elif needs_source(strategy):
            _check_source(source, place, source_of(strategy, own.get("source")), before)
        before.append(name)
    if before and REFERENCE not in before:
        source.complain(
            ("arms",),
            _("no arm is called '{reference}', which all others are compared with; add it").format(
                reference=REFERENCE
            ),
        )


def _check_source(source: _Source, place: tuple[str, ...], wanted: str, before: Sequence[str]) -> None:
    if wanted not in before:
        choice = _(" to one of {names}").format(names=", ".join(before)) if before else ""
        source.complain(
            place,
            _(
                "arm '{place}' is made from arm '{wanted}', which is not above it; add it there, or set "
                "source{choice}"
            ).format(place=place[-1], wanted=wanted, choice=choice),
        )


# ------------------------------------------------------------------------------------------------------------
# Its cells


def _cell(source: _Source, name: str, words: Sequence[str]) -> Cell:
    place = ("cells", name) if name else ("settings",)
    own = {key: value for key, value in source.table("cells", name).items() if key != "arms"} if name else {}
    settings = {**DEFAULTS, **source.table("settings"), **own}
    where = _("{path}, cell {name}").format(path=source.path, name=name) if name else str(source.path)
    file_words: list[str] = []
    try:
        file_words = [*source.words(settings), "--strategies", REFERENCE]
        config = _flags(file_words, words).config()
        kinds = [str(own.get("strategy", arm)) for arm, own in _own_arms(source, name).items()]
        config = with_probe_text(config, kinds)
    except SystemExit as ended:
        if ended.code:
            raise ConfigError(
                _("{where}: a setting has a value of another kind (see above)").format(where=where)
            ) from ended
        raise
    except UserError as problem:
        source.complain(place, str(problem))
        source.stop()
        raise
    arms = []
    for arm, given in {**_own_arms(source, name), **_worth_arms(source, name)}.items():
        try:
            own = _typed(source, given, file_words, words)
            made = make_arm(arm, own, config)
            made.source_seed(config.training.seeds[0])  # says whether there is another seed to take
            arms.append(made)
        except SystemExit as ended:
            raise ConfigError(
                _("{where}, arm {arm}: a setting has a value of another kind (see above)").format(
                    where=where, arm=arm
                )
            ) from ended
        except UserError as problem:
            source.complain(("arms", arm), _("arm '{arm}': {problem}").format(arm=arm, problem=problem))
    source.stop()
    return Cell(name, config, tuple(arms))


def _own_arms(source: _Source, cell: str) -> Settings:
    """What each arm of a cell sets for itself, by its name."""
    in_cell = {arm: source.table("cells", cell, "arms", arm) if cell else {} for arm in source.table("arms")}
    return {arm: {**source.table("arms", arm), **own} for arm, own in in_cell.items()}


def _typed(source: _Source, settings: Settings, file_words: Sequence[str], words: Sequence[str]) -> Settings:
    """The settings of an arm, checked, as the types that they are of."""
    own = {key: value for key, value in settings.items() if key != "strategy"}
    flat = _flags([*file_words, *source.words(own)], words).config().flat()
    kept = {"strategy": settings["strategy"]} if "strategy" in settings else {}
    return {**{key: flat[key] for key in own}, **kept}
