"""What an arm may spend and what it has spent.

What lives here: the ledger and the allowance. What does not: what a pass costs
(:mod:`iterbatch.model.flops`), and spending, which happens in :mod:`iterbatch.training.step` alone.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from iterbatch.config import UNITS
from iterbatch.language import _

# ------------------------------------------------------------------------------------------------------------
# What has been spent


@dataclass
class Ledger:
    """Where every forward and backward is charged, at the moment it is spent.

    Evaluation, checkpoints and logging are off its clock.
    """

    batches: int = 0
    updates: int = 0
    skipped_updates: int = 0  # passes whose loss or gradient was not finite
    tokens_unique: int = 0  # label tokens of text met for the first time
    tokens_trained: int = 0  # label tokens of all passes
    flops_fresh: float = 0.0
    flops_repeat: float = 0.0
    flops_probe: float = 0.0
    train_seconds: float = 0.0
    # Part of train_seconds: prefixes this arm met first but another had computed, at what they took then.
    seconds_charged: float = 0.0
    flops_saved: float = 0.0  # prefixes not computed and not charged: of repeats, and of later epochs
    seconds_saved: float = 0.0  # what those prefixes took when they were computed
    nonfinite_losses: int = 0  # passes
    nonfinite_gradients: int = 0  # passes whose loss was finite
    scaler_skips: int = 0  # passes whose float16 gradient overflowed; the scaler lowers its scale
    rollbacks: int = 0  # returns to a checkpoint after the arm diverged
    flops_lost: float = 0.0  # spent on batches that a return has undone; they stay charged
    _since: float | None = field(
        default=None, init=False, repr=False, compare=False
    )  # when the clock was started

    @property
    def flops(self) -> float:
        """All FLOPs charged."""
        return self.flops_fresh + self.flops_repeat + self.flops_probe + self.flops_lost

    @property
    def passes(self) -> int:
        """Passes made, whether their update was taken or skipped."""
        return self.updates + self.skipped_updates

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Run the training clock while the block runs."""
        self._start()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the training clock, if it runs, for what is not training.

        The seconds so far are counted when the block begins.
        """
        running = self._stop()
        try:
            yield
        finally:
            if running:
                self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()

    def _stop(self) -> bool:
        running = self._since is not None
        if self._since is not None:
            self.train_seconds += time.perf_counter() - self._since
        self._since = None
        return running

    def state_dict(self) -> dict[str, Any]:
        """All counters."""
        counters = dataclasses.asdict(self)
        del counters["_since"]
        return counters

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over all counters."""
        Ledger.__init__(self, **state)

    def keep_spent(self, before: "Ledger") -> None:
        """After a return to earlier counters: what had been spent stays charged, every fault stays counted.

        Args:
            before: The ledger as it was when the arm was sent back.
        """
        self.train_seconds = before.train_seconds
        self.nonfinite_losses, self.nonfinite_gradients = before.nonfinite_losses, before.nonfinite_gradients
        self.scaler_skips = before.scaler_skips
        self.flops_lost += before.flops - self.flops
        self.rollbacks = before.rollbacks + 1


@dataclass(frozen=True)
class Allowance:
    """What an arm may spend, in one unit: epochs are counted in batches, tokens in trained label tokens.

    The learning rate follows the fraction spent, so every arm ends fully decayed.
    """

    unit: str
    amount: float  # batches for 'epochs'; FLOPs, updates, tokens or seconds for the others
    baseline_passes: int  # fresh passes that the allowance pays for
    last_pass: float = 0.0  # price of the baseline's last pass, in the unit; 0 stands for an average one

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(
                _("unknown budget unit '{unit}'; choose from {names}").format(
                    unit=self.unit, names=", ".join(UNITS)
                )
            )
        if not self.amount > 0:
            raise ValueError(
                _("a budget of {amount} {unit} pays for nothing; it must be above 0").format(
                    amount=self.amount, unit=self.unit
                )
            )

    def spent(self, ledger: Ledger) -> float:
        """How much of the unit the ledger shows."""
        return {
            "epochs": ledger.batches,
            "flops": ledger.flops,
            "updates": ledger.passes,
            "tokens": ledger.tokens_trained,
            "seconds": ledger.train_seconds,
        }[self.unit]

    def fraction(self, ledger: Ledger) -> float:
        """Fraction spent; reaches 1 when the arm is over."""
        return self.spent(ledger) / self.amount

    def exhausted(self, ledger: Ledger) -> bool:
        """Whether less than half of the baseline's last pass is left: an arm ends at the nearest pass."""
        return self.spent(ledger) > self.amount - 0.5 * (self.last_pass or self._pass(ledger))

    def schedule_fraction(self, ledger: Ledger) -> float:
        """Fraction at the middle of the coming pass, where the learning rate stands: above 0, below 1.

        A pass beyond the middle of the last one stands there too: none is made at a learning rate of 0.
        """
        half = 0.5 * self._pass(ledger) / self.amount
        return min(max(1.0 - half, 0.5), self.fraction(ledger) + half)

    def _pass(self, ledger: Ledger) -> float:
        """An average pass, in the unit: the baseline's.

        In seconds this arm's own, as soon as it has made one.
        """
        if self.unit == "seconds" and ledger.passes:
            return ledger.train_seconds / ledger.passes
        return self.amount / self.baseline_passes

    def affords(self, ledger: Ledger, repeat_flops: float, label_tokens: int) -> bool:
        """Whether one more repeat fits into what is left.

        Counted in epochs a repeat is free: that is the original experiment's budget.
        """
        if self.unit == "epochs":
            return True
        price = {"flops": repeat_flops, "updates": 1, "tokens": label_tokens, "seconds": self._pass(ledger)}[
            self.unit
        ]
        return self.spent(ledger) + price <= self.amount
