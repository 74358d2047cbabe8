"""The strategies: pure rules of plain numbers under thin classes.

A strategy sees losses and ``step``. It never sees the optimizer, the data order, the data set's
name or evaluation scores. To add one: write a class with ``repeats``, add a line to ``STRATEGIES``
and a card to ``docs/strategies/``.
"""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from iterbatch.config import Knob, knobs_of
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.strategy import own
from iterbatch.strategy.base import BaseTrainingStrategy, ControlStep, Step
from iterbatch.strategy.controls import (
    ExcessStrategy,
    FixedStrategy,
    GradientNoiseStrategy,
    HigherLRStrategy,
    InverseStrategy,
    PermutedStrategy,
    ProfileStrategy,
    RandomStrategy,
    ScaledLRStrategy,
    SelectiveStrategy,
    SmallBatchesStrategy,
    SpacedStrategy,
    WeightedStrategy,
)
from iterbatch.strategy.learnable import FrozenStrategy, LearnableSchedulingStrategy
from iterbatch.strategy.original import ABRStrategy, BaselineStrategy, SlidingWindowStrategy

__all__ = [
    "REFERENCE",
    "STRATEGIES",
    "BaseTrainingStrategy",
    "ControlStep",
    "SharedKnob",
    "Step",
    "knobs",
    "make_strategy",
    "needs_source",
    "own_knobs",
    "register",
    "source_of",
]

STRATEGIES: dict[str, type[BaseTrainingStrategy]] = {
    "baseline": BaselineStrategy,
    "abr": ABRStrategy,
    "learnable": LearnableSchedulingStrategy,
    "window": SlidingWindowStrategy,
    "fixed": FixedStrategy,
    "permuted": PermutedStrategy,
    "profile": ProfileStrategy,
    "random": RandomStrategy,
    "inverse": InverseStrategy,
    "excess": ExcessStrategy,
    "scaled_lr": ScaledLRStrategy,
    "higher_lr": HigherLRStrategy,
    "weighted": WeightedStrategy,
    "spaced": SpacedStrategy,
    "small_batches": SmallBatchesStrategy,
    "selective": SelectiveStrategy,
    "gradient_noise": GradientNoiseStrategy,
    "frozen": FrozenStrategy,
}
REFERENCE = "baseline"  # the arm that all others are compared with
GIVEN = ("seed", "source")  # arguments of strategies that are no knobs
REGISTERED: set[str] = set()  # names of strategies of one's own
STRATEGIES |= own.from_packages(STRATEGIES)


@dataclass(frozen=True)
class SharedKnob:
    """A knob that one strategy or several have under one name, as one flag.

    Args:
        name: Of the flag.
        kind: int, float, str or bool.
        default: Theirs where they agree, else None, which leaves each its own.
        knob: Its meaning for each of them, and the range that all of them have.
    """

    name: str
    kind: type
    default: Any
    knob: Knob


@dataclass(frozen=True)
class OwnKnob:
    """A knob of one strategy."""

    kind: type  # int, float, str or bool
    default: Any  # None: it must be set
    knob: Knob


def knobs() -> dict[str, SharedKnob]:
    """The knobs of all strategies, by name."""
    return dict(_all_knobs(tuple(STRATEGIES.items())))


@cache
def _all_knobs(strategies: tuple[tuple[str, type[BaseTrainingStrategy]], ...]) -> dict[str, SharedKnob]:
    """Read off the classes once: they are asked for at every setting that is checked."""
    owners: dict[str, list[str]] = {}
    for strategy, _kind in strategies:
        for name in own_knobs(strategy):
            owners.setdefault(name, []).append(strategy)
    return {name: _shared(name, each) for name, each in owners.items()}


def own_knobs(strategy: str) -> dict[str, OwnKnob]:
    """The knobs that a strategy has, by name; placement is none of one that gives no k.

    Those it declares, and else the typed arguments of its constructor, told by its docstring.
    """
    return dict(_knobs_of(strategy, STRATEGIES[strategy]))


@cache
def _knobs_of(strategy: str, kind: type[BaseTrainingStrategy]) -> dict[str, OwnKnob]:
    arguments, of_all, declared = (
        inspect.signature(kind).parameters,
        knobs_of(BaseTrainingStrategy),
        knobs_of(kind),
    )
    hints = get_type_hints(kind)
    if any(name not in hints for name in arguments):  # a constructor that no dataclass wrote
        hints |= get_type_hints(kind.__init__)
    told, found = _told(kind), {}
    for name, argument in arguments.items():
        known = name in declared or (name not in GIVEN and hints.get(name) in (int, float, str, bool))
        if known and name not in of_all:
            default = None if argument.default is argument.empty else argument.default
            meaning = told.get(name, f"{name} of {strategy}")
            found[name] = OwnKnob(hints[name], default, declared.get(name) or Knob(meaning))
    placing = {
        name: OwnKnob(hints[name], getattr(kind, name), knob)
        for name, knob in of_all.items()
        if name in declared
    }
    return {**placing, **found} if kind.gives_k else found


