"""A LLaMA cut at its lowest adapter: the frozen prefix below, the adapted part with its loss above.

What lives here: how tokens go through the two parts. What does not: keeping what the prefix gives
(:mod:`iterbatch.reuse.prefix`).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from iterbatch.data.batch import MicroBatch
from iterbatch.model.head import head_nats


class CutModel(nn.Module):
    """The same weights as the PEFT model it is made from, in two parts.

    The prefix is frozen: its activations for given tokens never change. With adapters on layer 0 it
    is the embedding alone. Backward ends at the cut, because nothing below it needs a gradient.

    Args:
        model: A ``PeftModel`` over the LLaMA layer layout, or such a model without adapters.
    """

    sharded = False  # whether a forward needs all processes: :mod:`iterbatch.model.sharded`

    def __init__(self, model: Any) -> None:
        super().__init__()
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
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

    def wanted_by_any(self, wanted: bool) -> bool:
        """Whether the forward that comes is to be made here, because this process has need of it."""
        return wanted

    def forward(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """Cross-entropy of every position of a micro-batch, from its prefix activations.

        Returns:
            (rows, length) float32 nats, 0 where there is no label.
        """
        return head_nats(_through(self.adapted, micro, inputs_embeds=hidden), self.head.weight, micro.labels)


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
