"""The untrained base's loss on every training block: computed once for all arms and seeds of a cell."""

from __future__ import annotations

import time
from functools import cached_property
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
    from accelerate import Accelerator
    from peft import PeftModel

    from iterbatch.model.cut import CutModel


class BaseLosses:
    """A table in the cell's folder, filled where it is not there yet.

    No arm pays for it: what it cost is said once, apart.

    Args:
        folder: Of the cell.
        blocks: (blocks, length) of the training text.
        model: With its adapter, which is put back.
        cut: The same model, not distributed.
        accelerator: Of the run.
        batch_size: Blocks scored together.
    """

    def __init__(
        self,
        folder: Path,
        blocks: np.ndarray,
        model: PeftModel,
        cut: CutModel,
        accelerator: Accelerator,
        batch_size: int,
    ) -> None:
        self._folder, self._blocks, self._batch_size = folder, blocks, batch_size
        self._model, self._cut, self._accelerator = model, cut, accelerator

    @cached_property
    def nats(self) -> np.ndarray:
        """(blocks,) of each training block under the base without its adapter."""
        known = from_main(read_base_table(self._folder) if is_main() else None)
        if known is None or len(known.nats) != len(self._blocks):
            known = self._computed()
            if is_main():
                write_base_table(self._folder, known)
        return np.array(known.nats)

    def _computed(self) -> BaseTable:
        start, model, rows = time.perf_counter(), self._model, self._blocks
        current = copy_adapter(model)
        set_adapter(model, blank_adapter(model))
        tokens = [len(row) - 1 for row in rows]
        windows = [
            Window(row[:-1].astype(np.int32), row[1:].astype(np.int32), len(row) - 1, document=place)
            for place, row in enumerate(rows)
        ]
        text = EvalText(windows, 0, 0, sum(tokens), tokens)
        found = score(self._cut, text, self._accelerator, batch_size=self._batch_size)
        set_adapter(model, current)
        flops = flop_model(model).forward([(len(rows), rows.shape[1])])
        return BaseTable(found.document_nats, flops, time.perf_counter() - start)
