"""The untrained base's loss on every training block: computed once for all arms and seeds of a cell."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iterbatch.data.windows import EvalText, Window
from iterbatch.evaluation.perplexity import score
from iterbatch.model.flops import flop_model
from iterbatch.model.lora import blank_adapter, copy_adapter, set_adapter
from iterbatch.records.base_table import BaseTable, read_base_table, write_base_table
from iterbatch.runtime.processes import from_main, is_main

if TYPE_CHECKING:
    from iterbatch.bench.shared import Shared


class BaseLosses:
    """A table in the cell's folder, filled where it is not there yet.

    No arm pays for it: what it cost is said once, apart.
    """

    def __init__(self, shared: Shared, run_dir: Path) -> None:
        self._shared, self._folder = shared, run_dir
        self._nats: np.ndarray | None = None

    @property
    def nats(self) -> np.ndarray:
        """(blocks,) of each training block under the base without its adapter."""
        if self._nats is None:
            known = from_main(read_base_table(self._folder) if is_main() else None)
            blocks = len(self._shared.prepared.blocks)
            if known is None or len(known.nats) != blocks:
                known = self._computed()
                if is_main():
                    write_base_table(self._folder, known)
            self._nats = np.array(known.nats)
        return self._nats

    def _computed(self) -> BaseTable:
        shared, start = self._shared, time.perf_counter()
        model, rows = shared.model, shared.prepared.blocks
        current = copy_adapter(model)
        set_adapter(model, blank_adapter(model))
        tokens = [len(row) - 1 for row in rows]
        windows = [
            Window(row[:-1].astype(np.int32), row[1:].astype(np.int32), len(row) - 1, document=place)
            for place, row in enumerate(rows)
        ]
        text = EvalText(windows, 0, 0, sum(tokens), tokens)
        found = score(shared.cut, text, shared.accelerator, batch_size=shared.config.training.eval_batch_size)
        set_adapter(model, current)
        flops = flop_model(model).forward([(len(rows), rows.shape[1])])
        return BaseTable(found.document_nats, flops, time.perf_counter() - start)
