"""MAUVE of the sampled text against the human continuations, where its package and a local embedding model are there.

Source: Pillutla et al. 2021, arXiv 2102.01454. A few hundred texts give a rough figure: compare arms of one report, nothing else.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iterbatch.errors import ConfigError, RunError
from iterbatch.report.comparison import CellScores

LENGTH = 256  # tokens of a text that are embedded


def add(cells: Sequence[CellScores], model: Path) -> None:
    """Score every arm's samples, and put the figure with the other metrics of its text.

    Raises:
        ConfigError: where the package or the model is missing.
        RunError: where samples cannot be read.
    """
    try:
        from mauve import compute_mauve  # pyright: ignore[reportMissingImports]
    except ImportError as problem:
        raise ConfigError(f'--mauve needs the package {problem.name}: pip install "iterbatch[mauve]"') from problem
    embed = _Embedder(model)
    for cell in cells:
        human: dict[str, Any] = {}
        for arm in cell.arms:
            for each in arm.finished:
                if each.result is None:
                    continue
                prompts, references, texts = _texts(each.folder / "samples.json")
                key = json.dumps(references)
                if key not in human:
                    human = {key: embed([prompt + text for prompt, text in zip(prompts, references, strict=True)])}
                for decoding, written in texts.items():
                    features = embed([prompt + text for prompt, text in zip(prompts, written, strict=True)])
                    score = compute_mauve(p_features=human[key], q_features=features, verbose=False, seed=0).mauve
                    each.result["text"][decoding]["mauve"] = float(score)


def _texts(file: Path) -> tuple[list[str], list[str], dict[str, list[str]]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["prompts"], content["human"], {decoding: content["trained"][decoding]["texts"] for decoding in ("greedy", "sampled")}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise RunError(f"{file} cannot be read ({problem!r}); samples of an earlier version have no human continuations") from problem


class _Embedder:
    """Last hidden state of a text's last token, as the paper takes it."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        if not (model / "config.json").is_file():
            raise ConfigError(f"--mauve {model} is not a model folder in Hugging Face format (it has no config.json)")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
            self.model = AutoModel.from_pretrained(model, local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as problem:
            raise ConfigError(f"--mauve {model} cannot be loaded: {str(problem)[:300]}") from problem

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, width)."""
        rows = []
        for text in texts:
            ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH)["input_ids"]
            rows.append(self.model(input_ids=ids).last_hidden_state[0, -1].float().numpy())
        return np.stack(rows)
