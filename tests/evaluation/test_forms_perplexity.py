"""Perplexity of every form is that of independent code over the text as it should read."""

import json
import math

import pytest
import torch
from support.templates import with_template
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from iterbatch.bench.prepare import prepare
from iterbatch.checks import make_config
from iterbatch.evaluation.perplexity import score
from iterbatch.model.cut import CutModel
from iterbatch.model.weights import load_model
from iterbatch.runtime.processes import make_accelerator

TALKS = [
    (f"Where is {city}, and what do people do there?", f"It lies in {land}.\nThey fish, and sing of the sea.")
    for city, land in zip(
        ["Lima", "Oslo", "Porto", "Accra", "Quito", "Turku"],
        ["Peru", "Norway", "Portugal", "Ghana", "Ecuador", "Finland"],
        strict=True,
    )
]
BAR = "¦"
PLAIN = "user: {0}\nassistant: ¦{1}"
CHATML = "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n¦{1}<|im_end|>"


def _message(role, content):
    return {"role": role, "content": content}


# A form's row, and how it should read: the loss is on what stands behind the ¦.
FORMS = {
    "text": (lambda q, a: {"text": f"{q} {a}"}, "¦{0} {1}"),
    "turns": (
        lambda q, a: {"turns": [{"speaker": "A", "text": q}, {"speaker": "B", "text": a}]},
        "¦A: {0}\nB: {1}",
    ),
    "dialogue": (lambda q, a: {"dialogue": [q, a], "speakers": ["A", "B"]}, "¦A: {0}\nB: {1}"),
    "messages": (lambda q, a: {"messages": [_message("user", q), _message("assistant", a)]}, None),
    "parts": (
        lambda q, a: {
            "messages": [_message("user", [{"type": "text", "text": q}]), _message("assistant", a)]
        },
        None,
    ),
    "ShareGPT": (
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        None,
    ),
    "Alpaca": (lambda q, a: {"instruction": q, "input": "", "output": a}, None),
    "prompt of messages": (
        lambda q, a: {"prompt": [_message("user", q)], "completion": [_message("assistant", a)]},
        None,
    ),
    "prompt": (lambda q, a: {"prompt": q, "response": a}, "{0}\n¦{1}"),
}


@pytest.fixture(scope="module", params=["no template", "ChatML"])
def folder(request, tiny_folder, tmp_path_factory):
    """A model whose tokenizer has a chat template, or none."""
    if request.param == "no template":
        return tiny_folder, PLAIN
    place = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = with_template(AutoTokenizer.from_pretrained(tiny_folder), "ChatML")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place, CHATML


@pytest.fixture(scope="module")
def independent(folder):
    """Nats a trained token of texts with a ¦, each document alone with its one BOS and EOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder[0])
    model = AutoModelForCausalLM.from_pretrained(folder[0], dtype=torch.float32).eval()

    def perplexity(texts):
        nats, count = 0.0, 0
        for text in texts:
            before, trained = text.split(BAR)
            whole = tokenizer(before + trained, add_special_tokens=False, return_offsets_mapping=True)
            ids = [tokenizer.bos_token_id, *whole["input_ids"]]
            first = 1 + sum(end <= len(before) for _, end in whole["offset_mapping"])
            if ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double()
            losses = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
            nats, count = nats + losses[first - 1 :].sum().item(), count + len(ids) - first
        return math.exp(nats / count), count

    return perplexity


@pytest.mark.parametrize("form", FORMS)
def test_perplexity_of_every_form(form, folder, independent, tmp_path):
    place, chat = folder
    row, text = FORMS[form]
    for split, talks in (("train", TALKS * 4), ("validation", TALKS[:3]), ("test", TALKS[3:])):
        rows = "".join(json.dumps(row(*talk)) + "\n" for talk in talks)
        (tmp_path / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    config = make_config(
        model_name=str(place), dtype="float32", data_dir=tmp_path, max_length=128, strategies=["baseline"]
    )
    prepared = prepare(config)
    cut = CutModel(load_model(prepared.base, config.model).eval())
    for split, talks in (("validation", TALKS[:3]), ("test", TALKS[3:])):
        found = score(cut, prepared.texts[split], make_accelerator("no"), batch_size=2, pad_id=2)
        expected, count = independent([(text or chat).format(*talk) for talk in talks])
        assert found.tokens == count
        assert found.ppl == pytest.approx(expected, rel=1e-6)
