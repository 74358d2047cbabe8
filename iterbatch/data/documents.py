"""Documents: one text each, kept in a file so that a corpus need not fit into memory."""

import copy
import hashlib
import json
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iterbatch.data.cache import cache_folder

# Characters; a longer text is handled in pieces, cut at ends of lines, so that memory does not
# grow.
PIECE = 1 << 20

Span = tuple[int, int]  # of characters: from, to


@dataclass(frozen=True)
class Document:
    """One text, or a piece of a long one.

    ``words`` and ``bytes`` are counted on the source's own form, as lm-evaluation-harness counts them, and
    only where it is trained on.
    """

    text: str
    words: int
    bytes: int
    ends: bool = True  # whether the document ends here; otherwise the next piece continues it
    trained: tuple[Span, ...] | None = None  # what the loss is on; None: all of it
    # Where what looks like a special token is only text; None: everywhere.
    literal: tuple[Span, ...] | None = None

    @classmethod
    def of(
        cls,
        text: str,
        source: str | None = None,
        *,
        ends: bool = True,
        trained: tuple[Span, ...] | None = None,
        literal: tuple[Span, ...] | None = None,
    ) -> "Document":
        """Build a document; ``source`` is the text before detokenisation, where there was any."""
        source = text if source is None else source
        counted = [source] if trained is None else [text[start:stop] for start, stop in trained]
        return cls(
            text=text,
            words=sum(len(re.split(r"\s+", part)) for part in counted),
            bytes=sum(len(part.encode("utf-8", "surrogatepass")) for part in counted),
            ends=ends,
            trained=trained,
            literal=literal,
        )

    @property
    def end_trained(self) -> bool:
        """Whether the loss is on the end of the text, too."""
        return self.trained is None or (bool(self.trained) and self.trained[-1][1] >= len(self.text))


def pieces(reads: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut a text that comes in any portions into pieces of at most ``PIECE`` characters.

    After a line's end, a space, or where need be.

    Yields:
        Each piece, and whether it is the last.
    """
    rest = ""
    for text in reads:
        rest += text
        while len(rest) > PIECE:
            cut = max(rest.rfind("\n", 0, PIECE), 0) or max(rest.rfind(" ", 0, PIECE), 0) or PIECE - 1
            yield rest[: cut + 1], False
            rest = rest[cut + 1 :]
    yield rest, True


def documents_of_pieces(reads: Iterable[str]) -> Iterator[Document]:
    """One text as documents: one, or where it is long, several that continue each other.

    Without a word in it, none.
    """
    begun = False
    for piece, last in pieces(reads):
        if begun or piece.strip():
            begun = True
            yield Document.of(piece, ends=last)


def cut(document: Document) -> Iterator[Document]:
    """The pieces of a document that may be long."""
    if len(document.text) <= PIECE:
        yield document
        return
    start = 0
    for text, last in pieces([document.text]):
        stop = start + len(text)
        yield Document.of(
            text,
            ends=last,
            trained=within(document.trained, start, stop),
            literal=within(document.literal, start, stop),
        )
        start = stop


def within(spans: tuple[Span, ...] | None, start: int, stop: int) -> tuple[Span, ...] | None:
    """Spans of a text as spans of its part from ``start`` to ``stop``."""
    if spans is None:
        return None
    clipped = ((max(one, start) - start, min(two, stop) - start) for one, two in spans)
    return tuple((one, two) for one, two in clipped if one <= two)


def _spans(pairs: Any) -> tuple[Span, ...] | None:
    return None if pairs is None else tuple((start, stop) for start, stop in pairs)


class _Spool:
    """The file of some documents, open as long as any view of them is there."""

    def __init__(self, folder: Path) -> None:
        self.file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __del__(self) -> None:
        self.file.close()


class Documents(Sequence[Document]):
    """Pieces of documents, in a file without a name that is gone with the process; read when asked for.

    Args:
        documents: Taken one at a time; pieces of one follow each other.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self._spool = _Spool(folder)
        starts, counts = array("q", [0]), array("q")
        for document in documents:
            marks = json.dumps([document.trained, document.literal]).encode()
            text = document.text.encode("utf-8", "surrogatepass")
            starts.append(starts[-1] + self._spool.file.write(marks + b"\n" + text))
            counts.extend((document.words, document.bytes, document.ends))
        self._starts, self._counts = np.array(starts), np.array(counts).reshape(-1, 3)
        self._order = np.arange(len(self._counts))

    def __len__(self) -> int:
        """Pieces."""
        return len(self._order)

    def __getitem__(self, place: Any) -> Any:
        """A piece; a slice or array of places gives a view of so many."""
        if not isinstance(place, int):
            view = copy.copy(self)
            view._order = self._order[place]
            return view
        number = int(self._order[place])
        start, stop = self._starts[number : number + 2]
        file = self._spool.file
        file.seek(start)
        words, size, ends = self._counts[number].tolist()
        marks, _, text = file.read(stop - start).partition(b"\n")
        trained, literal = map(_spans, json.loads(marks))
        return Document(text.decode("utf-8", "surrogatepass"), words, size, bool(ends), trained, literal)

    @property
    def _of_document(self) -> np.ndarray:
        """(pieces,) which document each is of."""
        ends = self._counts[self._order, 2]
        return np.cumsum(ends) - ends

    @property
    def documents(self) -> int:
        """How many documents they are of."""
        return int(self._of_document[-1]) + 1 if len(self) else 0

    def select(self, numbers: np.ndarray) -> "Documents":
        """Some of the documents, each with all its pieces, in the order of the text."""
        return self[np.flatnonzero(np.isin(self._of_document, numbers))]

    def digest(self) -> str:
        """SHA-256 over everything that training makes of them."""
        digest = hashlib.sha256()
        for document in self:
            marks = json.dumps([document.ends, document.trained, document.literal])
            digest.update(marks.encode() + b"\0" + document.text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()
