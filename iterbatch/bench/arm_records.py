"""The records of one arm while it is trained: written, shown and tracked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from iterbatch.bench.listener import Listener
from iterbatch.bench.tracking import Tracking
from iterbatch.evaluation.perplexity import Score
from iterbatch.records import layout
from iterbatch.records.record import BatchRecord, EvalRecord, RecordWriter
from iterbatch.training.budget import Allowance, Ledger

if TYPE_CHECKING:
    from accelerate import Accelerator


class ArmRecords:
    """Batches and evaluations of an arm. Of several processes only the main one writes.

    Args:
        folder: Of the arm and seed.
        ledger: Of the arm; an evaluation says what had been spent.
        accelerator: Says which process this is.
        listener: Shows what happens.
        open_tracking: Makes the arm's trackers.
    """

    def __init__(
        self,
        folder: Path,
        ledger: Ledger,
        accelerator: Accelerator,
        listener: Listener,
        open_tracking: Callable[[], Tracking],
    ) -> None:
        self._ledger, self._listener = ledger, listener
        self._tracking = open_tracking() if accelerator.is_main_process else None
        self.writers: dict[str, RecordWriter] = {}
        if accelerator.is_main_process:
            self.writers["batches"] = RecordWriter(folder / layout.BATCHES)
            self.writers["evals"] = RecordWriter(folder / layout.EVALS)

    def batch(self, record: BatchRecord, allowance: Allowance) -> None:
        """A batch has been trained."""
        if "batches" in self.writers:
            self.writers["batches"].write(record)
        self._listener.batch_done(record, allowance.fraction(self._ledger))
        if self._tracking is not None:
            self._tracking.batch(
                {
                    "initial_loss": record.initial_loss,
                    **{f"loss_before_pass_{n}": loss for n, loss in enumerate(record.losses, 1) if n > 1},
                    "passes": record.repeats_done,
                    "learning_rate": record.learning_rate,
                    "gradient_norm": record.gradient_norm,
                    "flops": self._ledger.flops,
                    "train_seconds": self._ledger.train_seconds,
                },
                record.batch + 1,
            )

    def evaluation(self, score: Score, split: str, fraction: float) -> None:
        """A split has been scored, at a fraction of the budget."""
        ledger = self._ledger
        record = EvalRecord(
            split=split,
            fraction=fraction,
            batches=ledger.batches,
            updates=ledger.updates,
            tokens_trained=ledger.tokens_trained,
            flops=ledger.flops,
            train_seconds=ledger.train_seconds,
            nats=score.nats,
            tokens=score.tokens,
            words=score.words,
            bytes=score.bytes,
            ppl=score.ppl,
            word_ppl=score.word_ppl,
            byte_ppl=score.byte_ppl,
            bits_per_byte=score.bits_per_byte,
        )
        if "evals" in self.writers:
            self.writers["evals"].write(record)
        self._listener.evaluated(record)
        if self._tracking is not None:
            values = {f"{split}_ppl": record.ppl, f"{split}_bits_per_byte": record.bits_per_byte}
            spent = {"flops": record.flops, "train_seconds": record.train_seconds}
            self._tracking.evaluation(values | spent, record.batches)

    def sync(self) -> None:
        """Have everything written so far on the disk itself."""
        for writer in self.writers.values():
            writer.sync()

    def close(self) -> None:
        """Close the files, and end the tracking."""
        if self._tracking is not None:
            self._tracking.close()
        for writer in self.writers.values():
            writer.close()
