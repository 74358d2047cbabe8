"""One arm, from its first batch until its budget is spent.

What happens to one batch is the strategy's ``train_batch``; what a pass does is ``step``'s. No strategy is named here.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from iterbatch.training.budget import Allowance, Ledger
from iterbatch.data.data_loader import Batch
from iterbatch.records.record import BatchRecord
from iterbatch.training.step import TrainingStep
from iterbatch.strategy import BaseTrainingStrategy

PATIENCE = 10  # batches in a row that may be bad


class Watcher(Protocol):
    """Who is told about an arm while it runs; always off its clock."""

    def batch_begins(self) -> None:
        """A batch is about to be trained; a checkpoint made from here on goes back to here, or to a pass of this batch."""
        ...

    def batch_done(self, record: BatchRecord) -> None:
        """A batch has been trained."""
        ...

    def evaluate(self, fraction: float) -> None:
        """The arm has reached one of the fractions of its budget at which it is evaluated."""
        ...


@dataclass
class Progress:
    """Where an arm stands between two batches."""

    evaluated: int = -1  # evaluations made after the one at the start; -1: not even that
    seconds: float = 0.0  # the ledger's, when the batch began
    first: list[float] = field(default_factory=list)  # initial losses of the first batches
    not_finite: int = 0  # batches in a row whose fresh pass was not finite
    exploding: int = 0  # batches in a row whose initial loss was far above the first ones'
    stopped: str | None = None  # why the arm was ended before its budget was spent

    @property
    def healthy(self) -> bool:
        """Whether the last batch was as it should be."""
        return not (self.not_finite or self.exploding)

    def judge(self, record: BatchRecord, explosion: float) -> str | None:
        """Take a batch into account; say why the arm has diverged, if it has.

        Args:
            record: Of the batch.
            explosion: Nats a token above the mean of the first batches' initial losses that a loss may reach.
        """
        loss, finite = record.initial_loss, math.isfinite(record.initial_loss + record.gradient_norm)
        self.not_finite = 0 if finite else self.not_finite + 1
        if finite and len(self.first) < PATIENCE:
            self.first.append(loss)
        self.exploding = self.exploding + 1 if finite and loss > statistics.fmean(self.first) + explosion else 0
        if self.not_finite >= PATIENCE:
            return f"{PATIENCE} batches in a row had a loss or gradient that was not finite; lower --lr or use --dtype float32"
        if self.exploding >= PATIENCE:
            return f"{PATIENCE} batches in a row had a loss more than {explosion:g} nats above the first ones'; lower --lr"
        return None

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all of it over."""
        vars(self).update(state)


def fit(
    strategy: BaseTrainingStrategy,
    stream: Iterator[Batch],
    step: TrainingStep,
    ledger: Ledger,
    allowance: Allowance,
    watcher: Watcher,
    evals: int,  # evaluations, at equal fractions of the budget, the last at its end
    explosion: float = math.inf,  # see Progress.judge
    progress: Progress | None = None,  # where to go on from; default: the start
) -> str | None:
    """Train one arm.

    Returns:
        None, or why the arm stopped before its budget was spent: it has diverged.
    """
    progress = progress or Progress()
    if progress.evaluated < 0:
        watcher.evaluate(0.0)
        progress.evaluated = 0
    while step.midway or not allowance.exhausted(ledger):
        progress.seconds = progress.seconds if step.midway else ledger.train_seconds
        step.begin()
        watcher.batch_begins()
        with ledger.clock():
            record = strategy.train_batch(next(stream), step)
        watcher.batch_done(dataclasses.replace(record, seconds=ledger.train_seconds - progress.seconds))

        if (diverged := progress.judge(record, explosion)) is not None:
            return diverged
        reached = evals if allowance.exhausted(ledger) else math.floor(evals * allowance.fraction(ledger) + 1e-9)
        if reached > progress.evaluated:
            progress.evaluated = reached
            watcher.evaluate(reached / evals)
    return None
