"""The next batch on its way to the device while the current one trains."""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor

from iterbatch.data.batch import Batch
from iterbatch.data.data_loader import BatchStream
from iterbatch.reuse.prefix import PrefixSource


class Prefetch:
    """A stream whose next batch is on its way to the device while the current one trains.

    On a CPU there is no way to go, and a second thread would take cores from the training: batches
    are loaded when they are asked for.

    Args:
        stream: Of batches; its cursor is that of the batches handed out.
        source: Of the training text.
    """

    def __init__(self, stream: BatchStream, source: PrefixSource) -> None:
        self.stream, self.source = stream, source
        self.cursor = stream.cursor
        self._pool = (
            None if source.device.type == "cpu" else ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        )
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
        micro_batches = [
            micro.pinned() if self.source.device.type == "cuda" else micro for micro in batch.micro_batches
        ]
        if self.source.store is not None:
            micro_batches = [
                dataclasses.replace(
                    micro, ahead=self.source.read_ahead(micro.blocks or (), micro.input_ids.shape)
                )
                if micro.blocks
                else micro
                for micro in micro_batches
            ]
        return dataclasses.replace(
            batch, micro_batches=tuple(micro.to(self.source.device) for micro in micro_batches)
        )

    def state_dict(self) -> dict[str, int]:
        """The cursor: batches handed out so far."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches handed out before the state was saved."""
        if self._next is not None:
            self._next.result()
        self._next, self.cursor = None, state["cursor"]
        self.stream.load_state_dict(state)

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
