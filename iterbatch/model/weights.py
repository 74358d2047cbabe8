"""The weights of a base model: loaded, frozen, and given adapters.

What does not live here: configuration and tokenizer (:mod:`iterbatch.model.base`), the adapter
(:mod:`iterbatch.model.lora`) and the passes (:mod:`iterbatch.training.passes`).
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iterbatch.config import ModelConfig
from iterbatch.errors import ModelError, first_line
from iterbatch.language import _
from iterbatch.model.base import ADAPTER, LOCAL_HINT, Base, gguf_options
from iterbatch.model.lora import adapted_layers, attach_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_model(base: Base, config: ModelConfig, *, seed: int = 0, meta: bool = False) -> PeftModel:
    """Load the weights, freeze them and attach adapters.

    Args:
        base: From :func:`load_base`.
        config: The model group of the configuration.
        seed: Of the adapters' initial weights.
        meta: Build the same model without any storage, for planning.

    Returns:
        A ``peft.PeftModel``: frozen weights in the computing dtype, adapters in float32.

    Raises:
        ModelError: where weights are missing, truncated or of other shapes.
    """
    from transformers import AutoModelForCausalLM

    if meta:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(base.config, dtype=getattr(torch, base.dtype))
    else:
        model = load_weights(base, config)
    adapted = attach_adapter(model, base.dtype, config, adapted_layers(config.lora_layers, base.layers), seed)
    if config.gradient_checkpointing and not meta:
        _checkpoint(model)
    return adapted


def _checkpoint(model: Any) -> None:
    """Recompute activations in the backward pass, down to the lowest adapter and no further."""
    # The older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # Transformers forces a gradient upon the embeddings, which the reentrant kind needs; here it
    # would make every frozen layer pay a backward.
    model.disable_input_require_grads()


def load_weights(base: Base, config: ModelConfig) -> PreTrainedModel:
    """The base model with its weights in the computing dtype, or quantised.

    :func:`load_model` says what it raises.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        **base.options,
        "dtype": getattr(torch, base.dtype),
        "attn_implementation": "sdpa",
        **_quantisation(base, config),
    }
    try:
        with _quiet_loading(), _without_adapter(base.path) as path:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, use_safetensors=True, **options
            )
    except Exception as problem:
        # Safetensors, OSError and RuntimeError for truncated, missing or mismatched files.
        raise ModelError(
            _("the weights of '{path}' cannot be loaded: {problem}. {hint}").format(
                path=base.path, problem=first_line(problem), hint=_(LOCAL_HINT)
            )
        ) from problem
    model, report = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            _(
                "'{path}' on the hub holds an adapter beside the base; download it to a folder, and "
                "point --model_name there"
            ).format(path=base.path)
        )
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(
            _("the weights of '{path}' lack {count} tensors, the first is '{missing}'. {hint}").format(
                path=base.path, count=len(missing), missing=missing[0], hint=_(LOCAL_HINT)
            )
        )
    for module in model.modules():
        # bitsandbytes on a CPU: else its first evaluation repacks weights to a form without gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportAttributeAccessIssue]
    _try(model, base)
    return model


def _quantisation(base: Base, config: ModelConfig) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if config.load_in:
        quantised = BitsAndBytesConfig(
            load_in_8bit=config.load_in == "8bit",
            load_in_4bit=config.load_in == "4bit",
            bnb_4bit_compute_dtype=getattr(torch, base.dtype),
            bnb_4bit_quant_type=config.quant_type,
            bnb_4bit_use_double_quant=True,
        )
        return {"quantization_config": quantised}
    return gguf_options() if "gguf_file" in base.options else {}


@contextlib.contextmanager
def _without_adapter(path: str) -> Iterator[str]:
    """A base's own folder, or where an adapter lies in it, one of links to all else.

    Transformers would load that adapter too, and it would decide which layers are trained.
    """
    folder = Path(path)
    if not (folder / ADAPTER).is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                try:
                    (Path(scratch) / file.name).symlink_to(file.resolve())
                except OSError:  # Windows lets few users make links
                    shutil.copyfile(file, Path(scratch) / file.name)
        yield scratch


def _try(model: Any, base: Base) -> None:
    """Write one token: a wrong setting of config.json is found out here, not after an hour of training."""
    end: Any = base.tokenizer.eos_token_id
    ids = torch.full((1, 2), end, device=model.device)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 1,
        "do_sample": False,
        "pad_token_id": base.tokenizer.eos_token_id,
    }
    try:
        with torch.no_grad(), torch.random.fork_rng(), _quiet_loading():
            finite = bool(model.train()(ids).logits.isfinite().all())
            model.eval().generate(ids, **options)
    except Exception as problem:  # whatever a wrong setting brings about
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        raise ModelError(
            _(
                "the model '{path}' cannot write text ({reason}); a setting of its config.json may be wrong"
            ).format(path=base.path, reason=reason)
        ) from problem
    if not finite:
        raise ModelError(
            _(
                "the model '{path}' computes what is not finite in {dtype}; its weights may be damaged, "
                "or try --dtype float32"
            ).format(path=base.path, dtype=base.dtype)
        )


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
