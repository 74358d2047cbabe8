"""Frozen-prefix activations: computed once and served again, within a batch and across epochs, evaluations, arms, seeds and runs.

What lives here: where the activations of a micro-batch come from. What does not: how they are kept on disk (:mod:`iterbatch.reuse.store`), what they cost
an arm (:mod:`iterbatch.training.step`).
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iterbatch.model.cut import CutModel
from iterbatch.data.data_loader import Ahead, Batch, BatchStream, MicroBatch
from iterbatch.bench.prepare import SPLITS, Prepared, layouts
from iterbatch.runtime.processes import from_main, is_main
from iterbatch.reuse.store import DTYPES, ActivationStore, Layout, Warn, stores_folder


@dataclass(frozen=True)
class Receipt:
    """Where the activations of a micro-batch came from. Rows are counted on this process, rows without a label not at all."""

    computed: int = 0  # rows
    served: int = 0  # rows
    seconds_served: float = 0.0  # what the served rows took when they were computed


class PrefixSource:
    """Where the prefix activations of one text come from: the store where it has them, else the frozen layers.

    With a store all activations take its dtype on their way, computed or read: an arm's results do not depend on what others have stored.

    Args:
        model: Cut, and on its device.
        device: Of the model.
        store: Of this text, or None.
    """

    def __init__(self, model: CutModel, device: torch.device, store: ActivationStore | None = None) -> None:
        self.model, self.device, self.store = model, device, store
        self._computed: list[_Computed] = []  # since the last settle()

    def fetch(self, micro: MicroBatch) -> tuple[Tensor, Receipt]:
        """Read the rows that are stored, compute the others.

        Returns:
            (rows, length, width) on the device in the model's dtype, and where they came from.
        """
        if self.store is None or not micro.blocks:
            return self._compute(micro, micro.blocks).to(self._dtype), Receipt(computed=_counted(micro))
        ahead = micro.ahead or self.read_ahead(micro.blocks, micro.input_ids.shape)
        hidden, seconds = ahead.hidden.to(self.device, non_blocking=True), list(ahead.seconds)
        missing = [row for row, known in enumerate(seconds) if known is None]
        if micro.ahead and missing:  # stored since it was read ahead: whether it was must not depend on a thread's pace
            late = self.read_ahead([micro.blocks[row] for row in missing], micro.input_ids.shape)
            hidden[missing] = late.hidden.to(self.device)
            for row, known in zip(missing, late.seconds, strict=True):
                seconds[row] = known
            missing = [row for row in missing if seconds[row] is None]
        if missing:
            computed = self._compute(_rows(micro, missing), [micro.blocks[row] for row in missing])
            hidden = hidden.to(computed.dtype).index_copy(0, torch.tensor(missing, device=self.device), computed)
        served = [known for known in seconds if known is not None]
        return hidden.to(self._dtype), Receipt(len(missing), len(served), sum(served))

    def read_ahead(self, blocks: Sequence[int], shape: Sequence[int]) -> Ahead:
        """What the store has of these items, padded to a length of ``shape[1]``; touches neither model nor device."""
        assert self.store is not None
        layout = self.store.layout
        pinned = self.device.type == "cuda"
        hidden = torch.zeros((len(blocks), shape[1], layout.width), dtype=DTYPES[layout.dtype], pin_memory=pinned)
        return Ahead(hidden, [self.store.read_into(item, hidden[row, : layout.lengths[item]]) for row, item in enumerate(blocks)])

    def settle(self) -> float:
        """Store what was computed since the last call, and say how many seconds that took to compute.

        Called when the device has nothing left to do: it copies from there.
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
        if self.store is not None:
            hidden = hidden.to(DTYPES[self.store.layout.dtype])
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
        events[0].record()
        yield lambda: events[0].elapsed_time(events[1]) / 1e3
        events[1].record()
        return
    times = [time.perf_counter()]
    yield lambda: times[1] - times[0]
    times.append(time.perf_counter())


class Prefetch:
    """A stream whose next batch is on its way to the device, stored activations included, while the current one trains.

    On a CPU there is no way to go, and a second thread would take cores from the training: batches are loaded when they are asked for.

    Args:
        stream: Of batches; its cursor is that of the batches handed out.
        source: Of the training text.
    """

    def __init__(self, stream: BatchStream, source: PrefixSource) -> None:
        self.stream, self.source = stream, source
        self.cursor = stream.cursor
        self._pool = None if source.device.type == "cpu" else ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: Future[Batch] | None = None

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Batch:
        """The next batch; the one after it starts loading."""
        batch = self._load() if self._next is None else self._next.result()
        self._next = None if self._pool is None else self._pool.submit(self._load)
        self.cursor = batch.index + 1
        return batch

    def _load(self) -> Batch:
        batch = next(self.stream)
        micro_batches = [micro.pinned() if self.source.device.type == "cuda" else micro for micro in batch.micro_batches]
        if self.source.store is not None:
            micro_batches = [
                dataclasses.replace(micro, ahead=self.source.read_ahead(micro.blocks or (), micro.input_ids.shape)) if micro.blocks else micro
                for micro in micro_batches
            ]
        return dataclasses.replace(batch, micro_batches=tuple(micro.to(self.source.device) for micro in micro_batches))

    def state_dict(self) -> dict[str, int]:
        """The cursor: batches handed out so far."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches handed out before the state was saved."""
        if self._next is not None:
            self._next.result()
        self._next, self.cursor = None, state["cursor"]
        self.stream.load_state_dict(state)

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


