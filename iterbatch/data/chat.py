"""A row's form as one text, with the stretches that the loss is on.

Chat is written by the tokenizer's own template; where it has none, a turn is a line ``role: content``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from iterbatch.config import LossOn
from iterbatch.data.documents import Document, Span, within
from iterbatch.data.forms import Chat, Form, Message, Pair, Plain
from iterbatch.data.template import Template
from iterbatch.errors import DataError
from iterbatch.language import _

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What looks like the n-th special token is n places after the first, then REST up to the same length: private
# characters, from the last of Unicode's planes.
FIRST, REST = 0x100000, "\U0010fffd"
_HIDDEN = re.compile(f"[{chr(FIRST)}-\U0010fffc]{REST}*")

Render = Callable[..., str]  # messages, and whether the header of an answer is to follow


class Writer:
    """Writes rows as texts.

    Args:
        tokenizer: Whose chat template and special tokens count; None: chat is written as lines.
        loss_on: What the loss is on; None: what is usual for each form.
        keep_special: Whether a special token's words in a row stand for that token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        loss_on: LossOn | None = None,
        *,
        keep_special: bool = False,
    ) -> None:
        self.loss_on: LossOn | None = loss_on
        self.keep_special = keep_special
        self._tokenizer = tokenizer
        self._has_template = tokenizer is not None and bool(getattr(tokenizer, "chat_template", None))
        self._templates: dict[str, Template] = {}
        self._words = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True) if tokenizer else []
        self._special = re.compile("|".join(map(re.escape, self._words))) if self._words else None
        self._literal = () if keep_special else None

    def on(self, form: Form) -> LossOn:
        """What the loss is on in a row of this form."""
        return self.loss_on or form.loss_on

    def write(self, form: Form) -> Document:
        """One row as a text.

        Raises:
            DataError: where the template refuses it, or has no part that the loss could be on.
        """
        if isinstance(form, Plain):
            if self.on(form) != "all":
                raise DataError(
                    _(
                        "--loss_on {loss_on} needs rows that say who answers what, and this one is a "
                        "text only; give --loss_on all"
                    ).format(loss_on=self.loss_on)
                )
            return Document.of(form.text, literal=self._literal)
        if isinstance(form, Pair):
            return self._pair(form)
        return self._chat(form) if self._has_template else self._lines(form)

    # -- without a template ------------------------------------------------------------------------------

    def _pair(self, pair: Pair) -> Document:
        seam = "" if not pair.prompt or pair.prompt[-1].isspace() or pair.completion[:1].isspace() else "\n"
        text, start = f"{pair.prompt}{seam}{pair.completion}", len(pair.prompt) + len(seam)
        trained = None if self.on(pair) == "all" else ((start, len(text)),)
        return Document.of(text, literal=self._literal, trained=trained)

    def _lines(self, chat: Chat) -> Document:
        text, spans = "", []
        for number, message in enumerate(chat.messages):
            text += f"{message['role']}: "
            start = len(text)
            text += _said(message) + ("\n" if number < len(chat.messages) - 1 else "")
            spans.append((start, len(text)))
        trained = tuple(spans[number] for number in self._answers(chat))
        return Document.of(text, literal=self._literal, trained=None if self.on(chat) == "all" else trained)

    def _answers(self, chat: Chat) -> list[int]:
        """Which turns the loss is on, unless it is on all."""
        count = len(chat.messages)
        first = count - chat.last if self.on(chat) == "completion" else 0
        return [number for number in range(first, count) if chat.messages[number]["role"] == "assistant"]

    # -- with one ------------------------------------------------------------------------------------------

    def _chat(self, chat: Chat) -> Document:
        messages, render = self._hidden(chat.messages), self._renderer(chat)
        text = render(messages)
        trained = None if self.on(chat) == "all" else self._answered(chat, messages, text, render)
        literal: tuple[Span, ...] = ()
        if messages is not chat.messages:
            literal = tuple(match.span() for match in _HIDDEN.finditer(text))
            text = _HIDDEN.sub(lambda match: self._words[ord(match.group()[0]) - FIRST], text)
        return self._bare(text, trained, literal)

    def _template_for(self, chat: Chat) -> Template:
        """The tokenizer's template for such rows: some have another one for tools."""
        tokenizer: Any = self._tokenizer
        source = tokenizer.get_chat_template(tools=chat.tools)
        if source not in self._templates:
            self._templates[source] = Template(source, tokenizer.special_tokens_map)
        return self._templates[source]

    def _renderer(self, chat: Chat) -> Render:
        template = self._template_for(chat)
        return lambda messages, answer=False: template.render(messages, chat.tools, answer=answer)[0]

    def _answered(self, chat: Chat, messages: list[Message], text: str, render: Render) -> tuple[Span, ...]:
        """Where the answers stand in a text: as the template marks them, else by comparing its beginnings."""
        answers = self._answers(chat)
        marked = self._marked(chat, messages, text)
        if marked:
            return marked[-len(answers) :] if self.on(chat) == "completion" else marked
        return tuple(_answer(messages, number, text, render) for number in answers)

    def _marked(self, chat: Chat, messages: list[Message], text: str) -> tuple[Span, ...]:
        template = self._template_for(chat)
        if not template.marks:
            return ()
        rendered, spans = template.render(messages, chat.tools, mark=True)
        return tuple(spans) if rendered == text else ()

    def _hidden(self, messages: list[Message]) -> list[Message]:
        """With what looks like a special token and is only text as private characters, one for one.

        So it is known again when the template has written its own.
        """
        said, special = "".join(each["content"] for each in messages), self._special
        if special is None or self.keep_special or _HIDDEN.search(said) or not special.search(said):
            return messages
        return [{**each, "content": special.sub(self._hide, each["content"])} for each in messages]

    def _hide(self, match: re.Match[str]) -> str:
        return chr(FIRST + self._words.index(match.group())) + REST * (len(match.group()) - 1)

    def _bare(self, text: str, trained: tuple[Span, ...] | None, literal: tuple[Span, ...]) -> Document:
        """Without the start and the end of a text that the template wrote: every document gets its own."""
        tokenizer: Any = self._tokenizer
        begin, end = tokenizer.bos_token, tokenizer.eos_token
        start, whole = 0, len(text.rstrip())
        stop = whole
        while begin and text.startswith(begin, start) and (start, start + len(begin)) not in literal:
            start += len(begin)
        while end and text.endswith(end, start, stop) and (stop - len(end), stop) not in literal:
            stop -= len(end)
        if stop == whole:
            stop = len(text)
        if trained and trained[-1][1] >= whole:  # then the loss is on the end, too
            trained = (*trained[:-1], (min(trained[-1][0], stop), stop))
        return Document.of(
            text[start:stop], trained=within(trained, start, stop), literal=within(literal, start, stop)
        )


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _answer(messages: Sequence[Message], number: int, text: str, render: Render) -> Span:
    """Where one answer stands in a text, its end of turn included.

    From the end of what is written before it, its own header included, to the end of what is written with
    it. Where a template writes an answer in another way once others follow, its words are looked for.

    Raises:
        DataError: where the template writes what came before in another way, too.
    """
    before = [render(messages[:number], answer) for answer in (True, False)] if number else [""]
    start = next((len(each) for each in before if text.startswith(each)), None)
    if start is not None:
        through, words = render(messages[: number + 1]), messages[number]["content"].strip()
        if text.startswith(through) and len(through) >= start:
            return start, start + len(text[start : len(through)].rstrip())
        tail = through[through.rfind(words) + len(words) :].rstrip()
        stop = text.find(words, start) + len(words)
        if stop >= start + len(words) and text.startswith(tail, stop):
            return start, stop + len(tail)
    raise DataError(
        _(
            "the chat template writes message {number} so that the answer cannot be told apart; give "
            "--loss_on all, or a template that marks answers by {{% generation %}}"
        ).format(number=number + 1)
    )
