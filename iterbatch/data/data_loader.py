"""Documents to token blocks to batches, in an order set by (seed, epoch) alone; evaluation text to windows.

What lives here: tokens, packing, memory-mapped blocks, the order of batches, evaluation windows. What does not: reading text, which is in
:mod:`iterbatch.data.documents`.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iterbatch.data.cache import cache_folder
from iterbatch.data.documents import Document
from iterbatch.errors import DataError

IGNORED = -100  # a position without a label, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Ahead:
    """Prefix activations of a micro-batch's rows, read from a store before they are needed."""

    hidden: Tensor  # (rows, length, width); rows that are not there are undefined
    seconds: list[float | None]  # a row: what it took to compute, None where it is not there


@dataclass(frozen=True)
class MicroBatch:
    """Rows of tokens that go through the model together.

    Labels are aligned with their inputs: ``labels[row, t]`` is the token that position ``t`` must predict, or ``IGNORED``.
    """

    input_ids: Tensor  # (rows, length) int64
    labels: Tensor  # (rows, length) int64
    attention_mask: Tensor | None = None  # (rows, length) int64, 1 for real tokens; None where padding, if any, is on the right
    blocks: tuple[int, ...] | None = None  # which item of its text each row is; empty where the only row is there for company
    rows_in_all: int = 0  # rows over all processes; 0 stands for the rows here
    ahead: Ahead | None = None
    label_tokens: int = -1  # number of tokens this micro-batch predicts; counted here, before it is on a device

    def __post_init__(self) -> None:
        if self.label_tokens < 0:
            object.__setattr__(self, "label_tokens", int((self.labels != IGNORED).sum()))

    def to(self, device: torch.device) -> "MicroBatch":
        """The same rows on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """The same rows in page-locked memory, from which a copy to a GPU runs beside its work."""
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        mask = None if self.attention_mask is None else move(self.attention_mask)
        ahead = None if self.ahead is None else Ahead(move(self.ahead.hidden), self.ahead.seconds)
        return dataclasses.replace(self, input_ids=move(self.input_ids), labels=move(self.labels), attention_mask=mask, ahead=ahead)


@dataclass(frozen=True)
class Batch:
    """One accumulation window: all micro-batches of one optimizer update; the unit of repetition."""

    micro_batches: tuple[MicroBatch, ...]
    index: int = 0  # position in its arm, counted over all epochs
    epoch: int = 0

    @property
    def first_exposure(self) -> bool:
        """Whether the model has never trained on this text in this arm."""
        return self.epoch == 0

    @property
    def label_tokens(self) -> int:
        """Number of tokens all micro-batches predict, on this process."""
        return sum(micro.label_tokens for micro in self.micro_batches)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows over all processes, length) of each micro-batch: what the FLOP model needs to know."""
        return [(micro.rows_in_all or micro.input_ids.shape[0], micro.input_ids.shape[1]) for micro in self.micro_batches]

    @property
    def rows(self) -> int:
        """Blocks in it, on this process."""
        return sum(len(micro.input_ids) for micro in self.micro_batches)

    def part(self, number: int, parts: int) -> "Batch":
        """One of ``parts`` shares of its rows, in their order, no two of which differ by more than a row; micro-batches as large as before.

        With several processes each takes that share of its own rows; one that has none is given an unlabelled row for company.
        """
        ids, labels = (torch.cat([getattr(micro, name) for micro in self.micro_batches]) for name in ("input_ids", "labels"))
        blocks = [block for micro in self.micro_batches for block in (micro.blocks or [None] * len(micro.input_ids))]
        in_all = len(np.array_split(np.arange(sum(rows for rows, _ in self.shapes)), parts)[number])
        share, size = np.array_split(np.arange(len(ids)), parts)[number], len(self.micro_batches[0].input_ids)
        if not len(share):
            nothing = torch.full_like(labels[:1], IGNORED)
            return dataclasses.replace(self, micro_batches=(MicroBatch(ids[:1], nothing, blocks=(), rows_in_all=in_all),))
        pieces = []
        for start in range(0, len(share), size):
            rows = share[start : start + size]
            names = tuple(blocks[row] for row in rows)
            whole = round(in_all * len(rows) / len(share))
            pieces.append(MicroBatch(ids[rows], labels[rows], blocks=None if None in names else names, rows_in_all=whole))
        return dataclasses.replace(self, micro_batches=tuple(pieces))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return dataclasses.replace(self, micro_batches=tuple(micro.to(device) for micro in self.micro_batches))


