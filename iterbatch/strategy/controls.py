"""Controls and rivals: arms that exist to rule out another explanation of what adaptive repetition gains.

Each keeps everything of ABR but one thing. What a control needs beyond passes and repeats is a priced verb of
:class:`iterbatch.strategy.base.ControlStep`.
"""
# pyright: reportIncompatibleMethodOverride=false
# Controls ask for a ControlStep, which is more than a Step: they run in the bench, not in anyone
# else's trainer.

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from iterbatch.config import Knob
from iterbatch.errors import RunError
from iterbatch.strategy.base import BaseTrainingStrategy, ControlStep, make_repeats
from iterbatch.strategy.original import ABRStrategy

if TYPE_CHECKING:
    from iterbatch.data.batch import Batch
    from iterbatch.records.record import BatchRecord

RECENT = 64  # batches whose losses a rank is taken among
FEWEST = 8  # of them, before there is one

# ------------------------------------------------------------------------------------------------------------
# Does adaptivity matter?


@dataclass(eq=False)
class FixedStrategy(BaseTrainingStrategy):
    """Every batch ``max_repeats`` times."""

    summary: ClassVar[str] = "every batch as often"
    question: ClassVar[str] = "Does ABR beat the same number of passes for every batch?"

    max_repeats: Annotated[int, Knob("all its passes", at_least=1)] = 2

    def repeats(self, initial_loss: float) -> int:
        """Always the same."""
        return self.max_repeats


# ------------------------------------------------------------------------------------------------------------
# Does the loss signal matter?


