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
from iterbatch.language import N_, _
from iterbatch.strategy.base import (
    BASE_LOSSES,
    EVERY,
    GRADIENT_NOISE,
    MAX_REPEATS,
    OTHER_PASSES,
    PASSES,
    BaseTrainingStrategy,
    ControlStep,
)
from iterbatch.strategy.original import ABRRule, ABRStrategy
from iterbatch.strategy.placement import SPACED

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
    question: ClassVar[str] = N_("Does adapting beat the same number of passes for every batch?")
    arm: ClassVar[str] = EVERY

    max_repeats: Annotated[int, Knob("all its passes", at_least=1)] = 2

    def repeats(self, initial_loss: float) -> int:
        """Always the same."""
        return self.max_repeats


# ------------------------------------------------------------------------------------------------------------
# Does the loss signal matter?


@dataclass(eq=False)
class _FromSource(BaseTrainingStrategy):
    """Made from the passes that each batch of a finished arm got."""

    made_from: ClassVar[str] = PASSES

    source: Sequence[int] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.source:
            raise RunError(_("the arm that a control is made from has no batches"))
        self.mean = float(np.mean(self.source))
        self.random = np.random.default_rng([self.seed, 3])

    def state_dict(self) -> dict[str, Any]:
        """The random state."""
        return {"random": self.random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.random.bit_generator.state = state["random"]


@dataclass(eq=False)
class _Dealt(_FromSource):
    """Deals out the source's own run of k, block by block; a longer arm gets it again."""

    block: Annotated[
        int, Knob("batches within which a run of k is dealt out anew; 0 is the whole run", at_least=0)
    ] = 0
    left: list[int] = field(default_factory=list, init=False)  # of the current block, ascending
    dealt: int = field(default=0, init=False)

    def repeats(self, initial_loss: float) -> int:
        """One of what is left of the current block."""
        if not self.left:
            size = self.block or len(self.source)
            start = self.dealt % len(self.source)
            self.left = sorted(self.source[start : start + size])
        self.dealt += 1
        return self.left.pop(self.chosen(initial_loss))

    def chosen(self, initial_loss: float) -> int:
        """Its place in ``left``."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Random state, and what is left of the run."""
        return {**super().state_dict(), "left": self.left, "dealt": self.dealt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        super().load_state_dict(state)
        self.left, self.dealt = list(state["left"]), state["dealt"]


@dataclass(eq=False)
class PermutedStrategy(_Dealt):
    """The source's own run of k, shuffled over batches, or within blocks of them.

    All of ABR but the link between a batch's loss and its repeats; within short blocks it keeps when they
    are made.
    """

    summary: ClassVar[str] = "ABR's own run of k, shuffled over batches"
    question: ClassVar[str] = N_("Does the loss signal matter (which batches are repeated, and when)?")

    def chosen(self, initial_loss: float) -> int:
        """Any."""
        return int(self.random.integers(len(self.left)))


@dataclass(eq=False)
class ProfileStrategy(_FromSource):
    """The k of another seed's arm at the same batch number.

    Keeps when ABR repeats; the batches that stand there are others, so which it repeats is broken.
    """

    summary: ClassVar[str] = "the k of ABR's arm with another seed, at the same batch number"
    question: ClassVar[str] = N_("Does it matter which batches are repeated, when only their time is kept?")
    made_from: ClassVar[str] = OTHER_PASSES

    batch: int = field(default=0, init=False)

    def repeats(self, initial_loss: float) -> int:
        """That k; the last one for batches after the source's end."""
        self.batch += 1
        return self.source[min(self.batch, len(self.source)) - 1]

    def state_dict(self) -> dict[str, Any]:
        """Batches so far."""
        return {**super().state_dict(), "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        super().load_state_dict(state)
        self.batch = state["batch"]


@dataclass(eq=False)
class RandomStrategy(_FromSource):
    """Each batch's k drawn from the source's histogram."""

    summary: ClassVar[str] = "k drawn from the histogram of ABR's"
    question: ClassVar[str] = N_("Does it matter, against draws from the same histogram?")

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
class InverseStrategy(_Dealt):
    """ABR upside down: its own run of k, dealt out so that the lowest losses get the most passes."""

    summary: ClassVar[str] = "ABR upside down: its own run of k, the most passes where the loss ranks lowest"
    question: ClassVar[str] = N_("Is it high-loss batches that deserve repeats?")

    losses: deque[float] = field(default_factory=_recent, init=False)

    def chosen(self, initial_loss: float) -> int:
        """By the share of recent losses that are above this one; the middle before there are enough."""
        self.losses.append(initial_loss)
        if len(self.losses) < FEWEST:
            return len(self.left) // 2
        above = sum(loss > initial_loss for loss in self.losses) / (len(self.losses) - 1)
        return round(above * (len(self.left) - 1))

    def state_dict(self) -> dict[str, Any]:
        """The recent losses too."""
        return {**super().state_dict(), "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        super().load_state_dict(state)
        self.losses = deque(state["losses"], maxlen=RECENT)


@dataclass(eq=False)
class ExcessStrategy(ABRStrategy):
    """ABR on what a batch's loss has above the frozen base's loss on it.

    Difficulty that the base shares is taken off.
    """

    summary: ClassVar[str] = "ABR on what a batch's loss has above the untrained base's"
    question: ClassVar[str] = N_("Is difficulty beyond the base's a better signal than difficulty?")
    rival: ClassVar[str] = "abr"
    needs: ClassVar[str] = BASE_LOSSES

    losses: deque[float] = field(default_factory=_recent, init=False)
    excesses: deque[float] = field(default_factory=_recent, init=False)

    def decide(self, initial_loss: float, step: ControlStep) -> int:
        """ABR's answer for the loss that ranks as the batch's excess does."""
        excess = initial_loss - step.base_loss()
        if not math.isfinite(excess):
            return 1
        self.losses.append(initial_loss)
        self.excesses.append(excess)
        if len(self.losses) < FEWEST:
            return self.repeats(initial_loss)
        return self.repeats(loss_of_rank(excess, list(self.excesses), list(self.losses)))

    def state_dict(self) -> dict[str, Any]:
        """Recent losses and excesses too."""
        return {**super().state_dict(), "losses": list(self.losses), "excesses": list(self.excesses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all over."""
        super().load_state_dict(state)
        self.losses, self.excesses = (
            deque(state["losses"], maxlen=RECENT),
            deque(state["excesses"], maxlen=RECENT),
        )


def noise_repeats(rows: int, noise_scale: float, max_repeats: int) -> int:
    """Passes by how large a batch is against the gradient's noise: ``min(int(rows / noise), max_repeats)``.

    A batch well above the simple noise scale averages its noise away: one step does not use up what it says
    of the gradient. One below it is mostly noise, which a repeat would learn.

    Args:
        rows: Blocks of the batch, over all processes.
        noise_scale: In rows, see :meth:`iterbatch.strategy.base.ControlStep.noise_scale`; NaN is no evidence.
        max_repeats: Most passes, the first included.

    Source: McCandlish et al. 2018, arXiv 1812.06162, for the scale; what is made of it is this project's.
    """
    return int(min(max(rows / noise_scale, 1), max_repeats)) if noise_scale > 0 else 1


@dataclass(eq=False)
class GradientNoiseStrategy(BaseTrainingStrategy):
    """Repeats where the batch is large against the noise of its gradient; nothing is learned."""

    summary: ClassVar[str] = "`min(int(rows / noise scale), max_repeats)`, by its micro-batches' gradients"
    question: ClassVar[str] = N_("Does ABR beat a rule that asks how noisy the gradient is?")
    adapts: ClassVar[bool] = True
    needs: ClassVar[str] = GRADIENT_NOISE

    max_repeats: Annotated[int, Knob("most passes a batch, the first included", at_least=1)] = MAX_REPEATS
    rows: int = field(default=0, init=False)

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """As every strategy, with its size known."""
        self.rows = sum(rows for rows, _ in batch.shapes)
        return super().train_batch(batch, step)

    def decide(self, initial_loss: float, step: ControlStep) -> int:
        """By its size and the noise scale so far."""
        return noise_repeats(self.rows, step.noise_scale(), self.max_repeats)

    def repeats(self, initial_loss: float) -> int:
        """1: a loss says nothing of noise."""
        return 1


# ------------------------------------------------------------------------------------------------------------
# Was it only the learning rate, or only a weight?


@dataclass(eq=False)
class ScaledLRStrategy(ABRRule):
    """One pass, at the learning rate times the k that ABR would give."""

    summary: ClassVar[str] = "one pass at k times the learning rate"
    gives_k: ClassVar[bool] = False
    question: ClassVar[str] = N_("Is it more than a larger learning rate on the same batches?")
    rival: ClassVar[str] = ""

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """The fresh pass alone."""
        losses = [step.scaled(batch, self.repeats)]
        self.observe(losses)
        return step.record(losses, 1)


@dataclass(eq=False)
class HigherLRStrategy(_FromSource):
    """One pass, at the learning rate times the source's mean k."""

    summary: ClassVar[str] = "one pass at mean k times the learning rate"
    gives_k: ClassVar[bool] = False
    question: ClassVar[str] = N_("Is it more than a larger learning rate everywhere?")

    def repeats(self, initial_loss: float) -> int:
        """Always 1."""
        return 1

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """The fresh pass alone."""
        return step.record([step.scaled(batch, lambda loss: self.mean)], 1)


@dataclass(eq=False)
class WeightedStrategy(ABRRule):
    """One pass, its loss weighted by the k that ABR would give over the mean of those so far."""

    summary: ClassVar[str] = "one pass with the loss weighted by k over mean k"
    gives_k: ClassVar[bool] = False
    question: ClassVar[str] = N_("Is it more than a weight on the loss?")
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
        self.observe([loss])
        return step.record([loss], 1)

    def state_dict(self) -> dict[str, Any]:
        """Sum and number of the k so far too."""
        return {**super().state_dict(), "total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both over."""
        super().load_state_dict(state)
        self.total, self.count = state["total"], state["count"]


# ------------------------------------------------------------------------------------------------------------
# Does immediacy matter? Do more, smaller updates on fresh text do as well?


@dataclass(eq=False)
class SpacedStrategy(ABRStrategy):
    """ABR with ``--placement spaced``: its repeats of a batch come later, one at a time."""

    summary: ClassVar[str] = "ABR's repeats, spread over later batches"
    question: ClassVar[str] = N_("Does immediacy matter, against the same passes later?")
    rival: ClassVar[str] = ""

    placement: str = field(default=SPACED, init=False)


@dataclass(eq=False)
class SmallBatchesStrategy(_FromSource):
    """As many updates as the source makes, each on fresh text: a batch is cut into mean k parts."""

    summary: ClassVar[str] = "no repeats: batches cut into mean k parts"
    gives_k: ClassVar[bool] = False
    question: ClassVar[str] = N_("Is it more than many small updates on fresh text?")

    parts: Annotated[
        int | None, Knob("shares that every batch is cut into, instead of the source's mean k", at_least=2)
    ] = None
    owed: float = field(default=0.0, init=False)  # parts not made yet, below 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mean = float(self.parts or self.mean)

    @property
    def cuts(self) -> Sequence[int]:
        """The numbers of parts around mean k, above 1."""
        return [parts for parts in {math.floor(self.mean), math.ceil(self.mean)} if parts > 1]

    def repeats(self, initial_loss: float) -> int:
        """Every row once."""
        return 1

    def train_batch(self, batch: Batch, step: ControlStep) -> BatchRecord:
        """One pass on each part. The initial loss is that of the parts, each before its own update."""
        self.owed += self.mean
        parts = max(1, min(int(self.owed), batch.rows))
        self.owed = min(self.owed - parts, 1.0)
        losses = [step.part(batch, 0, parts)]
        while len(losses) < parts and step.affords_part(batch, len(losses), parts):
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
    gives_k: ClassVar[bool] = False
    question: ClassVar[str] = N_("Does it beat choosing batches by their loss?")

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
