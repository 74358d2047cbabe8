"""A LLaMA cut at its lowest adapter: the frozen prefix below, the adapted part with its loss above.

What lives here: how tokens go through the two parts. What does not: keeping what the prefix gives
(:mod:`iterbatch.reuse.prefix`).
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iterbatch.data.batch import MicroBatch
from iterbatch.errors import ModelError
from iterbatch.model.head import head_nats


class CutModel(nn.Module):
    """The same weights as the PEFT model it is made from, in two parts.

    The prefix is frozen: its activations for given tokens never change. With adapters on layer 0 it
    is the embedding alone. Backward ends at the cut, because nothing below it needs a gradient.

    Args:
        model: A ``PeftModel`` over the LLaMA layer layout.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        causal = model.get_base_model()
        layers = causal.model.layers
        adapted = (
            index for index, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())
        )
        self.cut = next(adapted, len(layers))  # number of frozen layers below the lowest adapter
        self.frozen = _part(causal.model, 0, self.cut)
        self.frozen.norm = nn.Identity()
        self.adapted = _part(causal.model, self.cut, len(layers))
        self.adapted.embed_tokens = None
        self.head = causal.lm_head
        self.train(model.training)

    def train(self, mode: bool = True) -> "CutModel":
        """Set the mode of the adapted part; the prefix never trains."""
        super().train(mode)
        self.frozen.eval()
        return self

    @torch.no_grad()
    def prefix(self, micro: MicroBatch) -> Tensor:
        """What enters the lowest adapted layer: (rows, length, width)."""
        return _through(self.frozen, micro, input_ids=micro.input_ids)

    def forward(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """Cross-entropy of every position of a micro-batch, from its prefix activations.

        Returns:
            (rows, length) float32 nats, 0 where there is no label.
        """
        return head_nats(_through(self.adapted, micro, inputs_embeds=hidden), self.head.weight, micro.labels)


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
    from iterbatch.model.attention import attending

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


# A name Transformers knows no mask for: it makes none, and does not read positions off the device to
# decide.
UNMASKED = "causal_without_mask"


def _through(part: Any, micro: MicroBatch, **inputs: Tensor) -> Tensor:
    """Last hidden states of one part.

    Packed blocks, and padding on the right, need no mask beside causality.
    """
    window = getattr(part.config, "sliding_window", None)
    masked = micro.attention_mask is not None or (window is not None and micro.input_ids.shape[1] >= window)
    part.config._attn_implementation = "sdpa" if masked else UNMASKED
    if micro.attention_mask is not None:
        positions = (micro.attention_mask.cumsum(1) - 1).clamp(min=0)
        inputs |= {"attention_mask": micro.attention_mask, "position_ids": positions}
    return part(use_cache=False, **inputs).last_hidden_state


def _part(inner: Any, first: int, last: int) -> Any:
    """Layers ``first`` to ``last - 1`` of a decoder as a decoder of their own, over the same modules.

    Transformers' own forward then makes masks and rotary positions, whatever the architecture.
    """
    config = copy.deepcopy(inner.config)
    config.num_hidden_layers = last - first
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[first:last]
    with torch.device("meta"):
        part = type(inner)(config)
    part.layers, part.embed_tokens, part.norm, part.rotary_emb = (
        inner.layers[first:last],
        inner.embed_tokens,
        inner.norm,
        inner.rotary_emb,
    )
    return part
