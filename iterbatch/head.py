"""The LM head and its loss together, so that the logits of a whole batch never exist.

Torch's own ``linear_cross_entropy`` chunks too, but gives the loss in the inputs' dtype: in bfloat16 a perplexity of 20 would be known to two digits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from iterbatch.data_loader import IGNORED

CHUNK_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits held at once: a CPU wants them in its cache, a GPU wants tall matrices


class _HeadNats(torch.autograd.Function):
    """Chunk by chunk: logits, nats, and at once the gradient of each position's nats, because its logits will be gone by the backward pass.

    A position's nats depend on its own hidden state alone, so the gradient only waits for its factor from above.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (positions, width)
        weight: Tensor,  # (vocabulary, width), frozen
        labels: Tensor,  # (positions,) int64
        rows: int,  # positions a chunk
    ) -> Tensor:
        nats = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels), rows):
            chunk = slice(start, start + rows)
            wanted = labels[chunk, None]
            target = wanted.clamp(min=0)
            log_p = functional.log_softmax(hidden[chunk] @ weight.T, dim=1, dtype=torch.float32)
            nats[chunk] = -log_p.gather(1, target)[:, 0]
            if gradient is not None:  # softmax minus one-hot, through the head
                errors = log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
                torch.mm(errors.to(weight.dtype), weight, out=gradient[chunk])
        ctx.save_for_backward(gradient, labels)
        return nats.masked_fill_(labels == IGNORED, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, labels = ctx.saved_tensors
        factor = upstream[0].masked_fill(labels == IGNORED, 0.0)
        return gradient * factor[:, None].to(gradient.dtype), None, None, None


def head_nats(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every position under ``softmax(hidden @ weight.T)``.

    Args:
        hidden: (rows, length, width), any floating dtype; the logits are computed in it, the loss in float32.
        weight: (vocabulary, width) of the frozen head; gets no gradient.
        labels: (rows, length) int64; ``IGNORED`` where there is nothing to predict.

    Returns:
        (rows, length) float32 nats, 0 where there is no label. Memory beside inputs and result: ``CHUNK_ENTRIES`` logits, whatever the
        vocabulary and the number of positions.
    """
    rows = max(1, CHUNK_ENTRIES.get(hidden.device.type, CHUNK_ENTRIES["cuda"]) // weight.shape[0])
    flat = hidden.flatten(0, 1).to(weight.dtype)
    return _HeadNats.apply(flat, weight, labels.flatten(), rows).view(labels.shape)  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]
