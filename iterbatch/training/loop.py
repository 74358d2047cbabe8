"""One arm, batch after batch, until its budget is spent.

What happens to one batch is the strategy's ``train_batch``; what a pass does is
:class:`iterbatch.training.passes`'. Evaluation, checkpoints and the arm's health are the business
of whoever takes the records.
"""

import dataclasses
from collections.abc import Iterator

from iterbatch.data.batch import Batch
from iterbatch.records.record import BatchRecord
from iterbatch.strategy.base import BaseTrainingStrategy
from iterbatch.training.step import TrainingStep


def fit(strategy: BaseTrainingStrategy, stream: Iterator[Batch], step: TrainingStep) -> Iterator[BatchRecord]:
    """Train one arm: one batch, one record. Between two of them its clock stands still."""
    while step.midway or not step.allowance.exhausted(step.ledger):
        step.begin()
        with step.ledger.clock():
            record = strategy.train_batch(next(stream), step)
        yield dataclasses.replace(record, seconds=step.batch_seconds)
