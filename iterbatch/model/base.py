"""A base model's configuration and tokenizer, read and checked before any weights are.

What does not live here: the weights (:mod:`iterbatch.model.weights`) and the adapter
(:mod:`iterbatch.model.lora`).
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iterbatch.config import BenchConfig
from iterbatch.data import hub
from iterbatch.data.tokens import tokenizer_digest
from iterbatch.errors import ConfigError, ModelError, first_line
from iterbatch.language import N_, _
from iterbatch.model.headers import check_files, check_headers, files_digest, weight_files
from iterbatch.model.lora import adapted_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # the LLaMA layer layout
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*")  # of a folder; one of them is there
PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # of Accelerate's autocast
GGUF = ".gguf"
ADAPTER = "adapter_config.json"  # in a folder: an adapter lies there
LOCAL_HINT = N_(
    "Point --model_name at a local folder in Hugging Face format (config.json, *.safetensors, tokenizer.json)"
)


@dataclass(frozen=True)
class Base:
    """A base model's configuration and tokenizer, read before any weights are."""

    path: str  # of a folder, or a hub name
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: str  # resolved: float32, bfloat16 or float16
    options: dict[str, Any] = field(default_factory=dict)  # for ``from_pretrained``

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

    path, options = _place(config)
    if config.model_path.endswith(GGUF) and importlib.util.find_spec("gguf") is None:
        raise ModelError(
            _("'{model_path}' needs a package: pip install \"iterbatch[gguf]\"").format(
                model_path=config.model_path
            )
        )
    if Path(path).is_dir() and "gguf_file" not in options:
        check_files(Path(path), _(LOCAL_HINT))
    try:
        base_config = AutoConfig.from_pretrained(path, **options)
    except Exception as problem:
        # Transformers and its hub library raise many classes for a config.json that is damaged.
        raise ModelError(_no_config(config.model_path, problem)) from problem
    if base_config.model_type not in SUPPORTED:
        raise ModelError(
            _("'{model_path}' is a '{model_type}' model; this experiment adapts {names}").format(
                model_path=config.model_path, model_type=base_config.model_type, names=", ".join(SUPPORTED)
            )
        )
    if Path(path).is_dir() and "gguf_file" not in options:
        check_headers(Path(path), base_config, _(LOCAL_HINT))
    tokenizer = _load_tokenizer(path, options)
    base = Base(path, base_config, tokenizer, resolve_dtype(config.model.dtype), options)
    _check_fit(config, base)
    return base


def _no_config(path: str, problem: BaseException) -> str:
    folder = Path(path)
    if (folder / ADAPTER).is_file() and not (folder / "config.json").exists():
        try:
            base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        return _(
            "'{path}' is an adapter, not a model; give the base that it was trained on by --model_name"
        ).format(path=path) + (f" ({base})" if base else "")
    return _("'{path}' has no usable config.json: {problem}. {hint}").format(
        path=path, problem=first_line(problem), hint=_(LOCAL_HINT)
    )


def _load_tokenizer(path: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = Path(path)
    local = folder.is_dir() and "gguf_file" not in options
    if local and not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        # Some versions of Transformers make an empty one.
        raise ModelError(
            _("'{path}' holds no tokenizer ({names}). {hint}").format(
                path=path, names=", ".join(TOKENIZER_FILES), hint=_(LOCAL_HINT)
            )
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as problem:
        # Tokenizers and transformers raise many classes, a bare Exception among them.
        hint = _(LOCAL_HINT)
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            hint = _("Its tokenizer.model is read by a package: pip install sentencepiece protobuf")
        raise ModelError(
            _("'{path}' has no usable tokenizer: {problem}. {hint}").format(
                path=path, problem=first_line(problem), hint=hint
            )
        ) from problem
    if not len(tokenizer) or tokenizer.eos_token_id is None:
        raise ModelError(
            _("the tokenizer of '{path}' has no {what}. {hint}").format(
                path=path,
                what=_("tokens") if not len(tokenizer) else _("end-of-text token"),
                hint=_(LOCAL_HINT),
            )
        )
    return tokenizer


def base_digests(base: Base) -> tuple[str, str]:
    """SHA-256 of a base's weights, as their files are, and of its tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(base.path)
    if not folder.is_dir():  # on the hub: what lies in its cache
        known = try_to_load_from_cache(base.path, "config.json")
        folder = Path(known).parent if isinstance(known, str) else folder
    gguf = base.options.get("gguf_file")
    files = [folder / gguf] if gguf else weight_files(folder)
    return files_digest(files), tokenizer_digest(base.tokenizer)


def gguf_options() -> dict[str, Any]:
    """For ``from_pretrained``: a GGUF file's weights as floats."""
    try:
        from transformers import GgufConfig
    except ImportError:  # versions before it dequantise by themselves
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _place(config: BenchConfig) -> tuple[str, dict[str, Any]]:
    """Where a model is, and options for ``from_pretrained``.

    A hub name is asked for once first, so that a missing hub is noticed within seconds.
    """
    path, options = config.model_path, {"trust_remote_code": config.model.trust_remote_code}
    if Path(path).is_dir():
        return path, {**options, "local_files_only": True}
    if path.lower().endswith(GGUF) and Path(path).is_file():
        return str(Path(path).parent), {"local_files_only": True, "gguf_file": Path(path).name}
    if path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1 or path.endswith(GGUF):
        raise ModelError(
            _("the model folder '{path}' does not exist. {hint}").format(path=path, hint=_(LOCAL_HINT))
        )
    problem = hub.problem_with(path)
    if problem is not None and not hub.cached(path, "config.json"):
        raise ModelError(
            _("the model '{path}' could not be reached on the hub ({name}: {problem}). {hint}").format(
                path=path, name=type(problem).__name__, problem=first_line(problem), hint=_(LOCAL_HINT)
            )
        )
    return path, {**options, "local_files_only": problem is not None}


def _check_fit(config: BenchConfig, base: Base) -> None:
    problems = []
    largest = max(base.tokenizer.get_vocab().values())
    if largest >= base.config.vocab_size:
        problems.append(
            _(
                "the tokenizer of '{path}' has tokens up to number {largest}, the model {vocab_size} of "
                "them; they do not belong together"
            ).format(path=base.path, largest=largest, vocab_size=base.config.vocab_size)
        )
    if config.max_length > base.context:
        problems.append(
            _("--max_length is {max_length}; the model's context is {context} tokens").format(
                max_length=config.max_length, context=base.context
            )
        )
    try:
        adapted_layers(config.model.lora_layers, base.layers)
    except ConfigError as problem:
        problems.append(str(problem))
    if config.model.load_in and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            _('--load_in {load_in} needs bitsandbytes: pip install "iterbatch[quant]"').format(
                load_in=config.model.load_in
            )
        )
    if base.dtype == "float16" and not torch.cuda.is_available():
        problems.append(_("--dtype float16 needs a GPU; use bfloat16, float32 or auto"))
    if problems:
        raise ConfigError("\n".join(problems))
