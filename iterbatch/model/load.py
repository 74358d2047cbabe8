"""Load a LLaMA and its tokenizer, and freeze its weights.

What does not live here: the adapter (:mod:`iterbatch.model.lora`) and the passes
(:mod:`iterbatch.training.passes`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from iterbatch.config import BenchConfig, ModelConfig
from iterbatch.data import hub
from iterbatch.errors import ConfigError, ModelError, first_line
from iterbatch.model.lora import adapted_layers, attach_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # the LLaMA layer layout
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*")  # of a folder; one of them is there
PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # of Accelerate's autocast


@dataclass(frozen=True)
class Base:
    """A base model's configuration and tokenizer, read before any weights are."""

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: str  # resolved: float32, bfloat16 or float16

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    @property
    def context(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return self.config.max_position_embeddings


def resolve_dtype(dtype: str) -> str:
    """``auto`` is bfloat16 where the machine computes it well, else float32.

    That is an AVX512-BF16 or AMX CPU, an Ampere or newer GPU.
    """
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float32"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


# ------------------------------------------------------------------------------------------------------------
# Loading


def load_base(config: BenchConfig) -> Base:
    """Read the configuration and the tokenizer, and check everything that can be checked without weights.

    Raises:
        ModelError: where the folder or hub name cannot be used.
        ConfigError: where the layers or the block length do not fit the model.
    """
    from transformers import AutoConfig

    path, options = config.model_path, _loading_options(config)
    try:
        base_config = AutoConfig.from_pretrained(path, **options)
    except Exception as problem:
        # Transformers and its hub library raise many classes for a config.json that is damaged.
        raise ModelError(
            f"'{path}' has no usable config.json: {first_line(problem)}. {_LOCAL_HINT}"
        ) from problem
    if base_config.model_type not in SUPPORTED:
        raise ModelError(
            f"'{path}' is a '{base_config.model_type}' model; this experiment adapts {', '.join(SUPPORTED)}"
        )
    _check_weights(path, base_config)
    tokenizer = _load_tokenizer(path, options, base_config.vocab_size)
    base = Base(path, base_config, tokenizer, resolve_dtype(config.model.dtype))
    _check_fit(config, base)
    return base


def _load_tokenizer(path: str, options: dict[str, Any], vocabulary: int) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any(any(Path(path).glob(name)) for name in TOKENIZER_FILES):
        # Some versions of Transformers make an empty one.
        raise ModelError(f"'{path}' holds no tokenizer ({', '.join(TOKENIZER_FILES)}). {_LOCAL_HINT}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as problem:
        # Tokenizers and transformers raise many classes, a bare Exception among them.
        raise ModelError(
            f"'{path}' has no usable tokenizer: {first_line(problem)}. {_LOCAL_HINT}"
        ) from problem
    if not len(tokenizer) or tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of '{path}' has no {'tokens' if not len(tokenizer) else 'end-of-text token'}. "
            f"{_LOCAL_HINT}"
        )
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"the tokenizer of '{path}' has {len(tokenizer)} tokens, the model {vocabulary}; "
            "they do not belong together"
        )
    return tokenizer


_LOCAL_HINT = (
    "Point --model_name at a local folder in Hugging Face format (config.json, *.safetensors, tokenizer.json)"
)


def _loading_options(config: BenchConfig) -> dict[str, Any]:
    """Options for ``from_pretrained``.

    A hub name is asked for once first, so that a missing hub is noticed within seconds.
    """
    path, options = config.model_path, {"trust_remote_code": config.model.trust_remote_code}
    if Path(path).is_dir():
        return {**options, "local_files_only": True}
    if path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1:
        raise ModelError(f"the model folder '{path}' does not exist. {_LOCAL_HINT}")
    problem = hub.problem_with(path)
    if problem is not None and not hub.cached(path, "config.json"):
        raise ModelError(
            f"the model '{path}' could not be reached on the hub ({type(problem).__name__}: "
            f"{first_line(problem)}). {_LOCAL_HINT}"
        )
    return {**options, "local_files_only": problem is not None}


