"""A LLaMA small enough for thousands of runs, for tests and campaigns."""

import io
from pathlib import Path
from typing import Any


def make_tiny(folder: Path, tokenizer: Any = None) -> None:
    """Write a local folder in hub format: two layers with random weights, and the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from iterbatch.config import ASSETS

    tokenizer = tokenizer or AutoTokenizer.from_pretrained(ASSETS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def empty_figure(_figure: Any, to: Path | io.StringIO, kind: str, **_look: Any) -> None:
    """In place of ``iterbatch.report.figures._save``: laying figures out takes most of a tiny run's time."""
    if isinstance(to, io.StringIO):
        to.write("<svg></svg>")
    else:
        to.write_bytes(kind.encode())
