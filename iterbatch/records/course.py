"""How far the pairs of a study are, and how long the rest will take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Running:
    """A pair that is being trained."""

    name: str
    folder: Path  # of its records
    fraction: float = 0.0  # of its budget that is spent
    loss: float | None = None  # initial loss of its last batch, nats a token
    doing: str = ""  # what it does instead of training, if it does


@dataclass(frozen=True)
class Course:
    """Where a study stands."""

    pairs: int
    ended: int
    running: tuple[Running, ...]
    left_s: float | None  # seconds, estimated; None as long as there is nothing to go by


class Pace:
    """Estimates when a study ends, from how fast it has moved since this was made.

    Args:
        shares: Of each pair, its budget in those of the others.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._whole = sum(shares)
        self._since, self._from = time.monotonic(), -1.0

    def left(self, spent: float) -> float | None:
        """Seconds until all is spent; None as long as nothing has moved.

        Args:
            spent: Of the budgets of all pairs, in shares.
        """
        if self._from < 0:
            self._since, self._from = time.monotonic(), spent
        moved = spent - self._from
        if moved <= 0:
            return None
        return max(0.0, self._whole - spent) * (time.monotonic() - self._since) / moved


def about(seconds: float) -> str:
    """A duration as one says it."""
    if seconds < 90:
        return f"{max(1, round(seconds)):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.0f} days"
