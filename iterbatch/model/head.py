"""The LM head and its loss together, so that the logits of a whole batch never exist.

Torch's own ``linear_cross_entropy`` chunks too, but gives the loss in the inputs' dtype: in
bfloat16 a perplexity of 20 would be known to two digits.
"""

from typing import Any

import torch
from torch import Tensor

from iterbatch.data.batch import IGNORED

CHUNK_ENTRIES = {
    "cpu": 1 << 19,
    "cuda": 1 << 26,
}  # logits held at once: a CPU wants them in its cache, a GPU wants tall matrices
# Positions a chunk, so that a large vocabulary's weights are not read for a few rows each time.
LEAST_ROWS = 64


class _HeadNats(torch.autograd.Function):
    """Chunk by chunk: logits, nats, and at once the gradient of each position's nats.

    Its logits will be gone by the backward pass.

    A position's nats depend on its own hidden state alone, so the gradient only waits for its
    factor from above.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (positions, width)
        weight: Tensor,  # (vocabulary, width), frozen
        labels: Tensor,  # (positions,) int64
        rows: int,  # positions a chunk
    ) -> Tensor:
        device, vocabulary = hidden.device, len(weight)
        nats = torch.empty(labels.shape, dtype=torch.float32, device=device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # One pair of buffers for all chunks: fresh memory would cost as much as the arithmetic.
        logits = torch.empty((rows, vocabulary), dtype=weight.dtype, device=device)
        log_p = torch.empty((rows, vocabulary), dtype=torch.float32, device=device)
        for start in range(0, len(labels), rows):
            chunk = slice(start, start + rows)
            target = labels[chunk, None].clamp(min=0)
            some, p = logits[: len(target)], log_p[: len(target)]
            torch.mm(hidden[chunk], weight.T, out=some)
            torch.log_softmax(some, dim=1, dtype=torch.float32, out=p)
            nats[chunk] = -p.gather(1, target)[:, 0]
            if gradient is not None:  # softmax minus one-hot, through the head
                p.exp_().scatter_add_(1, target, p.new_full(target.shape, -1.0))
                torch.mm(some.copy_(p), weight, out=gradient[chunk])
        ctx.save_for_backward(gradient, labels)
        return nats.masked_fill_(labels == IGNORED, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: Tensor
    ) -> tuple[Tensor, None, None, None]:
        gradient, labels = ctx.saved_tensors
        factor = upstream[0].masked_fill(labels == IGNORED, 0.0)
        return gradient * factor[:, None].to(gradient.dtype), None, None, None


def chunk_rows(device: str, vocabulary: int) -> int:
    """Positions whose logits are held at once."""
    return max(LEAST_ROWS, CHUNK_ENTRIES.get(device, CHUNK_ENTRIES["cuda"]) // vocabulary)


def head_nats(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every position under ``softmax(hidden @ weight.T)``.

    Args:
        hidden: (rows, length, width), any floating dtype; the logits are computed in it, the loss in float32.
        weight: (vocabulary, width) of the frozen head; gets no gradient.
        labels: (rows, length) int64; ``IGNORED`` where there is nothing to predict.

    Returns:
        (rows, length) float32 nats, 0 where there is no label. Memory beside inputs, gradient and
        result: the logits of one chunk, however many positions there are.
    """
    rows = chunk_rows(hidden.device.type, len(weight))
    flat = hidden.flatten(0, 1).to(weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadNats.apply(flat, weight, labels.flatten(), min(rows, len(flat))).view(labels.shape)
