"""Where prepared text and activations are kept, outside any run's folder."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where they are kept: ``ITERBATCH_CACHE``, or ``.cache/iterbatch`` in the user's home."""
    return Path(os.environ.get("ITERBATCH_CACHE") or Path.home() / ".cache" / "iterbatch")
