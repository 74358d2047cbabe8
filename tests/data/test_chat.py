"""Where the loss is: the answers of every family of chat templates, and nothing else."""

import gc

import psutil
import pytest
from support.templates import FAMILIES, with_template

from iterbatch.data.blocks import prepare_blocks
from iterbatch.data.chat import Writer
from iterbatch.data.forms import read_form
from iterbatch.data.tokens import tokenize
from iterbatch.data.windows import prepare_eval
from iterbatch.errors import DataError

TURNS = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "It is Paris."},
    {"role": "user", "content": "And of Peru?"},
    {"role": "assistant", "content": "That is Lima."},
]
# What the loss is on, an answer each, as the family writes it.
ANSWERS = {
    "Llama 2": [" It is Paris. </s>", " That is Lima. "],
    "Llama 3": ["It is Paris.<|eot_id|>", "That is Lima."],
    "ChatML": ["It is Paris.<|im_end|>", "That is Lima."],
    "Mistral": ["It is Paris.</s>", "That is Lima."],
    "Qwen": ["It is Paris.<|im_end|>", "<think>\n\n</think>\n\nThat is Lima.<|im_end|>\n"],
    "no system role": ["It is Paris.<end_of_turn>", "That is Lima.<end_of_turn>\n"],
    "with a generation mask": ["It is Paris.<|im_end|>", "That is Lima."],
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def _spans(document):
    return [document.text[start:stop] for start, stop in document.trained]


def test_the_loss_is_on_the_answers(tokenizer, family):
    form = read_form({"messages": TURNS})
    document = Writer(with_template(tokenizer, family)).write(form)
    assert _spans(document) == ANSWERS[family]
    assert document.end_trained
    assert Writer(with_template(tokenizer, family), "all").write(form).trained is None
    assert _spans(Writer(with_template(tokenizer, family), "completion").write(form)) == ANSWERS[family][1:]


def test_one_begin_and_one_end_whatever_the_template_wrote(tokenizer, family):
    changed = with_template(tokenizer, family)
    bare = changed.apply_chat_template(TURNS, tokenize=False).removeprefix(changed.bos_token)
    if bare.rstrip().endswith(changed.eos_token):
        bare = bare.rstrip().removesuffix(changed.eos_token)
    ids = changed(bare, add_special_tokens=False)["input_ids"]
    once = [changed.bos_token_id, *ids, changed.eos_token_id]
    documents = [Writer(changed, "all").write(read_form({"messages": TURNS}))] * 3
    blocks = prepare_blocks(documents, changed, 8)
    assert blocks.ids.reshape(-1).tolist() == (once * 3)[: 3 * len(once) // 8 * 8]
    window = prepare_eval(documents[:1], changed, 512).windows[0]
    assert [*window.input_ids.tolist(), int(window.targets[-1])] == once


def test_training_and_evaluation_are_over_the_same_tokens(tokenizer, family):
    changed = with_template(tokenizer, family)
    document = Writer(changed).write(read_form({"messages": TURNS}))
    (tokens,) = tokenize(changed, [document])
    window = prepare_eval([document], changed, 512).windows[0]
    assert window.trained.tolist() == [*tokens.trained.tolist(), True]
    assert window.ends
    words = changed.decode(tokens.ids[tokens.trained])
    assert "Paris" in words
    assert "Lima" in words
    assert "capital" not in words
    assert "Peru" not in words


def test_a_template_that_refuses_a_row_says_so_in_its_own_words(tokenizer):
    system = [{"role": "system", "content": "Be brief."}, *TURNS]
    for family, words in (
        ("no system role", "System role not supported"),
        ("Mistral", "Only user and assistant"),
    ):
        with pytest.raises(DataError, match=f"the chat template refuses it: {words}"):
            Writer(with_template(tokenizer, family)).write(read_form({"messages": system}))
    with pytest.raises(DataError, match="Conversation roles must alternate"):
        Writer(with_template(tokenizer, "Llama 2")).write(read_form({"messages": TURNS[1:]}))


def test_an_answer_that_cannot_be_told_apart(tokenizer):
    changed = with_template(tokenizer, "ChatML")
    changed.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"cannot be told apart; give --loss_on all"):
        Writer(changed).write(read_form({"messages": TURNS}))


def test_without_a_template_a_turn_is_a_line(tokenizer):
    document = Writer(tokenizer).write(read_form({"messages": TURNS[:2]}))
    assert document.text == "user: What is the capital of France?\nassistant: It is Paris."
    assert _spans(document) == ["It is Paris."]


@pytest.mark.parametrize("family", ["ChatML", "Llama 3"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_words_of_a_special_token_in_what_was_said(tokenizer, family, keep):
    """They are only text, unless the user says otherwise; those of the template are tokens."""
    changed = with_template(tokenizer, family)
    said = f"Type {changed.eos_token} or <s> to stop."
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    document = Writer(changed, keep_special=keep).write(read_form({"messages": turns}))
    (tokens,) = tokenize(changed, [document])
    ids = tokens.ids.tolist()
    assert changed.decode(ids) == document.text
    by_template = 1 if changed.eos_token in FAMILIES[family][1] else 0
    assert ids.count(changed.eos_token_id) == by_template + (2 if keep else 0)
    assert ids.count(changed.bos_token_id) == (2 if keep else 0)
    assert said in changed.decode(tokens.ids[tokens.trained])


def test_special_words_in_a_raw_text(tokenizer):
    text = "In HTML <s>strike</s> is old."
    for keep, count in ((False, 0), (True, 1)):
        document = Writer(tokenizer, keep_special=keep).write(read_form({"text": text}))
        (tokens,) = tokenize(tokenizer, [document])
        assert tokens.ids.tolist().count(tokenizer.eos_token_id) == count
        assert tokenizer.decode(tokens.ids) == text


def test_tools_reach_the_template(tokenizer):
    changed = with_template(tokenizer, "ChatML")
    changed.chat_template = (
        "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}"
        "{% if m.tool_calls %}<{{ m.tool_calls[0].function.arguments.city }}>{% endif %}"
        "{{ m.role }}={{ m.content }};{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    row = {
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "messages": [
            {"role": "user", "content": "How is it?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ],
    }
    document = Writer(changed).write(read_form(row))
    assert document.text == "[weather]user=How is it?;<Lima>assistant=;tool=sunny;assistant=Sunny.;"


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
LOOPS += "{% endfor %}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOPS, "takes more than 3 s for one conversation"),
        ("{{ 'a' * 10**10 }}", "more than 300 MB of memory"),
        ("{{ 'a' * 2**25 }}", "33,554,432 characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for %}", "refuses it"),
    ],
)
def test_a_template_that_does_not_end_or_grows_or_reaches_out_is_refused(tokenizer, template, words):
    changed = with_template(tokenizer, "ChatML")
    changed.chat_template = template
    with pytest.raises(DataError, match=words):
        Writer(changed).write(read_form({"messages": TURNS}))


@pytest.mark.slow
def test_a_template_s_process_is_gone_with_its_writer(tokenizer):
    before = len(psutil.Process().children())
    writer = Writer(with_template(tokenizer, "ChatML"))
    writer.write(read_form({"messages": TURNS}))
    assert len(psutil.Process().children()) == before + 1
    del writer
    gc.collect()
    assert len(psutil.Process().children()) == before
