"""What an adapter says of itself, so that it can be shared: no path of the machine that it was trained on."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iterbatch.bench.arm import Arm
from iterbatch.bench.prepare import Prepared
from iterbatch.checks import make_config
from iterbatch.config import BUNDLED
from iterbatch.evaluation.perplexity import Score
from iterbatch.flags import flag_words
from iterbatch.records.write import write_json, write_text

CONFIG, CARD = "adapter_config.json", "README.md"  # as PEFT names them
# Settings of one machine or one sitting, which say nothing of what was trained.
OWN = ("save_dir", "data_dir", "model_name", "run_name", "log_with", "checkpoint_every", "evals", "prompts")


def base_name(prepared: Prepared) -> str:
    """A hub name, or of a local folder its own name and the digest of its weights."""
    name = prepared.config.model.model_name
    if name == BUNDLED:
        return "the LLaMA of 4.3 M parameters that comes with iterbatch"
    if not Path(name).exists():
        return name
    return f"{Path(name).name} (weights of SHA-256 {prepared.origin.weights[:16]})"


def command(prepared: Prepared, arm: Arm, seed: int) -> str:
    """What trains the same arm again; text and model by their names."""
    config, usual = arm.config, make_config().flat()
    words = [] if config.model.model_name == BUNDLED else ["--model_name", Path(config.model.model_name).name]
    if config.data.data_dir is not None:
        words += ["--data_dir", Path(config.data.data_dir).name]
    for name, value in config.flat().items():
        if name not in (*OWN, "seeds", "strategies") and value != usual.get(name):
            words += flag_words(name, value)
    strategies = [*([arm.source] if arm.source else []), arm.strategy]
    words += ["--strategies", *strategies, "--seeds", str(seed)]
    return f"iterbatch train {shlex.join(words)}"


def write_card(folder: Path, prepared: Prepared, arm: Arm, seed: int, scores: Mapping[str, Score]) -> None:
    """Write the card of an adapter beside it, and take this machine's folders out of its settings.

    Args:
        folder: Of the adapter.
        prepared: What it was trained on.
        arm: Which it is of.
        seed: Which it is of.
        scores: Of validation and test.
    """
    file, config = folder / CONFIG, arm.config
    settings: Any = json.loads(file.read_text(encoding="utf-8"))
    name = config.model.model_name
    settings["base_model_name_or_path"] = Path(name).name if Path(name).exists() else name
    write_json(file, settings)
    source, training = prepared.corpus.source, config.training
    local = config.data.data_dir is not None
    budget = f"{training.budget:g}" if training.budget is not None else f"{training.epochs} epoch(s)"
    lines = [
        "---",
        "library_name: peft",
        *([] if Path(name).exists() or name == BUNDLED else [f"base_model: {name}"]),
        "tags: [lora, iterbatch]",
        "---",
        "",
        f"# {arm.name}, seed {seed}",
        "",
        f"- Base: {base_name(prepared)}.",
        f"- Text: {Path(source).name if local else source} ({prepared.corpus.licence}); of SHA-256 "
        f"{prepared.origin.text['train'][:16]} where it is trained on.",
        f"- Strategy: {arm.strategy}, learning rate {config.lr:g}.",
        f"- Budget: what the baseline needs for {budget}, in {training.match}.",
        *[f"- {split.capitalize()} perplexity: {_with_interval(score)}." for split, score in scores.items()],
        "",
        "```",
        command(prepared, arm, seed),
        "```",
        "",
    ]
    write_text(folder / CARD, "\n".join(lines))


def _with_interval(score: Score) -> str:
    low, high = score.interval()
    sure = (
        f" [{low:.3f}, {high:.3f}] over {len(score.document_tokens)} documents" if math.isfinite(low) else ""
    )
    return f"{score.ppl:.3f}{sure}, {score.tokens:,} tokens"
