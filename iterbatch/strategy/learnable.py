"""learnable: a scheduler trained on what passes gain on text that is never trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from iterbatch.config import Knob
from iterbatch.language import N_
from iterbatch.records.scheduler import read_schedulers
from iterbatch.strategy.base import MAX_REPEATS, PROBE_TEXT, SCHEDULER, BaseTrainingStrategy, Step
from iterbatch.strategy.scheduler import SPENT, VERSION, GainLearner

if TYPE_CHECKING:
    from iterbatch.data.batch import Batch
    from iterbatch.records.record import BatchRecord


@dataclass(eq=False)
class LearnableSchedulingStrategy(BaseTrainingStrategy):
    """Repeats while the expected gain of one more pass beats its price; learns the gains from probes.

    On a share ``probe_rate`` of the batches a piece of the probe text is scored before the first pass and
    after each: all gains come from the same text, which no arm is trained on. Such a batch is repeated at
    once, as far as its passes seem worth measuring. See :mod:`iterbatch.strategy.scheduler` for the decision
    and the network.
    """

    summary: ClassVar[str] = (
        "as long as one more pass is expected to gain more than it costs; a small network learns the "
        "gains from probes"
    )
    question: ClassVar[str] = N_("Does learnable beat training every batch once?")
    arm: ClassVar[str] = "learnable"
    rival: ClassVar[str] = "baseline"
    adapts: ClassVar[bool] = True
    needs: ClassVar[str] = PROBE_TEXT

    max_repeats: Annotated[int, Knob("most passes a batch, the first included; 5 at most", at_least=1)] = (
        MAX_REPEATS
    )
    probe_rate: Annotated[
        float, Knob("share of batches whose passes are measured on the probe text", at_least=0, at_most=1)
    ] = 0.1
    probe_budget: Annotated[
        float,
        Knob("most of the compute that probes and what they try may cost, as a share", above=0, at_most=1),
    ] = SPENT
    scheduler_from: Annotated[
        Path | None, Knob("begin with what the schedulers of this run have learned, over all its seeds")
    ] = None
    scheduler_frozen: Annotated[
        bool, Knob("keep the policy of --scheduler_from as it is: no probes, no learning")
    ] = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.learner = GainLearner(min(self.max_repeats, MAX_REPEATS), self.seed, self.probe_budget)
        self.frozen = self.scheduler_frozen
        self._random = np.random.default_rng([self.seed, 1])
        self._probes = 0
        # Batch, initial loss and gains of each probe, and what was expected of low, middling and high losses.
        self._learned: list[list[float]] = []
        if self.scheduler_from is not None:
            self.start_from(read_schedulers(self.scheduler_from))

    def start_from(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Begin with what other arms have learned."""
        self.learner.start_from(kept)

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
        """As every strategy; on some batches what each pass gains is measured."""
        if self.frozen or not (self._random.random() < self.probe_rate and self.learner.can_pay()):
            return super().train_batch(batch, step)
        scores, losses = [step.probe(self._probes)], list[float]()
        losses.append(step(batch))
        scores.append(step.probe(self._probes))
        while self._goes_on(losses, step) and step.affords_repeat():
            losses.append(step.again())
            scores.append(step.probe(self._probes))
        self.placing.repeat(step, losses, len(losses))  # what is due of others
        self._learn(losses, scores, batch.index, step)
        return step.record(losses, len(losses))

    def decide(self, initial_loss: float, step: Step) -> int:
        """By the learned policy, at the price of a repeat."""
        return self.learner.decide(initial_loss, step.price_ratio)

    def repeats(self, initial_loss: float) -> int:
        """The learned policy at a price ratio of 1."""
        return self.learner.decide(initial_loss, 1.0)

    def observe(self, losses: list[float]) -> None:
        """Standardise the next batch's features with this batch's too."""
        self.learner.note(losses[0])

    def _goes_on(self, losses: list[float], step: Step) -> bool:
        return math.isfinite(losses[-1]) and self.learner.curious(len(losses), step.price_ratio)

    def _learn(self, losses: list[float], scores: list[float], index: int, step: Step) -> None:
        """Take in what the passes on a probed batch gained; a score that is not finite teaches nothing."""
        self._probes += 1
        price_ratio = step.price_ratio
        wanted = self.learner.decide(losses[0], price_ratio) if math.isfinite(losses[0]) else 1
        self.learner.pay(len(scores) * step.probe_price, wanted, len(losses), price_ratio)
        if not all(map(math.isfinite, (losses[0], *scores))):
            return
        gains = [before - after for before, after in itertools.pairwise(scores)]
        self.learner.learn(self.learner.features(losses[0]), gains)
        self.observe(losses)
        scale = self.learner.scale
        expected = [scale * gain for z in (-1.0, 0.0, 1.0) for gain in self.learner.expected((z, z))]
        padded = [*gains, *[math.nan] * (MAX_REPEATS - len(gains))]
        self._learned.append([float(index), losses[0], price_ratio, *padded, *expected])

    def keepsake(self) -> dict[str, Any]:
        """The scheduler: its probes, from which another starts, and the course of what it learned."""
        names = ("gains", "low", "middling", "high")  # losses a deviation below and above the mean
        ends = [3 + part for part in np.cumsum([0, MAX_REPEATS, *[self.learner.max_repeats] * 3])]
        course = [
            dict(zip(("batch", "initial_loss", "price_ratio"), row, strict=False))
            | {name: row[a:b] for name, (a, b) in zip(names, itertools.pairwise(ends), strict=True)}
            for row in self._learned
        ]
        probes = self.learner.rows().tolist()
        return {"version": VERSION, "probes": probes, "course": course}

    def state_dict(self) -> dict[str, Any]:
        """The learner, the random state, and the course of what it learned."""
        return {
            "learner": self.learner.state_dict(),
            "random": self._random.bit_generator.state,
            "probes": self._probes,
            "learned": np.array(self._learned),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all of it over."""
        self.learner.load_state_dict(state["learner"])
        self._random.bit_generator.state = state["random"]
        self._probes = state["probes"]
        self._learned = state["learned"].tolist()


@dataclass(eq=False)
class FrozenStrategy(LearnableSchedulingStrategy):
    """The policy that a finished arm ended with, from the first batch on: what it learned, for nothing."""

    summary: ClassVar[str] = "by the policy that learnable ended with, from the first batch on, unprobed"
    question: ClassVar[str] = N_("Does learning on the way matter, against its final policy from the start?")
    rival: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    made_from: ClassVar[str] = SCHEDULER

    source: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.frozen = True
        if self.source and self.source.get("probes"):  # one that learned nothing trains every batch once
            self.start_from([self.source])
