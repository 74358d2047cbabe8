"""What may be spent inside somebody else's loop, which knows how many batches it means to train."""

from __future__ import annotations

from iterbatch.config import UNITS
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.training.budget import Ledger

MATCHABLE = tuple(unit for unit in UNITS if unit != "epochs")


class LoopAllowance:
    """A budget beside a loop's own number of batches.

    Without an amount it is what that many batches would cost if each were trained once, at the mean price of
    the fresh passes so far: known exactly at the end, and nearly so after a few batches.

    Args:
        unit: ``updates``, ``tokens``, ``flops`` or ``seconds``; None for no budget.
        amount: In that unit; None for what the loop would spend without repeats.

    Raises:
        ConfigError: for another unit, an amount that pays for nothing, or seconds without an amount.
    """

    def __init__(self, unit: str | None, amount: float | None = None) -> None:
        self.unit, self.amount = unit, amount
        self.batches = 0  # that the loop means to train; it says so when training begins
        self.fresh_tokens = 0  # label tokens of the batches so far, each counted once
        if unit is None and amount is not None:
            raise ConfigError(
                _("budget is {amount}, but of what? Give match as well: {names}").format(
                    amount=amount, names=", ".join(MATCHABLE)
                )
            )
        if unit is not None and unit not in MATCHABLE:
            raise ConfigError(
                _("match is '{unit}'; choose from {names}").format(unit=unit, names=", ".join(MATCHABLE))
            )
        if amount is not None and not amount > 0:
            raise ConfigError(_("budget is {amount}; it must be above 0").format(amount=amount))
        if unit == "seconds" and amount is None:
            raise ConfigError(_("match='seconds' needs their number: give budget=, in seconds"))

    def position(self, ledger: Ledger) -> float:
        """How far the budget is spent, in batches of the loop: where its schedule stands."""
        spent = self._spent(ledger)
        if self.amount is not None:
            return self.batches * spent / self.amount
        return spent / self._mean_fresh(ledger) if spent else 0.0

    def exhausted(self, ledger: Ledger) -> bool:
        """Whether less than half of a batch is left."""
        return self.unit is not None and self.position(ledger) > self.batches - 0.5

    def affords(self, ledger: Ledger, repeat_flops: float, label_tokens: int) -> bool:
        """Whether one more repeat fits into what is left."""
        if self.unit is None:
            return True
        seconds = ledger.train_seconds / ledger.passes if ledger.passes else 0.0
        price = {"updates": 1, "tokens": label_tokens, "flops": repeat_flops, "seconds": seconds}[self.unit]
        amount = self.amount if self.amount is not None else self.batches * self._mean_fresh(ledger)
        return self._spent(ledger) + price <= amount * (1 + 1e-9)  # a mean is rounded

    def _spent(self, ledger: Ledger) -> float:
        return {
            "updates": ledger.passes,
            "tokens": ledger.tokens_trained,
            "flops": ledger.flops,
            "seconds": ledger.train_seconds,
            None: ledger.batches,
        }[self.unit]

    def _mean_fresh(self, ledger: Ledger) -> float:
        """Price of a batch that is trained once, in the unit."""
        if self.unit == "flops":
            return ledger.flops_fresh / ledger.batches
        return self.fresh_tokens / ledger.batches if self.unit == "tokens" else 1.0
