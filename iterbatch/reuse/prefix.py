"""Frozen-prefix activations: where those of a micro-batch come from.

What does not live here: how they are kept on disk (:mod:`iterbatch.reuse.store`), which stores a run has
(:mod:`iterbatch.reuse.run_stores`), and what they cost an arm (:mod:`iterbatch.training.step`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from iterbatch.data.batch import Ahead, MicroBatch
from iterbatch.model.cut import CutModel
from iterbatch.reuse.store import DTYPES, ActivationStore


@dataclass(frozen=True)
class Receipt:
    """Where the activations of a micro-batch came from.

    Rows are counted on this process, rows without a label not at all.
    """

    computed: int = 0  # rows
    served: int = 0  # rows
    seconds_served: float = 0.0  # what the served rows took when they were computed


class PrefixSource:
    """Where the prefix activations of one text come from: the store, or else the frozen layers.

    Args:
        model: Cut, and on its device.
        device: Of the model.
        store: Of this text, or None.
        kept_as: All activations take this dtype on their way, computed or read, whether there is a store or
            not: an arm's results do not depend on what others have stored. None: as they are computed.
    """

    def __init__(
        self,
        model: CutModel,
        device: torch.device,
        store: ActivationStore | None = None,
        kept_as: torch.dtype | None = None,
    ) -> None:
        self.model, self.device, self.store, self.kept_as = model, device, store, kept_as
        self._computed: list[_Computed] = []  # since the last settle()

    def fetch(self, micro: MicroBatch) -> tuple[Tensor, Receipt]:
        """Read the rows that are stored, compute the others.

        Returns:
            (rows, length, width) on the device in the model's dtype, and where they came from.
        """
        if self.store is None or not micro.blocks:
            if self.store is not None:
                self.model.wanted_by_any(True)
            return self._compute(micro, micro.blocks).to(self._dtype), Receipt(computed=_counted(micro))
        ahead = micro.ahead or self.read_ahead(micro.blocks, micro.input_ids.shape)
        hidden, seconds = ahead.hidden.to(self.device, non_blocking=True), list(ahead.seconds)
        missing = [row for row, known in enumerate(seconds) if known is None]
        if (
            micro.ahead and missing
        ):  # stored since it was read ahead: whether it was must not depend on a thread's pace
            late = self.read_ahead([micro.blocks[row] for row in missing], micro.input_ids.shape)
            hidden[missing] = late.hidden.to(self.device)
            for row, known in zip(missing, late.seconds, strict=True):
                seconds[row] = known
            missing = [row for row in missing if seconds[row] is None]
        if self.model.wanted_by_any(bool(missing)) and not missing:
            self.model.prefix(_rows(micro, [0]))  # along with the processes that compute theirs
        if missing:
            computed = self._compute(_rows(micro, missing), [micro.blocks[row] for row in missing])
            hidden = hidden.to(computed.dtype).index_copy(
                0, torch.tensor(missing, device=self.device), computed
            )
        served = [known for known in seconds if known is not None]
        return hidden.to(self._dtype), Receipt(len(missing), len(served), sum(served))

    def read_ahead(self, blocks: Sequence[int], shape: Sequence[int]) -> Ahead:
        """What the store has of these items, padded to a length of ``shape[1]``.

        Touches neither model nor device.
        """
        assert self.store is not None
        layout = self.store.layout
        pinned = self.device.type == "cuda"
        hidden = torch.zeros(
            (len(blocks), shape[1], layout.width), dtype=DTYPES[layout.dtype], pin_memory=pinned
        )
        return Ahead(
            hidden,
            [
                self.store.read_into(item, hidden[row, : layout.lengths[item]])
                for row, item in enumerate(blocks)
            ],
        )

    def settle(self) -> float:
        """Store what was computed since the last call, and say how many seconds that took to compute.

        Waits for the device, and copies from there.
        """
        total = 0.0
        for computed in self._computed:
            seconds = computed.seconds()
            total += seconds
            if self.store is not None and computed.blocks:
                rows = computed.hidden.to("cpu")
                for item, row in zip(computed.blocks, rows, strict=True):
                    self.store.write(item, row[: self.store.layout.lengths[item]], seconds / len(rows))
        self._computed.clear()
        return total

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.frozen.embed_tokens.weight.dtype

    def _compute(self, micro: MicroBatch, blocks: Sequence[int] | None) -> Tensor:
        with _clock(self.device) as seconds:
            hidden = self.model.prefix(micro)
        if self.kept_as is not None:
            hidden = hidden.to(self.kept_as)
        self._computed.append(_Computed(hidden, blocks, seconds))
        return hidden


@dataclass(frozen=True)
class _Computed:
    hidden: Tensor
    blocks: Sequence[int] | None
    seconds: Callable[[], float]  # on a GPU known only when the device is done


def _counted(micro: MicroBatch) -> int:
    return len(micro.input_ids) if micro.blocks is None else len(micro.blocks)


def _rows(micro: MicroBatch, rows: list[int]) -> MicroBatch:
    if len(rows) == len(micro.input_ids):
        return micro
    mask = None if micro.attention_mask is None else micro.attention_mask[rows]
    return MicroBatch(micro.input_ids[rows], micro.labels[rows], mask, label_tokens=0)


@contextmanager
def _clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Time work on a device without waiting for it: the seconds are asked for later."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

        def seconds() -> float:
            events[1].synchronize()  # scoring asks while the device is still at work
            return events[0].elapsed_time(events[1]) / 1e3

        events[0].record()
        yield seconds
        events[1].record()
        return
    times = [time.perf_counter()]
    yield lambda: times[1] - times[0]
    times.append(time.perf_counter())
