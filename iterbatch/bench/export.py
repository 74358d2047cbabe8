"""A trained adapter as a folder to be shared, or merged into its base."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterbatch.bench.card import CARD
from iterbatch.bench.prepare import prepare
from iterbatch.checks import config_of_run
from iterbatch.data.windows import EvalText
from iterbatch.errors import RunError
from iterbatch.evaluation.perplexity import score
from iterbatch.evaluation.trained import load_trained
from iterbatch.language import _
from iterbatch.model.base import PRECISION
from iterbatch.model.cut import CutModel
from iterbatch.records import layout
from iterbatch.records.origin import check_origin
from iterbatch.records.read import read_config
from iterbatch.records.write import whole_or_not
from iterbatch.runtime.processes import make_accelerator

CLOSE = 0.01  # how far the perplexity of merged weights, which are rounded, may lie from the adapter's


@dataclass(frozen=True)
class Exported:
    """What was written; perplexities on the run's validation text, of merged weights only."""

    folder: Path
    arm: str
    adapter_ppl: float | None = None
    merged_ppl: float | None = None


def export(run_dir: Path, folder: Path, strategy: str | None, seed: int | None, *, merge: bool) -> Exported:
    """Write an adapter with its card to a folder, or its base with the adapter merged into the weights.

    Args:
        run_dir: A run's folder.
        folder: To be written; must not be there.
        strategy: Whose adapter; without it the one with the lowest validation perplexity.
        seed: Of which seed.
        merge: Whether to merge; then the merged model is scored on the run's validation text.

    Raises:
        RunError: where the folder is there, or the merged model does not score as the adapter does.
    """
    if folder.exists():
        raise RunError(
            _("{folder} exists already; give a folder that does not by --to").format(folder=folder)
        )
    model, tokenizer, name = load_trained(run_dir, strategy, seed)
    adapter = run_dir / name / layout.ADAPTER
    if not merge:
        with whole_or_not(folder) as half:
            shutil.copytree(adapter, half)
        return Exported(folder, name)
    text = _validation(run_dir)
    precision = PRECISION[str(model.base_model.model.dtype).removeprefix("torch.")]
    before = _perplexity(model, precision, text)
    merged: Any = model.merge_and_unload()
    after = _perplexity(merged, precision, text)
    if not abs(after / before - 1) <= CLOSE:
        raise RunError(
            _(
                "merged into its base, {name} has a perplexity of {after:.3f}, by itself {before:.3f}; "
                "nothing is written. Weights of fewer bits round more: export the adapter without --merge"
            ).format(name=name, after=after, before=before)
        )
    with whole_or_not(folder) as half:
        merged.save_pretrained(half)
        tokenizer.save_pretrained(half)
        card = adapter / CARD
        if card.is_file():
            words = card.read_text(encoding="utf-8")
            words = words.replace("library_name: peft", "library_name: transformers")
            said = _(
                "Merged into the base: validation perplexity {after:.3f}, of the adapter {before:.3f}.\n"
            ).format(after=after, before=before)
            (half / CARD).write_text(f"{words}\n{said}", encoding="utf-8")
    return Exported(folder, name, before, after)


def _validation(run_dir: Path) -> EvalText:
    prepared = prepare(config_of_run(read_config(run_dir)))
    check_origin(run_dir, prepared.origin)
    return prepared.texts["validation"]


def _perplexity(model: Any, precision: str, text: EvalText) -> float:
    accelerator = make_accelerator(precision)
    return score(CutModel(model.to(accelerator.device)), text, accelerator).ppl


def push(folder: Path, name: str) -> str:
    """Upload an exported folder to the hub; returns its address.

    Args:
        folder: From :func:`export`.
        name: ``owner/name`` of the repository, made private where it is not there yet.

    Raises:
        RunError: where the hub does not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="iterbatch export"))
    except (HfHubHTTPError, ValueError, OSError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise RunError(
            _(
                "{folder} is written, but could not be uploaded to '{name}' ({reason}); log in by 'hf "
                "auth login', and see that the name is owner/name"
            ).format(folder=folder, name=name, reason=reason)
        ) from problem
