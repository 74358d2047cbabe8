"""The untrained base's loss on every training block: computed once for all arms and seeds of a cell."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iterbatch.data.blocks import Blocks
from iterbatch.data.windows import block_text
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
        blocks: The training text.
        model: With its adapter, which is put back.
        cut: The same model, not distributed.
        accelerator: Of the run.
        batch_size: Blocks scored together.
    """

    def __init__(
        self,
        folder: Path,
        blocks: Blocks,
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
        start, model, blocks = time.perf_counter(), self._model, self._blocks
        current = copy_adapter(model)
        set_adapter(model, blank_adapter(model))
        found = score(self._cut, block_text(blocks), self._accelerator, batch_size=self._batch_size)
        set_adapter(model, current)
        flops = flop_model(model).forward([(len(blocks), blocks.length)])
        return BaseTable(found.document_nats, flops, time.perf_counter() - start)
