"""How much text a score rests on."""

import pytest

from iterbatch.records.scored import Scored


@pytest.mark.parametrize(
    ("tokens", "effective", "words"),
    [
        ([500] * 12, 12, None),
        ([1000], 1, "test scores 1 document, which say as much as 1.0 of one length"),
        ([10_000, *[10] * 50], 1.1025, "test scores 51 documents, which say as much as 1.1 of one length"),
    ],
)
def test_few_documents_are_a_caution(tokens, effective, words):
    found = Scored.of(tokens)
    assert (found.documents, found.tokens) == (len(tokens), sum(tokens))
    assert found.effective_documents == pytest.approx(effective, rel=1e-4)
    said = found.caution("test")
    assert said is None if words is None else said.startswith(words)
