"""A batch on the device, with everything that is known and kept of it while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from iterbatch.data.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from iterbatch.reuse.prefix import PrefixSource, Receipt


@dataclass(frozen=True)
class Bill:
    """What the prefix of a batch was last charged."""

    flops: float = 0.0
    seconds: float = 0.0  # that it took to compute, by whoever computed it


class OpenBatch:
    """A batch that passes are made on.

    Args:
        batch: On the host or the device.
        source: Where its prefix activations come from.
        device: Where it is trained.
        keeps: Whether prefix activations are kept from one pass to the next.
        label_tokens: Of the batch, over all processes.

    ``whole_tokens`` are those of the whole batch, where this is a part of one.
    """

    def __init__(
        self, batch: Batch, source: PrefixSource, device: torch.device, *, keeps: bool, label_tokens: int
    ) -> None:
        self.given, self.batch = batch, batch.to(device)
        self.label_tokens = self.whole_tokens = label_tokens
        self.keeps, self.bill = keeps, Bill()
        self._source = source
        self._kept: dict[int, Tensor] = {}  # micro-batch to its prefix activations, (rows, length, width)
        self._receipts: list[Receipt] = []  # of what was fetched and not billed yet

    def hidden(self, index: int) -> Tensor:
        """Prefix activations of a micro-batch, (rows, length, width): kept from a pass before, or fetched."""
        if index in self._kept:
            return self._kept[index]
        hidden, receipt = self._source.fetch(self.batch.micro_batches[index])
        self._receipts.append(receipt)
        if self.keeps:
            self._kept[index] = hidden
        return hidden

    def settle(self) -> tuple[float, list[Receipt]] | None:
        """Store what was computed since the last call.

        Called when the device is done, so that storing costs it nothing.

        Returns:
            Seconds that computing took, and the receipts of all that was fetched; None where nothing was.
        """
        if not self._receipts:
            return None
        receipts, self._receipts = self._receipts, []
        return self._source.settle(), receipts

    def fetch_again(self) -> None:
        """Fetch what was kept when training stopped in this batch; it has been charged."""
        if self.keeps:
            for index in range(len(self.batch.micro_batches)):
                self.hidden(index)
            self.settle()
