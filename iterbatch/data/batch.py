"""A batch: one accumulation window of micro-batches, the unit of repetition."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a position without a label, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Ahead:
    """Prefix activations of a micro-batch's rows, read from a store before they are needed."""

    hidden: Tensor  # (rows, length, width); rows that are not there are undefined
    seconds: list[float | None]  # a row: what it took to compute, None where it is not there


@dataclass(frozen=True)
class MicroBatch:
    """Rows of tokens that go through the model together.

    Labels are aligned with their inputs: ``labels[row, t]`` is the token that position ``t`` must
    predict, or ``IGNORED``.
    """

    input_ids: Tensor  # (rows, length) int64
    labels: Tensor  # (rows, length) int64
    # (rows, length) int64, 1 for real tokens; None where padding, if any, is on the right.
    attention_mask: Tensor | None = None
    # Which item of its text each row is; empty where the only row is there for company.
    blocks: tuple[int, ...] | None = None
    rows_in_all: int = 0  # rows over all processes; 0 stands for the rows here
    rank: int = 0  # of the process: it has every ``world``-th row, from this one on
    world: int = 1
    ahead: Ahead | None = None
    # Number of tokens this micro-batch predicts; counted here, before it is on a device.
    label_tokens: int = -1

    def __post_init__(self) -> None:
        if self.label_tokens < 0:
            object.__setattr__(self, "label_tokens", int((self.labels != IGNORED).sum()))

    def to(self, device: torch.device) -> "MicroBatch":
        """The same rows on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """The same rows in page-locked memory, from which a copy to a GPU runs beside its work."""
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        mask = None if self.attention_mask is None else move(self.attention_mask)
        ahead = None if self.ahead is None else Ahead(move(self.ahead.hidden), self.ahead.seconds)
        return dataclasses.replace(
            self, input_ids=move(self.input_ids), labels=move(self.labels), attention_mask=mask, ahead=ahead
        )


@dataclass(frozen=True)
class Batch:
    """One accumulation window: all micro-batches of one optimizer update; the unit of repetition."""

    micro_batches: tuple[MicroBatch, ...]
    index: int = 0  # position in its arm, counted over all epochs
    epoch: int = 0

    @property
    def first_exposure(self) -> bool:
        """Whether the model has never trained on this text in this arm."""
        return self.epoch == 0

    @property
    def label_tokens(self) -> int:
        """Number of tokens all micro-batches predict, on this process."""
        return sum(micro.label_tokens for micro in self.micro_batches)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows over all processes, length) of each micro-batch: what the FLOP model needs to know."""
        return [
            (micro.rows_in_all or micro.input_ids.shape[0], micro.input_ids.shape[1])
            for micro in self.micro_batches
        ]

    @property
    def rows(self) -> int:
        """Blocks in it, over all processes."""
        return sum(rows for rows, _ in self.shapes)

    def part(self, number: int, parts: int) -> "Batch":
        """One of ``parts`` shares of its rows, in their order, no two of which differ by more than a row.

        Micro-batches as large as before. Of several processes each takes those of its rows that are in the
        share, and one that has none of a micro-batch is given an unlabelled row for company: all of them make
        as many passes, and the shares are those of a single process.
        """
        ids, labels = (
            torch.cat([getattr(micro, name) for micro in self.micro_batches])
            for name in ("input_ids", "labels")
        )
        places, blocks = self._places()
        share, size = np.array_split(np.arange(self.rows), parts)[number], self.shapes[0][0]
        pieces = []
        for start in range(0, max(1, len(share)), size):
            wanted = share[start : start + size]
            rows = np.flatnonzero(np.isin(places, wanted))
            if len(rows):
                names = tuple(blocks[row] for row in rows)
                known = None if None in names else names
                piece = MicroBatch(ids[rows], labels[rows], blocks=known, rows_in_all=len(wanted))
            else:
                nothing = torch.full_like(labels[:1], IGNORED)
                piece = MicroBatch(ids[:1], nothing, blocks=(), rows_in_all=len(wanted))
            pieces.append(piece)
        return dataclasses.replace(self, micro_batches=tuple(pieces))

    def _places(self) -> tuple[np.ndarray, list[Any]]:
        """Of each row here: its place among those of all processes, -1 for company; and its block."""
        places, blocks, before = [], [], 0
        for micro, (in_all, _) in zip(self.micro_batches, self.shapes, strict=True):
            rows = np.arange(len(micro.input_ids))
            places.append(
                np.full_like(rows, -1) if micro.blocks == () else before + micro.rank + rows * micro.world
            )
            blocks += micro.blocks or [None] * len(rows)
            before += in_all
        return np.concatenate(places), blocks

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return dataclasses.replace(
            self, micro_batches=tuple(micro.to(device) for micro in self.micro_batches)
        )
