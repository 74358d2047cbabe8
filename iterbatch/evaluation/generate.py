"""Text written by a model: samples with their metrics, and the continuation of any prompt with a trained adapter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iterbatch.runtime import run_folder as folder
from iterbatch.report import summary as report
from iterbatch.config import make_config
from iterbatch.errors import DataError, RunError
from iterbatch.model.load import PRECISION, load_base, load_weights
from iterbatch.runtime.processes import make_accelerator


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
    options |= {"max_new_tokens": sampling.new_tokens, "use_cache": True, "remove_invalid_values": True}  # an adapter that diverged may give NaN
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, **options)
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


def self_bleu(texts: Sequence[Sequence[int]]) -> float:
    """Self-BLEU, 0 to 100: mean BLEU-4 of each text against all others; high where texts resemble each other. Source: arXiv 1802.01886."""
    from sacrebleu.metrics.bleu import BLEU

    words = [" ".join(map(str, text)) for text in texts]
    if len(words) < 2:
        return 0.0
    bleu = BLEU(tokenize="none", effective_order=True, force=True)
    judged = range(0, len(words), -(-len(words) // 50))  # some fifty of them, each against all others: the time is that of their product
    return sum(bleu.sentence_score(words[place], words[:place] + words[place + 1 :]).score for place in judged) / len(judged)


def text_metrics(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Distinct-1, -2 and -3, rep-4, self-BLEU, and mean length in tokens."""
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "rep_4": repetition(texts, 4),
        "self_bleu": self_bleu(texts),
        "mean_length": sum(map(len, texts)) / len(texts) if texts else 0.0,
    }


# --------------------------------------------------------------------------------------------------------------------------------------
# With the adapter of a run


def load_trained(run_dir: Path, strategy: str | None = None, seed: int | None = None, *, trust_remote_code: bool = False) -> tuple[Any, Any, str]:
    """Load a run's base with one of its adapters.

    Args:
        run_dir: A run's folder.
        strategy: Whose adapter; without it the one with the lowest validation perplexity.
        seed: Of which seed.
        trust_remote_code: Allow the base model's folder or hub name to run its own code; what the run itself allowed does not count.

    Returns:
        The PEFT model in eval mode, its tokenizer, and ``strategy/seedK``.

    Raises:
        RunError: where there is no such run or arm.
    """
    from peft import PeftModel

    if not (run_dir / folder.CONFIG).exists():
        raise RunError(f"{run_dir} is not the folder of a run (it has no config.yaml); give the folder that a run printed at its end")
    rows = [row for row in report.read_results(run_dir) if strategy in (None, row["strategy"]) and seed in (None, row["seed"])]
    if not rows:
        raise RunError(
            f"{run_dir} has no finished arm{f' of strategy {strategy!r}' if strategy else ''}{f' with seed {seed}' if seed is not None else ''}"
        )
    best = min(rows, key=lambda row: math.inf if row["val_ppl"] is None else row["val_ppl"])
    name = f"{best['strategy']}/seed{best['seed']}"
    try:
        config = make_config(**folder.read_config(run_dir), trust_remote_code=trust_remote_code)
    except (ValueError, TypeError) as problem:
        raise RunError(f"{run_dir / folder.CONFIG} is damaged: {problem}") from problem
    base = load_base(config)
    model, adapter = load_weights(base, config.model), run_dir / name / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"{adapter} holds no adapter_model.safetensors; train that arm again")
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval(), base.tokenizer, name
    except Exception as problem:  # safetensors, PEFT and torch have classes of their own for a damaged adapter
        raise RunError(f"the adapter {adapter} cannot be loaded ({type(problem).__name__}: {problem})"[:500]) from problem


def continue_text(
    run_dir: Path,
    prompt: str,
    sampling: Sampling,
    *,
    strategy: str | None = None,
    seed: int | None = None,
    greedy: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Continue a prompt with a trained adapter; what ``iterbatch generate`` prints.

    Raises:
        RunError: see :func:`load_trained`.
        DataError: where the prompt is empty, or too long for the model's context.
    """
    model, tokenizer, _ = load_trained(run_dir, strategy, seed, trust_remote_code=trust_remote_code)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    room = model.config.max_position_embeddings - sampling.new_tokens
    if not ids or len(ids) > room:
        raise DataError(f"the prompt has {len(ids)} tokens; with {sampling.new_tokens} new ones it must have 1 to {max(room, 0)} for this model")
    accelerator = make_accelerator(PRECISION[str(model.base_model.model.dtype).removeprefix("torch.")])
    with accelerator.autocast():
        new = generate(model.to(accelerator.device), [ids], tokenizer, sampling, greedy=greedy)[0]
    return tokenizer.decode(ids + new)