def _told(kind: type) -> dict[str, str]:
    """What a docstring says of arguments, in Google's style."""
    text = inspect.cleandoc(f"{kind.__doc__ or ''}\n{getattr(kind.__init__, '__doc__', '') or ''}")
    return {name: meaning.strip().rstrip(".") for name, meaning in re.findall(r"(?m)^\s+(\w+): (.+)$", text)}


def _shared(name: str, strategies: list[str]) -> SharedKnob:
    defaults: dict[Any, list[str]] = {}
    meanings: dict[Any, list[str]] = {}
    owned = {strategy: own_knobs(strategy)[name] for strategy in strategies}
    for strategy, each in owned.items():
        defaults.setdefault(each.default, []).append(strategy)
        meanings.setdefault(each.knob.meaning, []).append(strategy)
    agreed = next(iter(defaults)) if len(defaults) == 1 else None

    def told() -> str:
        words = _("; ").join(
            _("{strategies}: {meaning}").format(strategies=_names(users), meaning=_(meaning))
            for meaning, users in meanings.items()
        )
        if agreed is not None:
            return words
        rare = [f"{', '.join(users)} {value}" for value, users in list(defaults.items())[1:]]
        default = _(". Default: {default}; {rare}").format(default=next(iter(defaults)), rare="; ".join(rare))
        return words + default

    of_first = owned[strategies[0]]
    range_ = dataclasses.asdict(of_first.knob.range)
    knob = Knob(told, **range_, choices=of_first.knob.choices, also=of_first.knob.also)
    return SharedKnob(name, of_first.kind, agreed, knob)


def register(word: str | type[BaseTrainingStrategy], folder: Path = Path()) -> str:
    """Take a strategy of one's own among the others; returns its name.

    Args:
        word: ``FILE.py:CLASS``, or the class.
        folder: Where the file is looked for first.

    Raises:
        ConfigError: where there is no such class, or it cannot be a strategy under that name.
    """
    if isinstance(word, str):
        source, kind = own.read(word, folder)
        name = source.name
    else:
        source, name, kind = None, word.__name__, own.checked(word.__name__, word)
    if name in STRATEGIES and STRATEGIES[name] is not kind and name not in REGISTERED:
        raise ConfigError(
            _("{word}: there is a strategy {name} already; give the class another name").format(
                word=word, name=name
            )
        )
    others = knobs()
    STRATEGIES[name] = kind
    try:
        mine_all = own_knobs(name)
    except Exception as problem:  # hints that cannot be resolved, say
        del STRATEGIES[name]
        raise ConfigError(
            _("{word}: its constructor cannot be read ({problem})").format(word=word, problem=problem)
        ) from problem
    for knob, mine in mine_all.items():
        theirs = others.get(knob)
        if theirs is not None and theirs.kind is not mine.kind:
            del STRATEGIES[name]
            advice = _("other strategies' {knob} is a {name}; let it be one, or rename it").format(
                knob=knob, name=theirs.kind.__name__
            )
            raise ConfigError(f"{word}: {advice}")
    REGISTERED.add(name)
    if source is not None:
        own.SOURCES[name] = source
    return name


def _names(strategies: list[str]) -> str:
    every = [name for name, kind in STRATEGIES.items() if kind.gives_k]
    return (
        _("every strategy that gives k") if set(every) <= {*strategies, "spaced"} else ", ".join(strategies)
    )


def needs_source(name: str) -> bool:
    """Whether a strategy is made from another arm."""
    return bool(STRATEGIES[name].made_from)


def source_of(name: str, given: str | None) -> str:
    """The arm that a control is made from: the one given, or whose claim it examines."""
    return given or STRATEGIES[name].arm


def make_strategy(name: str, knobs: Mapping[str, Any], seed: int, source: Any = ()) -> BaseTrainingStrategy:
    """Build a strategy.

    Args:
        name: A key of ``STRATEGIES``.
        knobs: Values by name; those that it has none of are left out, None is its own default.
        seed: For a strategy that draws random numbers.
        source: Of the arm that a control is made from: what its ``made_from`` says.
    """
    kind = STRATEGIES[name]
    given = {**knobs, "seed": seed, "source": source}
    taken = [each for each in inspect.signature(kind).parameters if given.get(each) is not None]
    made = kind(**{each: given[each] for each in taken})
    own_ones = own_knobs(name)  # spaced has no placement to choose
    for each in knobs_of(BaseTrainingStrategy):  # a constructor of one's own need not take them
        if each in own_ones and each not in taken and given.get(each) is not None:
            setattr(made, each, given[each])
    return made
