"""A strategy for somebody else's training loop: made by name, and checked against what a loop can give."""

from __future__ import annotations

from typing import Any

from iterbatch.errors import ConfigError, did_you_mean
from iterbatch.language import _
from iterbatch.strategy import STRATEGIES, make_strategy, own_knobs, register
from iterbatch.strategy.base import PROBE_TEXT, BaseTrainingStrategy
from iterbatch.strategy.original import BaselineStrategy

Given = str | type[BaseTrainingStrategy] | BaseTrainingStrategy


def strategy_for_loop(
    given: Given, seed: int, knobs: dict[str, Any], *, probes: bool
) -> BaseTrainingStrategy:
    """The strategy that a user names.

    Args:
        given: A name of ``iterbatch.STRATEGIES``, a class or instance of one's own, or ``FILE.py:CLASS``.
        seed: For those that draw random numbers.
        knobs: By name; none for an instance.
        probes: Whether the loop has batches that are never trained on.

    Raises:
        ConfigError: for what is not known, out of range, or needs more than a loop has.
    """
    if isinstance(given, BaseTrainingStrategy):
        _check_needs(type(given), type(given).__name__, probes=probes)
        if knobs:
            raise ConfigError(
                _("the strategy is made already; give {names} to its constructor").format(
                    names=", ".join(knobs)
                )
            )
        return given
    name = register(given) if isinstance(given, type) or ":" in given else given
    if name not in STRATEGIES:
        raise ConfigError(
            _("unknown strategy '{name}'{near}").format(name=name, near=did_you_mean(name, STRATEGIES))
        )
    kind, known = STRATEGIES[name], own_knobs(name)
    for knob in knobs:
        if knob not in known:
            raise ConfigError(
                _("'{name}' has no knob '{knob}'{near}; it has {names}").format(
                    name=name, knob=knob, near=did_you_mean(knob, known), names=", ".join(known)
                )
            )
    if problems := [line for knob, value in knobs.items() for line in known[knob].knob.problems(knob, value)]:
        raise ConfigError("\n".join(problems))
    _check_needs(kind, name, probes=probes)
    return make_strategy(name, knobs, seed)


def _check_needs(kind: type[BaseTrainingStrategy], name: str, *, probes: bool) -> None:
    """See that a loop can give what a strategy needs.

    Raises:
        ConfigError: where it cannot.
    """
    if kind.made_from and kind.needs != PROBE_TEXT:
        raise ConfigError(
            _("'{name}' is made from another arm's records; compare it by `iterbatch compare`").format(
                name=name
            )
        )
    if kind.needs == PROBE_TEXT and not probes:
        raise ConfigError(
            _("'{name}' measures on batches that are never trained on; give some by probe=[...]").format(
                name=name
            )
        )
    if kind.needs not in ("", PROBE_TEXT):
        raise ConfigError(
            _("'{name}' needs {needs}, which a loop of one's own does not have").format(
                name=name, needs=kind.needs
            )
        )


def needs_no_more_than_passes(strategy: BaseTrainingStrategy) -> None:
    """See that a strategy does nothing but repeat batches: whole passes are all that a step can make.

    Raises:
        ConfigError: where it does more.
    """
    if not (strategy.gives_k or isinstance(strategy, BaselineStrategy)):
        raise ConfigError(
            _("{name} does more than repeat; it needs a LLaMA with frozen lowest layers").format(
                name=type(strategy).__name__
            )
        )
