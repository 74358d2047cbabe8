"""Blocks to batches, in an order set by (seed, epoch) alone.

What does not live here: reading text (:mod:`iterbatch.data.corpus`), blocks (:mod:`iterbatch.data.blocks`)
and evaluation windows (:mod:`iterbatch.data.windows`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from iterbatch.data.batch import IGNORED, Batch, MicroBatch
from iterbatch.data.blocks import Blocks
from iterbatch.errors import DataError
from iterbatch.language import _

MOST_SET_ASIDE = 256  # blocks of probe text: their prefix activations stay in memory


def set_aside(blocks: int, share: float | None) -> np.ndarray:
    """Which blocks are probe text: a share of all, evenly spread, ``MOST_SET_ASIDE`` at most.

    Args:
        blocks: Of the training text.
        share: Of them, above 0 and at most a tenth; None where no text is to be set aside.

    Raises:
        DataError: where a single block would be more than a tenth.
    """
    if share is None:
        return np.array([], dtype=np.int64)
    if blocks < 10:
        raise DataError(
            _(
                "the training text has {blocks} blocks, and the probe text of learnable takes at least "
                "one, more than a tenth of it; give more text or a smaller --max_length, or leave "
                "learnable out"
            ).format(blocks=blocks)
        )
    count = min(max(1, round(share * blocks)), MOST_SET_ASIDE, blocks // 10)
    return ((np.arange(count) + 0.5) * blocks / count).astype(np.int64)


def block_order(blocks: int, seed: int, epoch: int) -> np.ndarray:
    """The order of blocks in one epoch: a permutation set by (seed, epoch) and their number alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(blocks)


def order_digest(blocks: int, seed: int, epochs: int) -> str:
    """SHA-256 of the block orders of all epochs, stored with a run to show that its arms were paired."""
    digest = hashlib.sha256()
    for epoch in range(epochs):
        digest.update(block_order(blocks, seed, epoch).astype("<i8").tobytes())
    return digest.hexdigest()


class BatchStream:
    """Endless batches, epoch after epoch, with a cursor that can be saved.

    Args:
        blocks: The training text.
        batch_size: Blocks a micro-batch and process.
        grad_accum: Micro-batches a batch.
        seed: Sets the order, together with the epoch.
        rank: This process, from 0.
        world: Processes that share each micro-batch.
        aside: Blocks that are never trained on.

    The last batch of an epoch is short where the blocks do not divide evenly; it is a batch like
    any other, token-normalised.
    """

    def __init__(
        self,
        blocks: Blocks,
        batch_size: int,
        grad_accum: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        aside: np.ndarray | None = None,
    ) -> None:
        self.blocks, self.seed, self.rank, self.world = blocks, seed, rank, world
        self.aside = np.array([], dtype=np.int64) if aside is None else aside
        self._trained = np.setdiff1d(np.arange(len(blocks)), self.aside)
        self.micro_rows = batch_size * world
        self.batch_rows = self.micro_rows * grad_accum
        self.batches_per_epoch = -(-len(self._trained) // self.batch_rows)
        self.cursor = 0
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its permutation)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; advances the cursor."""
        batch = self.batch(self.cursor)
        self.cursor += 1
        return batch

    def batch(self, index: int) -> Batch:
        """Any batch, by its position counted over all epochs."""
        return self._batch_of(self.rows_of(index), index, index // self.batches_per_epoch)

    def pieces(self) -> list[Batch]:
        """The blocks that are set aside, in whole pieces of a quarter of a batch, two blocks at least."""
        size = min(max(2, self.batch_rows // 4), len(self.aside))
        return [
            self._batch_of(self.aside[start : start + size], 0, 0)
            for start in range(0, len(self.aside) - size + 1, max(1, size))
            if size
        ]

    def _batch_of(self, rows: np.ndarray, index: int, epoch: int) -> Batch:
        micro_batches = tuple(
            self.micro_batch(rows[start : start + self.micro_rows])
            for start in range(0, len(rows), self.micro_rows)
        )
        return Batch(micro_batches, index=index, epoch=epoch)

    def rows_of(self, index: int) -> np.ndarray:
        """Which blocks a batch has, over all processes."""
        epoch, position = divmod(index, self.batches_per_epoch)
        return self._epoch_order(epoch)[position * self.batch_rows : (position + 1) * self.batch_rows]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._trained[block_order(len(self._trained), self.seed, epoch)])
        return self._order[1]

    def micro_batch(self, rows: np.ndarray) -> MicroBatch:
        """Blocks by their numbers, this process's share of them."""
        share = rows[self.rank :: self.world]
        # A short micro-batch may leave a process without a row; it then runs one unlabelled row,
        # because all processes must reduce together.
        chosen = share if len(share) else rows[:1]
        input_ids = torch.from_numpy(self.blocks.ids[chosen].astype(np.int64))
        labels = torch.full_like(input_ids, IGNORED)
        if len(share):
            trained = torch.from_numpy(self.blocks.trained[chosen][:, 1:])
            labels[:, :-1] = input_ids[:, 1:].where(trained, IGNORED)
        names = tuple(int(row) for row in share)
        return MicroBatch(
            input_ids, labels, blocks=names, rows_in_all=len(rows), rank=self.rank, world=self.world
        )

    def state_dict(self) -> dict[str, int]:
        """The cursor: batches handed out so far."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches handed out before the state was saved."""
        self.cursor = state["cursor"]
