"""``--compile``: each decoder layer compiled for micro-batches of one shape."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from iterbatch.data.batch import MicroBatch
from iterbatch.errors import ModelError
from iterbatch.model.attention import attending


@contextmanager
def compiled(placed: Any, accelerator: Any, shape: tuple[int, int]) -> Iterator[float]:
    """Compile each decoder layer for micro-batches of one shape.

    Inputs of any other shape run uncompiled instead of compiling again.

    Args:
        placed: A :class:`CutModel`, prepared by the accelerator.
        accelerator: Casts as it will in training.
        shape: (rows, length) of a micro-batch.

    Yields:
        Seconds of the cold start: one forward and backward, thrown away.

    Raises:
        ModelError: where nothing can be compiled on this machine.
    """
    start, cut = time.perf_counter(), accelerator.unwrap_model(placed)
    layers: list[Any] = [*cut.frozen.layers, *cut.adapted.layers]
    for layer in layers:
        layer.compile(dynamic=False)
    ids = torch.zeros(shape, dtype=torch.int64, device=accelerator.device)
    micro = MicroBatch(ids, ids)
    with attending(layers[0].self_attn.config):
        try:
            with accelerator.autocast():
                nats = placed(cut.prefix(micro), micro).sum()
            nats.backward()
        except Exception as problem:  # torch raises many classes here, most of them its own backends'
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise ModelError(
                f"--compile does not work on this machine ({reason}); it needs a C++ compiler. Leave it out"
            ) from problem
        cut.zero_grad()
        with torch.compiler.set_stance("eager_on_recompile"):
            yield time.perf_counter() - start
