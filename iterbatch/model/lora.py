"""The adapter: attached to some layers of a frozen model, reset, copied, written back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iterbatch.config import INITS, ModelConfig
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.model.sharded import shard_like, whole, whole_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def adapted_layers(spec: str, layers: int) -> list[int]:
    """Layer numbers of a ``--lora_layers`` value, for a model of ``layers`` layers.

    Raises:
        ConfigError: where the range lies outside the model.
    """
    if spec == "all":
        return list(range(layers))
    if spec.startswith("top:"):
        first, last = layers - int(spec[4:]), layers - 1
    else:
        first, last = (int(part) for part in spec.split("-"))
    if not 0 <= first <= last < layers:
        allowed = _("all, top:1 to top:{layers}, and I-J within 0-{layers2}").format(
            layers=layers, layers2=layers - 1
        )
        raise ConfigError(
            _("--lora_layers is '{spec}'; the model has {layers} layers: allowed are {allowed}").format(
                spec=spec, layers=layers, allowed=allowed
            )
        )
    return list(range(first, last + 1))


def attach_adapter(
    model: PreTrainedModel, dtype: str, config: ModelConfig, layers: list[int], seed: int = 0
) -> PeftModel:
    """Freeze a model and put adapters on some of its layers.

    Args:
        model: The base, with its weights.
        dtype: That it computes in.
        config: Rank, scale, dropout and targets.
        layers: Numbers of the adapted layers, from 0.
        seed: Of the adapters' initial weights.
    """
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    model.config.use_cache = False
    alpha: Any = config.lora_alpha  # PEFT says int, but only divides it: a fraction is as good
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.rslora,
        init_lora_weights=INITS[config.init_lora],
        target_modules=list(config.lora_targets),
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=True)
    if dtype != "float32":
        _leave_casts_to_autocast(adapted)
    return adapted


def _leave_casts_to_autocast(model: nn.Module) -> None:
    """Keep PEFT from casting an adapter's input up to float32.

    Under autocast it would be cast down again at once, forward and backward.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def reset_adapter(model: nn.Module, seed: int) -> None:
    """Give the adapters the initial weights of a seed: the same for every arm of that seed."""
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(seed)
    kind: Any = next(iter(model.peft_config.values())).init_lora_weights  # pyright: ignore
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_A:
                with whole_weights(module.lora_A[name], module.lora_B[name]):
                    module.reset_lora_parameters(name, init_lora_weights=kind)


def copy_adapter(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's weights, a few megabytes.

    Whole, also of a sharded model, whose processes must all ask.
    """
    return {name: whole(parameter.detach()).clone() for name, parameter in adapter_parameters(model).items()}


def set_adapter(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write saved weights into the adapter."""
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(shard_like(weights[name], parameter))


def blank_adapter(model: nn.Module) -> dict[str, Tensor]:
    """An adapter that adds nothing, because its B is 0: the base itself."""
    current = copy_adapter(model)
    return {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in current.items()}
