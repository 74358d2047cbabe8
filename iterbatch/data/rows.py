"""The text and the rows of a file, as they were written: no type is guessed, no word taken for missing.

What lives here: formats. What does not: which fields make a text (:mod:`iterbatch.data.forms`).
"""

import contextlib
import csv
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from iterbatch.data.files import TextFile
from iterbatch.errors import DataError, first_line
from iterbatch.language import _

UTF8 = "utf-8"
# Marks at a file's start that say another encoding; UTF-32's begins as UTF-16's does.
_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}

Row = tuple[str, dict[str, Any]]  # where it stands in its file, and its fields


@contextlib.contextmanager
def characters(file: TextFile, encoding: str = UTF8, newline: str | None = None) -> Iterator[IO[str]]:
    r"""A file's text.

    Args:
        file: To be opened.
        encoding: Of it.
        newline: As ``open`` takes it; default: every end of a line reads as ``\n``.

    Raises:
        DataError: where it is empty, or as it is read, in another encoding.
    """
    with file.open() as stream:
        start = stream.peek(4)[:4]
        if not start:
            raise DataError(_("{path} is empty; give a file with text in it").format(path=file.path))
        marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
        if encoding == UTF8 and marked is not None:
            raise DataError(
                _("{path} is not UTF-8: it begins as {marked} does; give --encoding {marked}").format(
                    path=file.path, marked=marked
                )
            )
        text = io.TextIOWrapper(stream, "utf-8-sig" if encoding == UTF8 else encoding, newline=newline)
        try:
            yield text
        except UnicodeError as problem:
            raise DataError(_undecodable(file, encoding, stream, problem)) from problem
        finally:
            text.detach()


def _undecodable(file: TextFile, encoding: str, stream: IO[bytes], problem: UnicodeError) -> str:
    what = first_line(problem)
    if isinstance(problem, UnicodeDecodeError):
        place = max(0, stream.tell() - len(problem.object)) + problem.start
        what = _("byte {object:#04x} near byte {place}").format(
            object=problem.object[problem.start], place=place
        )
    if encoding != UTF8:
        return _("{path} is not {encoding}: {what}; give its own --encoding").format(
            path=file.path, encoding=encoding, what=what
        )
    return _(
        "{path} is not UTF-8: {what}; name what it is, for instance --encoding gbk, latin-1 or utf-16"
    ).format(path=file.path, what=what)


def rows(file: TextFile, encoding: str = UTF8) -> Iterator[Row]:
    """The rows of JSON lines, a JSON array, CSV, TSV or Parquet.

    Raises:
        DataError: where the file is damaged; names the file and the place.
    """
    if file.format == "parquet":
        yield from _parquet_rows(file)
    elif file.format == "csv":
        with characters(file, encoding, newline="") as text:
            yield from _csv_rows(file, text)
    else:
        with characters(file, encoding) as text:
            yield from _json_rows(file, text)


# ------------------------------------------------------------------------------------------------------------
# JSON


def _json_rows(file: TextFile, text: IO[str]) -> Iterator[Row]:
    """Of an array, or one a line."""
    head = ""
    while not head.strip() and (line := text.readline()):
        head += line
    if head.lstrip().startswith("[") and (file.ending == ".json" or not _whole(head)):
        return _array_rows(file, head + text.read())
    if head.strip() == "{":
        return iter([("row 1", _object(_parsed(head + text.read(), f"{file.path}"), f"{file.path}"))])
    return _line_rows(file, itertools.chain(io.StringIO(head), text))


def _whole(line: str) -> bool:
    """Whether a line is JSON by itself, and no array of rows."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return not (isinstance(value, list) and all(isinstance(each, dict) for each in value))


def _line_rows(file: TextFile, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"line {number}"
            yield place, _object(_parsed(line, f"{file.path}, {place}"), f"{file.path}, {place}")


def _array_rows(file: TextFile, content: str) -> Iterator[Row]:
    for number, value in enumerate(_parsed(content, str(file.path)), start=1):
        yield f"row {number}", _object(value, f"{file.path}, row {number}")


def _parsed(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except RecursionError as problem:
        raise DataError(
            _("{place}: nested too deeply to be read; mend or delete it").format(place=place)
        ) from problem
    except ValueError as problem:  # a number of too many digits among them
        raise DataError(
            _("{place}: not valid JSON ({problem}); mend or delete it").format(
                place=place, problem=first_line(problem)
            )
        ) from problem


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            _("{place}: a {name} where an object with fields is needed").format(
                place=place, name=type(value).__name__
            )
        )
    return value


# ------------------------------------------------------------------------------------------------------------
# CSV and TSV


def _csv_rows(file: TextFile, text: IO[str]) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    head = text.readline()
    separator = "\t" if file.ending == ".tsv" else max(",;\t", key=head.count)
    reader = csv.reader(
        itertools.chain(io.StringIO(head, newline=""), text), delimiter=separator, strict=True
    )
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(
                _("{path}: two columns have the same name in {names}").format(path=file.path, names=names)
            )
        for cells in reader:
            if not cells:  # an empty line
                continue
            place = f"line {reader.line_num}"
            if len(cells) != len(names):
                raise DataError(
                    _(
                        "{path}, {place}: {count} cells, where the header has {count2}; quote cells that "
                        "hold the separator or a quotation mark"
                    ).format(path=file.path, place=place, count=len(cells), count2=len(names))
                )
            yield place, dict(zip(names, cells, strict=True))
    except csv.Error as problem:
        raise DataError(
            _("{path}, line {line_num}: not valid {ending} ({problem})").format(
                path=file.path, line_num=reader.line_num, ending=file.ending[1:], problem=first_line(problem)
            )
        ) from problem


# ------------------------------------------------------------------------------------------------------------
# Parquet


def _parquet_rows(file: TextFile) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    with file.open() as stream, contextlib.ExitStack() as stack:
        if file.packed:  # it is read from its end
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            while chunk := stream.read(1 << 20):
                unpacked.write(chunk)
            stream = unpacked
        try:
            table = stack.enter_context(parquet.ParquetFile(stream))
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except (arrow.ArrowException, ValueError) as problem:
            raise DataError(
                _("{path} cannot be read as parquet: {problem}").format(
                    path=file.path, problem=first_line(problem)
                )
            ) from problem
