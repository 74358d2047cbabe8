"""Whether an arm is still learning, by its own losses: a rule of plain numbers."""

import math
import statistics
from dataclasses import dataclass, field

from iterbatch.language import _
from iterbatch.records.record import BatchRecord

PATIENCE = 10  # batches in a row that may be bad


@dataclass
class Health:
    """The last batches of an arm, against its first."""

    first: list[float] = field(default_factory=list)  # initial losses of the first batches
    not_finite: int = 0  # batches in a row whose fresh pass was not finite
    exploding: int = 0  # batches in a row whose initial loss was far above the first ones'

    @property
    def good(self) -> bool:
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
        far = finite and loss > statistics.fmean(self.first) + explosion
        self.exploding = self.exploding + 1 if far else 0
        if self.not_finite >= PATIENCE:
            what = _("a loss or gradient that was not finite; lower --lr or use --dtype float32")
            return _("{patience} batches in a row had {what}").format(patience=PATIENCE, what=what)
        if self.exploding >= PATIENCE:
            what = _("a loss more than {explosion:g} nats above the first ones'; lower --lr").format(
                explosion=explosion
            )
            return _("{patience} batches in a row had {what}").format(patience=PATIENCE, what=what)
        return None
