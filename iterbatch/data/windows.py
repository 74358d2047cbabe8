"""Evaluation text to windows in which every token is scored exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from iterbatch.data.batch import IGNORED, MicroBatch
from iterbatch.data.blocks import Blocks
from iterbatch.data.documents import Document
from iterbatch.data.tokens import tokenize
from iterbatch.errors import DataError
from iterbatch.language import _
from iterbatch.records.scored import Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """One stretch of a document: ``scored`` of its last tokens are predicted, the rest is context."""

    input_ids: np.ndarray  # (length,) int32
    targets: np.ndarray  # (length,) int32
    scored: int
    document: int = 0  # whose, by position in its text
    trained: np.ndarray | None = None  # (scored,) bool: which of those the loss is on; None: all
    ends: bool = False  # whether its last target is the document's EOS, and the loss is on it

    @property
    def labels(self) -> int:
        """How many tokens the loss is on."""
        return self.scored if self.trained is None else int(self.trained.sum())


@dataclass(frozen=True)
class EvalText:
    """A split prepared for scoring: windows, and words and bytes in its source's own form."""

    windows: list[Window]
    words: int
    bytes: int
    tokens: int  # that the loss is on
    document_tokens: list[int]  # of each document that has any
    all_tokens: int = 0  # those without loss included, the ends of documents not
    cut: bool = False  # whether the last document was longer than was wanted

    @property
    def documents(self) -> int:
        """How many documents are scored."""
        return len(self.document_tokens)

    @property
    def counts(self) -> Scored:
        """How much text it is."""
        return Scored.of(self.document_tokens)


def rolling_windows(
    ids: Sequence[int] | np.ndarray,
    prefix: int,
    max_length: int,
    document: int = 0,
    trained: np.ndarray | None = None,
    *,
    ends: bool = False,
) -> Iterator[Window]:
    """Cut one document so that every token is scored exactly once.

    The arithmetic of lm-evaluation-harness's ``loglikelihood_rolling`` (context of one token,
    disjoint windows): the first window starts with the prefix token, each full window with the last
    token of the one before it, and a short last window is filled up with context. Windows without a token
    that the loss is on are left out.

    Args:
        ids: Tokens of the document.
        prefix: What stands before it.
        max_length: Of a window.
        document: Its position in its text.
        trained: (tokens,) bool, which of them the loss is on; default: all.
        ends: Whether the last of them is an EOS that the loss is on.
    """
    sequence, done = np.array([prefix, *ids], dtype=np.int32), 0  # the windows share it
    while done < len(ids):
        scored = min(max_length, len(ids) - done)
        end = done + scored
        start = max(0, end - max_length)
        chosen = None if trained is None or trained[done:end].all() else trained[done:end]
        if chosen is None or chosen.any():
            last = ends and end == len(ids)
            yield Window(sequence[start:end], sequence[start + 1 : end + 1], scored, document, chosen, last)
        done = end


def prepare_eval(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_tokens: int | None = None,
) -> EvalText:
    """Tokenize documents, in their order, until ``max_tokens`` are reached, and cut them into windows.

    Every document is scored to its EOS, as it is trained. The last one is scored whole where that passes the
    cap by a tenth of it or less, and is else cut there.

    Raises:
        DataError: where there is no token to score.
    """
    bos: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows: list[Window] = []
    words = size = tokens = 0
    lengths: list[int] = []
    limit, cut = max_tokens if max_tokens is not None else math.inf, False
    for document in _whole(tokenizer, documents, limit):
        if tokens + document.count > 1.1 * limit:
            document, cut = document.part(int(limit) - tokens, tokenizer), True
        found = list(
            rolling_windows(
                document.ids, bos, max_length, len(lengths), document.trained, ends=document.end_scored
            )
        )
        labels = sum(window.labels for window in found)
        windows += found
        words, size, tokens = words + document.words, size + document.bytes, tokens + document.count
        lengths += [labels] if labels else []
        if tokens >= limit:
            break
    if not lengths:
        raise DataError(
            _(
                "the evaluation text has no tokens that the loss is on; give a validation and a test "
                "file with text in them, or --loss_on all"
            )
        )
    return EvalText(windows, words, size, sum(lengths), lengths, tokens, cut)


@dataclass(frozen=True)
class _Scored:
    """A document as it is scored; ends with its EOS unless it is cut."""

    ids: np.ndarray
    trained: np.ndarray
    words: int
    bytes: int
    whole: bool = True

    @property
    def count(self) -> int:
        """Tokens without the EOS."""
        return len(self.ids) - self.whole

    @property
    def end_scored(self) -> bool:
        return self.whole and bool(self.trained[-1])

    def part(self, count: int, tokenizer: PreTrainedTokenizerBase) -> _Scored:
        """The first tokens of it; words and bytes are of what they decode to."""
        ids, trained = self.ids[:count], self.trained[:count]
        text = Document.of(str(tokenizer.decode(ids[trained])))
        return _Scored(ids, trained, text.words, text.bytes, whole=False)


def _whole(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], limit: float
) -> Iterator[_Scored]:
    """Documents from their pieces; one that is longer than may be scored is the last, and not whole."""
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    words = size = 0
    for tokens in tokenize(tokenizer, documents, group=1 << 16):
        ids.append(tokens.ids)
        trained.append(tokens.trained)
        words, size = words + tokens.document.words, size + tokens.document.bytes
        if sum(map(len, ids)) > 1.1 * limit:
            yield _Scored(np.concatenate(ids), np.concatenate(trained), words, size, whole=False)
            return
        if tokens.document.ends:
            end = np.array([tokenizer.eos_token_id], dtype=np.int32)
            on_end = np.array([tokens.document.end_trained])
            yield _Scored(np.concatenate([*ids, end]), np.concatenate([*trained, on_end]), words, size)
            ids, trained, words, size = [], [], 0, 0


def block_text(blocks: Blocks, rows: np.ndarray | None = None) -> EvalText:
    """Training blocks to be scored as they are trained, each as a document of its own.

    Args:
        blocks: The training text.
        rows: Which of them; default: all.
    """
    rows = np.arange(len(blocks)) if rows is None else rows
    windows = [
        Window(
            blocks.ids[row][:-1].astype(np.int32),
            blocks.ids[row][1:].astype(np.int32),
            blocks.length - 1,
            document=place,
            trained=blocks.trained[row][1:],
        )
        for place, row in enumerate(rows)
    ]
    tokens = [window.labels for window in windows]
    return EvalText(windows, 0, 0, sum(tokens), tokens, len(rows) * blocks.length)


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
        targets = torch.from_numpy(window.targets[-window.scored :].astype(np.int64))
        if window.trained is not None:
            targets[torch.from_numpy(~window.trained)] = IGNORED
        labels[row, start + size - window.scored : start + size] = targets
    return MicroBatch(input_ids, labels, None if padding_side == "right" else mask)
