"""Documents as token ids, and which of them are trained on; what begins and ends a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iterbatch.data.documents import Document, Span
from iterbatch.errors import DataError
from iterbatch.language import _

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """Of a document, or of a piece of a long one; without BOS and EOS."""

    ids: np.ndarray  # (tokens,) int32
    trained: np.ndarray  # (tokens,) bool: whether the loss is on it
    document: Document

    def part(self, stop: int) -> Tokens:
        """The first of them."""
        return Tokens(self.ids[:stop], self.trained[:stop], self.document)


def begin_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token before every document; None where there is none, or the one before it ended with the same."""
    bos: Any = tokenizer.bos_token_id
    return None if bos == tokenizer.eos_token_id else bos


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], group: int = 1 << 22
) -> Iterator[Tokens]:
    """Yield the tokens of each document, or piece of one, in order.

    ``group`` characters are tokenized at a time.

    Raises:
        DataError: where the loss is on parts of a text and the tokenizer does not say which tokens those are.
    """
    together: list[Document] = []
    size = 0
    for document in documents:
        together.append(document)
        size += len(document.text) + 1
        if size >= group:
            yield from _tokens(tokenizer, together)
            together, size = [], 0
    yield from _tokens(tokenizer, together)


def _tokens(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Iterator[Tokens]:
    """Texts in which all is literal by one call, all others by another."""
    found: dict[int, Tokens] = {}
    for literal in (True, False):
        chosen = [place for place, each in enumerate(documents) if (each.literal is None) is literal]
        if not chosen:
            continue
        texts = [documents[place].text for place in chosen]
        marked = any(documents[place].trained is not None or documents[place].literal for place in chosen)
        # verbose=False: a document longer than the context is no fault here, it is cut into blocks.
        encoded: Any = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=literal,
            return_attention_mask=False,
            return_offsets_mapping=_has_offsets(tokenizer, marked),
            verbose=False,
        )
        offsets = encoded["offset_mapping"] if marked else [()] * len(texts)
        for place, ids, spans in zip(chosen, encoded["input_ids"], offsets, strict=True):
            found[place] = _of(tokenizer, documents[place], ids, spans)
    return (found[place] for place in range(len(documents)))


def _has_offsets(tokenizer: PreTrainedTokenizerBase, needed: bool) -> bool:
    if needed and not tokenizer.is_fast:
        raise DataError(
            _(
                "the tokenizer does not say where its tokens stand in a text, so the loss cannot be on "
                "parts of it; give --loss_on all --special_tokens_in_text keep, or a model with a "
                "tokenizer.json"
            )
        )
    return needed


def _of(
    tokenizer: PreTrainedTokenizerBase, document: Document, ids: list[int], offsets: Sequence[Span]
) -> Tokens:
    if document.literal:
        ids, offsets = _as_text(tokenizer, document, ids, offsets)
    tokens = np.asarray(ids, dtype=np.int32)
    if document.trained is None:
        return _bare(tokenizer, Tokens(tokens, np.ones(len(tokens), dtype=bool), document))
    trained = np.zeros(len(tokens), dtype=bool)
    starts, stops = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    for start, stop in document.trained:
        trained |= (starts < stop) & (np.maximum(stops, starts + 1) > start)
    return _bare(tokenizer, Tokens(tokens, trained, document))


def _as_text(
    tokenizer: PreTrainedTokenizerBase, document: Document, ids: list[int], offsets: Sequence[Span]
) -> tuple[list[int], list[Span]]:
    """What looks like a special token where the document says that it is only text, as ordinary tokens."""
    special, literal = set(tokenizer.all_special_ids), document.literal or ()
    new: list[int] = []
    places: list[Span] = []
    for token, (start, stop) in zip(ids, offsets, strict=True):
        if token in special and any(one < stop and start < two for one, two in literal):
            words = document.text[start:stop]
            found = tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            new += found
            places += [(start, stop)] * len(found)
        else:
            new.append(token)
            places.append((start, stop))
    return new, places


def _bare(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Tokens:
    """Without a BOS at the start and an EOS at the end that are in the text already."""
    if tokens.document.literal is None:
        return tokens  # no words of it stand for one
    ids, start, stop = tokens.ids, 0, len(tokens.ids)
    while start < stop and ids[start] == tokenizer.bos_token_id:
        start += 1
    while stop > start and ids[stop - 1] == tokenizer.eos_token_id:
        stop -= 1
    return Tokens(ids[start:stop], tokens.trained[start:stop], tokens.document)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over vocabulary and special tokens: blocks of one tokenizer are never served to another."""
    content = json.dumps(
        [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))]
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content += backend.to_str() if backend is not None else type(tokenizer).__name__
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
