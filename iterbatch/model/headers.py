"""What the headers of a base's weights say, before memory is asked for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from iterbatch.config import LONGEST_JSON
from iterbatch.errors import ModelError, first_line
from iterbatch.language import _

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SMALL = ("config.json", "generation_config.json")
LARGEST = {".json": 1 << 28, ".jinja": 1 << 20, ".safetensors": 1 << 25}  # bytes; of weights, their header's
FLOATS = ("F32", "BF16", "F16")  # quantised weights have shapes of their own


def weight_files(folder: Path) -> list[Path]:
    """The base's own, in order; an adapter's beside them are none of it."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))


def check_files(folder: Path, hint: str) -> None:
    """See that a local folder's files can be read at all, and in little memory, before anything reads them.

    Raises:
        ModelError: for a pipe or a device, and for what is far larger than such a file ever is.
    """
    for file in folder.iterdir():
        if file.is_dir():
            continue
        if not file.is_file() and file.exists():
            raise ModelError(_("{file} is neither a file nor a folder. {hint}").format(file=file, hint=hint))
        limit = LONGEST_JSON if file.name in SMALL else LARGEST.get(file.suffix)
        size = _header_bytes(file) if file.suffix == ".safetensors" else file.stat().st_size
        if limit is not None and size > limit:
            what = _("has a header of") if file.suffix == ".safetensors" else "has"
            raise ModelError(
                _("{file} {what} {size:,} bytes; at most {limit:,} are read. {hint}").format(
                    file=file, what=what, size=size, limit=limit, hint=hint
                )
            )


def _header_bytes(file: Path) -> int:
    """As its first eight bytes say."""
    with file.open("rb") as stream:
        return int.from_bytes(stream.read(8), "little")


def files_digest(files: Sequence[Path]) -> str:
    """SHA-256 over files, each by its own; empty where there is none."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else ""


def check_headers(folder: Path, config: PretrainedConfig, hint: str) -> None:
    """Compare a local folder's weights with its config.json.

    Args:
        folder: In Hugging Face format.
        config: What its config.json says.
        hint: What the user may do.

    Raises:
        ModelError: where they are not there, damaged, or do not fit.
    """
    files = weight_files(folder)
    if not files:
        pickled = (
            _("Pickled ones (*.bin) are not read: they can run code. Save the model again by save_pretrained")
            if [*folder.glob("*.bin")]
            else hint
        )
        raise ModelError(
            _("'{folder}' holds no weights (*.safetensors). {pickled}").format(folder=folder, pickled=pickled)
        )
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            shapes |= _shapes(file)
        except (SafetensorError, OSError) as problem:
            raise ModelError(
                _("the weights {file} cannot be read: {problem}. {hint}").format(
                    file=file, problem=first_line(problem), hint=hint
                )
            ) from problem
    problems = [
        _("{name} is {shapes}, not {wanted}").format(name=name, shapes=shapes[name], wanted=wanted)
        for name in shapes
        for end, wanted in _wanted(config)
        if name.endswith(end) and shapes[name] != wanted
    ]
    layers = {int(match[1]) for name in shapes if (match := re.search(r"\blayers\.(\d+)\.", name))}
    if layers and len(layers) != config.num_hidden_layers:
        problems.append(
            _("they have {count} layers, not {num_hidden_layers}").format(
                count=len(layers), num_hidden_layers=config.num_hidden_layers
            )
        )
    if problems:
        raise ModelError(
            _("the weights of '{folder}' do not fit its config.json: {names}. {hint}").format(
                folder=folder, names="; ".join(problems[:3]), hint=hint
            )
        )


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as weights:
        headers = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - not a dict
        return {name: each.get_shape() for name, each in headers.items() if each.get_dtype() in FLOATS}


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
