"""What an arm has memorised: its loss on the blocks it saw most against those it saw least.

Each beside the base's.

A block that is easy for the base is easy for the adapter too; what counts is how much further each
group fell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from iterbatch.data.data_loader import BatchStream
from iterbatch.model.cut import CutModel
from iterbatch.model.lora import blank_adapter, copy_adapter, set_adapter
from iterbatch.records.record import BatchRecord
from iterbatch.records.result import GroupLoss
from iterbatch.reuse.prefix import PrefixSource

if TYPE_CHECKING:
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
    stream: BatchStream,
    passes: np.ndarray,  # (blocks,)
    source: PrefixSource,
    batch_size: int,
    base: dict[int, float] | None = None,
) -> dict[str, GroupLoss]:
    """Score both groups, and a sample of everything that was trained, with the adapter and with the base.

    Args:
        cut: The model, cut.
        model: The same, with the adapter that was trained.
        stream: Its blocks, as they are trained.
        passes: (blocks,) that each got.
        source: Of the blocks' prefix activations, which both adapters share.
        batch_size: Blocks scored together.
        base: Nats of blocks under the base that are known already; others are added.

    Returns:
        Of ``all``, ``most`` and ``least``; losses are None where a group is empty.
    """
    most, least = groups(passes)
    trained = np.flatnonzero(passes)
    sample = trained[:: max(1, len(trained) // GROUP)][:GROUP]
    chosen, known = {"all": sample, "most": most, "least": least}, {} if base is None else base
    every = sorted({int(block) for group in chosen.values() for block in group})
    after = _nats(cut, stream, every, source, batch_size)
    current = copy_adapter(model)
    set_adapter(model, blank_adapter(model))
    known |= _nats(cut, stream, [block for block in every if block not in known], source, batch_size)
    set_adapter(model, current)
    tokens = stream.blocks.trained[:, 1:].sum(axis=1)
    result: dict[str, GroupLoss] = {}
    for name, group in chosen.items():
        mean, count = (float(passes[group].mean()) if len(group) else None), int(tokens[group].sum())
        losses = [
            sum(nats[int(block)] for block in group) / count if count else None for nats in (after, known)
        ]
        result[name] = GroupLoss(len(group), mean, *losses)
    return result


def _nats(
    cut: CutModel, stream: BatchStream, blocks: Sequence[int], source: PrefixSource, batch_size: int
) -> dict[int, float]:
    """Nats of each block, with the adapter as it is."""
    found: dict[int, float] = {}
    training = cut.training
    cut.eval()
    for start in range(0, len(blocks), batch_size):
        some = blocks[start : start + batch_size]
        micro = stream.micro_batch(np.array(some)).to(source.device)
        with torch.no_grad():
            nats = cut(source.fetch(micro)[0], micro).double().sum(dim=1)
        source.settle()
        found |= dict(zip(some, nats.tolist(), strict=True))
    cut.train(training)
    return found
