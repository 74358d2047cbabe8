"""What an arm has memorised: its loss on the training blocks it saw most against those it saw least, each beside the base's.

A block that is easy for the base is easy for the adapter too; what counts is how much further each group fell.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from iterbatch.data.data_loader import BatchStream, EvalText, Window
from iterbatch.evaluation.perplexity import score
from iterbatch.model.load import copy_adapter, set_adapter
from iterbatch.records.record import BatchRecord

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
    """Blocks that were passed most often and least often, among those that were trained; both empty where all got the same."""
    trained = np.flatnonzero(passes)
    if not len(trained) or passes[trained].min() == passes[trained].max():
        return trained[:0], trained[:0]
    order = trained[np.argsort(passes[trained], kind="stable")]
    size = min(GROUP, len(order) // 2)
    return order[-size:], order[:size]


def compare(cut: Any, model: Any, blocks: Any, passes: np.ndarray, accelerator: Any, batch_size: int) -> dict[str, Any]:
    """Score both groups, and a sample of everything that was trained, with the adapter and with the base.

    Returns:
        For ``all``, ``most`` and ``least``: number of blocks, mean passes, loss and base loss in nats a token (None where it is empty).
    """
    most, least = groups(passes)
    trained = np.flatnonzero(passes)
    sample = trained[:: max(1, len(trained) // GROUP)][:GROUP]
    current = copy_adapter(model)
    blank = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in current.items()}
    result: dict[str, Any] = {}
    for name, chosen in (("all", sample), ("most", most), ("least", least)):
        after = _loss(cut, blocks[chosen], accelerator, batch_size)
        set_adapter(model, blank)
        before = _loss(cut, blocks[chosen], accelerator, batch_size)
        set_adapter(model, current)
        mean = float(passes[chosen].mean()) if len(chosen) else None
        result[name] = {"blocks": len(chosen), "passes": mean, "loss": after, "base_loss": before}
    return result


def _loss(cut: Any, rows: Sequence[np.ndarray], accelerator: Any, batch_size: int) -> float | None:
    """Mean nats a label token of whole blocks, as in training."""
    if not len(rows):
        return None
    windows = [Window(row[:-1].astype(np.int32), row[1:].astype(np.int32), len(row) - 1) for row in rows]
    tokens = sum(window.scored for window in windows)
    result = score(cut, EvalText(windows, 0, 0, tokens, [tokens]), accelerator, batch_size=batch_size)
    return result.nats / result.tokens
