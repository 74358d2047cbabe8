"""What passes and probes cost an arm: charged to its ledger when they are made, as if the arm ran alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from iterbatch.model.flops import FlopModel
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.training.open_batch import Bill, OpenBatch
from iterbatch.training.passes import Pass, Passes


@dataclass(frozen=True)
class Account:
    """What passes cost, what has been spent, and what may be."""

    prices: FlopModel
    ledger: Ledger
    allowance: Allowance


class Charges:
    """Charges an account for what is made on a batch.

    Args:
        account: To be charged.
        passes: Know the processes, and whether gradients are scaled.
        keeps: Whether prefix activations are kept for repeats.
    """

    def __init__(self, account: Account, passes: Passes, *, keeps: bool) -> None:
        self.prices, self.ledger, self.allowance = account.prices, account.ledger, account.allowance
        self._passes, self.keeps = passes, keeps

    def repeat_flops(self, batch: OpenBatch) -> float:
        """FLOPs of one more pass on a batch."""
        shapes = batch.batch.shapes
        return self.prices.repeat(shapes) + (0.0 if self.keeps else self.prices.prefix.of(shapes))

    def price_ratio(self, batch: OpenBatch) -> float:
        """Price ratio rho of a batch: 1 where its fresh pass was given its prefix as well."""
        return self.repeat_flops(batch) / (self.prices.repeat(batch.batch.shapes) + batch.bill.flops)

    def affords_repeat(self, batch: OpenBatch) -> bool:
        """Whether one more repeat fits into the budget."""
        return self.allowance.affords(self.ledger, self.repeat_flops(batch), batch.label_tokens)

    def fresh(self, made: Pass, batch: OpenBatch, *, counts: bool = True) -> float:
        """Charge a fresh pass; ``counts`` says whether a batch begins with it. Returns its loss."""
        ledger = self.ledger
        self._count(made, batch)
        ledger.batches += counts
        ledger.flops_fresh += self.prices.repeat(batch.batch.shapes) + self._prefix(batch)
        ledger.tokens_unique += batch.label_tokens if batch.batch.first_exposure else 0
        return made.loss

    def repeat(self, made: Pass, batch: OpenBatch) -> float:
        """Charge a repeat, now or later. Returns its loss."""
        ledger, shapes = self.ledger, batch.batch.shapes
        self._count(made, batch)
        ledger.flops_repeat += self.prices.repeat(shapes) + self._prefix(batch)
        if self.keeps:
            ledger.flops_saved += self.prices.prefix.of(shapes)
            ledger.seconds_saved += batch.bill.seconds
        return made.loss

    def probe(self, batch: OpenBatch) -> None:
        """Charge a forward, and the prefix if it was fetched for it."""
        shapes = batch.batch.shapes
        prefix = self._prefix(batch)  # due for the fresh pass anyway, unless that computes it once more
        self.ledger.flops_fresh += prefix if self.keeps else 0.0
        self.ledger.flops_probe += self.prices.forward(shapes) - self.prices.prefix.of(shapes)
        self.ledger.flops_probe += 0.0 if self.keeps else prefix

    def forward_flops(self, shapes: Sequence[tuple[int, int]]) -> float:
        """FLOPs of scoring text whose prefix activations are kept, or are not."""
        return self.prices.forward(shapes) - (self.prices.prefix.of(shapes) if self.keeps else 0.0)

    def piece(self, batch: OpenBatch) -> None:
        """Charge a forward on probe text, and its prefix where that was computed for it."""
        shapes = batch.batch.shapes
        self.ledger.flops_probe += self._prefix(batch)
        self.ledger.flops_probe += self.prices.forward(shapes) - self.prices.prefix.of(shapes)

    def _count(self, made: Pass, batch: OpenBatch) -> None:
        ledger = self.ledger
        ledger.tokens_trained += batch.label_tokens
        ledger.updates += made.finite
        ledger.skipped_updates += not made.finite
        if not math.isfinite(made.loss):
            ledger.nonfinite_losses += 1
        elif not made.finite and self._passes.accelerator.scaler is None:
            ledger.nonfinite_gradients += 1
        elif not made.finite:
            ledger.scaler_skips += 1

    def _prefix(self, batch: OpenBatch) -> float:
        """Charge what was fetched since the last charge; returns its FLOPs.

        An arm pays for a block when it meets it first, computed or served: in FLOPs, and in the seconds
        recorded when it was computed. Later it pays for what is computed. Called after a loss has been
        read: the device is done.
        """
        fetched = batch.settle()
        if fetched is None:
            return 0.0
        seconds_computed, receipts = fetched
        computed, served, seconds_served = self._passes.totals(
            sum(receipt.computed for receipt in receipts),
            sum(receipt.served for receipt in receipts),
            sum(receipt.seconds_served for receipt in receipts),
        )
        seconds_served /= self._passes.accelerator.num_processes  # they work side by side
        shapes, prefix = batch.batch.shapes, self.prices.prefix
        if batch.batch.first_exposure:
            self.ledger.train_seconds += seconds_served
            self.ledger.seconds_charged += seconds_served
            flops = prefix.of(shapes)
        else:
            self.ledger.flops_saved += prefix.of([(int(served), shapes[0][1])])
            self.ledger.seconds_saved += seconds_served
            flops = prefix.of([(int(computed), shapes[0][1])])
        batch.bill = Bill(flops, seconds_computed + seconds_served)
        return flops
