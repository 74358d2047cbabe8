"""Perplexity, sum over sum, and samples of generated text with their metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from iterbatch.data_loader import EvalText, collate
from iterbatch.step import token_nats


@dataclass(frozen=True)
class Score:
    """Sums over a text, and the figures that follow from them. Words and bytes are those of the text's source."""

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def ppl(self) -> float:
        """Token perplexity, exp(nats / tokens)."""
        return _exp(self.nats / self.tokens)

    @property
    def word_ppl(self) -> float:
        """Word perplexity, exp(nats / words): comparable between tokenizers."""
        return _exp(self.nats / self.words)

    @property
    def byte_ppl(self) -> float:
        """Byte perplexity, exp(nats / bytes)."""
        return _exp(self.nats / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte, nats / bytes / ln 2."""
        return self.nats / self.bytes / math.log(2)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def score(
    model: Any,
    text: EvalText,
    accelerator: Any,
    *,
    batch_size: int = 8,  # windows scored together
    pad_id: int = 0,
    padding_side: str = "right",
) -> Score:
    """Score every token of a text once, in eval mode, without gradients.

    The result does not depend on ``batch_size`` or ``padding_side``: windows are independent and padding is never attended to.
    """
    training = model.training
    model.eval()
    # Longest first: windows of like length share a batch, and a batch too large for memory fails at once.
    windows = sorted(text.windows, key=lambda window: -len(window.input_ids))
    mine = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device if accelerator.device.type != "mps" else "cpu")
    for group in mine[accelerator.process_index :: accelerator.num_processes]:
        nats += _nats(model, group, accelerator, pad_id, padding_side).to(nats.device)
    model.train(training)
    return Score(float(accelerator.reduce(nats, "sum")), text.tokens, text.words, text.bytes)


def _nats(model: Any, group: Sequence[Any], accelerator: Any, pad_id: int, padding_side: str) -> torch.Tensor:
    micro = collate(group, pad_id, padding_side).to(accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        return token_nats(model, micro).sum(dtype=torch.float64)
