"""A run's base with one of its adapters, and how it continues a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from iterbatch.checks import config_of_run
from iterbatch.errors import DataError, RunError
from iterbatch.evaluation.generate import Sampling, generate
from iterbatch.language import _
from iterbatch.model.base import PRECISION, base_digests, load_base
from iterbatch.model.weights import load_weights
from iterbatch.records import layout
from iterbatch.records.origin import Origin, check_origin
from iterbatch.records.read import read_config, read_results
from iterbatch.runtime.processes import make_accelerator

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def load_trained(
    run_dir: Path, strategy: str | None = None, seed: int | None = None, *, trust_remote_code: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """Load a run's base with one of its adapters.

    Args:
        run_dir: A run's folder.
        strategy: Whose adapter; without it the one with the lowest validation perplexity.
        seed: Of which seed.
        trust_remote_code: Allow the base model's folder or hub name to run its own code; what the
            run itself allowed does not count.

    Returns:
        The PEFT model in eval mode, its tokenizer, and ``strategy/seedK``.

    Raises:
        RunError: where there is no such run or arm.
    """
    from peft import PeftModel

    if not (run_dir / layout.CONFIG).exists():
        raise RunError(
            _(
                "{run_dir} is not the folder of a run (it has no config.yaml); give the folder that a "
                "run printed at its end"
            ).format(run_dir=run_dir)
        )
    found = [
        each
        for each in read_results(run_dir)
        if strategy in (None, each.strategy) and seed in (None, each.seed)
    ]
    if not found:
        which = _(" of strategy {strategy!r}").format(strategy=strategy) if strategy else ""
        which += "" if seed is None else _(" with seed {seed}").format(seed=seed)
        raise RunError(_("{run_dir} has no finished arm{which}").format(run_dir=run_dir, which=which))
    best = min(found, key=lambda each: each.val_ppl)
    folder = layout.arm_folder(run_dir, best.strategy, best.seed)
    name = f"{best.strategy}/{folder.name}"
    try:
        config = config_of_run(read_config(run_dir), trust_remote_code=trust_remote_code)
    except (ValueError, TypeError) as problem:
        raise RunError(
            _("{run_dir} is damaged: {problem}").format(run_dir=run_dir / layout.CONFIG, problem=problem)
        ) from problem
    base = load_base(config)
    check_origin(run_dir, Origin({}, *base_digests(base)))
    model, adapter = load_weights(base, config.model), folder / layout.ADAPTER
    if not (adapter / layout.ADAPTER_WEIGHTS).is_file():
        raise RunError(
            _("{adapter} holds no {adapter_weights}; train that arm again").format(
                adapter=adapter, adapter_weights=layout.ADAPTER_WEIGHTS
            )
        )
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval(), base.tokenizer, name
    except Exception as problem:
        # Safetensors, PEFT and torch have classes of their own for a damaged adapter.
        raise RunError(
            _("the adapter {adapter} cannot be loaded ({name}: {problem})").format(
                adapter=adapter, name=type(problem).__name__, problem=problem
            )[:500]
        ) from problem


def continue_text(
    run_dir: Path,
    prompt: str,
    sampling: Sampling,
    *,
    strategy: str | None = None,
    seed: int | None = None,
    greedy: bool = False,
    trust_remote_code: bool = False,
) -> tuple[str, str]:
    """Continue a prompt with a trained adapter.

    Returns:
        The text, and whose adapter it was: ``strategy/seedK``.

    Raises:
        RunError: see :func:`load_trained`.
        DataError: where the prompt is empty, or too long for the model's context.
    """
    model, tokenizer, name = load_trained(run_dir, strategy, seed, trust_remote_code=trust_remote_code)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    room = model.config.max_position_embeddings - sampling.new_tokens
    if not ids or len(ids) > room:
        raise DataError(
            _(
                "the prompt has {count} tokens; with {new_tokens} new ones it must have 1 to {max} for "
                "this model"
            ).format(count=len(ids), new_tokens=sampling.new_tokens, max=max(room, 0))
        )
    accelerator = make_accelerator(PRECISION[str(model.base_model.model.dtype).removeprefix("torch.")])
    with accelerator.autocast():
        new = generate(model.to(accelerator.device), [ids], tokenizer, sampling, greedy=greedy)[0]
    return str(tokenizer.decode(ids + new)), name
