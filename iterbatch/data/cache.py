"""What is kept on disk outside a run's folder: the cache folder, and the documents of a corpus, so that none of it need fit into memory."""

import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from iterbatch.data.documents import Document


def cache_folder() -> Path:
    """Where prepared text and activations are kept: ``ITERBATCH_CACHE``, or ``.cache/iterbatch`` in the user's home."""
    return Path(os.environ.get("ITERBATCH_CACHE") or Path.home() / ".cache" / "iterbatch")


class _Spool:
    """The file of some documents, open as long as any view of them is there."""

    def __init__(self, folder: Path) -> None:
        self.file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __del__(self) -> None:
        self.file.close()


class Documents(Sequence["Document"]):
    """Documents in a file that has no name and is gone with the process; each is read when it is asked for.

    Args:
        documents: Taken one at a time.
    """

    def __init__(self, documents: Iterable["Document"]) -> None:
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
        from iterbatch.data.documents import Document

        if not isinstance(place, int):
            view = object.__new__(Documents)
            vars(view).update(vars(self) | {"_order": self._order[place]})
            return view
        number = self._order[place]
        start, stop = self._starts[number : number + 2]
        file = self._spool.file
        file.seek(start)
        words, size, ends = self._counts[:, number].tolist()
        return Document(file.read(stop - start).decode("utf-8", "surrogatepass"), words, size, bool(ends))
