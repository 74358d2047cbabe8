"""Keep other libraries' progress bars and advice off the screen; their errors still come through."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """For the rest of this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for category in (UserWarning, FutureWarning):
        libraries = r"(peft|accelerate|transformers|torch|huggingface_hub)\b.*"
        warnings.filterwarnings("ignore", category=category, module=libraries)
    for name in ("huggingface_hub", "datasets", "transformers", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
