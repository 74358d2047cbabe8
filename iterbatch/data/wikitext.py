"""WikiText's own form: articles, and ordinary punctuation for its spaced-out one."""

import re
from collections.abc import Iterable, Iterator

from iterbatch.data import documents
from iterbatch.data.documents import Document


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
    """An article with ordinary punctuation; its ``<unk>``, a rare word, stays that token."""
    return Document.of(detokenize_wikitext(article).strip("\n") + "\n", source=article, literal=())
