"""A batch: one accumulation window of micro-batches, the unit of repetition."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

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
        """Blocks in it, on this process."""
        return sum(len(micro.input_ids) for micro in self.micro_batches)

    def part(self, number: int, parts: int) -> "Batch":
        """One of ``parts`` shares of its rows, in their order, no two of which differ by more than a row.

        Micro-batches as large as before.

        With several processes each takes that share of its own rows; one that has none is given an
        unlabelled row for company.
        """
        ids, labels = (
            torch.cat([getattr(micro, name) for micro in self.micro_batches])
            for name in ("input_ids", "labels")
        )
        blocks = [
            block for micro in self.micro_batches for block in (micro.blocks or [None] * len(micro.input_ids))
        ]
        in_all = len(np.array_split(np.arange(sum(rows for rows, _ in self.shapes)), parts)[number])
        share, size = np.array_split(np.arange(len(ids)), parts)[number], len(self.micro_batches[0].input_ids)
        if not len(share):
            nothing = torch.full_like(labels[:1], IGNORED)
            return dataclasses.replace(
                self, micro_batches=(MicroBatch(ids[:1], nothing, blocks=(), rows_in_all=in_all),)
            )
        pieces = []
        for start in range(0, len(share), size):
            rows = share[start : start + size]
            names = tuple(blocks[row] for row in rows)
            whole = round(in_all * len(rows) / len(share))
            pieces.append(
                MicroBatch(
                    ids[rows], labels[rows], blocks=None if None in names else names, rows_in_all=whole
                )
            )
        return dataclasses.replace(self, micro_batches=tuple(pieces))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return dataclasses.replace(
            self, micro_batches=tuple(micro.to(device) for micro in self.micro_batches)
        )
