import os
from pathlib import Path

import pytest

# Before any library is imported: no network, and no cache shared with the user's own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("ITERBATCH_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Prepared text goes to a folder of this test session."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ITERBATCH_CACHE"] = str(folder)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "datasets"


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
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    """Flags of a quick run on the tiny model, in float32, without trackers."""
    return {
        "model_name": str(tiny_folder),
        "dtype": "float32",
        "max_length": 32,
        "max_train_tokens": 512,
        "max_eval_tokens": 200,
        "evals": 2,
        "lr": 0.01,
        "log_with": ["none"],
    }
