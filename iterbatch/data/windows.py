"""Evaluation text to windows in which every token is scored exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from iterbatch.data.batch import IGNORED, MicroBatch
from iterbatch.data.data_loader import tokenize
from iterbatch.data.documents import Document
from iterbatch.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """One stretch of a document: ``scored`` of its last tokens are predicted, the rest is context."""

    input_ids: np.ndarray  # (length,) int32
    targets: np.ndarray  # (length,) int32
    scored: int
    document: int = 0  # whose, by position in its text


@dataclass(frozen=True)
class EvalText:
    """A split prepared for scoring: windows, and words and bytes in its source's own form."""

    windows: list[Window]
    words: int
    bytes: int
    tokens: int
    document_tokens: list[int]  # of each document that has any

    @property
    def documents(self) -> int:
        """How many documents are scored."""
        return len(self.document_tokens)


def rolling_windows(ids: Sequence[int], prefix: int, max_length: int, document: int = 0) -> Iterator[Window]:
    """Cut one document so that every token is scored exactly once.

    The arithmetic of lm-evaluation-harness's ``loglikelihood_rolling`` (context of one token,
    disjoint windows): the first window starts with the prefix token, each full window with the last
    token of the one before it, and a short last window is filled up with context.
    """
    sequence, done = np.array([prefix, *ids], dtype=np.int32), 0  # the windows share it
    while done < len(ids):
        scored = min(max_length, len(ids) - done)
        end = done + scored
        start = max(0, end - max_length)
        yield Window(sequence[start:end], sequence[start + 1 : end + 1], scored, document)
        done = end


def prepare_eval(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_tokens: int | None = None,
) -> EvalText:
    """Tokenize whole documents, in their order, until ``max_tokens`` are reached, and cut them into windows.

    The last document may pass the cap: documents are scored whole, so that words and bytes stay exact.
    """
    prefix: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows: list[Window] = []
    words = size = tokens = 0
    lengths: list[int] = []
    for document, ids in zip(documents, tokenize(tokenizer, documents, group=1 << 16), strict=False):
        windows.extend(rolling_windows(ids, prefix, max_length, len(lengths)))
        words, size, tokens = words + document.words, size + document.bytes, tokens + len(ids)
        lengths += [len(ids)] if ids else []
        if max_tokens is not None and tokens >= max_tokens:
            break
    if not tokens:
        raise DataError(
            "the evaluation text has no tokens; give a validation and a test file with text in them"
        )
    return EvalText(windows, words, size, tokens, lengths)


def collate(windows: Sequence[Window], pad_id: int, padding_side: str = "right") -> MicroBatch:
    """Pad windows to one length. On the right causal attention needs no mask; on the left it does."""
    length = max(len(window.input_ids) for window in windows)
    input_ids = torch.full((len(windows), length), pad_id)
    labels = torch.full((len(windows), length), IGNORED)
    mask = torch.zeros((len(windows), length), dtype=torch.int64)
    for row, window in enumerate(windows):
        size = len(window.input_ids)
        start = 0 if padding_side == "right" else length - size
        input_ids[row, start : start + size] = torch.from_numpy(window.input_ids)
        mask[row, start : start + size] = 1
        labels[row, start + size - window.scored : start + size] = torch.from_numpy(
            window.targets[-window.scored :]
        )
    return MicroBatch(input_ids, labels, None if padding_side == "right" else mask)