# --------------------------------------------------------------------------------------------------------------------------------------
# Documents -> token blocks


def tokenize(tokenizer: Any, documents: Iterable[Document], group: int = 1 << 22) -> Iterator[list[int]]:
    """Yield the token ids of each document, without special tokens; ``group`` characters are tokenized at a time."""
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text) + 1
        if size >= group:
            yield from _token_lists(tokenizer, texts)
            texts, size = [], 0
    if texts:
        yield from _token_lists(tokenizer, texts)


def _token_lists(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose=False: a document longer than the context is no fault here, it is cut into blocks.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def prepare_blocks(
    documents: Sequence[Document],
    tokenizer: Any,
    max_length: int,  # tokens a block
    max_tokens: int | None = None,  # stop after this many tokens
    *,
    data_key: str = "",  # digest of the documents; with it the blocks are cached and found again
) -> np.ndarray:
    """Tokenize documents, end each with EOS, and pack them into blocks on disk.

    Returns:
        A memory-mapped array (blocks, max_length) of token ids, uint16 or int32. A tail shorter than a block is left out.

    Raises:
        DataError: where the text is shorter than one block.
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    key = json.dumps([data_key, tokenizer_digest(tokenizer), max_length, max_tokens, np.dtype(dtype).name])
    folder = cache_folder() / "blocks"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    if not (data_key and file.exists()):
        total = _write_blocks(documents, tokenizer, max_length, max_tokens, file, dtype)
        if total < max_length:
            raise DataError(
                f"the training text has {total} tokens, fewer than one block of {max_length}; give more text or a smaller --max_length"
                + (" or a larger --max_train_tokens" if max_tokens is not None and max_tokens < max_length else "")
            )
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _write_blocks(documents: Sequence[Document], tokenizer: Any, max_length: int, max_tokens: int | None, file: Path, dtype: Any) -> int:
    """Stream tokens to a raw file, then give it its header and its name in one rename; return the number of tokens."""
    total, limit = 0, max_tokens if max_tokens is not None else float("inf")
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        raw = Path(scratch) / "tokens"
        with raw.open("wb") as stream:
            for document, ids in zip(documents, tokenize(tokenizer, documents), strict=True):
                ids = [*ids, tokenizer.eos_token_id] if document.ends else ids
                ids = ids[: int(min(len(ids), limit - total))]
                stream.write(np.asarray(ids, dtype=dtype).tobytes())
                total += len(ids)
                if total >= limit:
                    break
        blocks = total // max_length
        if blocks:
            tokens = np.memmap(raw, dtype=dtype, mode="r", shape=(blocks, max_length))
            packed = Path(scratch) / "blocks.npy"
            np.save(packed, tokens, allow_pickle=False)
            del tokens  # Windows cannot remove a file that is still mapped
            os.replace(packed, file)
    return total


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary and the special tokens, so that blocks of one tokenizer are never served to another."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content += backend.to_str() if backend is not None else type(tokenizer).__name__
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


# --------------------------------------------------------------------------------------------------------------------------------------
# Blocks -> batches


def block_order(blocks: int, seed: int, epoch: int) -> np.ndarray:
    """The order of blocks in one epoch: a permutation that depends on (seed, epoch) and the number of blocks, and on nothing else."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(blocks)


def order_digest(blocks: int, seed: int, epochs: int) -> str:
    """SHA-256 of the block orders of all epochs, stored with a run to show that its arms were paired."""
    digest = hashlib.sha256()
    for epoch in range(epochs):
        digest.update(block_order(blocks, seed, epoch).astype("<i8").tobytes())
    return digest.hexdigest()


class BatchStream:
    """Endless batches, epoch after epoch, with a cursor that can be saved.

    Args:
        blocks: (blocks, length) token ids, memory-mapped or not.
        batch_size: Blocks a micro-batch and process.
        grad_accum: Micro-batches a batch.
        seed: Sets the order, together with the epoch.
        rank: This process, from 0.
        world: Processes that share each micro-batch.

    The last batch of an epoch is short where the blocks do not divide evenly; it is a batch like any other, token-normalised.
    """

    def __init__(self, blocks: np.ndarray, batch_size: int, grad_accum: int, seed: int, *, rank: int = 0, world: int = 1) -> None:
        self.blocks, self.seed, self.rank, self.world = blocks, seed, rank, world
        self.micro_rows = batch_size * world
        self.batch_rows = self.micro_rows * grad_accum
        self.batches_per_epoch = -(-len(blocks) // self.batch_rows)
        self.cursor = 0
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its permutation)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; advances the cursor."""
        batch = self.batch(self.cursor)
        self.cursor += 1
        return batch

    def batch(self, index: int) -> Batch:
        """Any batch, by its position counted over all epochs."""
        rows = self.rows_of(index)
        micro_batches = tuple(self._micro_batch(rows[start : start + self.micro_rows]) for start in range(0, len(rows), self.micro_rows))
        return Batch(micro_batches, index=index, epoch=index // self.batches_per_epoch)

    def rows_of(self, index: int) -> np.ndarray:
        """Which blocks a batch has, over all processes."""
        epoch, position = divmod(index, self.batches_per_epoch)
        return self._epoch_order(epoch)[position * self.batch_rows : (position + 1) * self.batch_rows]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, block_order(len(self.blocks), self.seed, epoch))
        return self._order[1]

    def _micro_batch(self, rows: np.ndarray) -> MicroBatch:
        share = rows[self.rank :: self.world]
        # A short micro-batch may leave a process without a row; it then runs one unlabelled row, because all processes must reduce together.
        input_ids = torch.from_numpy(self.blocks[share if len(share) else rows[:1]].astype(np.int64))
        labels = torch.full_like(input_ids, IGNORED)
        if len(share):
            labels[:, :-1] = input_ids[:, 1:]
        return MicroBatch(input_ids, labels, blocks=tuple(int(row) for row in share), rows_in_all=len(rows))

    def state_dict(self) -> dict[str, int]:
        """The cursor: batches handed out so far."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches handed out before the state was saved."""
        self.cursor = state["cursor"]


# --------------------------------------------------------------------------------------------------------------------------------------
# Evaluation text -> windows


@dataclass(frozen=True)
class Window:
    """One stretch of a document: ``scored`` of its last tokens are predicted, the rest is context."""

    input_ids: np.ndarray  # (length,) int32
    targets: np.ndarray  # (length,) int32
    scored: int
    document: int = 0  # whose, by position in its text


@dataclass(frozen=True)
class EvalText:
    """A split prepared for scoring: its windows, and the words and bytes its documents have in their source's own form."""

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

    The arithmetic of lm-evaluation-harness's ``loglikelihood_rolling`` (context of one token, disjoint windows): the first window starts with
    the prefix token, each full window with the last token of the one before it, and a short last window is filled up with context.
    """
    sequence, done = np.array([prefix, *ids], dtype=np.int32), 0  # the windows share it
    while done < len(ids):
        scored = min(max_length, len(ids) - done)
        end = done + scored
        start = max(0, end - max_length)
        yield Window(sequence[start:end], sequence[start + 1 : end + 1], scored, document)
        done = end


def prepare_eval(documents: Sequence[Document], tokenizer: Any, max_length: int, max_tokens: int | None = None) -> EvalText:
    """Tokenize whole documents, in their order, until ``max_tokens`` are reached, and cut them into windows.

    The last document may pass the cap: documents are scored whole, so that words and bytes stay exact.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
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
        raise DataError("the evaluation text has no tokens; give a validation and a test file with text in them")
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
        labels[row, start + size - window.scored : start + size] = torch.from_numpy(window.targets[-window.scored :])
    return MicroBatch(input_ids, labels, None if padding_side == "right" else mask)
