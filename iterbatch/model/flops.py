"""What a pass costs, from the shapes of the model's projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iterbatch.errors import ModelError
from iterbatch.language import _
from iterbatch.model.head import chunk_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

Shape = tuple[int, int]  # (rows, length) of a micro-batch
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer as the FLOP model sees it.

    Each projection is (inputs, outputs, rank), rank 0 where it has no adapter.
    """

    attention_in: tuple[tuple[int, int, int], ...]  # q, k, v
    attention_out: tuple[tuple[int, int, int], ...]  # o
    mlp_in: tuple[tuple[int, int, int], ...]  # gate, up
    mlp_out: tuple[tuple[int, int, int], ...]  # down
    score_width: int  # heads x head width

    @property
    def adapted(self) -> bool:
        """Whether any projection has an adapter."""
        groups = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out)
        return any(rank for group in groups for _, _, rank in group)


@dataclass(frozen=True)
class Cost:
    """FLOPs as a function of tokens n and block length L: ``n * (per_token + per_token_length * L)``."""

    per_token: float = 0.0
    per_token_length: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.per_token + other.per_token, self.per_token_length + other.per_token_length)

    def of(self, shapes: Sequence[Shape]) -> float:
        """FLOPs of micro-batches of these shapes."""
        return float(
            sum(rows * length * (self.per_token + self.per_token_length * length) for rows, length in shapes)
        )


def _forward(layer: LayerShape) -> Cost:
    projections = (*layer.attention_in, *layer.attention_out, *layer.mlp_in, *layer.mlp_out)
    linear = sum(
        2 * inputs * outputs + 2 * rank * (inputs + outputs) for inputs, outputs, rank in projections
    )
    return Cost(linear, 4 * layer.score_width)  # QK^T and AV over the full square, as the field counts them


def _backward(layer: LayerShape, live: bool) -> tuple[Cost, bool]:
    """Backward of one layer; ``live`` says whether its input needs a gradient.

    Returns the cost and whether its output does.

    Frozen weights have no gradient. A projection costs its input-gradient (2 in out) where its
    input is live, an adapter its two weight gradients and the gradient between its matrices, and
    its own input-gradient where its input is live.
    """
    total = 0.0
    scores = 0.0
    for group in (layer.attention_in, layer.attention_out, layer.mlp_in, layer.mlp_out):
        for inputs, outputs, rank in group:
            total += (2 * inputs * outputs + 2 * rank * inputs) * live + 2 * rank * (inputs + 2 * outputs)
        live = live or any(rank for _, _, rank in group)
        if group is layer.attention_in:
            scores = 8.0 * layer.score_width * live
    return Cost(total, scores), live


@dataclass(frozen=True)
class FlopModel:
    """Analytic FLOPs of LoRA training with frozen weights.

    A multiply-add counts 2; norms, softmax and the optimizer count nothing.

    Forward: 2N a token, attention scores, adapters, head. Backward: input-gradients from the head
    down to the lowest adapter, and adapter gradients. Source: this project; tested against
    ``torch.utils.flop_counter``.
    """

    prefix: Cost  # forward of the layers below the lowest adapter
    adapted_forward: Cost
    adapted_backward: Cost
    head: Cost  # forward; its input-gradient costs the same
    checkpointing: bool = False

    @classmethod
    def of(
        cls, layers: Sequence[LayerShape], hidden: int, vocabulary: int, checkpointing: bool = False
    ) -> FlopModel:
        """Build from the layers in order, input side first."""
        cut = next((index for index, layer in enumerate(layers) if layer.adapted), len(layers))
        prefix = sum((_forward(layer) for layer in layers[:cut]), Cost())
        forward, backward, live = Cost(), Cost(), False
        for layer in layers[cut:]:
            forward = forward + _forward(layer)
            cost, live = _backward(layer, live)
            backward = backward + cost
        return cls(prefix, forward, backward, Cost(2.0 * hidden * vocabulary), checkpointing)

    def forward(self, shapes: Sequence[Shape]) -> float:
        """FLOPs of scoring without gradients."""
        return (self.prefix + self.adapted_forward + self.head).of(shapes)

    def fresh(self, shapes: Sequence[Shape]) -> float:
        """FLOPs of a fresh pass: forward and backward of everything."""
        recompute = self.adapted_forward if self.checkpointing else Cost()
        return self.forward(shapes) + (self.adapted_backward + self.head + recompute).of(shapes)

    def repeat(self, shapes: Sequence[Shape]) -> float:
        """FLOPs of a pass that is given its prefix activations: a fresh pass without the prefix."""
        return self.fresh(shapes) - self.prefix.of(shapes)

    def price_ratio(self, shapes: Sequence[Shape]) -> float:
        """rho: cost of a repeat over cost of a fresh pass; 1 where there is no prefix."""
        return self.repeat(shapes) / self.fresh(shapes)


