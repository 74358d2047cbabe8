"""The forms of rows: read as they are meant, and every value of an unexpected type named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterbatch.data.chat import Writer
from iterbatch.data.corpus import Reading, read_corpus
from iterbatch.data.forms import read_form
from iterbatch.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
IMAGE = {"role": "user", "content": [{"type": "image", "url": "x"}]}
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
CHAT = "user: hi\nassistant: ho"


@pytest.mark.parametrize(
    ("row", "text", "trained"),
    [
        ({"text": "a\nb"}, "a\nb", None),
        ({"turns": [{"speaker": "A", "text": "hi"}, {"speaker": "B", "text": "ho"}]}, "A: hi\nB: ho", None),
        ({"dialogue": ["hi", "ho"], "speakers": ["Ann", "Bob"]}, "Ann: hi\nBob: ho", None),
        ({"messages": [USER, ASSISTANT]}, CHAT, "ho"),
        ({"messages": [USER, {**ASSISTANT, "content": None}]}, "user: hi\nassistant: ", ""),
        ({"messages": [PARTS, ASSISTANT]}, CHAT, "ho"),
        ({"conversations": SHAREGPT}, CHAT, "ho"),
        ({"instruction": "Do.", "input": "hi", "output": "ho"}, "user: Do.\n\nhi\nassistant: ho", "ho"),
        ({"instruction": "Say it.", "input": "", "output": "ho"}, "user: Say it.\nassistant: ho", "ho"),
        ({"prompt": "Say: ", "completion": "ho"}, "Say: ho", "ho"),
        ({"prompt": "Say it.", "response": "ho"}, "Say it.\nho", "ho"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, CHAT, "ho"),
        ({"text": None, "messages": [USER, ASSISTANT]}, CHAT, "ho"),
        ({"messages": json.dumps([USER, ASSISTANT])}, CHAT, "ho"),  # a cell of CSV
    ],
)  # fmt: skip
def test_forms(row, text, trained):
    document = Writer().write(read_form(row))
    assert document.text == text
    if trained is None:
        assert document.trained is None
    else:
        assert "".join(text[start:stop] for start, stop in document.trained) == trained
    assert document.end_trained


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": None},
        {"text": " \n"},
        {"body": "x"},
        {"messages": []},
        {"messages": [{"role": "user", "content": None}]},
        {"turns": None},
        {"dialogue": ["a"]},
        {"instruction": "x", "output": ""},
        {"prompt": "x", "completion": None},
    ],
)
def test_rows_without_text(row):
    assert read_form(row) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 5}, "field 'text' is a int where text is needed"),
        ({"text": ["a"]}, "field 'text' is a list where text is needed"),
        ({"turns": [{"speaker": 1, "text": "x"}]}, r"field 'turns\[0\].speaker' is a int"),
        ({"turns": ["x"]}, r"field 'turns\[0\]' is a str where an object"),
        ({"dialogue": ["a"], "speakers": ["A", "B"]}, "'dialogue' has 1 turns, 'speakers' 2"),
        ({"dialogue": [1], "speakers": ["A"]}, r"field 'dialogue\[0\]' is a int"),
        ({"messages": {"role": "user"}}, "field 'messages' is a dict where a list is needed"),
        ({"messages": "user: hi"}, "field 'messages' is a str where a list is needed"),
        ({"messages": [{"content": "x"}]}, r"field 'messages\[0\]' has \['content'\]; 'role' and"),
        ({"messages": [{"role": "user", "content": 5}]}, r"field 'messages\[0\].content' is a int"),
        ({"messages": [IMAGE]}, "only text can be trained on"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "is 'martian'; known are human"),
        ({"instruction": "x", "output": {"a": 1}}, "field 'output' is a dict"),
        ({"prompt": "x", "completion": 1.5}, "field 'completion' is a float"),
        ({"messages": [USER], "tools": "x"}, "field 'tools' is text that is no JSON"),
    ],
)  # fmt: skip
def test_unexpected_types(row, message):
    with pytest.raises(DataError, match=message):
        read_form(row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    *("text", "turns", "dialogue", "speakers", "messages", "conversations", "prompt", "completion"),
    *("instruction", "output", "tools", "role", "content", "from", "value", "speaker"),
)
ROWS = st.dictionaries(
    st.sampled_from(NAMES),
    JSON | st.lists(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4), max_size=3),
    max_size=5,
)


@settings(max_examples=400, deadline=None)
@given(row=ROWS)
def test_any_row_is_a_text_nothing_or_an_error(row):
    try:
        form = read_form(row)
        assert form is None or Writer().write(form).text.strip()
    except DataError as problem:
        assert str(problem)


def test_one_field_by_name(tmp_path):
    rows = [{"text": "wrong", "body": f"Document {number}."} for number in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read_corpus("x", data_dir=path, reading=Reading(text_field="body"))
    assert sum(split.documents for split in found.splits.values()) == 20
    assert not any("wrong" in each.text for each in found.splits["train"])
    with pytest.raises(DataError, match=r"fields \['body', 'text'\]; 'bodi'.*did you mean 'body'"):
        read_corpus("x", data_dir=path, reading=Reading(text_field="bodi"))


def test_where_the_loss_cannot_be(tmp_path):
    with pytest.raises(DataError, match=r"--loss_on assistant needs rows that say who answers"):
        Writer(loss_on="assistant").write(read_form({"text": "x"}))
