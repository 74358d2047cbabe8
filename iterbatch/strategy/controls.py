"""Controls and rivals: arms that exist to rule out another explanation of what adaptive repetition gains.

Each keeps everything of ABR but one thing. What a control needs beyond passes and repeats is a priced verb of ``step``.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from iterbatch.data.data_loader import Batch
from iterbatch.errors import RunError
from iterbatch.records.record import BatchRecord
from iterbatch.strategy.scheduler import MAX_REPEATS
from iterbatch.strategy.base import BaseTrainingStrategy, Step
from iterbatch.strategy.original import ABRStrategy, abr_repeats

RECENT = 64  # batches whose losses a rank is taken among
FEWEST = 8  # of them, before there is one

# --------------------------------------------------------------------------------------------------------------------------------------
# Does adaptivity matter?


class FixedStrategy(BaseTrainingStrategy):
    """Every batch ``passes`` times."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def repeats(self, initial_loss: float) -> int:
        """Always the same."""
        return self.passes


# --------------------------------------------------------------------------------------------------------------------------------------
# Does the loss signal matter?


class _FromSource(BaseTrainingStrategy):
    """Made from the passes that each batch of a finished arm got."""

    needs_source: ClassVar[bool] = True

    def __init__(self, source: Sequence[int], seed: int) -> None:
        if not source:
            raise RunError("the arm that a control is made from has no batches")
        self.source = np.asarray(source)
        self.mean = float(self.source.mean())
        self.random = np.random.default_rng([seed, 3])

    def state_dict(self) -> dict[str, Any]:
        """The random state."""
        return {"random": self.random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.random.bit_generator.state = state["random"]


class PermutedStrategy(_FromSource):
    """The source's own run of k, shuffled over batches: all of ABR but the link between a batch's loss and its repeats."""

    def __init__(self, source: Sequence[int], seed: int) -> None:
        super().__init__(source, seed)
        self.left: list[int] = []

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


class RandomStrategy(_FromSource):
    """Each batch's k drawn from the source's histogram."""

    def repeats(self, initial_loss: float) -> int:
        """A draw."""
        return int(self.random.choice(self.source))


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


class InverseStrategy(BaseTrainingStrategy):
    """ABR upside down: the lowest of the recent losses is treated as ABR treats the highest."""

    def __init__(self, threshold: float = 2.0, max_repeats: int = MAX_REPEATS) -> None:
        self.threshold, self.max_repeats = threshold, max_repeats
        self.losses: deque[float] = deque(maxlen=RECENT)

    def repeats(self, initial_loss: float) -> int:
        """ABR's answer for the loss of the opposite rank; by its own loss while there are few."""
        self.losses.append(initial_loss)
        if len(self.losses) < FEWEST:
            return abr_repeats(initial_loss, self.threshold, self.max_repeats)
        mirrored = loss_of_rank(-initial_loss, [-loss for loss in self.losses], self.losses)
        return abr_repeats(mirrored, self.threshold, self.max_repeats)

    def state_dict(self) -> dict[str, Any]:
        """The recent losses."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.losses = deque(state["losses"], maxlen=RECENT)


class ExcessStrategy(BaseTrainingStrategy):
    """ABR on what a batch's loss has above the frozen base's loss on it: difficulty that the base shares is taken off."""

    def __init__(self, threshold: float = 2.0, max_repeats: int = MAX_REPEATS) -> None:
        self.threshold, self.max_repeats = threshold, max_repeats
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.excesses: deque[float] = deque(maxlen=RECENT)

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
        """As every strategy, with the base's loss asked for after the fresh pass."""
        losses = [step(batch)]
        planned = 1
        if math.isfinite(excess := losses[0] - step.base_loss()):
            self.losses.append(losses[0])
            self.excesses.append(excess)
            planned = self.repeats(losses[0])
        while len(losses) < planned and math.isfinite(losses[-1]) and step.affords_repeat():
            losses.append(step.again())
        return step.record(losses, planned)

    def repeats(self, initial_loss: float) -> int:
        """ABR's answer for the loss that ranks as the last excess does."""
        if len(self.losses) >= FEWEST:
            initial_loss = loss_of_rank(self.excesses[-1], self.excesses, self.losses)
        return abr_repeats(initial_loss, self.threshold, self.max_repeats)

    def state_dict(self) -> dict[str, Any]:
        """Recent losses and excesses."""
        return {"losses": list(self.losses), "excesses": list(self.excesses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        self.losses, self.excesses = deque(state["losses"], maxlen=RECENT), deque(state["excesses"], maxlen=RECENT)


# --------------------------------------------------------------------------------------------------------------------------------------
# Was it only the learning rate, or only a weight?


class ScaledLRStrategy(ABRStrategy):
    """One pass, at the learning rate times the k that ABR would give."""

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
        """The fresh pass alone."""
        return step.record([step.scaled(batch, self.repeats)], 1)


class HigherLRStrategy(_FromSource):
    """One pass, at the learning rate times the source's mean k."""

    def repeats(self, initial_loss: float) -> int:
        """Always 1."""
        return 1

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
        """The fresh pass alone."""
        return step.record([step.scaled(batch, lambda loss: self.mean)], 1)


class WeightedStrategy(ABRStrategy):
    """One pass, its loss weighted by the k that ABR would give over the mean of those so far."""

    def __init__(self, threshold: float = 2.0, max_repeats: int = MAX_REPEATS) -> None:
        super().__init__(threshold, max_repeats)
        self.total, self.count = 0, 0

    def weight(self, initial_loss: float) -> float:
        """K over the mean k, this batch included."""
        k = self.repeats(initial_loss)
        return k * (self.count + 1) / (self.total + k)

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
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


# --------------------------------------------------------------------------------------------------------------------------------------
# Does immediacy matter? Do more, smaller updates on fresh text do as well?


class SpacedStrategy(ABRStrategy):
    """ABR's repeats of a batch, spread over later batches: one every ``GAP`` batches, from a ring buffer of the ``HELD`` last ones."""

    GAP, HELD = 8, 64

    def __init__(self, threshold: float = 2.0, max_repeats: int = MAX_REPEATS) -> None:
        super().__init__(threshold, max_repeats)
        self.waiting: list[tuple[int, int, int]] = []  # batches until it is due, the name it is held under, passes left

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
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


class SmallBatchesStrategy(_FromSource):
    """As many updates as the source makes, each on fresh text: a batch is cut into mean k parts, on average."""

    def __init__(self, source: Sequence[int], seed: int) -> None:
        super().__init__(source, seed)
        self.owed = 0.0  # parts not made yet, below 1

    def repeats(self, initial_loss: float) -> int:
        """Every row once."""
        return 1

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
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


# --------------------------------------------------------------------------------------------------------------------------------------
# A rival


class SelectiveStrategy(BaseTrainingStrategy):
    """Selective Backprop, a batch at a time: a forward on every batch, an update with a chance that rises with its loss's rank.

    Source: Jiang et al. 2019, arXiv 1910.00762, with beta = 1; there examples are chosen, and gathered into full batches.
    """

    def __init__(self, seed: int = 0) -> None:
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.random = np.random.default_rng([seed, 4])

    def repeats(self, initial_loss: float) -> int:
        """1 for a batch that is trained, 0 for one that is not: with the share of recent losses below its own as its chance."""
        self.losses.append(initial_loss)
        below = sum(loss < initial_loss for loss in self.losses)
        return int(len(self.losses) < FEWEST or self.random.random() * (len(self.losses) - 1) < below)

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
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
