"""Files of every format, packing and encoding: read back exactly; what is left out is said."""

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iterbatch.data.corpus import Reading, read_corpus
from iterbatch.data.files import find_files
from iterbatch.data.rows import rows
from iterbatch.errors import DataError

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")


def _bytes(kind, table):
    """Rows of text as a file has them."""
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table).encode()
    if kind == "json":
        return json.dumps(table, indent=1).encode()
    if kind == "parquet":
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), stream)
        return stream.getvalue()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]), delimiter="," if kind == "csv" else "\t")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def _pack(content, packing):
    return {
        "": lambda: content,
        ".gz": lambda: gzip.compress(content),
        ".zst": lambda: pyarrow.compress(content, codec="zstd", asbytes=True),
    }[packing]()


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _read(path):
    (file,) = find_files(path).splits["train"]
    return [row for _, row in rows(file)]


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(WORDS, min_size=1, max_size=20), upper=st.booleans())
def test_rows_are_read_back_as_they_were_written(tmp_path, kind, packing, texts, upper):
    table = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    ending = f".{kind}{packing}"
    path = _write(
        tmp_path / f"rows{ending.upper() if upper else ending}", _pack(_bytes(kind, table), packing)
    )
    assert _read(path) == table
    path.unlink()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(WORDS.filter(str.strip), min_size=10, max_size=30))
def test_documents_are_the_rows(tmp_path, texts):
    path = _write(tmp_path / "rows.jsonl", _bytes("jsonl", [{"text": text} for text in texts]))
    found = read_corpus("x", data_dir=path).splits
    assert sorted(each.text for split in found.values() for each in split) == sorted(texts)


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_taken_for_a_number_a_date_or_missing(tmp_path, kind):
    table = [{"text": word} for word in ("NA", "null", "None", "nan", "007", "1e3", "2020-01-02", "TRUE", "")]
    assert _read(_write(tmp_path / f"rows.{kind}", _bytes(kind, table))) == table


def test_a_path_is_a_path_and_a_changed_file_is_another_text(tmp_path):
    import os

    path = _write(tmp_path / "notes[12].jsonl", _bytes("jsonl", [{"text": "one"}]))
    _write(tmp_path / "notes1.jsonl", _bytes("jsonl", [{"text": "WRONG"}]))
    assert _read(path) == [{"text": "one"}]
    before = path.stat()
    _write(path, _bytes("jsonl", [{"text": "two"}]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _read(path) == [{"text": "two"}]


def test_lines_may_have_other_fields_each(tmp_path):
    table = [{"text": "a"}, {"text": None, "n": 1}, {"text": "b", "extra": [{"x": 1}]}]
    assert _read(_write(tmp_path / "rows.jsonl", _bytes("jsonl", table))) == table


@pytest.mark.parametrize("head", ["a;text", "a,text", "a\ttext"])
def test_the_separator_of_a_csv_file_is_seen(tmp_path, head):
    path = _write(tmp_path / "rows.csv", f"{head}\n1{head[1]}x\n")
    assert _read(path) == [{"a": "1", "text": "x"}]


# -- which files, and for which split --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("training-00001.parquet", "train"),
        ("my-valid.txt", "validation"),
        ("val2.csv", "validation"),
        ("dev.tsv.gz", "validation"),
        ("EVAL.JSONL", "validation"),
        ("evaluation_set.json", "validation"),
        ("test.md", "test"),
        ("held_out.jsonl", "test"),
        ("held-out.jsonl", "test"),
        ("HeldOut.jsonl", "test"),
        ("test/part1.jsonl", "test"),
        ("validation/train-like.jsonl", "train"),
    ],
)
def test_names_of_splits(tmp_path, name, split):
    _write(tmp_path / name, "x")
    _write(tmp_path / "train" / "a.txt", "x")
    found = find_files(tmp_path)
    assert [file.path for file in found.splits[split] if file.path != tmp_path / "train" / "a.txt"] == [
        tmp_path / name
    ]
    assert found.notes == []


def test_what_is_not_text_is_left_alone_and_what_is_left_out_is_said(tmp_path):
    for name in (
        ".hidden.txt",
        ".ipynb_checkpoints/train-checkpoint.jsonl",
        "._train.jsonl",
        "Thumbs.db",
        "__MACOSX/train.jsonl",
    ):
        _write(tmp_path / name, "x")
    for name in ("train.jsonl", "train.jsonl.gz", "README.md", "picture.png", "extra.jsonl"):
        _write(tmp_path / name, "x")
    found = find_files(tmp_path)
    assert [file.path.name for file in found.splits["train"]] == ["extra.jsonl", "train.jsonl"]
    assert found.notes == [
        "3 file(s) left out: README.md, picture.png, train.jsonl.gz",
        "1 file(s) whose names say no split are training text: extra.jsonl",
    ]


def test_a_name_that_may_mean_held_out_text_is_noted(tmp_path):
    for name in ("mytestset.jsonl", "other.jsonl"):
        _write(tmp_path / name, "x")
    assert find_files(tmp_path).notes == [
        "training text, though the name may mean held-out text: mytestset.jsonl"
    ]


def test_rows_without_text_are_counted(tmp_path):
    table = [{"text": "a"}, {"text": " "}, {"other": "b"}, *({"text": f"{n}"} for n in range(20))]
    path = _write(tmp_path / "rows.jsonl", _bytes("jsonl", table))
    notes = read_corpus("x", data_dir=path).notes
    assert f"{path}: 2 of 23 rows have no text and are left out (line 2, line 3)" in notes


# -- encodings and damage --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "utf-16-le", "latin-1", "utf-8"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_another_encoding(tmp_path, kind, encoding):
    words = "café" if encoding == "latin-1" else "公园里谈论天气"
    texts = [f"{words} {number}" for number in range(20)]
    content = {
        "txt": "\n\n".join(texts),
        "jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        "csv": "text\n" + "\n".join(texts),
    }[kind]
    path = _write(tmp_path / f"rows.{kind}", content.encode(encoding))
    found = read_corpus("x", data_dir=path, reading=Reading(encoding=encoding)).splits
    assert sorted(each.text.strip() for split in found.values() for each in split) == sorted(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "天气".encode("gbk"), r"a\.txt is not UTF-8: byte 0x.. near byte 0; .*--encoding gbk"),
        ("a.jsonl", "x".encode("utf-16"), r"begins as utf-16 does; give --encoding utf-16"),
        ("a.jsonl.gz", b"no gzip", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "cannot be unpacked"),
        ("a.jsonl.zst", b"no zstandard", "cannot be unpacked"),
        ("a.parquet", b"no parquet", "cannot be read as parquet"),
        ("a.json", '{"text": "x"', "not valid JSON"),
        ("a.json", "[1, 2]", r"line 1: a list where an object|row 1: a int where an object"),
        ("a.json", '[{"text": "x"}, 2]', "row 2: a int where an object"),
        ("a.jsonl", '{"text": "x"}\n{"text": 5}\n', r"line 2: field 'text' is a int where text is needed"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.csv", 'text,id\nfine,1\nbroken, "2,3\n', "not valid csv|cells, where the header has 2"),
        ("a.csv", "text,id\na,b,c\n", "line 2: 3 cells, where the header has 2"),
        ("a.csv", "text,text\na,b\n", "two columns have the same name"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_corpus("x", data_dir=_write(tmp_path / name, content))
