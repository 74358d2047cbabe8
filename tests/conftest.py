import os
from pathlib import Path

import pytest

from campaigns.tiny import empty_figure, make_tiny

# Before any library is imported: no network, and no cache shared with the user's own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ITERBATCH_LANG"] = "en"  # messages are compared in English, wherever the tests run
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread a process: tests run side by side, and threads of busy processes wait for each other by spinning.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("ITERBATCH_DATA") or ROOT.parent / "shared" / "data")


def pytest_collection_modifyitems(items):
    """Files that start processes of their own take long: they go first, and short ones fill the gaps."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Prepared text goes to a folder of this test session."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ITERBATCH_CACHE"] = str(folder)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "datasets"


@pytest.fixture(scope="module", autouse=True)
def pictures(request):
    """Laying figures out takes most of a small run's time: they are empty where no test looks at them."""
    if request.node.get_closest_marker("pictures") or request.path.parent.name == "report":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iterbatch.report.figures._save", empty_figure)
        yield


@pytest.fixture(scope="session")
def real_text():
    """The folder of real text, or a skip that says why."""
    if not (DATA / "wikitext-2").is_dir():
        pytest.skip(f"no real text at {DATA}; set ITERBATCH_DATA to its folder")
    return DATA


@pytest.fixture(scope="session")
def tokenizer():
    """The bundled tokenizer."""
    from transformers import AutoTokenizer

    from iterbatch.config import ASSETS

    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A local folder in hub format: a LLaMA of two layers with random weights and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(folder, tokenizer)
    return folder


def tiny_flags(folder):
    """Flags of a quick run on a tiny model, in float32, without trackers."""
    return {
        "model_name": str(folder),
        "dtype": "float32",
        "max_length": 32,
        "max_train_tokens": 512,
        "max_eval_tokens": 200,
        "evals": 2,
        "lr": 0.01,
        "log_with": ["none"],
    }


@pytest.fixture
def llama(tiny_folder):
    """A function that loads the tiny model anew, with adapters on its last layer or on others."""
    import torch
    from transformers import AutoModelForCausalLM

    from iterbatch.config import ModelConfig
    from iterbatch.model.lora import attach_adapter

    def load(layers=(1,), dropout=0.0, **changed):
        base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, **changed)
        return attach_adapter(base, "float32", ModelConfig(lora_dropout=dropout), list(layers)).train()

    return load


@pytest.fixture
def tiny(tiny_folder):
    """Flags of a quick run on the tiny model, in float32, without trackers."""
    return tiny_flags(tiny_folder)
