"""Which local files are read, as what, for which split, and what of a folder is left alone.

What lives here: names. What does not: what is in the files (:mod:`iterbatch.data.rows`).
"""

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterbatch.errors import DataError, did_you_mean, first_line
from iterbatch.language import _

# What a file is, by its ending.
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".tokens": "wikitext",
    ".raw": "wikitext",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
PACKED = {".gz": "gzip", ".zst": "zstd"}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "validate": "validation",
    "val": "validation",
    "dev": "validation",
    "development": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
    "heldout": "test",
    "holdout": "test",
}
# Within a longer word they may mean held-out text all the same.
_HINTS = re.compile("|".join(word for word, split in SPLIT_WORDS.items() if split != "train"))
_NEVER = {"thumbs.db", "desktop.ini", "__macosx", "__pycache__"}
# Of text files, those that tell of a data set and are none of it.
_ABOUT = re.compile(r"(readme|licen[cs]e|notice|changelog|citation|contributing|dataset_infos?)\b", re.I)


def endings() -> str:
    """Those that can be read, as one says them."""
    return _("{names}, each also with {packed}").format(names=", ".join(FORMATS), packed=" or ".join(PACKED))


@dataclass(frozen=True)
class TextFile:
    """A file that is read."""

    path: Path
    ending: str  # in small letters, without that of its packing
    packed: str  # .gz, .zst, or nothing

    @property
    def format(self) -> str:
        """How it is read."""
        return FORMATS[self.ending]

    @contextlib.contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """Its bytes, unpacked.

        Raises:
            DataError: where they cannot be had.
        """
        import pyarrow as arrow

        try:
            with self.path.open("rb") as stream:
                if self.packed:
                    unpacked: Any = arrow.CompressedInputStream(stream, PACKED[self.packed])
                    stream = io.BufferedReader(unpacked)
                yield stream
        except OSError as problem:
            read = problem.strerror or not self.packed
            said = (
                _("{path} cannot be read: {problem}") if read else _("{path} cannot be unpacked: {problem}")
            )
            raise DataError(
                said.format(path=self.path, problem=problem.strerror or first_line(problem))
            ) from problem


@dataclass
class Found:
    """The files of a place, by split, and what the reader must be told of the others."""

    splits: dict[str, list[TextFile]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_files(place: Path) -> Found:
    """The text files of a folder, or the one that is given, whatever its name.

    Raises:
        DataError: where there are none.
    """
    if not place.exists():
        raise DataError(
            _("--data_dir {place} does not exist; give a file or folder of {endings}").format(
                place=place, endings=endings()
            )
        )
    if not place.is_dir():
        return Found({"train": [_named(place)]})
    files, left = _below(place)
    if not files:
        raise DataError(
            _("--data_dir {place} holds no file with one of the endings {endings}").format(
                place=place, endings=endings()
            )
        )
    found = Found()
    splits = {file.path: _split_of(file.path.relative_to(place)) for file in files}
    for file in files:
        found.splits.setdefault(splits[file.path] or "train", []).append(file)
    if left:
        found.notes.append(_("{count} file(s) left out: {list}").format(count=len(left), list=_list(left)))
    unsaid = [file.path.relative_to(place) for file in files if splits[file.path] is None]
    if unsaid and len(unsaid) < len(files):
        found.notes.append(
            _("{count} file(s) whose names say no split are training text: {list}").format(
                count=len(unsaid), list=_list(unsaid)
            )
        )
    elif hinted := [path for path in unsaid if _HINTS.search(path.as_posix().lower())]:
        found.notes.append(
            _("training text, though the name may mean held-out text: {list}").format(list=_list(hinted))
        )
    return found


def _named(path: Path) -> TextFile:
    file = _text_file(path)
    if file is None:
        ending = path.suffix
        raise DataError(
            _("{path} has the ending '{ending}'; allowed are {endings}{near}").format(
                path=path, ending=ending, endings=endings(), near=did_you_mean(ending.lower(), FORMATS)
            )
        )
    if not path.is_file():
        raise DataError(
            _("{path} is no regular file; give a file or folder of {endings}").format(
                path=path, endings=endings()
            )
        )
    return file


def _text_file(path: Path) -> TextFile | None:
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    packed = endings.pop() if endings and endings[-1] in PACKED else ""
    ending = endings[-1] if endings else ""
    return TextFile(path, ending, packed) if ending in FORMATS else None


def _below(folder: Path) -> tuple[list[TextFile], list[Path]]:
    """The text files below a folder, in order of their names, and the others that a person put there."""
    files: list[TextFile] = []
    left: list[Path] = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") or part.lower() in _NEVER for part in inside.parts) or path.is_dir():
            continue
        file = _text_file(path) if path.is_file() else None
        if file is None or (_ABOUT.match(path.name) and file.ending in (".txt", ".md", ".json")):
            left.append(inside)
        else:
            files.append(file)
    plain = {file.path for file in files if not file.packed}
    twice = [file for file in files if file.packed and file.path.with_suffix("") in plain]
    left += [file.path.relative_to(folder) for file in twice]  # the same text, unpacked beside it
    return [file for file in files if file not in twice], left


def _split_of(inside: Path) -> str | None:
    """By the last part of its place whose name says one."""
    for name in reversed(inside.parts):
        words = re.split(r"[^a-z]+", re.sub(r"held[-_ ]out|hold[-_ ]out", "heldout", name.lower()))
        for word in words:
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _list(paths: list[Path], most: int = 5) -> str:
    named = ", ".join(path.as_posix() for path in paths[:most])
    return named + (_(" and {count} more").format(count=len(paths) - most) if len(paths) > most else "")
