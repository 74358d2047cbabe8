"""Strategies of one's own: found by file, by class and by package, with their knobs, everywhere."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import flag_words

import iterbatch
from iterbatch.checks import make_config
from iterbatch.cli.main import main
from iterbatch.errors import ConfigError
from iterbatch.plain_yaml import dump_yaml
from iterbatch.strategy import REGISTERED, STRATEGIES, knobs, make_strategy, own, register
from iterbatch.study.study_folder import from_folder

CODE = '''
import iterbatch

class TwiceWhenHard(iterbatch.BaseTrainingStrategy):
    """Twice where the loss is above a cut.

    Args:
        cut: initial loss, nats a token, above which a batch gets two passes.
    """

    def __init__(self, cut: float = 2.0, gently: bool = False):
        self.cut, self.gently = cut, gently

    def repeats(self, initial_loss):
        return 2 if initial_loss > self.cut and not self.gently else 1
'''


@pytest.fixture(autouse=True)
def forgotten():
    """What a test registers is gone after it."""
    yield
    for name in [*REGISTERED]:
        STRATEGIES.pop(name, None)
        own.SOURCES.pop(name, None)
    REGISTERED.clear()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def test_typed_arguments_are_knobs_told_by_the_docstring(file):
    assert register(f"{file}:TwiceWhenHard") == "TwiceWhenHard"
    cut = knobs()["cut"]
    assert (cut.kind, cut.default) == (float, 2.0)
    assert "initial loss, nats a token, above which" in cut.knob.documentation
    assert knobs()["gently"].kind is bool
    made = make_strategy("TwiceWhenHard", {"cut": 3.0, "placement": "spaced"}, seed=0)
    assert (made.repeats(3.5), made.repeats(2.5), made.placement) == (2, 1, "spaced")


def test_a_class_will_do_from_python():
    class Thrice(iterbatch.BaseTrainingStrategy):
        def repeats(self, initial_loss):
            return 3

    config = make_config(strategies=["baseline", Thrice])
    assert config.strategy.strategies == ("baseline", "Thrice")


@pytest.mark.parametrize(
    ("code", "word", "message"),
    [
        (CODE, "mine.py:Twice", "has no class Twice (did you mean 'TwiceWhenHard'?)"),
        (CODE, "yours.py:TwiceWhenHard", "there is no file"),
        ("import nothing_like_it", "mine.py:X", "cannot be imported: ModuleNotFoundError"),
        ("class X: pass", "mine.py:X", "does not derive from iterbatch.BaseTrainingStrategy"),
        (
            "import iterbatch\nclass X(iterbatch.BaseTrainingStrategy): pass",
            "mine.py:X",
            "must write repeats",
        ),
        (
            CODE.replace("cut: float", "max_repeats: str"),
            "mine.py:TwiceWhenHard",
            "max_repeats is a int; let it be one",
        ),
        (CODE.replace("TwiceWhenHard", "abr"), "mine.py:abr", "there is a strategy abr already"),
    ],
)
def test_what_is_wrong_is_said(file, capsys, code, word, message):
    file.write_text(code, encoding="utf-8")
    before = {*STRATEGIES}
    assert main(["train", "--strategies", "baseline", f"{file.parent / word}"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert {*STRATEGIES} == before


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["cut=x"], "cut is a float"),
        (["gently=perhaps"], "gently is a true or false"),
        (["cub=1"], "no strategy has a knob 'cub' (did you mean 'cut'?)"),
        (["cut"], "write NAME=VALUE"),
        (["cut=nan"], "--cut is nan; it must be a finite number"),
    ],
)
def test_what_is_set_is_checked(file, capsys, pairs, message):
    assert main(["train", "--strategies", f"{file}:TwiceWhenHard", "--set", *pairs]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_trained_resumed_continued_and_changed(file, tiny, tmp_path, capsys):
    run_dir, named = tmp_path / "run", ["--strategies", "baseline", f"{file}:TwiceWhenHard"]
    flags = flag_words(tiny | {"save_dir": tmp_path, "run_name": "run"})
    assert main(["train", *flags, *named, "--set", "cut=0.5", "gently=false"]) == 0
    result = json.loads((run_dir / "TwiceWhenHard/seed0/result.json").read_text(encoding="utf-8"))
    assert result["mean_repeats"] == 2
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["origin"]["strategies"] == {"TwiceWhenHard": own.SOURCES["TwiceWhenHard"].digest}
    (run_dir / "TwiceWhenHard/seed0/result.json").unlink()
    assert main(["train", "--resume", str(run_dir), *named]) == 0
    assert (
        json.loads((run_dir / "TwiceWhenHard/seed0/result.json").read_text(encoding="utf-8"))["val_ppl"]
        == (result["val_ppl"])
    )
    forgotten_by = STRATEGIES.pop("TwiceWhenHard"), REGISTERED.clear()
    assert forgotten_by
    assert main(["report", str(run_dir)]) == 0
    assert (
        main(["generate", str(run_dir), "--prompt", "a", "--new_tokens", "2", "--strategy", "TwiceWhenHard"])
        == 0
    )
    capsys.readouterr()
    assert main(["train", "--resume", str(run_dir)]) == 2  # code runs only where the command line names it
    said = " ".join(capsys.readouterr().err.split())
    assert "has strategies of your own, TwiceWhenHard; name their files again" in said
    assert said.endswith("--strategies baseline FILE.py:TwiceWhenHard")
    (run_dir / "TwiceWhenHard/seed0/result.json").unlink()
    file.write_text(CODE + "# changed\n", encoding="utf-8")
    assert main(["train", "--resume", str(run_dir), *named]) == 2
    assert "the strategy TwiceWhenHard has SHA-256" in " ".join(capsys.readouterr().err.split())


def test_who_is_interrupted_is_told_to_name_the_file_again(file, tiny, tmp_path, monkeypatch, capsys):
    from iterbatch.study import run as doors

    def interrupted(config, listener):
        listener.run_dir = tmp_path / "run"
        raise KeyboardInterrupt

    monkeypatch.setattr(doors, "run", interrupted)
    flags = flag_words(tiny | {"save_dir": tmp_path})
    assert main(["train", *flags, "--strategies", "baseline", f"{file}:TwiceWhenHard"]) == 130
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(f"train --resume {tmp_path / 'run'} --strategies baseline {file}:TwiceWhenHard")
    assert main(["train", *flags, "--strategies", "baseline"]) == 130
    assert capsys.readouterr().out.split()[-2:] == ["--resume", str(tmp_path / "run")]


def test_a_mistake_in_a_strategy_is_said_with_its_line(file, tiny, tmp_path, capsys):
    file.write_text(CODE.replace("self.cut and", "self.cutt and"), encoding="utf-8")
    flags = flag_words(tiny | {"save_dir": tmp_path, "run_name": "run"})
    assert main(["train", *flags, "--strategies", "baseline", f"{file}:TwiceWhenHard"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"{file}, line 15, in repeats: AttributeError: 'TwiceWhenHard' object has no attribute 'cutt'" in said
    )
    assert "What was trained before is kept" in said
    assert (tmp_path / "run/baseline/seed0/result.json").is_file()


@pytest.mark.slow
def test_a_study_names_a_file_beside_it_and_workers_find_it(file, tiny, tmp_path):
    settings = tiny | {"log_with": "none", "seeds": [0], "prompts": 1, "match": "epochs"}
    arms = {"baseline": None, "mine": {"strategy": "mine.py:TwiceWhenHard", "cut": 0.5}}
    study = tmp_path / "study.yaml"
    study.write_text(dump_yaml({"settings": settings, "arms": arms}), encoding="utf-8")
    assert main(["compare", str(study), "--workers", "2", "--save_dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "study/mine/seed0/result.json").read_text(encoding="utf-8"))
    assert (result["mean_repeats"], result["arm"]["strategy"]) == (2, "TwiceWhenHard")


def test_packages_offer_strategies_by_entry_points(file, tmp_path, monkeypatch):
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n", encoding="utf-8")
    entries = (
        "[iterbatch.strategies]\ntwice = mine:TwiceWhenHard\nabr = mine:TwiceWhenHard\nlost = nowhere:X\n"
    )
    (info / "entry_points.txt").write_text(entries, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(own, "BROKEN", {})
    found = own.from_packages(["abr"])
    assert [*found] == ["twice"]
    assert found["twice"].__name__ == "TwiceWhenHard"
    assert {*own.BROKEN} == {"abr", "lost"}
    assert own.why_broken("abr") == "the package's 'mine:TwiceWhenHard' has the name of another strategy"
    assert "'nowhere:X' cannot be used: No module named" in own.why_broken("lost")
    sys.modules.pop("mine", None)


def test_nothing_of_a_run_names_code(file, tiny, tmp_path):
    config = make_config(**tiny, strategies=["baseline", f"{file}:TwiceWhenHard"])
    assert str(file) not in json.dumps(config.flat())
    with pytest.raises(ConfigError, match="unknown strategy 'Other'"):
        make_config(**tiny, strategies=["baseline", "Other"])
    assert Path(own.SOURCES["TwiceWhenHard"].words.rpartition(":")[0]) == file


@pytest.mark.parametrize("place", ["settings of a cell", "an arm", "a strategy of an arm"])
def test_a_study_in_a_folder_runs_no_code(tmp_path, tiny, place):
    """One that somebody else has made, say."""
    (tmp_path / "evil.py").write_text(
        CODE + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8"
    )
    word = f"{tmp_path / 'evil.py'}:TwiceWhenHard"
    config = make_config(**tiny, strategies=["baseline"]).flat()
    config = json.loads(json.dumps(config, default=str))
    arms = {"baseline": {}}
    if place == "settings of a cell":
        config["strategies"] = [word]
    elif place == "an arm":
        arms["baseline"] = {"strategies": [word]}
    else:
        arms["mine"] = {"strategy": word}
    study = {"name": "s", "cells": {"": {"config": config, "arms": arms}}}
    (tmp_path / "study.json").write_text(json.dumps(study), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        from_folder(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert not (tmp_path / "ran").exists()


def test_hints_that_cannot_be_resolved_are_said_and_leave_the_others_whole(tmp_path):
    code = "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nimport iterbatch\n\n"
    code += (
        "if TYPE_CHECKING:\n    from nowhere import Kind\n\n\nclass Odd(iterbatch.BaseTrainingStrategy):\n"
    )
    code += "    def __init__(self, kind: Kind = None):\n        pass\n\n"
    code += "    def repeats(self, initial_loss):\n        return 1\n"
    (tmp_path / "odd.py").write_text(code, encoding="utf-8")
    with pytest.raises(ConfigError, match="its constructor cannot be read"):
        register(f"{tmp_path / 'odd.py'}:Odd")
    assert "Odd" not in STRATEGIES
    assert "max_repeats" in knobs()


@pytest.mark.slow
def test_a_new_strategy_comes_with_a_test_that_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-strategy", "TwiceWhenSlow"]) == 0
    assert "baseline twice_when_slow.py:TwiceWhenSlow" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {
        "twice_when_slow.py",
        "test_twice_when_slow.py",
        "twice_when_slow.md",
    }
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", str(tmp_path)], cwd=tmp_path, check=False)
    assert ran.returncode == 0
    assert main(["new-strategy", "TwiceWhenSlow"]) == 2
    for name in ("2hard", "class", "a b", "abr"):
        assert main(["new-strategy", name]) == 2
