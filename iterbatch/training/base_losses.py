"""The untrained base's loss on every block that was asked for: computed, and paid for, once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from iterbatch.model.lora import blank_adapter
from iterbatch.training.charges import Charges
from iterbatch.training.open_batch import OpenBatch
from iterbatch.training.passes import Passes


class BaseLosses:
    """A table of nats a block, filled where it has none."""

    def __init__(self, passes: Passes, charges: Charges) -> None:
        self._passes, self._charges = passes, charges
        self._nats: dict[int, float] = {}  # by block

    def of(self, batch: OpenBatch) -> float:
        """Loss of a batch under the base; rows without a block have no entry, and are scored each time."""
        return float(self._passes.total(self._sum(batch))) / batch.label_tokens

    def _sum(self, opened: OpenBatch) -> torch.Tensor:
        batch, accelerator = opened.batch, self._passes.accelerator
        blocks = [block for micro in batch.micro_batches for block in micro.blocks or ()]
        known = len(blocks) == batch.rows and all(block in self._nats for block in blocks)
        if self._passes.totals(known)[0] == accelerator.num_processes:  # all processes score, or none
            return torch.tensor(sum(self._nats[block] for block in blocks), device=accelerator.device)
        rows = self._passes.score(opened, blank_adapter(self._passes.model))
        self._nats.update(zip(blocks, rows.tolist(), strict=False))
        self._charges.probe(opened)
        return rows.sum()

    def state_dict(self) -> dict[str, Any]:
        """The table."""
        blocks = np.array(list(self._nats), dtype=np.int64)
        return {"blocks": blocks, "nats": np.array(list(self._nats.values()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._nats = dict(zip(state["blocks"].tolist(), state["nats"].tolist(), strict=True))
