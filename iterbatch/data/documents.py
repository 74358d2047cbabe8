"""Documents: one text each, kept in a file so that a corpus need not fit into memory."""

import copy
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


@dataclass(frozen=True)
class Document:
    """One text.

    ``words`` and ``bytes`` are counted on the source's own form, as lm-evaluation-harness counts them.
    """

    text: str
    words: int
    bytes: int
    ends: bool = True  # whether the document ends here; otherwise the next one continues it

    @classmethod
    def of(cls, text: str, source: str | None = None, *, ends: bool = True) -> "Document":
        """Build a document; ``source`` is the text before detokenisation, where there was any."""
        source = text if source is None else source
        return cls(
            text=text,
            words=len(re.split(r"\s+", source)),
            bytes=len(source.encode("utf-8", "surrogatepass")),
            ends=ends,
        )


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


class _Spool:
    """The file of some documents, open as long as any view of them is there."""

    def __init__(self, folder: Path) -> None:
        self.file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __del__(self) -> None:
        self.file.close()


class Documents(Sequence[Document]):
    """Documents in a file that has no name and is gone with the process; each is read when it is asked for.

    Args:
        documents: Taken one at a time.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self._spool = _Spool(folder)
        starts, words, sizes, ends = array("q", [0]), array("q"), array("q"), array("b")
        for document in documents:
            starts.append(starts[-1] + self._spool.file.write(document.text.encode("utf-8", "surrogatepass")))
            words.append(document.words)
            sizes.append(document.bytes)
            ends.append(document.ends)
        self._starts, self._counts = np.array(starts), np.array([words, sizes, ends])
        self._order = np.arange(len(words))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: Any) -> Any:
        """A document; a slice or array of places gives a view of so many."""
        if not isinstance(place, int):
            view = copy.copy(self)
            view._order = self._order[place]
            return view
        number = self._order[place]
        start, stop = self._starts[number : number + 2]
        file = self._spool.file
        file.seek(start)
        words, size, ends = self._counts[:, number].tolist()
        return Document(file.read(stop - start).decode("utf-8", "surrogatepass"), words, size, bool(ends))
