"""The simple noise scale of the gradient, from the gradients of micro-batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iterbatch.training.open_batch import OpenBatch

if TYPE_CHECKING:
    from accelerate import Accelerator

MEMORY = 0.9  # share of the averages that a batch leaves


def noise_and_signal(small: float, large: float, rows_small: float, rows_large: float) -> tuple[float, float]:
    """Trace of the gradient's covariance for a row, and the squared norm of its mean: both unbiased.

    Args:
        small: Mean squared norm of the gradient of ``rows_small`` rows.
        large: Squared norm of the gradient of ``rows_large`` rows, which must be more.
        rows_small: Of a micro-batch.
        rows_large: Of the batch.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.
    """
    noise = (small - large) / (1 / rows_small - 1 / rows_large)
    signal = (rows_large * large - rows_small * small) / (rows_large - rows_small)
    return noise, signal


class GradientNoise:
    """Averages over fresh passes, from all micro-batches of a batch but the last.

    Of several processes each looks at its own: the last one's gradient is synchronised with what was
    accumulated before, and belongs to all. Those of a sharded model look at each micro-batch together.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._before: Tensor | None = None  # accumulated before the current micro-batch
        self._squares: list[float] = []
        self._rows: list[int] = []
        self._noise = self._signal = 0.0

    @property
    def scale(self) -> float:
        """Noise over signal, in rows; infinity where no signal is seen, NaN before there is a batch."""
        if not self._noise and not self._signal:
            return math.nan
        return self._noise / self._signal if self._signal > 0 else math.inf

    def micro_batch(self, gradients: list[Tensor], rows: int, share: float) -> None:
        """Look at what a micro-batch has added to the gradient.

        Args:
            gradients: With what was accumulated before.
            rows: Of the micro-batch.
            share: Of the batch's label tokens, that its loss was weighted with.
        """
        flat = torch.cat([gradient.detach().flatten().float() for gradient in gradients])
        added = flat if self._before is None else flat - self._before
        self._before = flat
        if share:
            scaler = self._accelerator.scaler
            factor = 1 / share / (1.0 if scaler is None else scaler.get_scale())
            self._squares.append(float((factor * added).square().sum()))
            self._rows.append(rows)

    def batch(self, norm: float, batch: OpenBatch, totals: Any) -> None:
        """Take a whole batch in: its gradient's norm, before clipping."""
        squares, rows, count = totals(sum(self._squares), sum(self._rows), len(self._squares))
        self._before, self._squares, self._rows = None, [], []
        large = sum(rows for rows, _ in batch.batch.shapes)
        if count and rows / count < large and math.isfinite(squares + norm):
            noise, signal = noise_and_signal(squares / count, norm**2, rows / count, large)
            self._noise = MEMORY * self._noise + (1 - MEMORY) * noise
            self._signal = MEMORY * self._signal + (1 - MEMORY) * signal

    def state_dict(self) -> dict[str, Any]:
        """Both averages."""
        return {"noise": self._noise, "signal": self._signal}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._noise, self._signal = state["noise"], state["signal"]
