"""A run knows what it was made from, from whatever folder it is gone on with."""

import json
import shutil

import pytest

from iterbatch.bench.arm import arms_of
from iterbatch.checks import make_config
from iterbatch.cli.main import main
from iterbatch.errors import RunError
from iterbatch.records.origin import Origin, check_origin, read_origin
from iterbatch.study.engines.processes import Processes
from iterbatch.study.pairs import Cell, Study
from iterbatch.study.run import compare
from iterbatch.study.run import run as run_bench

ROWS = [
    {"text": f"Document {number} speaks of trains, tea and maps, in its own words."} for number in range(60)
]


def _write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def ran(tiny, tmp_path, monkeypatch):
    """A finished run, made from a folder with relative places."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    _write(home / "rows.jsonl", ROWS)
    shutil.copytree(tiny["model_name"], home / "model")
    flags = {**tiny, "model_name": "model", "data_dir": "rows.jsonl", "prompts": 2}
    config = make_config(**flags, strategies=["baseline"], save_dir="results", run_name="run")
    return home / run_bench(config)


def test_the_manifest_names_no_place_of_this_machine(ran):
    manifest = (ran / "manifest.json").read_text(encoding="utf-8")
    assert str(ran.parents[1]) not in manifest
    places = json.loads((ran / "places.json").read_text(encoding="utf-8"))
    assert places == {name: str(ran.parents[1] / file) for name, file in (("data_dir", "rows.jsonl"), ("model_name", "model"))}  # fmt: skip # noqa: E501
    origin = read_origin(ran)
    assert origin is not None
    assert len({*origin.text.values(), origin.weights, origin.tokenizer}) == 5


def test_places_mean_the_same_from_any_folder(ran, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    _write(elsewhere / "rows.jsonl", ROWS[:20])  # which is not what the run means
    assert main(["generate", str(ran), "--prompt", "Document", "--new_tokens", "2"]) == 0
    assert main(["train", "--resume", str(ran), "--strategies", "baseline", "abr"]) == 0
    assert (ran / "abr" / "seed0" / "result.json").is_file()
    capsys.readouterr()


def test_another_text_or_model_under_the_same_name_is_refused(ran, capsys):
    home = ran.parents[1]
    then = read_origin(ran)
    _write(home / "rows.jsonl", [{"text": row["text"].replace("tea", "ale")} for row in ROWS])
    assert main(["train", "--resume", str(ran), "--strategies", "baseline", "abr"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"the text of train has SHA-256" in said  # noqa: F541
    assert then is not None
    assert then.text["train"][:16] in said
    assert "another run by another --run_name" in said
    _write(home / "rows.jsonl", ROWS)
    weights = home / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for command in (["train", "--resume", str(ran), "--strategies", "baseline", "abr"], ["generate", str(ran), "--prompt", "x"]):  # fmt: skip # noqa: E501
        assert main(command) == 2
        assert "the weights of the base has SHA-256" in " ".join(capsys.readouterr().err.split())


def test_cells_made_from_different_things_under_one_name_are_not_compared(tiny, tmp_path, capsys):
    _write(tmp_path / "rows.jsonl", ROWS)
    study = tmp_path / "study"
    flags = {**tiny, "data_dir": str(tmp_path / "rows.jsonl"), "prompts": 2}
    cells = {
        name: Cell(
            name, config := make_config(**flags | {"lr": lr}, strategies=["baseline"]), arms_of(config)
        )
        for name, lr in (("slow", 0.001), ("fast", 0.01))
    }
    compare(Study("study", (cells["slow"],)), study, Processes(1))
    _write(tmp_path / "rows.jsonl", [{"text": row["text"].replace("tea", "ale")} for row in ROWS])
    with pytest.raises(RunError, match="the text of train has SHA-256"):
        compare(Study("study", tuple(cells.values())), study, Processes(1))
    assert main(["report", str(study)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "fast was made from something else than slow" in said


def test_what_is_not_known_is_not_compared(ran):
    then = read_origin(ran)
    assert then is not None
    check_origin(ran, Origin({}, "", then.tokenizer))
    (ran / "manifest.json").unlink()
    check_origin(ran, Origin({"train": "x"}, "y", "z"))


def test_the_card_and_the_exported_folders(ran, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", str(ran), "--to", str(adapter)]) == 0
    assert main(["export", str(ran), "--to", str(merged), "--merge"]) == 0
    for folder in (adapter, merged):
        for file in folder.iterdir():
            if file.suffix in (".md", ".json"):
                assert str(tmp_path) not in file.read_text(encoding="utf-8")
    card = (adapter / "README.md").read_text(encoding="utf-8")
    result = json.loads((ran / "baseline" / "seed0" / "result.json").read_text(encoding="utf-8"))
    assert f"Validation perplexity: {result['val_ppl']:.3f} [" in card
    assert "iterbatch train --model_name model --data_dir rows.jsonl" in card
    assert "--strategies baseline --seeds 0" in card
    assert read_origin(ran).text["train"][:16] in card
    assert AutoModelForCausalLM.from_pretrained(merged) is not None
    capsys.readouterr()
    assert main(["export", str(ran), "--to", str(merged)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_merged_model_that_scores_otherwise_is_not_written(ran, tmp_path, monkeypatch, capsys):
    from iterbatch.bench import export

    scores = iter([10.0, 11.0])
    monkeypatch.setattr(export, "_perplexity", lambda *_: next(scores))
    assert main(["export", str(ran), "--to", str(tmp_path / "merged"), "--merge"]) == 2
    assert "perplexity of 11.000, by itself 10.000" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "merged").exists()
