"""Named or local text, in any supported form, to documents in three splits.

What lives here: reading (through ``datasets``), and the split into train, validation and test. What
does not: the forms of text (:mod:`iterbatch.data.forms`); tokens, blocks and batches
(:mod:`iterbatch.data.data_loader`).
"""

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from iterbatch.data import documents
from iterbatch.data.documents import Document, Documents, documents_of_pieces
from iterbatch.data.forms import FIELDS, ChatTemplate, row_text, wikitext_articles, wikitext_document
from iterbatch.errors import DataError, did_you_mean

SPLITS = ("train", "validation", "test")
HELD_OUT_FRACTION = 0.1  # of the documents, for each of validation and test, where a source brings none
SPLIT_SEED = 20_180_626  # fixed, so that every run and every arm holds out the same documents

DEEP = 500  # brackets in a row of JSON from which on its depth is looked at

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_BUILDERS = {
    ".txt": "text",
    ".tokens": "text",
    ".raw": "text",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class HubDataset:
    """A data set by its hub name, with the licence its card states."""

    name: str
    config: str | None
    licence: str


NAMED = {
    "wikitext": HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1", "CC BY-SA 3.0 and GFDL"),
    "dialogue": HubDataset("allenai/soda", None, "CC BY 4.0"),
}


@dataclass(frozen=True)
class Corpus:
    """Documents in three splits, where they came from, and what the reader must be told about them."""

    splits: dict[str, Documents]
    source: str
    licence: str
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 over every split's documents in order: two runs can be shown to have read the same text."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for document in self.splits[split]:
                digest.update(split.encode() + b"\0" + document.text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Sources


def read_corpus(
    dataset: str,
    *,
    dataset_config: str | None = None,
    data_dir: Path | None = None,
    chat_template: ChatTemplate | None = None,
) -> Corpus:
    """Read a corpus by name or from a local file or folder.

    Args:
        dataset: ``pydocs``, ``wikitext``, ``dialogue``, or any hub name ``owner/name``.
        dataset_config: The hub data set's configuration; the named ones have a default.
        data_dir: A local file or folder to read instead of the hub.
        chat_template: See :func:`row_text`.

    Raises:
        DataError: where the text cannot be found, reached or read.
    """
    if data_dir is not None:
        splits, licence, source = (
            _read_local(data_dir, chat_template),
            "as the text's owner states",
            str(data_dir),
        )
    elif dataset == "pydocs":
        splits, licence, source = (
            {"train": Documents(_pydocs())},
            "Python Software Foundation License 2",
            "pydoc_data.topics",
        )
    else:
        splits, licence, source = _read_hub(dataset, dataset_config, chat_template)
    return complete_splits(splits, source, licence)


def complete_splits(splits: Mapping[str, Documents], source: str, licence: str) -> Corpus:
    """Cut the splits that a source lacks from its train split, by document with a fixed seed, and note it.

    Raises:
        DataError: where there is no training text, or too few documents to hold any out.
    """
    train = splits.get("train")
    if not train:
        raise DataError(
            f"{source} holds no training text (splits found: {', '.join(splits) or 'none'}); name a file "
            "with 'train' in its name, "
            "or point --data_dir at a single file"
        )
    notes = []
    missing = [split for split in SPLITS[1:] if not splits.get(split)]
    if missing and sum(document.ends for document in itertools.islice(train, 1000)) < 10:
        train = Documents(piece for document in train for piece in _paragraphs(document))
        notes.append(f"fewer than 10 documents: cut at blank lines into {len(train)} pieces")
    held_out = max(1, round(HELD_OUT_FRACTION * len(train)))
    if missing and len(train) <= held_out * len(missing):
        raise DataError(
            f"{source} has {len(train)} document(s), too few to hold out {' and '.join(missing)}; give "
            "separate files "
            "(train, valid, test in their names) or more documents"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    complete = {split: splits[split] for split in SPLITS[1:] if split not in missing}
    for split in missing:
        chosen, order = order[:held_out], order[held_out:]
        complete[split] = train[np.sort(chosen)]
        notes.append(f"no {split} split: {held_out} of {len(train)} documents held out of train, fixed seed")
    complete["train"] = train[np.sort(order)]
    return Corpus({split: complete[split] for split in SPLITS}, source, licence, notes)


def _paragraphs(document: Document) -> list[Document]:
    parts = [part for part in re.split(r"\n\s*\n", document.text) if part.strip()]
    return [Document.of(part.strip("\n") + "\n") for part in parts]


def _pydocs() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document.of(topics[name])


def _read_local(path: Path, chat_template: ChatTemplate | None) -> dict[str, Documents]:
    files: dict[str, list[Path]] = {}
    for file in _local_files(path):
        files.setdefault(_split_of(file, path), []).append(file)
    return {
        split: Documents(document for file in chosen for document in _read_file(file, chat_template))
        for split, chosen in files.items()
    }


def _local_files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"--data_dir {path} does not exist; give a file or folder of {', '.join(_BUILDERS)}")
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise DataError(
                f"{path} has the ending '{path.suffix}'; allowed are "
                f"{', '.join(_BUILDERS)}{did_you_mean(path.suffix, _BUILDERS)}"
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in _BUILDERS and file.is_file())
    if not files:
        raise DataError(f"--data_dir {path} holds no file with one of the endings {', '.join(_BUILDERS)}")
    return files


def _split_of(file: Path, root: Path) -> str:
    names = [file.name] if file == root else list(file.relative_to(root).parts)
    for name in reversed(names):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in _SPLIT_WORDS and root != file:
                return _SPLIT_WORDS[word]
    return "train"


def _read_file(file: Path, chat_template: ChatTemplate | None) -> Iterator[Document]:
    if file.suffix != ".parquet":
        _check_utf8(file)
    if file.suffix == ".txt":
        with file.open(encoding="utf-8-sig") as text:
            yield from documents_of_pieces(iter(lambda: text.read(documents.PIECE), ""))
    elif file.suffix in (".tokens", ".raw"):
        with file.open(encoding="utf-8-sig") as text:
            yield from map(
                wikitext_document, wikitext_articles(iter(lambda: text.readline(documents.PIECE), ""))
            )
    else:
        yield from _documents_of_rows(_load_rows(file), chat_template, file)


def _load_rows(file: Path) -> Any:
    import datasets

    if file.suffix == ".jsonl":
        _check_depth(file)
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(_BUILDERS[file.suffix], data_files=str(file), split="train")
    except Exception as problem:  # datasets wraps every reader's own error in one of several classes
        if file.suffix == ".jsonl":
            _check_json_lines(file)
        reason = problem.__cause__ or problem
        raise DataError(
            f"{file} cannot be read as {file.suffix[1:]}: {str(reason).splitlines()[0]}"
        ) from problem


def _documents_of_rows(
    rows: Iterable[dict[str, Any]], chat_template: ChatTemplate | None, source: object
) -> Iterator[Document]:
    try:
        for row in rows:
            yield from documents_of_pieces([row_text(row, chat_template)])
    except DataError as problem:
        raise DataError(f"{source}: {problem}") from problem


def _check_utf8(file: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                decoder.decode(chunk)
                read += len(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{file} is not UTF-8: byte {problem.object[problem.start]:#04x} near byte "
            f"{read + problem.start}; save it as UTF-8 and try again"
        ) from problem
    except OSError as problem:
        raise DataError(f"{file} cannot be read: {problem.strerror}") from problem
    if read == 0:
        raise DataError(f"{file} is empty; give a file with text in it")


def _check_depth(file: Path) -> None:
    """Refuse rows nested so deeply that the JSON reader's stack would end the process."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.count(b"[") + line.count(b"{") < DEEP:
                continue
            try:
                json.loads(line)
            except RecursionError as problem:
                raise DataError(
                    f"{file}, line {number}: nested too deeply to be read; mend or delete that line"
                ) from problem
            except ValueError:
                continue  # the reader says what is wrong with it


def _check_json_lines(file: Path) -> None:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise DataError(
                    f"{file}, line {number}: not valid JSON ({problem}); mend or delete that line"
                ) from problem
            if not isinstance(row, dict):
                raise DataError(
                    f"{file}, line {number}: a {type(row).__name__} where an object with one of {FIELDS} is "
                    "needed"
                )


def _read_hub(
    dataset: str, config: str | None, chat_template: ChatTemplate | None
) -> tuple[dict[str, Documents], str, str]:
    import datasets

    known = NAMED.get(dataset)
    if known is None and "/" not in dataset:
        names = ["pydocs", *NAMED]
        raise DataError(
            f"unknown dataset '{dataset}'; choose from {', '.join(names)}, a hub name 'owner/name', or "
            f"--data_dir{did_you_mean(dataset, names)}"
        )
    hub = known or HubDataset(dataset, None, "as the data set's card states")
    config = config or hub.config
    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(hub.name, config)
    except Exception as problem:
        # Connection, missing name, missing configuration: each library layer has its own class.
        raise DataError(unreachable_dataset(hub.name, problem)) from problem
    splits: dict[str, Documents] = {}
    for split, rows in loaded.items():
        name = _SPLIT_WORDS.get(str(split).lower())
        if name is None:
            continue
        if hub.name == "Salesforce/wikitext":
            splits[name] = Documents(map(wikitext_document, wikitext_articles(row["text"] for row in rows)))
        else:
            splits[name] = Documents(_documents_of_rows(rows, chat_template, hub.name))
    return splits, hub.licence, f"{hub.name}{f' ({config})' if config else ''}"


def unreachable_dataset(name: str, problem: BaseException) -> str:
    """The message for a hub data set that could not be read."""
    return (
        f"the data set '{name}' could not be read from the hub ({type(problem).__name__}: "
        f"{str(problem).splitlines()[0][:200]}). "
        "Without a hub, point --data_dir at a local file or folder: .txt, .tokens/.raw (WikiText form), "
        ".jsonl, .csv or .parquet"
    )
