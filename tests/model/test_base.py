"""Bases as people have them: what is said of those that cannot be used, and what is left alone."""

import json
import shutil

import pytest
import torch

from iterbatch.checks import make_config
from iterbatch.errors import ModelError
from iterbatch.evaluation.generate import Sampling, generate
from iterbatch.model.base import base_digests, load_base
from iterbatch.model.lora import adapter_parameters
from iterbatch.model.weights import load_model


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "base")


def _config(folder, **flags):
    return make_config(**{"model_name": str(folder), "dtype": "float32", "max_length": 32, **flags})


def test_an_adapter_beside_the_base_decides_nothing(folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    alone = load_model(
        load_base(_config(folder, lora_layers="top:1")), _config(folder, lora_layers="top:1").model
    )
    digests = base_digests(load_base(_config(folder)))
    other = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    assert (folder / "adapter_config.json").is_file()
    beside = load_model(
        load_base(_config(folder, lora_layers="top:1")), _config(folder, lora_layers="top:1").model
    )
    assert adapter_parameters(beside).keys() == adapter_parameters(alone).keys()
    assert base_digests(load_base(_config(folder))) == digests
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(beside.eval()(ids).logits, alone.eval()(ids).logits)


def test_a_folder_of_an_adapter_alone_says_that_it_is_one(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "huggyllama/llama-7b"}), encoding="utf-8"
    )
    with pytest.raises(
        ModelError, match=r"is an adapter, not a model; .*--model_name \(huggyllama/llama-7b\)"
    ):
        load_base(_config(folder))


def test_a_tokenizer_model_alone_says_what_reads_it(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(b"\0" * 64)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"no usable tokenizer: .*pip install sentencepiece"):
        load_base(_config(folder))


def test_a_token_beyond_the_embedding_is_found_before_training(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 4500, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 4500
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokens up to number 4500, the model \d+ of them"):
        load_base(_config(folder))


def test_a_gguf_file_needs_its_package(folder, monkeypatch):
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r'needs a package: pip install "iterbatch\[gguf\]"'):
        load_base(_config(folder / "model.gguf"))
    with pytest.raises(ModelError, match="does not exist"):
        load_base(_config(folder / "other.gguf"))


def test_every_end_of_the_generation_config_ends_a_text_and_padding_is_none_of_it(folder, tokenizer):
    model = load_model(load_base(_config(folder)), _config(folder).model)
    prompt, sampling = tokenizer("The with statement")["input_ids"], Sampling(new_tokens=12)
    (free,) = generate(model, [prompt], tokenizer, sampling, greedy=True)
    assert len(free) > 3
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, free[2]]
    (ended,) = generate(model, [prompt], tokenizer, sampling, greedy=True)
    assert ended == free[: free.index(free[2])]
    other = tokenizer("An if of two")["input_ids"]
    size = min(len(prompt), len(other))
    texts = generate(model, [prompt[:size], other[:size]], tokenizer, sampling, greedy=True)
    assert not any(token in text for text in texts for token in (tokenizer.pad_token_id, free[2]))


@pytest.mark.parametrize(("flags", "scale"), [({}, 2.0), ({"rslora": True}, 16 / 8**0.5)])
def test_scale_of_the_adapter(folder, flags, scale):
    config = _config(folder, **flags)
    model = load_model(load_base(config), config.model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(scale)


def test_what_changes_the_frozen_weights_is_refused_with_the_reason(folder, capsys):
    from iterbatch.cli.main import main

    for words, reason in (
        (["--init_lora", "pissa"], "change the frozen weights, which all arms share"),
        (["--dora"], "the FLOP model does not count"),
    ):
        assert main(["train", "--model_name", str(folder), *words]) == 2
        assert reason in " ".join(capsys.readouterr().err.split())
