"""A quick word with the hub before any long work: whether a name can be had."""

import os
from pathlib import Path

TIMEOUT_SECONDS = 5.0


def cached(name: str, file: str, repo_type: str | None = None) -> bool:
    """Whether a hub repository's file is in the local cache already."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, file, repo_type=repo_type), str)
    except HFValidationError:
        return False


def problem_with(name: str, repo_type: str = "model") -> Exception | None:
    """Ask the hub for a repository once, without the retries of a download; return what went wrong, or None.

    Args:
        name: ``owner/name``.
        repo_type: ``model`` or ``dataset``.
    """
    from huggingface_hub import HfApi

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return ConnectionError("HF_HUB_OFFLINE is set")
    api = HfApi()
    try:
        if repo_type == "dataset":
            api.dataset_info(name, timeout=TIMEOUT_SECONDS)
        else:
            api.model_info(name, timeout=TIMEOUT_SECONDS)
    # No name service, no route, no such name, gated: each has its own class, all mean "not to be
    # had".
    except Exception as problem:
        return problem
    return None


def dataset_in_cache(name: str) -> bool:
    """Whether ``datasets`` has prepared this hub data set before."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / name.replace("/", "___").lower()
    return folder.exists() or (folder.parent / name.replace("/", "___")).exists()
