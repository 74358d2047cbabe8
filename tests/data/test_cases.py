"""Small inputs that tools like this one stumbled over, each through the command line."""

import json
import os
import runpy
import shutil
from pathlib import Path

import pytest

from iterbatch.bench.prepare import prepare
from iterbatch.checks import make_config
from iterbatch.cli.main import main


@pytest.fixture(scope="module")
def cases(real_text, tmp_path_factory):
    """The folder of all cases, and what must come of each."""
    script = real_text.parent / "cases" / "make.py"
    if not script.is_file():
        pytest.skip(f"{script} is not there")
    folder = tmp_path_factory.mktemp("cases")
    written = runpy.run_path(str(script))
    expected = {}
    for name, make in written["CASES"].items():
        (folder / name).mkdir()
        expected[name] = make(folder / name)
    return folder, expected


def _flags(tiny, case, **others):
    known = {name: tiny[name] for name in ("model_name", "dtype", "max_length", "max_train_tokens")}
    return {**known, "max_eval_tokens": 200, "data_dir": case["data_dir"], **others}


def _run(flags):
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return main(["train", "--dry_run", "--strategies", "baseline", *words])


def _documents(flags):
    corpus = prepare(make_config(**flags, strategies=["baseline"])).corpus
    return {split: list(pieces) for split, pieces in corpus.splits.items()}, sum(
        pieces.documents for pieces in corpus.splits.values()
    )


NAMES = (
    *("bracket_in_file_name", "changed_file_same_time_and_name", "content_null", "content_in_parts"),
    *("notebook_checkpoints", "eval_file", "csv_words_that_look_missing", "json_array", "gzip_lines"),
    *("upper_case_ending", "apple_double", "one_very_long_document", "field_that_comes_late"),
    *("numbers_and_dates_as_text", "sharegpt", "alpaca", "prompt_and_completion", "gbk"),
)


def test_every_case_is_tried(cases):
    assert sorted(cases[1]) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_case(cases, name, tiny, monkeypatch, capsys):
    folder, case = cases[0] / name, cases[1][name]
    monkeypatch.chdir(folder)
    flags = _flags(tiny, case)
    if "exit" in case:
        assert _run(flags) == case["exit"]
        assert case["says"] in capsys.readouterr().err
        flags |= {key.lstrip("-"): value for key, value in case["with"].items()}
    assert _run(flags) == 0
    assert "Traceback" not in capsys.readouterr().err
    splits, count = _documents(flags)
    assert count == case["documents"]
    texts = {split: [piece.text for piece in pieces] for split, pieces in splits.items()}
    if "absent" in case:
        assert not any(case["absent"] in text for found in texts.values() for text in found)
    if "train_lacks" in case:
        assert not any(case["train_lacks"] in text for text in texts["train"])
    if "then" in case:
        before = Path("data.jsonl").stat()
        shutil.copyfile("then.jsonl.new", "data.jsonl")
        os.utime("data.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
        splits, count = _documents(flags)
        assert count == 200
        assert all("Zelda" in piece.text for pieces in splits.values() for piece in pieces)


def test_the_plan_says_where_the_loss_is_and_how_many_documents_are_scored(tiny, tmp_path, capsys):
    rows = [{"prompt": f"Question {n}: ", "completion": f"the answer is {n}"} for n in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert _run(_flags(tiny, {"data_dir": str(file)})) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "loss on │ completion" in shown
    assert "32 documents" in shown
    assert "scored of test │ 4 documents (as much as 4.0 of one length)" in shown
    assert "below 10, a difference may be that of a single one" in shown
    assert _run(_flags(tiny, {"data_dir": str(file)}, loss_on="all")) == 0
    assert "loss on │ all" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"encoding": "utf8mb4"}, "--encoding is 'utf8mb4', which is none; such as utf-8"),
        ({"encoding": "hex"}, "--encoding is 'hex', which is none"),
        ({"text_field": "words"}, "the rows have the fields ['text']; 'words'"),
        ({"loss_on": "assistant"}, "--loss_on assistant needs rows that say who answers what"),
    ],
)
def test_bad_words(tiny, tmp_path, capsys, flags, message):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a text"}\n' * 30, encoding="utf-8")
    assert _run(_flags(tiny, {"data_dir": str(file)}, **flags)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
