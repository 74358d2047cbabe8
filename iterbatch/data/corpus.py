"""Named or local text, in any supported form, to documents in three splits.

What lives here: sources, and the split into train, validation and test. What does not: files and formats
(:mod:`iterbatch.data.files`, :mod:`iterbatch.data.rows`); the forms of a row (:mod:`iterbatch.data.forms`)
and how they are written (:mod:`iterbatch.data.chat`); tokens, blocks and batches.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from iterbatch.config import LossOn
from iterbatch.data import documents
from iterbatch.data.chat import Writer
from iterbatch.data.documents import Document, Documents, cut, documents_of_pieces
from iterbatch.data.files import SPLIT_WORDS, TextFile, endings, find_files
from iterbatch.data.forms import FIELDS, has_form, read_form
from iterbatch.data.rows import UTF8, Row, characters, rows
from iterbatch.data.wikitext import wikitext_articles, wikitext_document
from iterbatch.errors import DataError, did_you_mean
from iterbatch.language import N_, _

SPLITS = ("train", "validation", "test")
HELD_OUT_FRACTION = 0.1  # of the documents, for each of validation and test, where a source brings none
SPLIT_SEED = 20_180_626  # fixed, so that every run and every arm holds out the same documents
PYDOCS = "pydocs.jsonl.gz"  # among the assets: topics of CPython 3.11.7


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
class Reading:
    """How text is read, and what is met on the way.

    Args:
        writer: Writes rows as texts.
        encoding: Of local files.
        text_field: The only field of a row that counts; default: the first form that it has.
    """

    writer: Writer = field(default_factory=Writer)
    encoding: str = UTF8
    text_field: str | None = None
    notes: list[str] = field(default_factory=list)
    loss_on: Counter[LossOn] = field(default_factory=Counter)  # documents, by what the loss is on


@dataclass(frozen=True)
class Corpus:
    """Documents in three splits, where they came from, and what the reader must be told about them."""

    splits: dict[str, Documents]
    source: str
    licence: str
    notes: list[str] = field(default_factory=list)
    loss_on: Mapping[LossOn, int] = field(default_factory=dict)  # documents, by what the loss is on

    def digests(self) -> dict[str, str]:
        """SHA-256 over each split's documents in order: two runs can be shown to have read the same text."""
        return {split: self.splits[split].digest() for split in SPLITS}

    def digest(self) -> str:
        """SHA-256 over all splits."""
        return hashlib.sha256("".join(self.digests().values()).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Sources


def read_corpus(
    dataset: str,
    *,
    dataset_config: str | None = None,
    data_dir: Path | None = None,
    reading: Reading | None = None,
) -> Corpus:
    """Read a corpus by name or from a local file or folder.

    Args:
        dataset: ``pydocs``, ``wikitext``, ``dialogue``, or any hub name ``owner/name``.
        dataset_config: The hub data set's configuration; the named ones have a default.
        data_dir: A local file or folder to read instead of the hub.
        reading: How.

    Raises:
        DataError: where the text cannot be found, reached or read.
    """
    reading = reading or Reading()
    if data_dir is not None:
        splits, licence, source = (
            _read_local(data_dir, reading),
            N_("as the text's owner states"),
            str(data_dir),
        )
    elif dataset == "pydocs":
        splits, source = _pydocs(reading), _("the Python reference manual")
        licence = "Python Software Foundation License 2"
    else:
        splits, licence, source = _read_hub(dataset, dataset_config, reading)
    return complete_splits(splits, source, licence, reading)


def complete_splits(
    splits: Mapping[str, Documents], source: str, licence: str, reading: Reading | None = None
) -> Corpus:
    """Cut the splits that a source lacks from its train split, by document with a fixed seed, and note it.

    Raises:
        DataError: where there is no training text, or too few documents to hold any out.
    """
    reading = reading or Reading()
    train = splits.get("train")
    if not train:
        raise DataError(
            _(
                "{source} holds no training text (splits found: {names}); name a file with 'train' in "
                "its name, or point --data_dir at a single file"
            ).format(source=source, names=", ".join(splits) or "none")
        )
    notes = [*reading.notes]
    missing = [split for split in SPLITS[1:] if not splits.get(split)]
    if missing and train.documents < 10 and reading.loss_on.keys() <= {"all"}:
        train = Documents(piece for document in train for piece in _paragraphs(document))
        notes.append(
            _("fewer than 10 documents: cut at blank lines into {documents} pieces").format(
                documents=train.documents
            )
        )
    held_out = max(1, round(HELD_OUT_FRACTION * train.documents))
    if missing and train.documents <= held_out * len(missing):
        raise DataError(
            _(
                "{source} has {documents} document(s), too few to hold out {names}; give separate files "
                "(train, valid, test in their names) or more documents"
            ).format(source=source, documents=train.documents, names=" and ".join(missing))
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(train.documents)
    complete = {split: splits[split] for split in SPLITS[1:] if split not in missing}
    for split in missing:
        chosen, order = order[:held_out], order[held_out:]
        complete[split] = train.select(chosen)
        notes.append(
            _("no {split} split: {held_out} of {documents} documents held out of train, fixed seed").format(
                split=split, held_out=held_out, documents=train.documents
            )
        )
    complete["train"] = train.select(order)
    return Corpus({split: complete[split] for split in SPLITS}, source, licence, notes, reading.loss_on)


def _paragraphs(document: Document) -> list[Document]:
    parts = [part for part in re.split(r"\n\s*\n", document.text) if part.strip()]
    return [Document.of(part.strip("\n") + "\n", literal=document.literal) for part in parts]


def _pydocs(reading: Reading) -> dict[str, Documents]:
    """The Python reference manual, as one version of CPython has it: others have other topics."""
    asset = resources.files("iterbatch") / "assets" / "text" / PYDOCS
    with resources.as_file(asset) as path:
        file = TextFile(path, ".jsonl", ".gz")
        return {"train": Documents(_documents_of_rows(rows(file), reading, PYDOCS))}


# ------------------------------------------------------------------------------------------------------------
# Local files


def _read_local(place: Path, reading: Reading) -> dict[str, Documents]:
    found = find_files(place)
    reading.notes.extend(found.notes)
    return {
        split: Documents(document for file in files for document in _read_file(file, reading))
        for split, files in found.splits.items()
    }


def _read_file(file: TextFile, reading: Reading) -> Iterator[Document]:
    if file.format == "text":
        with characters(file, reading.encoding) as text:
            yield from _texts(documents_of_pieces(iter(lambda: text.read(documents.PIECE), "")), reading)
    elif file.format == "wikitext":
        with characters(file, reading.encoding) as text:
            articles = wikitext_articles(iter(lambda: text.readline(documents.PIECE), ""))
            yield from _texts(map(wikitext_document, articles), reading)
    else:
        yield from _documents_of_rows(rows(file, reading.encoding), reading, str(file.path))


def _texts(found: Iterable[Document], reading: Reading) -> Iterator[Document]:
    """Documents that are no rows."""
    for document in found:
        reading.loss_on["all"] += document.ends
        yield document


def _documents_of_rows(found: Iterable[Row], reading: Reading, source: str) -> Iterator[Document]:
    """The rows that hold text, each as a document; what is left out is noted.

    Raises:
        DataError: where a row cannot be read, or none has a form that is known; names file, row and field.
    """
    left: list[str] = []  # where rows without text are
    read, formless = 0, 0
    names: dict[str, None] = {}
    for place, row in found:
        read += 1
        try:
            form = read_form(row, reading.text_field)
            document = None if form is None else reading.writer.write(form)
        except DataError as problem:
            raise DataError(f"{source}, {place}: {problem}") from problem
        if form is None or document is None:
            left.append(place)
            formless += not has_form(row, reading.text_field)
            names |= dict.fromkeys(row)
            continue
        reading.loss_on[reading.writer.on(form)] += 1
        yield from cut(document)
    if read and formless == read:
        wanted = (
            f"'{reading.text_field}'"
            if reading.text_field
            else _("one of them must be {fields}").format(fields=_(FIELDS))
        )
        near = (
            did_you_mean(reading.text_field, names)
            if reading.text_field
            else _(", or name one by --text_field")
        )
        raise DataError(
            _("{source}: the rows have the fields {sorted}; {wanted}{near}").format(
                source=source, sorted=sorted(names), wanted=wanted, near=near
            )
        )
    if left:
        some = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        reading.notes.append(
            _("{source}: {count} of {read} rows have no text and are left out ({some})").format(
                source=source, count=len(left), read=read, some=some
            )
        )


# ------------------------------------------------------------------------------------------------------------
# The hub


def _read_hub(dataset: str, config: str | None, reading: Reading) -> tuple[dict[str, Documents], str, str]:
    import datasets

    known = NAMED.get(dataset)
    if known is None and "/" not in dataset:
        names = ["pydocs", *NAMED]
        raise DataError(
            _(
                "unknown dataset '{dataset}'; choose from {names}, a hub name 'owner/name', or "
                "--data_dir{near}"
            ).format(dataset=dataset, names=", ".join(names), near=did_you_mean(dataset, names))
        )
    hub = known or HubDataset(dataset, None, N_("as the data set's card states"))
    config = config or hub.config
    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(hub.name, config)
    except Exception as problem:
        # Connection, missing name, missing configuration: each library layer has its own class.
        raise DataError(unreachable_dataset(hub.name, problem)) from problem
    splits: dict[str, Documents] = {}
    for split, table in loaded.items():
        name = SPLIT_WORDS.get(str(split).lower())
        if name is None or name in splits:
            reading.notes.append(_("split '{split}' left out").format(split=split))
        elif hub.name == "Salesforce/wikitext":
            articles = wikitext_articles(row["text"] for row in table)
            splits[name] = Documents(_texts(map(wikitext_document, articles), reading))
        else:
            found = ((f"{split}, row {number}", row) for number, row in enumerate(table, start=1))
            splits[name] = Documents(_documents_of_rows(found, reading, hub.name))
    return splits, hub.licence, f"{hub.name}{f' ({config})' if config else ''}"


def unreachable_dataset(name: str, problem: BaseException) -> str:
    """The message for a hub data set that could not be read."""
    return _(
        "the data set '{name}' could not be read from the hub ({name2}: {splitlines}). Without a "
        "hub, point --data_dir at a local file or folder: {endings}"
    ).format(
        name=name,
        name2=type(problem).__name__,
        splitlines=str(problem).splitlines()[0][:200],
        endings=endings(),
    )
