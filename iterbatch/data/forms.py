"""The forms of a row: which of its fields make a text, and how.

What lives here: from fields to turns. What does not: writing them as one text (:mod:`iterbatch.data.chat`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from iterbatch.config import LossOn
from iterbatch.errors import DataError
from iterbatch.language import N_, _

Message = dict[str, Any]  # with role and content
Fields = Mapping[str, Any]

FIELDS = N_(
    "'text', 'turns' (speaker, text), 'dialogue' with 'speakers', 'messages' (role, content), "
    "'conversations' (from, value), 'instruction' with 'output', or 'prompt' with 'completion' or "
    "'response'"
)

# Who speaks in ShareGPT's words, and in a chat template's.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Plain:
    """A text."""

    text: str
    loss_on: ClassVar[LossOn] = "all"


@dataclass(frozen=True)
class Pair:
    """A prompt and what completes it."""

    prompt: str
    completion: str
    loss_on: ClassVar[LossOn] = "completion"


@dataclass(frozen=True)
class Chat:
    """Turns for a chat template."""

    messages: list[Message]
    tools: list[Any] | None = None
    loss_on: LossOn = "assistant"  # unless the user says otherwise
    last: int = 1  # turns at its end that complete the others


Form = Plain | Pair | Chat


class FieldError(DataError):
    """A field holds what it must not."""

    def __init__(self, name: str, value: Any, wanted: str) -> None:
        super().__init__(
            _("field '{name}' is a {name2} where {wanted} is needed").format(
                name=name, name2=type(value).__name__, wanted=wanted
            )
        )


def read_form(row: Fields, text_field: str | None = None) -> Form | None:
    """What a row holds, by the first of the forms that it has; None where it has none, or without text.

    Args:
        row: Its fields.
        text_field: The only one that counts.

    Raises:
        FieldError: where a field has another type than it should.
    """
    if text_field is not None:
        return _plain(row, text_field)
    for names, read in _FORMS:
        if all(name in row for name in names) and (form := read(row)) is not None:
            return form
    return None


def has_form(row: Fields, text_field: str | None = None) -> bool:
    """Whether a row has the fields of any form, with text in them or not."""
    if text_field is not None:
        return text_field in row
    return any(all(name in row for name in names) for names, _ in _FORMS)


# ------------------------------------------------------------------------------------------------------------
# Texts and dialogue


def _plain(row: Fields, name: str = "text") -> Plain | None:
    text = _string(row, name)
    return Plain(text) if text.strip() else None


def _turns(row: Fields) -> Plain | None:
    turns = _list(row, "turns")
    lines = []
    for number, turn in enumerate(turns):
        place = f"turns[{number}]"
        who, what = (_string(_mapping(turn, place), name, place) for name in ("speaker", "text"))
        lines.append((who, what))
    return _lines(lines)


def _dialogue(row: Fields) -> Plain | None:
    said, speakers = _list(row, "dialogue"), _list(row, "speakers")
    if len(said) != len(speakers):
        raise DataError(
            _("field 'dialogue' has {count} turns, 'speakers' {count2}; one each is needed").format(
                count=len(said), count2=len(speakers)
            )
        )
    for name, values in (("dialogue", said), ("speakers", speakers)):
        for number, value in enumerate(values):
            if not isinstance(value, str):
                raise FieldError(f"{name}[{number}]", value, "text")
    return _lines(list(zip(speakers, said, strict=True)))


def _lines(turns: Sequence[tuple[str, str]]) -> Plain | None:
    if not any(what.strip() for _, what in turns):
        return None
    return Plain("\n".join(f"{who}: {what}" for who, what in turns))


# ------------------------------------------------------------------------------------------------------------
# Chat and instructions


def _messages(row: Fields, name: str = "messages") -> Chat | None:
    messages = [_message(turn, f"{name}[{number}]") for number, turn in enumerate(_list(row, name))]
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools")
    if tools is not None and not isinstance(tools, list):
        raise FieldError("tools", tools, "a list")
    return Chat(messages, tools or None) if _worded(messages) else None


def _worded(messages: Sequence[Message]) -> bool:
    return any(message["content"].strip() or message.get("tool_calls") for message in messages)


def _message(turn: Any, place: str) -> Message:
    turn = _mapping(turn, place)
    if "role" in turn:
        role, content = _string(turn, "role", place), _content(turn.get("content"), f"{place}.content")
    elif "from" in turn:
        said = _string(turn, "from", place)
        if said.lower() not in ROLES:
            raise DataError(
                _("field '{place}.from' is {said!r}; known are {names}").format(
                    place=place, said=said, names=", ".join(ROLES)
                )
            )
        role, content = ROLES[said.lower()], _content(turn.get("value"), f"{place}.value")
    else:
        raise DataError(
            _("field '{place}' has {sorted}; 'role' and 'content', or 'from' and 'value', are needed").format(
                place=place, sorted=sorted(turn)
            )
        )
    if not role:
        raise DataError(
            _("field '{place}' has no role; user, assistant, system or tool is needed").format(place=place)
        )
    known = ("role", "content", "from", "value")
    message: Message = {"role": role, "content": content}
    message |= {name: value for name, value in turn.items() if name not in known and value is not None}
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"], f"{place}.tool_calls")
    return message


def _content(value: Any, place: str) -> str:
    """Text, nothing, or a list of parts of it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise FieldError(place, value, "text")
    texts = []
    for number, part in enumerate(value):
        name = f"{place}[{number}]"
        part = {"type": "text", "text": part} if isinstance(part, str) else _mapping(part, name)
        if part.get("type", "text") != "text":
            raise DataError(
                _("field '{name}' is of type {type!r}; only text can be trained on").format(
                    name=name, type=part["type"]
                )
            )
        texts.append(_string(part, "text", name))
    return "".join(texts)


