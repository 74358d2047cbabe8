"""The same documents through lm-evaluation-harness's own code, with the arithmetic of its ``wikitext``."""

import itertools
import math
import warnings

import pytest

from iterbatch.checks import make_config
from iterbatch.data.documents import Document
from iterbatch.data.wikitext import wikitext_articles, wikitext_document
from iterbatch.data.windows import prepare_eval
from iterbatch.evaluation.perplexity import score
from iterbatch.evaluation.trained import load_trained
from iterbatch.model.cut import CutModel
from iterbatch.runtime.processes import make_accelerator
from iterbatch.study.run import run as run_bench

LENGTH = 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_folder, real_text):
    """A saved adapter, loaded from its folder, and WikiText documents."""
    folder = tmp_path_factory.mktemp("harness")
    flags = {
        "model_name": str(tiny_folder),
        "dtype": "float32",
        "max_length": LENGTH,
        "max_train_tokens": 2048,
        "max_eval_tokens": 200,
    }
    data = {"dataset": "wikitext", "data_dir": real_text / "wikitext-2"}
    run_dir = run_bench(
        make_config(
            **flags, **data, lr=0.01, strategies=["abr"], save_dir=folder, run_name="run", log_with=["none"]
        )
    )
    with (real_text / "wikitext-2" / "wiki.test.tokens").open(encoding="utf-8") as lines:
        articles = list(itertools.islice(wikitext_articles(lines), 2))
    short = [
        "Short.",
        "  Two lines,\nand spaces around them. \n",
        "Not ASCII: naïve 数学 text, with a word or two more. " * 9,
    ]
    model, tokenizer, _ = load_trained(run_dir)
    return (
        model,
        tokenizer,
        [*articles, *short],
        [*map(wikitext_document, articles), *map(Document.of, short)],
    )


def test_word_and_byte_perplexity_and_bits_per_byte_are_the_harness_s(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.instance import Instance
        from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

        model, tokenizer, pages, documents = trained
        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, backend="causal"
        )
        requests = [
            Instance(
                request_type="loglikelihood_rolling",
                doc={},
                arguments=(document.text,),
                idx=index,
                metadata=("wikitext", index, 1),
            )
            for index, document in enumerate(documents)
        ]
        loglikelihoods = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    items = [
        process_results({"page": page}, (value,)) for page, value in zip(pages, loglikelihoods, strict=True)
    ]
    text = prepare_eval(documents, tokenizer, LENGTH)
    ours = score(CutModel(model), text, make_accelerator("no"), pad_id=tokenizer.pad_token_id)
    assert ours.word_ppl == pytest.approx(
        weighted_perplexity([item["word_perplexity"] for item in items]), rel=1e-3
    )
    assert ours.byte_ppl == pytest.approx(
        weighted_perplexity([item["byte_perplexity"] for item in items]), rel=1e-3
    )
    assert ours.bits_per_byte == pytest.approx(
        bits_per_byte([item["bits_per_byte"] for item in items]), rel=1e-3
    )
    assert math.isfinite(ours.word_ppl)
