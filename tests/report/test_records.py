"""Records that do not agree with one another, or are not as they were written, are named and not reported."""

import csv
import json
import re
import shutil

import pytest
from conftest import tiny_flags
from support.records import change_result

from iterbatch.checks import make_config
from iterbatch.cli.main import main
from iterbatch.report.wording import cell_text
from iterbatch.study.run import run as run_bench


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_folder):
    """A run of two arms with two seeds."""
    flags = tiny_flags(tiny_folder)
    folder = tmp_path_factory.mktemp("records")
    return run_bench(
        make_config(**flags, strategies=["baseline", "fixed"], seeds=[0, 1], save_dir=folder, run_name="run")
    )


@pytest.fixture
def copy(ran, tmp_path):
    shutil.copytree(ran, tmp_path / "run")
    return tmp_path / "run"


def _edit(name, change):
    def edit(folder):
        file = folder / name
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")

    return edit


def _nats(change):
    def edited(text):
        content = json.loads(text)
        content["test"]["nats"] = [change(value) for value in content["test"]["nats"]]
        return json.dumps(content)

    return edited


CHANGES = {
    "NaN in documents": (_edit("documents.json", _nats(lambda _: None)), "documents.json"),
    "halved nats": (_edit("documents.json", _nats(lambda value: value / 2)), "documents.json"),
    "nats of an evaluation": (
        _edit("evals.jsonl", lambda text: re.sub(r'"nats": ([\d.]+)', '"nats": 1.0', text)),
        "evals.jsonl",
    ),
    "an evaluation of no tokens": (
        _edit("evals.jsonl", lambda text: re.sub(r'"tokens": \d+', '"tokens": 0', text)),
        "evals.jsonl",
    ),
    "zero FLOPs": (lambda folder: change_result(folder, flops=0.0), "flops is 0.0 after"),
    "zero tokens": (lambda folder: change_result(folder, tokens_trained=0), "tokens_trained is 0 after"),
    "another perplexity": (lambda folder: change_result(folder, test_ppl=2.0), "do not agree"),
}


@pytest.mark.parametrize(("edit", "message"), CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("sealed", [True, False], ids=["with digests", "without"])
def test_what_does_not_agree_is_named(copy, capsys, edit, message, sealed):
    folder = copy / "fixed/seed1"
    if not sealed:
        change_result(folder)
    edit(folder)
    assert main(["report", str(copy)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "name", ["batches.jsonl", "evals.jsonl", "documents.json", "samples.json", "result.json"]
)
def test_a_record_that_was_changed_or_is_gone_is_named(copy, capsys, name):
    file = copy / "baseline/seed0" / name
    text = file.read_text(encoding="utf-8")
    file.write_text(
        re.sub(r"(\d)(\D*)$", lambda found: f"{(int(found[1]) + 1) % 10}{found[2]}", text), encoding="utf-8"
    )
    assert main(["report", str(copy)]) == 2
    assert name in capsys.readouterr().err
    if name != "result.json":
        file.unlink()
        assert main(["report", str(copy)]) == 2
        assert "is gone since its arm ended" in " ".join(capsys.readouterr().err.split())


def test_a_seed_scored_on_other_documents_is_left_out_and_said_first(copy, capsys):
    folder = copy / "fixed/seed1"
    change_result(folder)
    content = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
    for kept in content["test"].values():  # two documents as one
        kept[:2] = [sum(kept[:2])]
    (folder / "documents.json").write_text(json.dumps(content), encoding="utf-8")
    assert main(["report", str(copy)]) == 0
    first = capsys.readouterr().out.strip().splitlines()[0]
    assert first.startswith("Left out of every comparison: fixed with seed 1, scored on other documents")


def test_a_pair_that_is_open_allows_no_verdict(copy, capsys):
    shutil.rmtree(copy / "fixed/seed1")
    assert main(["report", str(copy)]) == 0
    said = "Unfinished, no verdict yet: fixed with seed 1 still to be trained."
    assert capsys.readouterr().out.strip().startswith(said)
    for name in ("report.md", "report.html"):
        text = (copy / name).read_text(encoding="utf-8").replace("\\", "")
        body = text[text.find("<body>") :] if name.endswith("html") else text
        assert said in body[:200]
        assert "Holm" in text
        assert "beyond chance" not in text
        assert "may be chance" not in text.replace("differences may be chance", "")


@pytest.mark.parametrize("name", [r"$\frac{1}{$", "$x$", "=cmd|' C calc!A0", "@SUM(1)", "+1", "-1"])
def test_a_name_is_a_name_in_figures_and_spreadsheets(copy, name):
    (copy / "fixed").rename(copy / name)
    (copy / "study.json").unlink()
    assert main(["report", str(copy)]) == 0
    with (copy / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = {row["arm"] for row in rows}
    assert shown == {"baseline", cell_text(name)}
    assert not any(
        cell.lstrip().startswith(("=", "+", "-", "@"))
        for row in rows
        for cell in row.values()
        if not _number(cell)
    )


def _number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("=1+1", "'=1+1"),
        ("\t=1", "' =1"),
        ("\r@x", "' @x"),
        ("a\x07b", "a b"),
        ("-3", "'-3"),
        ("abr", "abr"),
        (-3.5, -3.5),
    ],
)
def test_cells_of_text_are_text(value, shown):
    assert cell_text(value) == shown