def _calls(calls: Any, place: str) -> list[Any]:
    """Tool calls as templates want them: with arguments that are an object, not its JSON."""
    if not isinstance(calls, list):
        raise FieldError(place, calls, "a list")
    mended = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except ValueError:
                arguments = function["arguments"]
            call = {**call, "function": {**function, "arguments": arguments}}
        mended.append(call)
    return mended


def _instruction(row: Fields) -> Chat | None:
    instruction, given, answer, system = (
        _string(row, name) for name in ("instruction", "input", "output", "system")
    )
    if not answer.strip() or not (instruction + given).strip():
        return None
    asked = "\n\n".join(part for part in (instruction, given) if part)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Chat(messages, loss_on="completion")


def _pair(row: Fields, answer: str) -> Pair | Chat | None:
    prompt, completion = row.get("prompt"), row.get(answer)
    if isinstance(prompt, list) or isinstance(completion, list):  # both as messages
        parts = [
            [_message(turn, f"{name}[{number}]") for number, turn in enumerate(_list(row, name))]
            for name in ("prompt", answer)
        ]
        chat = Chat([*parts[0], *parts[1]], loss_on="completion", last=len(parts[1]))
        return chat if _worded(parts[1]) else None
    prompt, completion = _string(row, "prompt"), _string(row, answer)
    return Pair(prompt, completion) if completion.strip() else None


# In the order in which they are looked for: fields that must be there, and how they are read.
_FORMS: tuple[tuple[tuple[str, ...], Callable[[Fields], Form | None]], ...] = (
    (("text",), _plain),
    (("turns",), _turns),
    (("dialogue", "speakers"), _dialogue),
    (("messages",), _messages),
    (("conversations",), lambda row: _messages(row, "conversations")),
    (("instruction", "output"), _instruction),
    (("prompt", "completion"), lambda row: _pair(row, "completion")),
    (("prompt", "response"), lambda row: _pair(row, "response")),
)


# ------------------------------------------------------------------------------------------------------------
# Types


def _string(fields: Fields, name: str, place: str = "") -> str:
    """A field of text; empty where it is null or not there."""
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise FieldError(f"{place}.{name}" if place else name, value, "text")
    return value or ""


def _list(fields: Fields, name: str) -> list[Any]:
    value = fields.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a CSV file
        value = _json(value, name)
    if value is not None and not isinstance(value, list):
        raise FieldError(name, value, "a list")
    return value or []


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(place, value, _("an object with fields"))
    return value


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise DataError(
            _("field '{name}' is text that is no JSON; a list is needed").format(name=name)
        ) from problem
