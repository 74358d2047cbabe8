"""Documents packed into blocks of one length, on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iterbatch.data.cache import cache_folder
from iterbatch.data.documents import Document
from iterbatch.data.tokens import Tokens, begin_of_text, tokenize, tokenizer_digest
from iterbatch.errors import DataError
from iterbatch.language import _
from iterbatch.records.seal import file_digest
from iterbatch.records.write import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 4096  # blocks handled together


@dataclass(frozen=True)
class Blocks:
    """The training text as a model sees it, memory-mapped. Every block has a token that the loss is on."""

    ids: np.ndarray  # (blocks, length) token ids, uint16 or int32
    trained: np.ndarray  # (blocks, length) bool: whether the loss is on that token, where it is predicted
    note: str = ""  # what their user should know

    @classmethod
    def of(cls, ids: np.ndarray) -> Blocks:
        """All of which the loss is on."""
        return cls(ids, np.ones(ids.shape, dtype=bool))

    def __len__(self) -> int:
        """Blocks."""
        return len(self.ids)

    @property
    def length(self) -> int:
        """Tokens of each."""
        return self.ids.shape[1]

    def label_tokens(self) -> np.ndarray:
        """(blocks,) how many tokens of each the loss is on; the first is never predicted."""
        return np.count_nonzero(self.trained[:, 1:], axis=1)


def prepare_blocks(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,  # tokens a block
    max_tokens: int | None = None,  # stop after this many tokens
    *,
    data_key: str = "",  # digest of the documents; with it the blocks are cached and found again
) -> Blocks:
    """Tokenize documents, begin each with BOS and end it with EOS, and pack them into blocks on disk.

    Returns:
        Blocks of ``max_length`` tokens. A tail shorter than a block is left out, and so are blocks without a
        token that the loss is on.

    Raises:
        DataError: where the text is shorter than one block, or the loss is on none of it.
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    key = json.dumps([data_key, tokenizer_digest(tokenizer), max_length, max_tokens, np.dtype(dtype).name])
    folder = cache_folder() / "blocks"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{end}.npy" for end in ("", "-trained")]
    seal = files[0].with_suffix(".json")
    there = data_key and seal.exists()
    whole = there and _digests(files) == read_json(seal)
    if not whole:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            total = _write_tokens(_packed(documents, tokenizer), max_tokens, Path(scratch), dtype)
            if total < max_length:
                raise DataError(_too_short(total, max_length, max_tokens))
            _cut(Path(scratch), total // max_length, max_length, dtype, files)
        write_json(seal, _digests(files))
    ids, trained = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
    damaged = _("{files} was changed or cut short on disk; the blocks are prepared anew").format(
        files=files[0]
    )
    return Blocks(ids, trained, damaged if there and not whole else "")


def _digests(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by name; empty where one cannot be read."""
    try:
        return {file.name: file_digest(file) for file in files}
    except OSError:
        return {}


def _too_short(total: int, max_length: int, max_tokens: int | None) -> str:
    more = _(" or a larger --max_train_tokens") if max_tokens is not None and max_tokens < max_length else ""
    return _(
        "the training text has {total} tokens, fewer than one block of {max_length}; give more text "
        "or a smaller --max_length{more}"
    ).format(total=total, max_length=max_length, more=more)


def _packed(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Tokens with what begins and what ends a document."""
    bos, eos = begin_of_text(tokenizer), tokenizer.eos_token_id
    begun = False
    for tokens in tokenize(tokenizer, documents):
        before = [] if begun or bos is None else [bos]
        after = [eos] if tokens.document.ends else []
        begun = not tokens.document.ends
        ids = np.concatenate([np.array(before, np.int32), tokens.ids, np.array(after, np.int32)])
        ends = [tokens.document.end_trained] * len(after)
        trained = np.concatenate([np.zeros(len(before), bool), tokens.trained, np.array(ends, bool)])
        yield Tokens(ids, trained, tokens.document)


def _write_tokens(packed: Iterable[Tokens], limit: int | None, scratch: Path, dtype: Any) -> int:
    """Stream tokens to two raw files; returns their number."""
    total, most = 0, limit if limit is not None else float("inf")
    with (scratch / "ids").open("wb") as ids, (scratch / "trained").open("wb") as trained:
        for tokens in packed:
            count = int(min(len(tokens.ids), most - total))
            ids.write(tokens.ids[:count].astype(dtype).tobytes())
            trained.write(tokens.trained[:count].tobytes())
            total += count
            if total >= most:
                break
    return total


def _cut(scratch: Path, blocks: int, length: int, dtype: Any, files: list[Path]) -> None:
    """Write blocks with their headers, and give them their names in one rename each."""
    trained = np.memmap(scratch / "trained", dtype=bool, mode="r", shape=(blocks, length))
    chunks = [slice(start, start + ROWS) for start in range(0, blocks, ROWS)]
    kept = [trained[chunk, 1:].any(axis=1) for chunk in chunks]
    count = sum(map(np.count_nonzero, kept))
    del trained  # Windows cannot remove a file that is still mapped
    if not count:
        raise DataError(_("the loss is on no token of the training text; give --loss_on all"))
    for name, kind, file in (("ids", dtype, files[0]), ("trained", bool, files[1])):
        raw = np.memmap(scratch / name, dtype=kind, mode="r", shape=(blocks, length))
        with (scratch / file.name).open("wb") as stream:
            header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (int(count), length)}
            np.lib.format.write_array_header_1_0(stream, header)
            for chunk, rows in zip(chunks, kept, strict=True):
                stream.write(raw[chunk][rows].tobytes())
        del raw
    for file in reversed(files):
        os.replace(scratch / file.name, file)