def _check_weights(path: str, base_config: PretrainedConfig) -> None:
    """Compare a local folder's weights with its config.json, before memory is asked for.

    Only the files' headers are read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = (
            " Pickled ones (*.bin) are not read: they can run code. Save the model again by save_pretrained"
            if [*folder.glob("*.bin")]
            else ""
        )
        raise ModelError(f"'{path}' holds no weights (*.safetensors).{pickled or ' ' + _LOCAL_HINT}")
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a dict
                    header = weights.get_slice(name)
                    if header.get_dtype() in (
                        "F32",
                        "BF16",
                        "F16",
                    ):  # quantised weights have shapes of their own
                        shapes[name] = header.get_shape()
        except (SafetensorError, OSError) as problem:
            raise ModelError(
                f"the weights {file} cannot be read: {first_line(problem)}. {_LOCAL_HINT}"
            ) from problem
    problems = [
        f"{name} is {shapes[name]}, not {wanted}"
        for name in shapes
        for end, wanted in _wanted(base_config)
        if name.endswith(end) and shapes[name] != wanted
    ]
    layers = {int(match[1]) for name in shapes if (match := re.search(r"\blayers\.(\d+)\.", name))}
    if layers and len(layers) != base_config.num_hidden_layers:
        problems.append(f"they have {len(layers)} layers, not {base_config.num_hidden_layers}")
    if problems:
        raise ModelError(
            f"the weights of '{path}' do not fit its config.json: {'; '.join(problems[:3])}. {_LOCAL_HINT}"
        )


def _wanted(config: PretrainedConfig) -> list[tuple[str, list[int]]]:
    """Shapes of weights by the ends of their names, as config.json has them."""
    hidden, heads, inner = config.hidden_size, config.num_attention_heads, config.intermediate_size
    width = getattr(config, "head_dim", None) or hidden // max(1, heads)
    keys = (getattr(config, "num_key_value_heads", None) or heads) * width
    return [
        ("embed_tokens.weight", [config.vocab_size, hidden]),
        ("q_proj.weight", [heads * width, hidden]),
        ("k_proj.weight", [keys, hidden]),
        ("v_proj.weight", [keys, hidden]),
        ("gate_proj.weight", [inner, hidden]),
        ("down_proj.weight", [hidden, inner]),
    ]


def _check_fit(config: BenchConfig, base: Base) -> None:
    problems = []
    if config.max_length > base.context:
        problems.append(f"--max_length is {config.max_length}; the model's context is {base.context} tokens")
    try:
        adapted_layers(config.model.lora_layers, base.layers)
    except ConfigError as problem:
        problems.append(str(problem))
    if config.model.load_in and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            f'--load_in {config.model.load_in} needs bitsandbytes: pip install "iterbatch[quant]"'
        )
    if base.dtype == "float16" and not torch.cuda.is_available():
        problems.append("--dtype float16 needs a GPU; use bfloat16, float32 or auto")
    if problems:
        raise ConfigError("\n".join(problems))


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
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {
        "dtype": getattr(torch, base.dtype),
        "attn_implementation": "sdpa",
        "trust_remote_code": config.trust_remote_code,
    }
    if config.load_in:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=config.load_in == "8bit",
            load_in_4bit=config.load_in == "4bit",
            bnb_4bit_compute_dtype=getattr(torch, base.dtype),
        )
    try:
        with _quiet_loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base.path, output_loading_info=True, use_safetensors=True, **options
            )
    except Exception as problem:
        # Safetensors, OSError and RuntimeError for truncated, missing or mismatched files.
        raise ModelError(
            f"the weights of '{base.path}' cannot be loaded: {first_line(problem)}. {_LOCAL_HINT}"
        ) from problem
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"the weights of '{base.path}' lack {len(missing)} tensors, the first is '{missing[0]}'. "
            f"{_LOCAL_HINT}"
        )
    for module in model.modules():
        # bitsandbytes on a CPU: else its first evaluation repacks weights to a form without gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportAttributeAccessIssue]
    _try(model, base)
    return model


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
            f"the model '{base.path}' cannot write text ({reason}); a setting of its config.json may be wrong"
        ) from problem
    if not finite:
        raise ModelError(
            f"the model '{base.path}' computes what is not finite in {base.dtype}; its weights may be "
            "damaged, or try --dtype float32"
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
