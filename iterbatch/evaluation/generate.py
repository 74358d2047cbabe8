"""Text written by a model, and its metrics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How text is continued."""

    new_tokens: int = 60
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    greedy: bool,
    together: bool = False,
) -> list[list[int]]:
    """Continue prompts of one length together.

    Args:
        model: A causal LM with ``generate``.
        prompts: Token ids, all of the same length, so that no padding is needed.
        tokenizer: For its EOS and padding ids; what the model's generation config ends with, ends too.
        sampling: Length, temperature, nucleus and seed.
        greedy: Take the likeliest token each time, instead of drawing.
        together: Whether other processes do the same, and all must make as many forwards (a sharded model).

    Returns:
        The new token ids of each prompt, up to and without what ends it.
    """
    training = model.training
    model.eval()
    ids = torch.tensor([list(prompt) for prompt in prompts], device=next(model.parameters()).device)
    options: dict[str, Any] = (
        {"do_sample": False}
        if greedy
        else {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    )
    options |= {
        "max_new_tokens": sampling.new_tokens,
        "use_cache": True,
        "remove_invalid_values": True,
        "synced_gpus": together,
    }  # an adapter that diverged may give NaN
    settings = getattr(model, "generation_config", None)
    end: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    ends = {end, *_several(getattr(settings, "eos_token_id", None))}
    options["eos_token_id"] = sorted(ends)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        write: Any = model.generate
        written: Any = write(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, **options)
    model.train(training)
    return [_until(row, {*ends, pad}) for row in written[:, ids.shape[1] :].tolist()]


def _several(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _until(tokens: list[int], ends: set[Any]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All n-grams of a sequence, in order."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct-n: unique n-grams over all n-grams of all texts; 0 where there are none. Source: Li et al.

    2016, arXiv 1510.03055.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[Sequence[int]], n: int = 4) -> float:
    """rep-n: 1 - unique n-grams / n-grams within a text, averaged over texts. Source: Welleck et al.

    2019, arXiv 1908.04319.
    """
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := ngrams(text, n))]
    return sum(shares) / len(shares) if shares else 0.0


def self_bleu(texts: Sequence[Sequence[int]]) -> float | None:
    """Self-BLEU, 0 to 100: mean BLEU-4 of each text against all others; high where texts resemble each other.

    None where sacrebleu, an extra, is not installed. Source: arXiv 1802.01886.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        return None
    words = [" ".join(map(str, text)) for text in texts]
    if len(words) < 2:
        return 0.0
    bleu = BLEU(tokenize="none", effective_order=True, force=True)
    # Some fifty of them, each against all others: the time is that of their product.
    judged = range(0, len(words), -(-len(words) // 50))
    scores = [bleu.sentence_score(words[at], words[:at] + words[at + 1 :]).score for at in judged]
    return sum(scores) / len(scores)


def text_metrics(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Distinct-1, -2 and -3, rep-4, self-BLEU where sacrebleu is installed, and mean length in tokens."""
    bleu = self_bleu(texts)
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "rep_4": repetition(texts, 4),
        **({} if bleu is None else {"self_bleu": bleu}),
        "mean_length": sum(map(len, texts)) / len(texts) if texts else 0.0,
    }
