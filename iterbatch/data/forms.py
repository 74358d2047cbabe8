"""The forms of text: WikiText, plain rows, dialogue, chat messages."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from iterbatch.data import documents
from iterbatch.data.documents import Document
from iterbatch.errors import DataError

FIELDS = "'text', 'turns' (speaker, text), 'dialogue' with 'speakers', or 'messages' (role, content)"


def detokenize_wikitext(text: str) -> str:
    """Turn WikiText's spaced-out form (`` , ``, ``@-@``) into ordinary punctuation.

    The rules undo what the Moses tokenizer did to the corpus; the same job as the detokeniser of
    lm-evaluation-harness's ``wikitext`` task.
    """
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,:;?!%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{$£€]) ", r"\1", text)
    text = re.sub(r" '(s|m|re|ve|ll|d|t)\b", r"'\1", text)
    text = re.sub(r" n't\b", "n't", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r"(?<=\w) ' (?=[^'\n]* ' )", " '", text)
    text = re.sub(r"(?m)^ +| +$", "", text)
    return re.sub(r"^((?:= ?)+)([^=\n]+?)((?: ?=)+)$", _plain_heading, text, flags=re.MULTILINE)


def _plain_heading(match: re.Match[str]) -> str:
    marks = match.group(1).replace(" ", "")
    return f"{marks} {match.group(2).strip()} {marks}"


def wikitext_articles(lines: Iterable[str]) -> Iterator[str]:
    """Group WikiText's lines into articles.

    A new one starts at each top-level heading ``= Title =``, or after ``PIECE`` characters without one.
    """
    article: list[str] = []
    size, previous_blank = 0, True
    for line in lines:
        stripped = line.strip()
        # A top-level heading stands after a blank line; ``= = Section = =`` has a second mark, and a
        # formula's line does not follow a blank.
        is_title = previous_blank and re.fullmatch(r"= [^=].*[^=] =|= [^=] =", stripped) is not None
        if (is_title or size > documents.PIECE) and any(part.strip() for part in article):
            yield "\n".join(article)
            article, size = [], 0
        article.append(line.rstrip("\n"))
        size += len(line)
        previous_blank = not stripped
    if any(part.strip() for part in article):
        yield "\n".join(article)


def wikitext_document(article: str) -> Document:
    """An article with ordinary punctuation."""
    return Document.of(detokenize_wikitext(article).strip("\n") + "\n", source=article)


ChatTemplate = Callable[[list[dict[str, str]]], str]


def row_text(row: dict[str, Any], chat_template: ChatTemplate | None = None) -> str:
    """The text of one row, whichever of the supported fields it has.

    Args:
        row: One record of a JSONL, CSV, Parquet or hub data set.
        chat_template: Writes ``messages`` as the tokenizer's own template does; without one a turn
            is a line ``role: content``.

    Returns:
        The text; dialogue has one line a turn, ``speaker: text``.

    Raises:
        DataError: where no supported field is there, or it has another form than it should.
    """
    try:
        if isinstance(row.get("text"), str):
            return row["text"]
        if row.get("turns"):
            return "\n".join(f"{turn['speaker']}: {turn['text']}" for turn in row["turns"])
        if row.get("dialogue") and row.get("speakers"):
            return "\n".join(
                f"{who}: {what}" for who, what in zip(row["speakers"], row["dialogue"], strict=True)
            )
        if row.get("messages"):
            messages = [
                {"role": str(turn["role"]), "content": str(turn["content"])} for turn in row["messages"]
            ]
            if chat_template is not None:
                return chat_template(messages)
            return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
    except (KeyError, TypeError, ValueError) as problem:
        raise DataError(
            f"a row's dialogue cannot be read ({type(problem).__name__}: {problem}); allowed fields are "
            f"{FIELDS}"
        ) from problem
    if any(name in row for name in ("text", "turns", "dialogue", "messages")):
        return ""  # a row with an empty field is an empty document, skipped by the caller
    raise DataError(f"the rows have the fields {sorted(row)}; one of them must be {FIELDS}")
