"""MAUVE of the sampled text against the human continuations, where package and model are there.

Source: Pillutla et al. 2021, arXiv 2102.01454. A few hundred texts give a rough figure: compare
arms of one report, nothing else.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.records.read import Samples, read_samples
from iterbatch.records.result import ArmResult
from iterbatch.report.comparison import CellScores
from iterbatch.report.scores import ArmScores, SeedScores

LENGTH = 256  # tokens of a text that are embedded


Embed = Callable[[Sequence[str]], np.ndarray]


def scored(cells: Sequence[CellScores], model: Path) -> list[CellScores]:
    """The cells with MAUVE among the metrics of every arm's text.

    Raises:
        ConfigError: where the package or the model is missing.
        RunError: where samples cannot be read.
    """
    try:
        from mauve import compute_mauve  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    except ImportError as problem:
        raise ConfigError(
            _('--mauve needs the package {name}: pip install "iterbatch[mauve]"').format(name=problem.name)
        ) from problem
    embed = _Embedder(model)
    return [cell.with_arms([_scored(arm, embed, compute_mauve) for arm in cell.arms]) for cell in cells]


def _scored(arm: ArmScores, embed: Embed, compute_mauve: Callable[..., Any]) -> ArmScores:
    def seed(scores: SeedScores) -> SeedScores:
        if scores.failed is not None or scores.result is None:
            return scores
        found = _mauve(read_samples(scores.folder), embed, compute_mauve)
        return dataclasses.replace(scores, result=_with_metric(scores.result, found))

    return dataclasses.replace(arm, seeds=[seed(each) for each in arm.seeds])


def _mauve(samples: Samples, embed: Embed, compute_mauve: Callable[..., Any]) -> dict[str, float]:
    """Of each decoding."""

    def features(texts: Sequence[str]) -> np.ndarray:
        return embed([prompt + text for prompt, text in zip(samples.prompts, texts, strict=True)])

    human = features(samples.human)
    return {
        decoding: float(
            compute_mauve(p_features=human, q_features=features(written), verbose=False, seed=0).mauve
        )
        for decoding, written in samples.trained.items()
    }


def _with_metric(result: ArmResult, found: dict[str, float]) -> ArmResult:
    text = {decoding: {**metrics, "mauve": found[decoding]} for decoding, metrics in result.text.items()}
    return dataclasses.replace(result, text=text)


class _Embedder:
    """Last hidden state of a text's last token, as the paper takes it."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        if not (model / "config.json").is_file():
            raise ConfigError(
                _(
                    "--mauve {model} is not a model folder in Hugging Face format (it has no config.json)"
                ).format(model=model)
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
            # float32: weights kept in bfloat16 would be computed in it, which many CPUs do slowly
            self.model = AutoModel.from_pretrained(
                model, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as problem:
            raise ConfigError(
                _("--mauve {model} cannot be loaded: {problem}").format(
                    model=model, problem=str(problem)[:300]
                )
            ) from problem
        self._known: dict[str, np.ndarray] = {}  # human continuations come back with every arm

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, width)."""
        self._known |= {text: self._embed(text) for text in texts if text not in self._known}
        return np.stack([self._known[text] for text in texts])

    @torch.no_grad()
    def _embed(self, text: str) -> np.ndarray:
        ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH)["input_ids"]
        return self.model(input_ids=ids).last_hidden_state[0, -1].float().numpy()
