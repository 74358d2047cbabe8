"""``--compile``: each decoder layer compiled for the shapes of micro-batches that are asked for.

Whether it is worth it is decided by plain numbers, so that every process of a study decides alike.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from iterbatch.data.batch import MicroBatch
from iterbatch.errors import ModelError
from iterbatch.language import _
from iterbatch.model.attention import attending

# What ``auto`` reckons with, by kind of device: seconds of cold start a layer, FLOPs a second of passes that
# are not compiled. Orders of size, after docs/performance.md.
RECKONED = {"cpu": (2.0, 2e11), "cuda": (1.0, 1e14)}
SAVED = {"float32": 0.08}  # share of their time: matrix products of float32 leave little to gain
SAVED_BY_OTHERS = {"cpu": 0.25, "cuda": 0.4}
MARGIN = 2.0  # what is saved must be this many times the cold start


def worth_compiling(flops: float, layers: int, device: str, dtype: str) -> bool:
    """Whether passes of this many FLOPs are worth the cold start; not on devices that are not known."""
    if device not in RECKONED:
        return False
    cold_start, rate = RECKONED[device]
    saved = SAVED.get(dtype, SAVED_BY_OTHERS[device])
    return saved * flops / rate >= MARGIN * cold_start * layers


class Compiled:
    """Layers that are compiled for some shapes; inputs of any other run uncompiled.

    Args:
        placed: A :class:`CutModel`, prepared by the accelerator.
        accelerator: Casts as it will in training.
    """

    def __init__(self, placed: Any, accelerator: Any) -> None:
        self._placed, self._accelerator = placed, accelerator
        self._known: set[tuple[tuple[int, int], bool]] = set()
        self.seconds = 0.0  # of cold starts

    def warm(self, shape: tuple[int, int], *, training: bool = True) -> None:
        """Compile for a shape: one forward and backward, thrown away; or one forward as in scoring.

        Args:
            shape: (rows, length) of a micro-batch.
            training: Whether gradients are needed.

        Raises:
            ModelError: where nothing can be compiled on this machine.
        """
        if (shape, training) in self._known:
            return
        start = time.perf_counter()
        try:
            with torch.compiler.set_stance("default"):
                self._run(shape, training)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as problem:  # torch raises many classes here, most of them its own backends'
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise ModelError(
                _(
                    "layers cannot be compiled on this machine ({reason}); that needs a C++ compiler. Give "
                    "--compile off"
                ).format(reason=reason)
            ) from problem
        self._known.add((shape, training))
        self.seconds += time.perf_counter() - start

    def _run(self, shape: tuple[int, int], training: bool) -> None:
        cut = self._accelerator.unwrap_model(self._placed)
        ids = torch.zeros(shape, dtype=torch.int64, device=self._accelerator.device)
        micro, was = MicroBatch(ids, ids), cut.training
        self._placed.train(training)
        try:
            with torch.set_grad_enabled(training), self._accelerator.autocast():
                nats = self._placed(cut.prefix(micro), micro).sum()
            if training:
                nats.backward()
        finally:
            cut.zero_grad()
            self._placed.train(was)


@contextmanager
def compiled(placed: Any, accelerator: Any, shape: tuple[int, int]) -> Iterator[Compiled]:
    """Compile each decoder layer, for micro-batches of one shape to begin with.

    Args:
        placed: A :class:`CutModel`, prepared by the accelerator.
        accelerator: Casts as it will in training.
        shape: (rows, length) of a micro-batch.

    Raises:
        ModelError: where nothing can be compiled on this machine.
    """
    cut = accelerator.unwrap_model(placed)
    layers: list[Any] = [*cut.frozen.layers, *cut.adapted.layers]
    for layer in layers:
        layer.compile(dynamic=False)
    made = Compiled(placed, accelerator)
    with attending(layers[0].self_attn.config):
        try:
            made.warm(shape)
        except ModelError:
            for layer in layers:
                layer._compiled_call_impl = None  # as it was before Module.compile()
            raise
        with torch.compiler.set_stance("eager_on_recompile"):
            yield made
