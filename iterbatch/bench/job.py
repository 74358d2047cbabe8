"""One arm with one seed as a job: its budget, what it is made from, and what its strategy needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterbatch.bench.arm import Arm
from iterbatch.bench.listener import Listener
from iterbatch.bench.prepare import trackers
from iterbatch.bench.shared import Shared
from iterbatch.bench.tracking import Tracking
from iterbatch.data.data_loader import BatchStream
from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.record import BatchRecord, passes_received, read_records
from iterbatch.records.result import check_records, read_result
from iterbatch.records.scheduler import read_scheduler
from iterbatch.strategy import REFERENCE, STRATEGIES, BaseTrainingStrategy
from iterbatch.strategy.base import BASE_LOSSES, GRADIENT_NOISE, PROBE_TEXT, SCHEDULER
from iterbatch.training.budget import Allowance
from iterbatch.training.step import Extras


@dataclass(frozen=True)
class Job:
    """What is to be trained, and where its records go."""

    shared: Shared
    arm: Arm
    seed: int
    folder: Path  # of the arm and seed
    listener: Listener

    @property
    def label(self) -> str:
        """As trackers and messages name it."""
        return f"{self.arm.name}/seed{self.seed}"

    def tracking(self) -> Tracking:
        """Trackers of its own."""
        config = self.arm.config
        run_dir = self.folder.parent.parent
        return Tracking(trackers(config.run.log_with), run_dir, self.label, config.flat())

    def allowance(self) -> Allowance:
        """What the arm may spend, in the unit that all arms share.

        Raises:
            RunError: where that is the baseline's seconds, and the baseline is not finished.
        """
        training, plan = self.shared.config.training, self.shared.plan
        unit, passes = training.match, plan.batches
        if unit == "seconds" and training.budget is None and self.arm.strategy == REFERENCE:
            unit = "epochs"  # its seconds are what the others may spend
        amounts = {"epochs": passes, "flops": plan.flops, "updates": passes, "tokens": plan.tokens}
        amount = training.budget or (amounts[unit] if unit in amounts else self._baseline_seconds())
        amount *= self.arm.config.training.budget_share
        last = {"epochs": 1.0, "updates": 1.0, "flops": plan.last_pass_flops}.get(unit, 0.0)
        expected = max(1, round(passes * amount / amounts.get(unit, amount)))
        return Allowance(unit, float(amount), expected, last)

    def source(self) -> Any:
        """What the arm is made from: passes of each batch, or the scheduler, of another arm; None: nothing.

        Raises:
            RunError: where that arm is not finished.
        """
        if self.arm.source is None:
            return None
        folder = self._finished(self.arm.source, self.arm.source_seed(self.seed))
        if STRATEGIES[self.arm.strategy].made_from == SCHEDULER:
            return read_scheduler(folder)
        check_records(folder)
        return passes_received(read_records(folder / layout.BATCHES, BatchRecord))

    def extras(self, strategy: BaseTrainingStrategy, stream: BatchStream) -> Extras:
        """What its strategy needs besides batches.

        Raises:
            RunError: where the run has nothing to make it from.
        """
        shared, needs = self.shared, strategy.needs
        if needs == GRADIENT_NOISE and len(stream.batch(0).micro_batches) < 2:
            raise RunError(
                _(
                    "{label} compares the gradients of micro-batches, and a batch has one; give "
                    "--grad_accum 2 or more, with a smaller --batch_size"
                ).format(label=self.label)
            )
        pieces = stream.pieces() if needs == PROBE_TEXT else ()
        if needs == PROBE_TEXT and not pieces:
            raise RunError(
                _("{label} measures on probe text, and none was set aside; give --probe_text 0.01").format(
                    label=self.label
                )
            )
        base = shared.base_losses.nats if needs == BASE_LOSSES else None
        return Extras(pieces, base, noise=needs == GRADIENT_NOISE)

    def warm(self, strategy: BaseTrainingStrategy, stream: BatchStream) -> None:
        """Where layers are compiled: for the shapes that only this arm has."""
        batch, length = stream.batch(0), self.shared.config.max_length
        for parts in strategy.cuts:
            pieces = [micro for n in range(parts) for micro in batch.part(n, parts).micro_batches]
            for rows in {micro.input_ids.shape[0] for micro in pieces}:
                self.shared.warm((rows, length))
        if strategy.needs == PROBE_TEXT:
            probed = [micro for piece in stream.pieces() for micro in piece.micro_batches]
            for rows in {micro.input_ids.shape[0] for micro in probed}:
                self.shared.warm((rows, length), training=False)

    def _baseline_seconds(self) -> float:
        return read_result(self._finished(REFERENCE)).train_seconds

    def _finished(self, arm: str, seed: int | None = None) -> Path:
        """The folder of another arm, of this seed or another."""
        run = self.folder.parent.parent
        folder = layout.arm_folder(run, arm, self.seed if seed is None else seed)
        if not (folder / layout.RESULT).is_file():
            other = f"{arm}/{folder.name}"
            raise RunError(
                _("{label} is made from {other}, which is not finished; train that arm first").format(
                    label=self.label, other=other
                )
            )
        return folder
