"""What an arm has memorised: its loss on the blocks it saw most against those it saw least.

Each beside the base's.

A block that is easy for the base is easy for the adapter too; what counts is how much further each
group fell.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.data.windows import EvalText, block_text
from iterbatch.evaluation.perplexity import score
from iterbatch.model.cut import CutModel
from iterbatch.model.lora import blank_adapter, copy_adapter, set_adapter
from iterbatch.records.record import BatchRecord
from iterbatch.records.result import GroupLoss

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

GROUP = 64  # blocks scored in each group, at most


def passes_of_blocks(records: Iterable[BatchRecord], stream: BatchStream) -> np.ndarray:
    """(blocks,) passes that each training block got over the whole arm."""
    passes = np.zeros(len(stream.blocks), dtype=np.int64)
    for record in records:
        passes[stream.rows_of(record.batch)] += record.repeats_done
        for earlier in record.revisited:
            passes[stream.rows_of(earlier)] += 1
    return passes


def groups(passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks that were passed most often and least often, among those that were trained.

    Both empty where all got the same.
    """
    trained = np.flatnonzero(passes)
    if not len(trained) or passes[trained].min() == passes[trained].max():
        return trained[:0], trained[:0]
    order = trained[np.argsort(passes[trained], kind="stable")]
    size = min(GROUP, len(order) // 2)
    return order[-size:], order[:size]


def memorised(
    cut: CutModel,
    model: PeftModel,
    blocks: Blocks,
    passes: np.ndarray,  # (blocks,)
    accelerator: Accelerator,
    batch_size: int,
) -> dict[str, GroupLoss]:
    """Score both groups, and a sample of everything that was trained, with the adapter and with the base.

    Returns:
        Of ``all``, ``most`` and ``least``; losses are None where a group is empty.
    """
    most, least = groups(passes)
    trained = np.flatnonzero(passes)
    sample = trained[:: max(1, len(trained) // GROUP)][:GROUP]
    current, blank = copy_adapter(model), blank_adapter(model)
    result: dict[str, GroupLoss] = {}
    for name, chosen in (("all", sample), ("most", most), ("least", least)):
        text = block_text(blocks, chosen)
        after = _loss(cut, text, accelerator, batch_size)
        set_adapter(model, blank)
        before = _loss(cut, text, accelerator, batch_size)
        set_adapter(model, current)
        mean = float(passes[chosen].mean()) if len(chosen) else None
        result[name] = GroupLoss(len(chosen), mean, after, before)
    return result


def _loss(cut: CutModel, text: EvalText, accelerator: Accelerator, batch_size: int) -> float | None:
    """Mean nats a label token."""
    if not text.tokens:
        return None
    result = score(cut, text, accelerator, batch_size=batch_size)
    return result.nats / result.tokens