# ------------------------------------------------------------------------------------------------------------
# Of a model


def flop_model(model: PeftModel, checkpointing: bool = False) -> FlopModel:
    """Read the shapes of all projections, adapted or not, off the model.

    Raises:
        ModelError: where the layers are not laid out as LLaMA's are.
    """
    config = model.config
    layers = [
        module
        for module in model.modules()
        if all(hasattr(module, part) for part in ("self_attn", "mlp", "input_layernorm"))
    ]
    if len(layers) != config.num_hidden_layers:
        raise ModelError(
            _("found {count} LLaMA layers in a '{model_type}' model of {num_hidden_layers} layers").format(
                count=len(layers), model_type=config.model_type, num_hidden_layers=config.num_hidden_layers
            )
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = [_layer_shape(layer, config.num_attention_heads * width) for layer in layers]
    return FlopModel.of(shapes, config.hidden_size, config.vocab_size, checkpointing)


def _layer_shape(layer: nn.Module, score_width: int) -> LayerShape:
    from peft.tuners.lora import LoraLayer

    def projection(name: str) -> tuple[int, int, int]:
        owner: Any = layer.mlp if hasattr(layer.mlp, name) else layer.self_attn
        module: Any = getattr(owner, name)
        rank: int = next(iter(module.r.values()), 0) if isinstance(module, LoraLayer) else 0
        linear: Any = module
        return linear.in_features, linear.out_features, rank

    groups = [tuple(projection(name) for name in group) for group in GROUPS]
    return LayerShape(*groups, score_width=score_width)


def memory_estimate_mb(model: PeftModel, rows: int, length: int, shares: int = 1) -> float:
    """A rough estimate of peak training memory, of a process.

    Weights, adapter with gradient and two AdamW moments, activations of the adapted part.

    Activations are taken as 2 bytes for each of about 16 hidden-sized and 5 MLP-sized tensors a
    layer and token, one chunk of logits as 6 bytes an entry. Of ``shares`` processes that share the layers
    each holds a share, and two whole layers: the one that runs and the one that comes.
    """
    config = model.config
    weights = dict(model.named_parameters())
    inner = sum(p.numel() * p.element_size() for name, p in weights.items() if ".layers." in name)
    outer = sum(p.numel() * p.element_size() for name, p in weights.items() if ".layers." not in name)
    frozen = outer + inner / shares + (2 * inner / config.num_hidden_layers if shares > 1 else 0)
    adapter = sum(p.numel() * 12 for p in weights.values() if p.requires_grad) / shares
    adapted = sum(
        1
        for module in model.modules()
        if hasattr(module, "self_attn") and any(p.requires_grad for p in module.parameters())
    )
    activations = rows * length * adapted * 2 * (16 * config.hidden_size + 5 * config.intermediate_size)
    return (
        frozen
        + adapter
        + activations
        + chunk_rows(model.device.type, config.vocab_size) * config.vocab_size * 6
    ) / 1e6
