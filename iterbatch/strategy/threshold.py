"""Thresholds of the loss: a number, or one that follows the losses themselves."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from iterbatch.config import Also
from iterbatch.language import N_

AUTO_QUANTILE = 0.67  # a third of the batches is repeated
RECENT = 32  # losses that a quantile is taken of
FEWEST = 8  # of them, before there is one


def is_quantile(words: str) -> bool:
    """Whether words stand for a running quantile."""
    return words == "auto" or (re.fullmatch(r"q0?\.\d+", words) is not None and 0 < float(words[1:]) < 1)


QUANTILE = Also(is_quantile, N_("'auto', or 'q' and a quantile between 0 and 1, for example q0.67"))


def quantile_of(threshold: float | str) -> float | None:
    """The quantile that a threshold stands for, between 0 and 1; None where it is a number of nats."""
    if not isinstance(threshold, str):
        return None
    return AUTO_QUANTILE if threshold == "auto" else float(threshold.removeprefix("q"))


def running_quantile(losses: Sequence[float], quantile: float) -> tuple[float, float]:
    """Where the quantile of recent losses stands at the coming batch, and how widely they scatter.

    Losses fall while a model learns, so the quantile is taken around their straight line, which is
    followed to the coming batch.

    Args:
        losses: Initial losses, oldest first, nats a token; at least 2.
        quantile: Between 0 and 1.

    Returns:
        The threshold, and the standard deviation around the line, both in nats a token.
    """
    values = np.asarray(losses, dtype=np.float64)
    place = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(place @ values / (place @ place))
    rest = values - values.mean() - slope * place
    ahead = float(values.mean() + slope * (len(values) + 1) / 2)
    return ahead + float(np.quantile(rest, quantile)), float(rest.std())


def auto_repeats(loss: float, threshold: float, spread: float, max_repeats: int) -> int:
    """Passes by how far a loss stands above a running quantile, in units of the spread.

    1 at or below it, 2 above it, and one more for each whole spread.

    Args:
        loss: Initial loss, nats a token.
        threshold: Where the quantile stands, nats a token.
        spread: Standard deviation of recent losses, nats a token.
        max_repeats: Most passes, the first included.
    """
    if not loss > threshold or not spread > 0:
        return 1
    return min(2 + int(min((loss - threshold) / spread, max_repeats)), max_repeats)


class Threshold:
    """A threshold as a strategy has it: a number, or a running quantile of the losses it is shown."""

    def __init__(self, given: float | str) -> None:
        self.given, self.quantile = given, quantile_of(given)
        self.losses: deque[float] = deque(maxlen=RECENT)

    @property
    def now(self) -> tuple[float, float]:
        """The threshold and the spread, nats a token; infinity before there is enough to take one of."""
        if self.quantile is None:
            return float(self.given), 0.0
        if len(self.losses) < FEWEST:
            return float("inf"), 0.0
        return running_quantile(self.losses, self.quantile)

    def note(self, loss: float) -> None:
        """A batch's initial loss has become one of the earlier ones."""
        if self.quantile is not None:
            self.losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """The losses."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.losses = deque(state["losses"], maxlen=RECENT)
