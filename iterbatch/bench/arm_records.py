"""The records of one arm while it is trained: written, shown and tracked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from iterbatch.bench.listener import Listener
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
        label: As trackers and messages name the arm.
        ledger: Of the arm; an evaluation says what had been spent.
        accelerator: Has the trackers.
        listener: Shows what happens.
    """

    def __init__(
        self, folder: Path, label: str, ledger: Ledger, accelerator: Accelerator, listener: Listener
    ) -> None:
        self._label, self._ledger, self._accelerator, self._listener = label, ledger, accelerator, listener
        self.writers: dict[str, RecordWriter] = {}
        if accelerator.is_main_process:
            self.writers["batches"] = RecordWriter(folder / layout.BATCHES)
            self.writers["evals"] = RecordWriter(folder / layout.EVALS)

    def batch(self, record: BatchRecord, allowance: Allowance) -> None:
        """A batch has been trained."""
        if "batches" in self.writers:
            self.writers["batches"].write(record)
        self._listener.batch_done(record, allowance.fraction(self._ledger))
        values = {
            "initial_loss": record.initial_loss,
            "repeats": record.repeats_done,
            "learning_rate": record.learning_rate,
            "gradient_norm": record.gradient_norm,
            "flops": self._ledger.flops,
        }
        self._track(values, record.batch)

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
        self._track({f"{split}_ppl": record.ppl}, record.batches)

    def _track(self, values: dict[str, float], position: int) -> None:
        if self._accelerator.trackers:
            named = {f"{self._label}/{name}": value for name, value in values.items()}
            self._accelerator.log(named, step=position)

    def sync(self) -> None:
        """Have everything written so far on the disk itself."""
        for writer in self.writers.values():
            writer.sync()

    def close(self) -> None:
        """Close the files."""
        for writer in self.writers.values():
            writer.close()
