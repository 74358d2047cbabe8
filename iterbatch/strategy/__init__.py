"""The strategies: pure rules of plain numbers under thin classes.

A strategy sees losses and ``step``. It never sees the optimizer, the data order, the data set's
name or evaluation scores. To add one: write a class with ``repeats``, add a line to ``STRATEGIES``
and a card to ``docs/strategies/``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from iterbatch.config import Knob, knobs_of
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


def knobs() -> dict[str, SharedKnob]:
    """The knobs of all strategies, by name."""
    owners: dict[str, list[str]] = {}
    for strategy in STRATEGIES:
        for name in own_knobs(strategy):
            owners.setdefault(name, []).append(strategy)
    return {name: _shared(name, strategies) for name, strategies in owners.items()}


def own_knobs(strategy: str) -> list[str]:
    """Names of the knobs that a strategy has; placement is none of one that gives no k."""
    kind = STRATEGIES[strategy]
    of_all = () if kind.gives_k else knobs_of(BaseTrainingStrategy)
    return [name for name in knobs_of(kind) if name not in of_all]


def _shared(name: str, strategies: list[str]) -> SharedKnob:
    defaults: dict[Any, list[str]] = {}
    meanings: dict[str, list[str]] = {}
    for strategy in strategies:
        kind = STRATEGIES[strategy]
        defaults.setdefault(getattr(kind, name), []).append(strategy)
        meanings.setdefault(knobs_of(kind)[name].meaning, []).append(strategy)
    words = "; ".join(f"{_names(users)}: {meaning}" for meaning, users in meanings.items())
    agreed = next(iter(defaults)) if len(defaults) == 1 else None
    if agreed is None:
        rare = [f"{', '.join(users)} {value}" for value, users in list(defaults.items())[1:]]
        words += f". Default: {next(iter(defaults))}; {'; '.join(rare)}"
    first = STRATEGIES[strategies[0]]
    of_first = knobs_of(first)[name]
    range_ = dataclasses.asdict(of_first.range)
    knob = Knob(words, **range_, choices=of_first.choices, also=of_first.also)
    return SharedKnob(name, get_type_hints(first)[name], agreed, knob)


def _names(strategies: list[str]) -> str:
    every = [name for name, kind in STRATEGIES.items() if kind.gives_k]
    return "every strategy that gives k" if set(every) <= {*strategies, "spaced"} else ", ".join(strategies)


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
    taken = [each.name for each in dataclasses.fields(kind) if each.init]
    return kind(**{each: given[each] for each in taken if given.get(each) is not None})
