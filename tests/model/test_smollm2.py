"""A real pretrained LLaMA end to end, on its top layers; ``ITERBATCH_SMOLLM2`` says where it is."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from support.records import change_result
from torch.nn import functional

from iterbatch.checks import make_config
from iterbatch.cli.main import main
from iterbatch.report import page
from iterbatch.runtime.interrupt import Stopped
from iterbatch.study.run import run as run_bench

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    """Its folder."""
    place = os.environ.get("ITERBATCH_SMOLLM2")
    if not place:
        pytest.skip("ITERBATCH_SMOLLM2 is not set; python studies/get_smollm2.py brings the model")
    return Path(place)


@pytest.fixture(scope="module")
def flags(smollm2, real_text, tmp_path_factory):
    return {
        "model_name": str(smollm2),
        "dataset": "dialogue",
        "data_dir": real_text / "dialogue" / "casino",
        "dtype": "float32",
        "lora_layers": "top:8",
        "lr": 1e-3,
        "max_length": 64,
        "max_train_tokens": 256,
        "max_eval_tokens": 300,
        "epochs": 2,
        "evals": 1,
        "prompts": 1,
        "reuse": "epoch",
        "reuse_dtype": "float32",
        "strategies": ["baseline"],
        "log_with": ["none"],
        "save_dir": tmp_path_factory.mktemp("smollm2"),
    }


def test_trained_stopped_resumed_and_continued(flags, monkeypatch, capsys):
    from iterbatch.bench.train_arm import SavePoints

    whole = run_bench(make_config(**flags, run_name="whole"))
    here, seen = SavePoints.here, []

    def stopping(points):
        seen.append(1)
        if len(seen) == 3:
            raise Stopped(15)
        here(points)

    monkeypatch.setattr(SavePoints, "here", stopping)
    monkeypatch.setattr("iterbatch.bench.train_arm.Every.due", lambda *_: True)
    with pytest.raises(Stopped):
        run_bench(make_config(**flags, run_name="cut"))
    monkeypatch.undo()
    cut = flags["save_dir"] / "cut"
    assert main(["train", "--resume", str(cut)]) == 0
    results = [
        json.loads((run / "baseline" / "seed0" / "result.json").read_text(encoding="utf-8"))
        for run in (whole, cut)
    ]
    assert results[0]["val_ppl"] == results[1]["val_ppl"] < results[0]["base_val_ppl"]
    assert results[0]["flops_saved"] > 0
    assert main(["generate", str(whole), "--prompt", "participant: I need water", "--new_tokens", "4"]) == 0
    assert "I need water" in capsys.readouterr().out


def test_mauve_with_it_as_the_embedding_model(smollm2, tiny, tmp_path):
    run = run_bench(make_config(**tiny | {"prompts": 12, "save_dir": tmp_path}, strategies=["baseline"]))

    def scored():
        (cell,) = page.write(run, smollm2)
        text = cell.arms[0].seeds[0].result.text
        return [text[decoding]["mauve"] for decoding in ("greedy", "sampled")]

    written = scored()
    assert all(0 < value < 1 for value in written)
    file = run / "baseline" / "seed0" / "samples.json"
    samples = json.loads(file.read_text(encoding="utf-8"))
    samples["trained"]["greedy"]["texts"] = samples["human"]
    file.write_text(json.dumps(samples), encoding="utf-8")
    change_result(file.parent)
    assert scored() == [pytest.approx(1, abs=0.01), written[1]]


def test_the_base_s_perplexity_is_that_of_independent_code(flags, smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = flags["save_dir"] / "whole"
    base = json.loads((run / "baseline" / "seed0" / "result.json").read_text(encoding="utf-8"))[
        "base_val_ppl"
    ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    rows = (flags["data_dir"] / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    nats, tokens, seen, length = 0.0, 0, 0, flags["max_length"]
    for row in map(json.loads, rows):
        text = "\n".join(f"{turn['speaker']}: {turn['text']}" for turn in row["turns"])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = flags["max_eval_tokens"] - seen
        seen += len(ids)
        whole = len(ids) <= room + flags["max_eval_tokens"] / 10
        ids = [*ids, tokenizer.eos_token_id] if whole else ids[:room]
        sequence = [tokenizer.bos_token_id or tokenizer.eos_token_id, *ids]
        for start in range(0, len(ids), length):
            end = min(start + length, len(ids))
            first = max(0, end - length)
            with torch.no_grad():
                logits = model(torch.tensor([sequence[first:end]])).logits[0, start - first :]
            nats += functional.cross_entropy(logits, torch.tensor(ids[start:end]), reduction="sum").item()
        tokens += len(ids)
        if seen >= flags["max_eval_tokens"]:
            break
    assert base == pytest.approx(math.exp(nats / tokens), rel=1e-4)