# --------------------------------------------------------------------------------------------------------------------------------------
# The stores of a run


class Reuse:
    """The prefix sources of a run, one a text, over stores where ``--reuse epoch`` asks for them."""

    def __init__(self, sources: dict[str, PrefixSource]) -> None:
        self.sources = sources

    @property
    def stored_blocks(self) -> int:
        """How many training blocks are served from the second epoch on: the first so many."""
        store = self.sources["train"].store
        return 0 if store is None else store.capacity

    @property
    def store_gb(self) -> float:
        """Activations on disk for this run's texts, in GB."""
        return sum(source.store.stored_bytes for source in self.sources.values() if source.store is not None) / 1e9

    def close(self) -> None:
        """Let go of the stores."""
        for source in self.sources.values():
            if source.store is not None:
                source.store.close()


@contextmanager
def open_reuse(prepared: Prepared, model: CutModel, device: torch.device, warn: Warn) -> Iterator[Reuse]:
    """Open what a run's configuration asks for; without a prefix to reuse, or a folder to write to, say so and go on without."""
    stores: dict[str, ActivationStore | None] = dict.fromkeys(SPLITS)
    if prepared.config.speed.reuse == "epoch":
        if model.cut == 0:
            warn("--reuse epoch: the lowest adapter is on layer 0, so there is no frozen prefix to reuse; --lora_layers top:N makes one")
        else:
            stores = _open_stores(prepared, model, warn)
    reuse = Reuse({split: PrefixSource(model, device, store) for split, store in stores.items()})
    try:
        yield reuse
    finally:
        reuse.close()


def _open_stores(prepared: Prepared, model: CutModel, warn: Warn) -> dict[str, ActivationStore | None]:
    weights = weights_digest(model)
    items = {"train": prepared.blocks, **{split: [window.input_ids for window in text.windows] for split, text in prepared.texts.items()}}
    stores: dict[str, ActivationStore | None] = {}
    for split, layout in layouts(prepared, model.head.weight.shape[1]).items():
        header = _header(prepared, model, split, layout, weights, tokens_digest(items[split]))
        folder = stores_folder() / hashlib.sha256(json.dumps(header["key"], sort_keys=True).encode()).hexdigest()[:16]
        stores[split] = _open_store(folder, header, layout, warn) if layout.capacity else None
    return stores


def _open_store(folder: Path, header: dict[str, Any], layout: Layout, warn: Warn) -> ActivationStore | None:
    """The main process takes the lock; the others write where it may."""
    try:
        store = ActivationStore(folder, header, layout, warn) if is_main() else None
    except OSError as problem:
        warn(f"the activation store {folder} cannot be used ({problem.strerror}); training goes on without it, as with --reuse batch")
        store = None
    writable = from_main(None if store is None else store.writable)
    if writable is None or is_main():
        return store
    return ActivationStore(folder, header, layout, warn, leader=False, writable=writable)


def _header(prepared: Prepared, model: CutModel, split: str, layout: Layout, weights: str, tokens: str) -> dict[str, Any]:
    key = {
        "weights_sha256": weights,
        "tokens_sha256": tokens,
        "cut": model.cut,
        "dtype": layout.dtype,
        "computed_in": prepared.base.dtype,
        "compiled": prepared.config.speed.compile,
        "device": next(model.parameters()).device.type,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }
    shown = {
        "model": Path(prepared.config.model.model_name).name,
        "text": f"{prepared.config.data.dataset}, {split}" if prepared.config.data.data_dir is None else split,
        "items": len(layout.lengths),
        "tokens": int(sum(layout.lengths)),
        "width": layout.width,
    }
    return {"key": key, **shown}


def weights_digest(model: CutModel) -> str:
    """SHA-256 over everything the prefix activations depend on but the tokens: the frozen weights and the architecture."""
    config = {name: value for name, value in model.frozen.config.to_dict().items() if not name.startswith("_") and name != "transformers_version"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(model.frozen.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokens_digest(items: Sequence[Any]) -> str:
    """SHA-256 over the items' tokens and lengths."""
    digest = hashlib.sha256()
    for item in items:
        ids = np.asarray(item, dtype="<i8")
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    return digest.hexdigest()
