"""When repeats are made: at once, or spaced over later batches."""

from __future__ import annotations

import math
from typing import Any, Protocol

AT_ONCE, SPACED = "at_once", "spaced"


class Placing(Protocol):
    """A way to place the repeats of a batch."""

    def repeat(self, step: Any, losses: list[float], planned: int) -> None:
        """Make what is due after the fresh pass of the current batch.

        Args:
            step: See :class:`iterbatch.strategy.base.Step`.
            losses: Of the passes made on it so far; grows by those made now.
            planned: Passes in all.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is still to be made."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        ...


class AtOnce:
    """Repeats follow the fresh pass, while the loss is finite and the budget affords them."""

    def repeat(self, step: Any, losses: list[float], planned: int) -> None:
        """All repeats of the current batch."""
        while len(losses) < planned and math.isfinite(losses[-1]) and step.affords_repeat():
            losses.append(step.again())

    def state_dict(self) -> dict[str, Any]:
        """Nothing is left for later."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class Spaced:
    """One repeat every ``gap`` batches, from a ring buffer of the last ``buffer`` batches that wait.

    A batch that waits keeps its prefix activations (price: their memory). Repeats that the buffer has no room
    for, or that are not due before the budget is spent, are never made.
    """

    def __init__(self, gap: int, buffer: int) -> None:
        self.gap, self.buffer = gap, buffer
        # Batches until it is due, the name it is held under, passes left.
        self.waiting: list[tuple[int, int, int]] = []

    def repeat(self, step: Any, losses: list[float], planned: int) -> None:
        """Let the current batch wait for its repeats, and make one on each batch that is due."""
        waiting = [(due - 1, held, left) for due, held, left in self.waiting]
        if planned > len(losses) and math.isfinite(losses[-1]):
            waiting.append((self.gap, step.hold(), planned - len(losses)))
        self.waiting = []
        for due, held, left in waiting[-self.buffer :]:
            if due <= 0 and step.affords_repeat():
                step.revisit(held)
                due, left = self.gap, left - 1
            if left:
                self.waiting.append((due, held, left))
        for held in {held for _, held, _ in waiting} - {held for _, held, _ in self.waiting}:
            step.release(held)

    def state_dict(self) -> dict[str, Any]:
        """What is waiting; the batches themselves are held by ``step``."""
        return {"waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.waiting = [(due, held, left) for due, held, left in state["waiting"]]
