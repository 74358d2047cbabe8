"""What happens to one batch: the contract between a strategy and ``step``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from iterbatch.data.batch import Batch
    from iterbatch.records.record import BatchRecord

Adapter = Any  # what step.snapshot() returns and step.score() takes; opaque to a strategy


class Step(Protocol):
    """What any trainer can offer a strategy. Each call is charged when it is made."""

    @property
    def price_ratio(self) -> float:
        """rho: cost of a repeat over cost of a fresh pass, on the current batch."""
        ...

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last pass."""
        ...

    def __call__(self, batch: Batch) -> float:
        """Fresh pass and update on a new batch; returns the initial loss, mean nats a label token."""
        ...

    def again(self) -> float:
        """A repeat: one more pass and update on the same batch; returns its loss before its update."""
        ...

    def affords_repeat(self) -> bool:
        """Whether the budget has room for one more repeat."""
        ...

    def snapshot(self) -> Adapter:
        """A copy of the adapter as it is now."""
        ...

    def score(self, batch: Batch, adapter: Adapter) -> float:
        """Loss of a batch under a saved adapter, without gradients; charged as a probe."""
        ...

    def record(self, losses: list[float], planned: int, done: int | None = None) -> BatchRecord:
        """The record of the batch that was just trained.

        ``done`` is for one whose passes are not its losses.
        """
        ...


class ControlStep(Step, Protocol):
    """What only controls need.

    A rule that is handed in must only look: in a batch that is resumed it may not be asked again.
    """

    def scaled(self, batch: Batch, factor: Callable[[float], float]) -> float:
        """Fresh pass whose update takes ``factor(initial loss)`` times the learning rate.

        Price: a fresh pass.
        """
        ...

    def weighted(self, batch: Batch, weight: Callable[[float], float]) -> float:
        """Fresh pass whose loss counts ``weight(initial loss)`` times. Price: a fresh pass."""
        ...

    def part(self, batch: Batch, number: int, parts: int) -> float:
        """Fresh pass on one of ``parts`` shares of the batch's rows. Price: its share.

        Adam's beta2 is taken to the power of the share: the same half-life in tokens.
        """
        ...

    def forward(self, batch: Batch) -> float:
        """Loss of a new batch, without gradients. Price: a forward, as a probe."""
        ...

    def skip(self) -> None:
        """Let the batch go untrained; it counts as a batch."""
        ...

    def base_loss(self) -> float:
        """Loss of the current batch under the base without its adapter.

        Price: a forward of the adapted part, as a probe, the first time a block is met.
        """
        ...

    def hold(self) -> int:
        """Keep the current batch and its prefix activations; returns the name it is held under.

        Price: memory.
        """
        ...

    def revisit(self, held: int) -> float:
        """One pass and update on a held batch; returns its loss before the update. Price: a repeat."""
        ...

    def release(self, held: int) -> None:
        """Let a held batch go."""
        ...


def make_repeats(
    step: Step,
    losses: list[float],  # of the passes made so far; grows
    planned: int,  # passes in all
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Repeat the current batch as often as planned, while its loss is finite and the budget affords it."""
    while len(losses) < planned and math.isfinite(losses[-1]) and step.affords_repeat():
        before_each()
        losses.append(step.again())


@dataclass(eq=False)
class BaseTrainingStrategy(ABC):
    """What happens to one batch. A subclass must write :meth:`repeats`, and may write :meth:`observe`.

    A subclass with knobs is a dataclass whose fields are the knobs, each with a
    :class:`iterbatch.config.Knob`; a field ``seed`` is given the arm's seed, and a field ``source``
    the passes of each batch of ``--source``.
    """

    summary: ClassVar[str] = ""  # how often a batch is trained, or what a control keeps and changes
    question: ClassVar[str] = ""  # what the report answers where this arm and its rival are both there
    arm: ClassVar[str] = "abr"  # whose claim the question examines; this arm is what it must beat
    rival: ClassVar[str] = ""  # what this arm must beat instead, where the claim is its own

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
        """Train one batch: the fresh pass, then the repeats it deserves and the budget affords.

        A loss that is not finite is no evidence: such a batch is not repeated and not observed.
        """
        losses = [step(batch)]  # the fresh pass always happens; its loss is the evidence
        planned = self.repeats(losses[0]) if math.isfinite(losses[0]) else 1
        make_repeats(step, losses, planned)
        if math.isfinite(losses[0]):
            self.observe(losses)
        return step.record(losses, planned)

    @abstractmethod
    def repeats(self, initial_loss: float) -> int:
        """How many passes a batch gets, the fresh pass included; at least 1."""

    def observe(self, losses: list[float]) -> None:  # noqa: B027 - optional: most rules keep no state
        """Take note of a batch after its last pass; ``losses[0]`` is the initial loss."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decision depends on, in plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nor have anything to load
        """Continue from a saved state."""
