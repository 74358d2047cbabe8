"""The one place that spends compute: every pass and probe is charged to the ledger when it is made.

What does not live here: how often a batch is repeated (:mod:`iterbatch.strategy`), how a pass is made
(:mod:`iterbatch.training.passes`) and what it costs (:mod:`iterbatch.model.flops`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iterbatch.data.batch import Batch
from iterbatch.records.record import BatchRecord
from iterbatch.training.charges import Account, Charges
from iterbatch.training.journal import Journal, Reading, journalled
from iterbatch.training.noise import GradientNoise
from iterbatch.training.open_batch import Bill, OpenBatch
from iterbatch.training.passes import Pass, Passes, schedule, warmup_share

if TYPE_CHECKING:
    from iterbatch.reuse.prefix import PrefixSource


@dataclass(frozen=True)
class StepSettings:
    """How an update is made."""

    lr: float  # peak learning rate
    warmup: float = 0.03  # share of the budget
    reuse: bool = True  # keep the prefix activations of a batch for its repeats


@dataclass(frozen=True)
class Extras:
    """What only some strategies ask a step for."""

    pieces: Sequence[Batch] = ()  # of the probe text
    base_losses: np.ndarray | None = None  # (blocks,) nats of each training block under the base
    noise: bool = False  # measure the gradient's noise


def _whole(batch: Batch, *_: Any) -> tuple[Batch, Batch]:
    return batch, batch


def _part(batch: Batch, number: int, parts: int) -> tuple[Batch, Batch]:
    return batch.part(number, parts), batch


class TrainingStep:
    """``step`` as a strategy sees it: ``step(batch)`` is the fresh pass, ``step.again()`` a repeat.

    Args:
        passes: Makes them.
        account: Where they are charged; the learning rate follows its allowance.
        settings: Learning rate and reuse.
        source: Of the training text's prefix activations.
        batch_at: Any batch of the stream by its index, for batches that were held when a checkpoint was made.
        extras: What the strategy needs besides.

    Its answers about the current batch are part of its state: see :mod:`iterbatch.training.journal`.
    """

    def __init__(
        self,
        passes: Passes,
        account: Account,
        settings: StepSettings,
        source: PrefixSource,
        batch_at: Callable[[int], Batch],
        extras: Extras | None = None,
    ) -> None:
        self.passes, self.settings, self.extras = passes, settings, extras or Extras()
        self.ledger, self.allowance, self.prices = account.ledger, account.allowance, account.prices
        self.journal = Journal()
        self.after_pass: Callable[[], None] = lambda: None  # may be set: a checkpoint can be made there
        self.learning_rate = 0.0
        self._source, self._batch_at = source, batch_at
        self.charges = Charges(account, passes, keeps=settings.reuse and source.model.cut > 0)
        self._noise = GradientNoise(passes.accelerator) if self.extras.noise else None
        self._gradient_norm = 0.0
        self._pieces: dict[int, OpenBatch] = {}  # of the probe text that have been scored, by number
        self._held: dict[int, OpenBatch] = {}  # by index: batches for later
        self._begun = (0.0, 0, 0.0)  # FLOPs, skipped updates and seconds when the current batch began
        self._revisited: list[int] = []  # while the current batch was
        self._batch = self._opened(Batch(()))

    # -- what a strategy uses --------------------------------------------------------------------------------

    @journalled(opens=_whole, passes=True)
    def __call__(self, batch: Batch) -> float:
        """Fresh pass on a new batch, and its update. Returns the initial loss, mean nats a label token."""
        return self._fresh(self.passes.make(self._batch, self._rate(), noise=self._noise))

    @journalled(passes=True)
    def again(self) -> float:
        """A repeat on the same batch, and its update. Returns its loss before that update."""
        return self.charges.repeat(self.passes.make(self._batch, self._rate()), self._batch)

    @journalled()
    def affords_repeat(self) -> bool:
        """Whether one more repeat fits into the budget."""
        return self.charges.affords_repeat(self._batch)

    @property
    def price_ratio(self) -> float:
        """Price ratio rho of the current batch: 1 where its fresh pass was given its prefix as well."""
        return self.charges.price_ratio(self._batch)

    @property
    def probe_price(self) -> float:
        """Cost of scoring a piece of the probe text over cost of a fresh pass on the current batch."""
        scored = self.charges.forward_flops(self.extras.pieces[0].shapes)
        return scored / self.prices.fresh(self._batch.batch.shapes)

    @journalled()
    def probe(self, number: int) -> float:
        """Loss of a piece of the probe text, as the adapter is now; numbers go round the pieces.

        Price: a forward of the adapted part; of the prefix too, the first time.
        """
        number %= len(self.extras.pieces)
        piece = self._pieces.get(number) or self._opened(self.extras.pieces[number])
        if self.charges.keeps:
            self._pieces[number] = piece
        loss = float(self.passes.total(self.passes.score(piece).sum())) / piece.label_tokens
        self.charges.piece(piece)
        return loss

    def record(self, losses: list[float], planned: int, done: int | None = None) -> BatchRecord:
        """The record of the current batch, with all that was charged since it began, a probe included.

        Seconds are filled in by the loop, whose clock is still running. ``done`` is for a batch
        whose passes are not its losses.
        """
        flops, skipped, _ = self._begun
        return BatchRecord(
            batch=self._batch.batch.index,
            epoch=self._batch.batch.epoch,
            initial_loss=losses[0],
            losses=losses,
            repeats_planned=planned,
            repeats_done=len(losses) if done is None else done,
            learning_rate=self.learning_rate,
            gradient_norm=self._gradient_norm,
            tokens=self._batch.whole_tokens,
            flops=self.ledger.flops - self.ledger.flops_lost - flops,
            seconds=0.0,
            skipped_updates=self.ledger.skipped_updates - skipped,
            revisited=self._revisited,
        )

    # -- what controls use -----------------------------------------------------------------------------------

    @journalled(opens=_whole, passes=True)
    def scaled(self, batch: Batch, factor: Callable[[float], float]) -> float:
        """Fresh pass whose update takes ``factor(initial loss)`` times the learning rate.

        Price: a fresh pass, and a wait for its loss.
        """
        rate = self._rate()

        def adjust(loss: float) -> None:
            self.learning_rate = rate * factor(loss)
            self.passes.take_rate(self.learning_rate)

        return self._fresh(self.passes.make(self._batch, rate, adjust))

    @journalled(opens=_whole, passes=True)
    def weighted(self, batch: Batch, weight: Callable[[float], float]) -> float:
        """Fresh pass whose loss counts ``weight(initial loss)`` times, before clipping.

        Price: a fresh pass, and a wait for its loss.
        """

        def adjust(loss: float) -> None:
            self.passes.weigh_gradient(weight(loss))

        return self._fresh(self.passes.make(self._batch, self._rate(), adjust))

    @journalled(opens=_part, passes=True)
    def part(self, batch: Batch, number: int, parts: int) -> float:
        """Fresh pass on one of ``parts`` shares of the rows, Adam's beta2 at the same half-life in tokens.

        Price: the share's. The batch counts as one, at its first part.
        """
        with self.passes.shorter_memory(self._batch.label_tokens / self._batch.whole_tokens):
            made = self.passes.make(self._batch, self._rate())
        return self._fresh(made, counts=number == 0)

    @journalled(opens=_whole)
    def forward(self, batch: Batch) -> float:
        """Loss of a new batch without gradients.

        Price: a forward, as a probe; the prefix is there for the fresh pass, if one follows.
        """
        loss = float(self.passes.total(self.passes.score(self._batch).sum())) / self._batch.label_tokens
        self.charges.probe(self._batch)
        return loss

    @journalled(passes=True)
    def skip(self) -> None:
        """Let the current batch go untrained; it counts as a batch."""
        self.ledger.batches += 1

    @journalled()
    def base_loss(self) -> float:
        """Loss of the current batch under the base, from the table. Price: none here."""
        assert self.extras.base_losses is not None
        blocks = [block for micro in self._batch.batch.micro_batches for block in micro.blocks or ()]
        return self.passes.totals(float(self.extras.base_losses[blocks].sum()))[0] / self._batch.label_tokens

    @journalled()
    def noise_scale(self) -> float:
        """Simple noise scale of the gradient, in rows, over the fresh passes so far. Price: none."""
        return math.nan if self._noise is None else self._noise.scale

    @journalled()
    def affords_part(self, batch: Batch, number: int, parts: int) -> bool:
        """Whether the budget has room for a share of a batch's rows, as a fresh pass."""
        part = batch.part(number, parts)
        tokens = int(self.passes.totals(part.label_tokens)[0])
        return self.allowance.affords(self.ledger, self.prices.fresh(part.shapes), tokens)

    def hold(self) -> int:
        """Keep the current batch, with its prefix activations, for later. Price: their memory."""
        index = self._batch.batch.index
        self._held[index] = self._batch
        return index

    def revisit(self, held: int) -> float:
        """One pass and update on a held batch. Price: a repeat."""
        self._revisited.append(held)
        return self._revisit(held)

    @journalled(passes=True)
    def _revisit(self, held: int) -> float:
        batch = self._held[held]
        return self.charges.repeat(self.passes.make(batch, self._rate()), batch)

    def release(self, held: int) -> None:
        """Let a held batch go."""
        self._held.pop(held, None)

    # -- the loop --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A batch is about to begin, or to be resumed."""
        self.journal.begin()
        self._revisited = []
        if not self.midway:
            ledger = self.ledger
            self._begun = (ledger.flops - ledger.flops_lost, ledger.skipped_updates, ledger.train_seconds)

    @property
    def batch_seconds(self) -> float:
        """What the current batch took, the clock being stopped."""
        return self.ledger.train_seconds - self._begun[2]

    @property
    def midway(self) -> bool:
        """Whether training stopped between two passes of the coming batch."""
        return self.journal.replaying

    @property
    def finite(self) -> bool:
        """Whether all losses of the current batch, and its gradient, were finite."""
        return all(map(math.isfinite, self.journal.losses)) and math.isfinite(self._gradient_norm)

    def _rate(self) -> float:
        """Learning rate of the coming pass: its place on the schedule, halved for each rollback."""
        fraction = self.allowance.schedule_fraction(self.ledger)
        rise = warmup_share(self.settings.warmup, self.allowance.baseline_passes)
        share = schedule(fraction, rise) * 0.5**self.ledger.rollbacks
        self.learning_rate = self.settings.lr * share
        return self.learning_rate

    def _fresh(self, made: Pass, *, counts: bool = True) -> float:
        self._gradient_norm = made.gradient_norm
        return self.charges.fresh(made, self._batch, counts=counts)

    # -- what the journal asks for -------------------------------------------------------------------------

    def open(self, batch: Batch, whole: Batch) -> None:
        """Make a batch the current one, unless a probe has done so.

        What was kept of the one before is let go.
        """
        if batch is not self._batch.given:
            self._batch = self._opened(batch)
            if whole is not batch:
                self._batch.whole_tokens = int(self.passes.totals(whole.label_tokens)[0])

    def _opened(self, batch: Batch) -> OpenBatch:
        tokens = int(self.passes.totals(batch.label_tokens)[0])
        device = self.passes.accelerator.device
        return OpenBatch(batch, self._source, device, keeps=self.charges.keeps, label_tokens=tokens)

    @property
    def reading(self) -> Reading:
        """What comes next depends on this."""
        return Reading(self.learning_rate, self._gradient_norm, self._batch.bill)

    def take_reading(self, reading: Reading) -> None:
        """Put things back to where they were after an answer."""
        self.learning_rate, self._gradient_norm = reading.learning_rate, reading.gradient_norm
        self._batch.bill = reading.bill

    def fetch_again(self) -> None:
        """Fetch what was kept of the current batch when training stopped in it."""
        self._fetch_again(self._batch)

    def _fetch_again(self, batch: OpenBatch) -> None:
        with self.ledger.paused(), self.passes.accelerator.autocast():
            batch.fetch_again()

    def state_dict(self) -> dict[str, Any]:
        """The answers about the current batch, what was spent before it, and the batches that are held."""
        held = [[index, batch.bill.flops, batch.bill.seconds] for index, batch in self._held.items()]
        return {
            "journal": self.journal.state_dict(),
            "begun": self._begun,
            "held": held,
            "pieces": list(self._pieces),
            "noise": None if self._noise is None else self._noise.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume in the middle of a batch, or at its beginning where nothing had been answered."""
        self.journal.load_state_dict(state["journal"])
        flops, skipped, seconds = state["begun"]
        self._begun = (flops, skipped, seconds)
        if self._noise is not None:
            self._noise.load_state_dict(state["noise"])
        self._pieces = {number: self._opened(self.extras.pieces[number]) for number in state["pieces"]}
        for piece in self._pieces.values():
            self._fetch_again(piece)
        self._held = {}
        for index, flops, seconds in state["held"]:
            self._held[index] = self._opened(self._batch_at(index))
            self._held[index].bill = Bill(flops, seconds)
            self._fetch_again(self._held[index])
        self._batch = self._opened(Batch(()))
