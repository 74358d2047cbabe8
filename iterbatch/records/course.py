"""How far the pairs of a study are, and how long the rest will take."""

import time
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
    """Estimates how long the rest takes, from how much has moved since this was made."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def left(self, moved: float, rest: float) -> float | None:
        """Seconds until all is done; None as long as nothing has moved.

        Args:
            moved: What has been done since, in any unit.
            rest: What is left, in the same.
        """
        return rest * (time.monotonic() - self._since) / moved if moved > 0 else None


def about(seconds: float) -> str:
    """A duration as one says it."""
    if seconds < 90:
        return f"{max(1, round(seconds)):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.0f} days"
