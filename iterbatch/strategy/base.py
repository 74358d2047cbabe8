"""What happens to one batch: the contract between a strategy and ``step``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from iterbatch.config import Knob
from iterbatch.strategy.placement import AT_ONCE, SPACED, AtOnce, Placing, Spaced

if TYPE_CHECKING:
    from iterbatch.data.batch import Batch
    from iterbatch.records.record import BatchRecord


MAX_REPEATS = 5  # the original experiment's range is 1 to 5 passes

# What a run must give the step of some strategies, and what some strategies are made from.
PROBE_TEXT, BASE_LOSSES, GRADIENT_NOISE = "probe text", "base losses", "gradient noise"
EVERY = "every arm that adapts"  # whose claim some questions examine
PASSES, OTHER_PASSES, SCHEDULER = "passes", "another seed's passes", "scheduler"


class Step(Protocol):
    """What any trainer can offer a strategy. Each call is charged when it is made."""

    @property
    def price_ratio(self) -> float:
        """rho: cost of a repeat over cost of a fresh pass, on the current batch."""
        ...

    @property
    def probe_price(self) -> float:
        """Cost of scoring a piece of the probe text over cost of a fresh pass on the current batch."""
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

    def probe(self, number: int) -> float:
        """Loss of a piece of the probe text, which is never trained on, as the adapter is now.

        Without gradients; charged as a probe. Numbers go round the pieces.
        """
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

    def affords_part(self, batch: Batch, number: int, parts: int) -> bool:
        """Whether the budget has room for a share of the batch's rows, as a fresh pass."""
        ...

    def forward(self, batch: Batch) -> float:
        """Loss of a new batch, without gradients. Price: a forward, as a probe."""
        ...

    def skip(self) -> None:
        """Let the batch go untrained; it counts as a batch."""
        ...

    def base_loss(self) -> float:
        """Loss of the current batch under the base without its adapter.

        Price: none here; the table of base losses is made once for all arms and seeds, and shown apart.
        """
        ...

    def noise_scale(self) -> float:
        """Simple noise scale of the gradient, in rows: at which batch size noise and gradient weigh alike.

        Averaged over the fresh passes so far, of their micro-batches' gradients; infinity where the
        noise hides the gradient, NaN before there is one. Price: none worth counting.
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


@dataclass(eq=False)
class BaseTrainingStrategy(ABC):
    """What happens to one batch. A subclass must write :meth:`repeats`, and may write :meth:`observe`.

    A subclass with knobs is a dataclass whose fields are the knobs, each with a
    :class:`iterbatch.config.Knob`; a field ``seed`` is given the arm's seed, and a field ``source``
    what ``made_from`` says, of the arm ``--source``.
    """

    summary: ClassVar[str] = ""  # how often a batch is trained, or what a control keeps and changes
    question: ClassVar[str] = ""  # what the report answers where this arm and its rival are both there
    arm: ClassVar[str] = "abr"  # whose claim the question examines, or EVERY; this arm is what it must beat
    rival: ClassVar[str] = ""  # what this arm must beat instead, where the claim is its own
    gives_k: ClassVar[bool] = True  # whether batches are repeated as :meth:`repeats` says
    adapts: ClassVar[bool] = False  # whether it means to repeat some batches more often than others
    needs: ClassVar[str] = ""  # PROBE_TEXT, BASE_LOSSES or GRADIENT_NOISE: what its step must offer
    made_from: ClassVar[str] = ""  # PASSES, OTHER_PASSES or SCHEDULER: what of another arm it takes

    placement: Annotated[
        str,
        Knob("repeats follow the fresh pass (at_once), or come later (spaced)", choices=(AT_ONCE, SPACED)),
    ] = field(default=AT_ONCE, kw_only=True)
    gap: Annotated[int, Knob("spaced: batches between two passes of a batch", at_least=1)] = field(
        default=8, kw_only=True
    )
    buffer: Annotated[int, Knob("spaced: most batches that wait for a repeat", at_least=1)] = field(
        default=64, kw_only=True
    )

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
        """Train one batch: the fresh pass, then the repeats it deserves and the budget affords.

        A loss that is not finite is no evidence: such a batch is not repeated and not observed.
        """
        losses = [step(batch)]  # the fresh pass always happens; its loss is the evidence
        planned = self.decide(losses[0], step) if math.isfinite(losses[0]) else 1
        self.placing.repeat(step, losses, planned)  # step.again() while planned, finite and affordable
        if math.isfinite(losses[0]):
            self.observe(losses)
        return step.record(losses, planned)

    def decide(self, initial_loss: float, step: Step) -> int:
        """What :meth:`repeats` says; for a rule that asks ``step`` for more evidence than the loss."""
        return self.repeats(initial_loss)

    @abstractmethod
    def repeats(self, initial_loss: float) -> int:
        """How many passes a batch gets, the fresh pass included; at least 1."""

    def observe(self, losses: list[float]) -> None:  # noqa: B027 - optional: most rules keep no state
        """Take note of a batch after its last pass; ``losses[0]`` is the initial loss."""

    @property
    def cuts(self) -> Sequence[int]:
        """Into how many parts it may cut a batch; empty where it does not."""
        return ()

    @cached_property
    def placing(self) -> Placing:
        """When its repeats are made."""
        return Spaced(self.gap, self.buffer) if self.placement == SPACED else AtOnce()

    def foresee(self, base_loss: float) -> str:
        """What can be said before training, from the untrained base's loss; empty where nothing."""
        return ""

    @classmethod
    def advice(cls, losses: Sequence[float]) -> str:
        """What to set where no batch was repeated, or all alike, from the losses it saw; or empty."""
        return ""

    def keepsake(self) -> dict[str, Any]:
        """What it learned, in plain values, to be kept beside the adapter; empty where nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decision depends on, in plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nor have anything to load
        """Continue from a saved state."""
