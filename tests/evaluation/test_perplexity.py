import math
import re

import pytest
import torch
from torch.nn import functional

from iterbatch.checks import make_config
from iterbatch.data.documents import Document
from iterbatch.data.windows import EvalText, prepare_eval, rolling_windows
from iterbatch.evaluation.generate import distinct, repetition, text_metrics
from iterbatch.evaluation.perplexity import Score, score
from iterbatch.model.base import load_base
from iterbatch.model.cut import CutModel
from iterbatch.model.weights import load_model
from iterbatch.runtime.processes import make_accelerator

TEXTS = [
    "Short.",
    "A longer document, with more words in it than the first one has. " * 3,
    "Middle of the road " * 5 + "\n",
]


@pytest.fixture(scope="module")
def model(tiny_folder):
    config = make_config(model_name=str(tiny_folder), dtype="float32", max_length=32)
    return load_model(load_base(config), config.model).eval()


@pytest.fixture(scope="module")
def cut(model):
    return CutModel(model)


@pytest.fixture(scope="module")
def text(tokenizer):
    return prepare_eval([Document.of(text) for text in TEXTS], tokenizer, max_length=32)


def test_perplexity_by_hand_on_unequal_lengths_with_padding(model, cut, tokenizer, text):
    nats, ends, tokens = 0.0, 0.0, 0
    for document in TEXTS:  # each document alone, unpadded, window by window, to its end
        ids = [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        tokens += len(ids)
        for start in range(0, len(ids), 32):
            end = min(start + 32, len(ids))
            first = max(0, end - 32) if start else 0
            context = [tokenizer.bos_token_id, *ids[: end - 1]] if not start else ids[first - 1 : end - 1]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context]), use_cache=False).logits[0]
            losses = functional.cross_entropy(
                logits[-(end - start) :].double(), torch.tensor(ids[start:end]), reduction="none"
            )
            nats += losses.sum().item()
        ends += losses[-1].item()
    result = score(cut, text, make_accelerator("no"), batch_size=3, pad_id=tokenizer.pad_token_id)
    assert result.tokens == tokens
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert result.end_nats == pytest.approx(ends, rel=1e-6)
    assert result.word_ppl == pytest.approx(math.exp((nats - ends) / result.words), rel=1e-6)
    assert result.words == sum(
        len(re.split(r"\s+", document)) for document in TEXTS
    )  # as lm-evaluation-harness counts
    assert result.bytes == sum(len(document.encode()) for document in TEXTS)


@pytest.mark.parametrize(
    ("batch_size", "side"), [(1, "right"), (2, "right"), (7, "right"), (3, "left"), (1, "left")]
)
def test_result_does_not_depend_on_batch_size_or_padding_side(cut, text, batch_size, side):
    accelerator = make_accelerator("no")
    reference = score(cut, text, accelerator, batch_size=1, pad_id=2)
    found = score(cut, text, accelerator, batch_size=batch_size, pad_id=2, padding_side=side)
    assert found.nats == pytest.approx(reference.nats, rel=1e-6)
    assert found.end_nats == pytest.approx(reference.end_nats, rel=1e-6)


def test_result_does_not_depend_on_packing(cut, tokenizer, text):
    """Windows in any order, or split over two texts, add up to the same."""
    accelerator = make_accelerator("no")
    whole = score(cut, text, accelerator, pad_id=2).nats
    shuffled = EvalText(text.windows[::-1], text.words, text.bytes, text.tokens, text.document_tokens)
    parts = [prepare_eval([Document.of(part)], tokenizer, max_length=32) for part in TEXTS]
    assert score(cut, shuffled, accelerator, pad_id=2).nats == pytest.approx(whole, rel=1e-6)
    assert sum(score(cut, part, accelerator, pad_id=2).nats for part in parts) == pytest.approx(
        whole, rel=1e-6
    )


def test_windows_score_every_token_once_and_never_see_their_target():
    for length in (1, 2, 7, 8, 9, 15, 16, 17, 50):
        ids = list(range(100, 100 + length))
        windows = list(rolling_windows(ids, prefix=0, max_length=8))
        scored = [token for window in windows for token in window.targets[-window.scored :]]
        assert scored == ids
        assert windows[0].input_ids[0] == 0
        for window in windows:
            assert len(window.input_ids) == len(window.targets) <= 8
            assert window.input_ids[1:].tolist() == window.targets[:-1].tolist()


def test_windows_are_those_of_the_evaluation_harness():
    # lm-evaluation-harness, make_disjoint_window(get_rolling_token_windows([1..10], prefix 0,
    # max_seq_len 4, context_len 1)):
    # ([0,1,2,3],[1,2,3,4]), ([4,5,6,7],[5,6,7,8]), ([6,7,8,9] scoring only [9,10])
    windows = rolling_windows(list(range(1, 11)), 0, 4)
    assert [(window.input_ids.tolist(), window.targets.tolist(), window.scored) for window in windows] == [
        ([0, 1, 2, 3], [1, 2, 3, 4], 4),
        ([4, 5, 6, 7], [5, 6, 7, 8], 4),
        ([6, 7, 8, 9], [7, 8, 9, 10], 2),
    ]


def test_figures_of_a_score():
    result = Score(nats=math.log(2) * 100, tokens=100, words=50, bytes=400)
    assert result.ppl == pytest.approx(2)
    assert result.word_ppl == pytest.approx(4)
    assert result.bits_per_byte == pytest.approx(0.25)
    assert result.byte_ppl == pytest.approx(2**0.25)
    assert Score(1e6, 1, 1, 1).ppl == math.inf


def test_text_metrics_by_hand():
    assert distinct([[1, 1, 2], [1, 3]], 1) == pytest.approx(3 / 5)
    assert distinct([[1, 1, 2], [1, 3]], 2) == 1.0
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]], 4) == pytest.approx(1 - 4 / 5)
    assert repetition([[1, 2]], 4) == 0.0
    assert text_metrics([[5] * 10, [1, 2]])["mean_length"] == 6
    assert text_metrics([])["distinct_1"] == 0.0
