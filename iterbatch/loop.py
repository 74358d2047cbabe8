"""One arm, from its first batch until its budget is spent.

What happens to one batch is the strategy's ``train_batch``; what a pass does is ``step``'s. No strategy is named here.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol

from iterbatch.budget import Allowance, Ledger
from iterbatch.data_loader import Batch
from iterbatch.record import BatchRecord
from iterbatch.strategy import BaseTrainingStrategy, Step

NOT_FINITE_LIMIT = 10  # batches in a row


class Watcher(Protocol):
    """Who is told about an arm while it runs; always off its clock."""

    def batch_done(self, record: BatchRecord) -> None:
        """A batch has been trained."""
        ...

    def evaluate(self, fraction: float) -> None:
        """The arm has reached one of the fractions of its budget at which it is evaluated."""
        ...


def fit(
    strategy: BaseTrainingStrategy,
    stream: Iterator[Batch],
    step: Step,
    ledger: Ledger,
    allowance: Allowance,
    watcher: Watcher,
    evals: int,  # evaluations, at equal fractions of the budget, the last at its end
) -> str | None:
    """Train one arm.

    Returns:
        None, or why the arm stopped before its budget was spent: ten batches in a row whose fresh pass was not finite.
    """
    watcher.evaluate(0.0)
    evaluated, not_finite = 0, 0
    while not allowance.exhausted(ledger):
        before = ledger.train_seconds
        with ledger.clock():
            record = strategy.train_batch(next(stream), step)
        watcher.batch_done(dataclasses.replace(record, seconds=ledger.train_seconds - before))

        not_finite = 0 if math.isfinite(record.initial_loss + record.gradient_norm) else not_finite + 1
        if not_finite >= NOT_FINITE_LIMIT:
            return f"{not_finite} batches in a row had a loss or gradient that was not finite; lower --lr or use --dtype float32"
        reached = evals if allowance.exhausted(ledger) else math.floor(evals * allowance.fraction(ledger) + 1e-9)
        if reached > evaluated:
            evaluated = reached
            watcher.evaluate(reached / evals)
    return None
