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


# --------------------------------------------------------------------------------------------------------------------------------------
# Generated text


@dataclass(frozen=True)
class Sampling:
    """How text is continued."""

    new_tokens: int = 60
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def generate(model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, sampling: Sampling, *, greedy: bool) -> list[list[int]]:
    """Continue prompts of one length together.

    Args:
        model: A causal LM with ``generate``.
        prompts: Token ids, all of the same length, so that no padding is needed.
        tokenizer: For its EOS and padding ids.
        sampling: Length, temperature, nucleus and seed.
        greedy: Take the likeliest token each time, instead of drawing.

    Returns:
        The new token ids of each prompt, up to and without EOS.
    """
    training = model.training
    model.eval()
    ids = torch.tensor([list(prompt) for prompt in prompts], device=next(model.parameters()).device)
    options: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=sampling.new_tokens, use_cache=True, pad_token_id=pad, **options
        )
    model.train(training)
    return [_until(row, tokenizer.eos_token_id) for row in written[:, ids.shape[1] :].tolist()]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All n-grams of a sequence, in order."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct-n: unique n-grams over all n-grams of all texts; 0 where there are none. Source: Li et al. 2016, arXiv 1510.03055."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[Sequence[int]], n: int = 4) -> float:
    """rep-n: 1 - unique n-grams / n-grams within a text, averaged over texts. Source: Welleck et al. 2019, arXiv 1908.04319."""
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := ngrams(text, n))]
    return sum(shares) / len(shares) if shares else 0.0


def text_metrics(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Distinct-1 and -2, rep-4, and mean length in tokens."""
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "rep_4": repetition(texts, 4),
        "mean_length": sum(map(len, texts)) / len(texts) if texts else 0.0,
    }