@dataclass(eq=False)
class _FromSource(BaseTrainingStrategy):
    """Made from the passes that each batch of a finished arm got."""

    source: Sequence[int] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.source:
            raise RunError("the arm that a control is made from has no batches")
        self.mean = float(np.mean(self.source))
        self.random = np.random.default_rng([self.seed, 3])

    def state_dict(self) -> dict[str, Any]:
        """The random state."""
        return {"random": self.random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.random.bit_generator.state = state["random"]


@dataclass(eq=False)
class PermutedStrategy(_FromSource):
    """The source's own run of k, shuffled over batches.

    All of ABR but the link between a batch's loss and its repeats.
    """

    summary: ClassVar[str] = "ABR's own run of k, shuffled over batches"
    question: ClassVar[str] = "Does the loss signal matter (which batches are repeated, and when)?"

    left: list[int] = field(default_factory=list, init=False)

    def repeats(self, initial_loss: float) -> int:
        """The next of the shuffled run; a longer arm shuffles it anew."""
        if not self.left:
            self.left = self.random.permutation(self.source).tolist()
        return self.left.pop()

    def state_dict(self) -> dict[str, Any]:
        """Random state, and what is left of the run."""
        return {**super().state_dict(), "left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        super().load_state_dict(state)
        self.left = list(state["left"])


@dataclass(eq=False)
class RandomStrategy(_FromSource):
    """Each batch's k drawn from the source's histogram."""

    summary: ClassVar[str] = "k drawn from the histogram of ABR's"
    question: ClassVar[str] = "Does it matter, against draws from the same histogram?"

    def repeats(self, initial_loss: float) -> int:
        """A draw."""
        return int(self.random.choice(np.asarray(self.source)))


def loss_of_rank(value: float, values: Sequence[float], losses: Sequence[float]) -> float:
    """The loss that ranks among ``losses`` as ``value`` does among ``values``.

    ABR's rule asked about it hands out the same numbers of repeats, by another signal.

    Args:
        value: The signal of the current batch, one of ``values``.
        values: Signals of recent batches.
        losses: Initial losses of the same batches, nats a token.
    """
    rank = sum(other < value for other in values)
    return sorted(losses)[min(rank, len(losses) - 1)]


def _recent() -> deque[float]:
    return deque(maxlen=RECENT)


@dataclass(eq=False)
class InverseStrategy(ABRStrategy):
    """ABR upside down: the lowest of the recent losses is treated as ABR treats the highest."""

    summary: ClassVar[str] = "ABR upside down: repeats where the loss is low"
    question: ClassVar[str] = "Is it high-loss batches that deserve repeats?"
    rival: ClassVar[str] = ""

    losses: deque[float] = field(default_factory=_recent, init=False)

    def repeats(self, initial_loss: float) -> int:
        """ABR's answer for the loss of the opposite rank; by its own loss while there are few."""
        self.losses.append(initial_loss)
        if len(self.losses) < FEWEST:
            return super().repeats(initial_loss)
        return super().repeats(
            loss_of_rank(-initial_loss, [-loss for loss in self.losses], list(self.losses))
        )

    def state_dict(self) -> dict[str, Any]:
        """The recent losses."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.losses = deque(state["losses"], maxlen=RECENT)


@dataclass(eq=False)
class ExcessStrategy(ABRStrategy):
    """ABR on what a batch's loss has above the frozen base's loss on it.

    Difficulty that the base shares is taken off.
    """

    summary: ClassVar[str] = "ABR on what a batch's loss has above the untrained base's"
    question: ClassVar[str] = "Is difficulty beyond the base's a better signal than difficulty?"
    rival: ClassVar[str] = "abr"

    losses: deque[float] = field(default_factory=_recent, init=False)
    excesses: deque[float] = field(default_factory=_recent, init=False)

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """As every strategy, with the base's loss asked for after the fresh pass."""
        losses = [step(batch)]
        planned = 1
        if math.isfinite(excess := losses[0] - step.base_loss()):
            self.losses.append(losses[0])
            self.excesses.append(excess)
            planned = self.repeats(losses[0])
        make_repeats(step, losses, planned)
        return step.record(losses, planned)

    def repeats(self, initial_loss: float) -> int:
        """ABR's answer for the loss that ranks as the last excess does."""
        if len(self.losses) >= FEWEST:
            initial_loss = loss_of_rank(self.excesses[-1], list(self.excesses), list(self.losses))
        return super().repeats(initial_loss)

    def state_dict(self) -> dict[str, Any]:
        """Recent losses and excesses."""
        return {"losses": list(self.losses), "excesses": list(self.excesses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        self.losses, self.excesses = (
            deque(state["losses"], maxlen=RECENT),
            deque(state["excesses"], maxlen=RECENT),
        )


# ------------------------------------------------------------------------------------------------------------
# Was it only the learning rate, or only a weight?


@dataclass(eq=False)
class ScaledLRStrategy(ABRStrategy):
    """One pass, at the learning rate times the k that ABR would give."""

    summary: ClassVar[str] = "one pass at k times the learning rate"
    question: ClassVar[str] = "Is it more than a larger learning rate on the same batches?"
    rival: ClassVar[str] = ""

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """The fresh pass alone."""
        return step.record([step.scaled(batch, self.repeats)], 1)


@dataclass(eq=False)
class HigherLRStrategy(_FromSource):
    """One pass, at the learning rate times the source's mean k."""

    summary: ClassVar[str] = "one pass at mean k times the learning rate"
    question: ClassVar[str] = "Is it more than a larger learning rate everywhere?"

    def repeats(self, initial_loss: float) -> int:
        """Always 1."""
        return 1

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """The fresh pass alone."""
        return step.record([step.scaled(batch, lambda loss: self.mean)], 1)


@dataclass(eq=False)
class WeightedStrategy(ABRStrategy):
    """One pass, its loss weighted by the k that ABR would give over the mean of those so far."""

    summary: ClassVar[str] = "one pass with the loss weighted by k over mean k"
    question: ClassVar[str] = "Is it more than a weight on the loss?"
    rival: ClassVar[str] = ""

    total: int = field(default=0, init=False)
    count: int = field(default=0, init=False)

    def weight(self, initial_loss: float) -> float:
        """K over the mean k, this batch included."""
        k = self.repeats(initial_loss)
        return k * (self.count + 1) / (self.total + k)

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """The fresh pass alone."""
        loss = step.weighted(batch, self.weight)
        if math.isfinite(loss):
            self.total, self.count = self.total + self.repeats(loss), self.count + 1
        return step.record([loss], 1)

    def state_dict(self) -> dict[str, Any]:
        """Sum and number of the k so far."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        self.total, self.count = state["total"], state["count"]


# ------------------------------------------------------------------------------------------------------------
# Does immediacy matter? Do more, smaller updates on fresh text do as well?


@dataclass(eq=False)
class SpacedStrategy(ABRStrategy):
    """ABR's repeats of a batch, spread over later batches.

    One every ``GAP`` batches, from a ring buffer of the ``HELD`` last ones.
    """

    GAP: ClassVar[int] = 8
    HELD: ClassVar[int] = 64

    summary: ClassVar[str] = "ABR's repeats, spread over later batches"
    question: ClassVar[str] = "Does immediacy matter, against the same passes later?"
    rival: ClassVar[str] = ""

    # Batches until it is due, the name it is held under, passes left.
    waiting: list[tuple[int, int, int]] = field(default_factory=list, init=False)

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """The fresh pass, then one pass on each batch that is due."""
        loss = step(batch)
        planned = self.repeats(loss) if math.isfinite(loss) else 1
        waiting = [(due - 1, held, left) for due, held, left in self.waiting]
        if planned > 1:
            waiting.append((self.GAP, step.hold(), planned - 1))
        self.waiting = []
        for due, held, left in waiting[-self.HELD :]:
            if due <= 0 and step.affords_repeat():
                step.revisit(held)
                due, left = self.GAP, left - 1
            if left:
                self.waiting.append((due, held, left))
        for held in {held for _, held, _ in waiting} - {held for _, held, _ in self.waiting}:
            step.release(held)
        return step.record([loss], planned)

    def state_dict(self) -> dict[str, Any]:
        """What is waiting; the batches themselves are held by ``step``."""
        return {"waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.waiting = [(due, held, left) for due, held, left in state["waiting"]]


@dataclass(eq=False)
class SmallBatchesStrategy(_FromSource):
    """As many updates as the source makes, each on fresh text: a batch is cut into mean k parts."""

    summary: ClassVar[str] = "no repeats: batches cut into mean k parts"
    question: ClassVar[str] = "Is it more than many small updates on fresh text?"

    owed: float = field(default=0.0, init=False)  # parts not made yet, below 1

    def repeats(self, initial_loss: float) -> int:
        """Every row once."""
        return 1

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """One pass on each part. The initial loss is that of the parts, each before its own update."""
        self.owed += self.mean
        parts = max(1, min(int(self.owed), batch.rows))
        self.owed = min(self.owed - parts, 1.0)
        losses = [step.part(batch, 0, parts)]
        while len(losses) < parts and step.affords_repeat():
            losses.append(step.part(batch, len(losses), parts))
        return step.record([sum(losses) / len(losses)], 1)

    def state_dict(self) -> dict[str, Any]:
        """Random state, and the parts owed."""
        return {**super().state_dict(), "owed": self.owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        super().load_state_dict(state)
        self.owed = state["owed"]


# ------------------------------------------------------------------------------------------------------------
# A rival


@dataclass(eq=False)
class SelectiveStrategy(BaseTrainingStrategy):
    """Selective Backprop, a batch at a time.

    A forward on every batch, an update with a chance that rises with its loss's rank.

    Source: Jiang et al. 2019, arXiv 1910.00762, with beta = 1; there examples are chosen, and
    gathered into full batches.
    """

    summary: ClassVar[str] = "a forward on every batch, an update where its loss ranks high"
    question: ClassVar[str] = "Does it beat choosing batches by their loss?"

    seed: int = 0
    losses: deque[float] = field(default_factory=_recent, init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng([self.seed, 4])

    def repeats(self, initial_loss: float) -> int:
        """1 for a batch that is trained, else 0; its chance is the share of recent losses below its own."""
        self.losses.append(initial_loss)
        below = sum(loss < initial_loss for loss in self.losses)
        return int(len(self.losses) < FEWEST or self.random.random() * (len(self.losses) - 1) < below)

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """A forward, then the fresh pass or none."""
        loss = step.forward(batch)
        if math.isfinite(loss) and not self.repeats(loss):
            step.skip()
            return step.record([loss], 0, done=0)
        return step.record([step(batch)], 1)

    def state_dict(self) -> dict[str, Any]:
        """Recent losses and random state."""
        return {"losses": list(self.losses), "random": self.random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        self.losses = deque(state["losses"], maxlen=RECENT)
        self.random.bit_generator.state = state["random"]
