"""Three of the four strategies of the original experiment: pure rules of plain numbers under thin classes.

The fourth, which learns, has a room of its own: :mod:`iterbatch.strategy.learnable`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np

from iterbatch.config import Knob
from iterbatch.language import N_, _
from iterbatch.strategy.base import MAX_REPEATS, BaseTrainingStrategy
from iterbatch.strategy.threshold import QUANTILE, Threshold, auto_repeats

SHARES = (0.1, 1 / 3, 0.5)  # of batches, that a threshold is asked for

# ------------------------------------------------------------------------------------------------------------
# baseline: every batch once


@dataclass(eq=False)
class BaselineStrategy(BaseTrainingStrategy):
    """Every batch once: k = 1."""

    summary: ClassVar[str] = "once"
    gives_k: ClassVar[bool] = False

    def repeats(self, initial_loss: float) -> int:
        """Always 1."""
        return 1


# ------------------------------------------------------------------------------------------------------------
# abr: Adaptive Batch Repetition


def abr_repeats(loss: float, threshold: float, max_repeats: int) -> int:
    """``min(int(loss / threshold), max_repeats)`` where the loss is above the threshold, else 1.

    Args:
        loss: Initial loss, nats a token, >= 0.
        threshold: Loss above which a batch may be repeated, nats a token, > 0.
        max_repeats: Most passes, the first included, >= 1.

    Source: the original experiment.
    """
    return min(int(loss / threshold), max_repeats) if loss > threshold else 1


def abr_threshold(share: float, losses: Sequence[float]) -> float:
    """The threshold from which :func:`abr_repeats` repeats a share of these losses: it takes twice that."""
    return float(np.quantile(losses, 1 - share)) / 2


@dataclass(eq=False)
class ABRRule(BaseTrainingStrategy):
    """ABR's answer to how often; what is made of it is a subclass's."""

    loss_threshold: Annotated[
        float | str,
        Knob("initial loss, in nats a token, above which a batch is repeated", above=0, also=QUANTILE),
    ] = 2.0
    max_repeats: Annotated[int, Knob("most passes a batch, the first included", at_least=1)] = MAX_REPEATS

    @cached_property
    def threshold(self) -> Threshold:
        """A number, or a running quantile."""
        return Threshold(self.loss_threshold)

    def repeats(self, initial_loss: float) -> int:
        """By the ratio of the initial loss to the threshold, or its distance above a running quantile."""
        level, spread = self.threshold.now
        if self.threshold.quantile is None:
            return abr_repeats(initial_loss, level, self.max_repeats)
        return auto_repeats(initial_loss, level, spread, self.max_repeats)

    def observe(self, losses: list[float]) -> None:
        """Let a running quantile follow."""
        if math.isfinite(losses[0]):
            self.threshold.note(losses[0])

    def state_dict(self) -> dict[str, Any]:
        """What a running quantile is taken of."""
        return {"threshold": self.threshold.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.threshold.load_state_dict(state["threshold"])


@dataclass(eq=False)
class ABRStrategy(ABRRule):
    """Adaptive Batch Repetition: the higher the initial loss, the more passes.

    See :func:`abr_repeats`; :func:`iterbatch.strategy.threshold.auto_repeats` for a threshold that follows.
    """

    summary: ClassVar[str] = (
        "`min(int(loss / threshold), max_repeats)` where its initial loss is above the threshold"
    )
    question: ClassVar[str] = N_("Does ABR beat training every batch once?")
    rival: ClassVar[str] = "baseline"
    adapts: ClassVar[bool] = True

    def foresee(self, base_loss: float) -> str:
        """What it makes of a batch as hard as the base finds the text."""
        if self.threshold.quantile is not None or not math.isfinite(base_loss):
            return ""
        threshold, passes = float(self.loss_threshold), self.repeats(base_loss)
        at = _("the base's loss is {base_loss:.2f}, and at --loss_threshold {threshold:g} a batch").format(
            base_loss=base_loss, threshold=threshold
        )
        if passes == 1:
            said = _("{at} is repeated from {threshold:.2f} on: hardly any will be").format(
                at=at, threshold=2 * threshold
            )
        elif passes == self.max_repeats:
            said = _("{at} gets all {passes} passes from {passes2:.2f} on: at first every one will").format(
                at=at, passes=passes, passes2=passes * threshold
            )
        else:
            return ""
        return _("{said}. --loss_threshold auto follows the losses").format(said=said)

    @classmethod
    def advice(cls, losses: Sequence[float]) -> str:
        """The thresholds from which it would repeat a tenth, a third and half of these losses."""
        found = [f"{abr_threshold(share, losses):.3g}" for share in SHARES]
        return _("--loss_threshold {found} repeats a tenth of them, {found2} a third, {found3} half").format(
            found=found[0], found2=found[1], found3=found[2]
        )


# ------------------------------------------------------------------------------------------------------------
# window: trend, level and volatility of the last initial losses


def window_repeats(earlier: Sequence[float], loss: float, threshold: float, extra: int) -> int:
    """Passes from the earlier losses and the current one.

    Rising and high gets all extra passes, falling and low none. Anything else is weighed by how far the loss
    stands above the window: one extra pass for each whole volatility above its mean.

    With a line fitted to the window by least squares: *trend* is its rise over the window, *volatility* the
    standard deviation of the losses around it. The trend counts as rising or falling only where it exceeds
    the volatility, so that noise is not taken for a trend. *Level*: the current loss is high above the
    threshold.

    Args:
        earlier: Initial losses of the batches before, oldest first, nats a token; all of them are used.
        loss: Of the current batch, nats a token.
        threshold: Loss above which the level is high, nats a token, > 0.
        extra: Most extra passes, >= 0; the total stays within 5.

    Source: the original experiment names the regression over earlier losses, and that trend, current loss and
    volatility decide; how finely the three are weighed is this project's.
    """
    window = np.asarray(earlier, dtype=np.float64)
    place = np.arange(len(window)) - (len(window) - 1) / 2
    slope = float(place @ window / (place @ place))
    trend = slope * (len(window) - 1)
    volatility = float(np.std(window - window.mean() - slope * place))
    # A constant window must neither rise nor scatter by rounding.
    noise = max(volatility, 1e-9 * max(1.0, abs(float(window.mean()))))
    if trend > noise and loss > threshold:
        adjustment = extra
    elif trend < -noise and not loss > threshold:
        adjustment = 0
    else:
        adjustment = int(min(max((loss - float(window.mean())) / noise, 0), extra))
    return min(1 + adjustment, MAX_REPEATS)


@dataclass(eq=False)
class SlidingWindowStrategy(BaseTrainingStrategy):
    """Looks back on the last ``window_size`` initial losses. See :func:`window_repeats`."""

    summary: ClassVar[str] = "by the trend of the last losses, the current loss and their volatility"
    question: ClassVar[str] = N_("Does the sliding window beat training every batch once?")
    arm: ClassVar[str] = "window"
    rival: ClassVar[str] = "baseline"
    adapts: ClassVar[bool] = True

    loss_threshold: Annotated[
        float | str,
        Knob("current loss, in nats a token, above which the level is high", above=0, also=QUANTILE),
    ] = 2.0
    max_repeats: Annotated[int, Knob("most extra passes", at_least=1)] = 1
    window_size: Annotated[int, Knob("earlier losses that it looks back on", at_least=2)] = 5

    def __post_init__(self) -> None:
        self.window: deque[float] = deque(maxlen=self.window_size)
        self.threshold = Threshold(self.loss_threshold)

    def repeats(self, initial_loss: float) -> int:
        """By trend and volatility of the window, and the loss itself; 1 while the window is not full."""
        if len(self.window) < self.window_size:
            return 1
        return window_repeats(self.window, initial_loss, self.threshold.now[0], self.max_repeats)

    def observe(self, losses: list[float]) -> None:
        """The current loss enters the window."""
        self.window.append(losses[0])
        self.threshold.note(losses[0])

    def state_dict(self) -> dict[str, Any]:
        """The window, and what a running quantile is taken of."""
        return {"window": list(self.window), "threshold": self.threshold.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        self.window = deque(state["window"], maxlen=self.window_size)
        self.threshold.load_state_dict(state["threshold"])
