"""``--compile auto``: decided by plain numbers, recorded, and kept when a run is resumed."""

import json
import shutil

import pytest

from iterbatch.bench import shared
from iterbatch.checks import config_of, make_config
from iterbatch.config import LAST
from iterbatch.errors import ConfigError, ModelError
from iterbatch.flags import parse_config, with_values
from iterbatch.model.compiled import worth_compiling
from iterbatch.plain_yaml import parse_yaml
from iterbatch.study.run import run

QUICK = {"strategies": ["baseline"], "prompts": 1}
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++")


def test_it_is_worth_it_where_passes_are_many_and_layers_few():
    assert not worth_compiling(1.3e13, 8, "cpu", "bfloat16")  # the default run: about three minutes
    assert worth_compiling(6e13, 8, "cpu", "bfloat16")
    assert not worth_compiling(6e13, 8, "cpu", "float32")  # less to gain
    assert not worth_compiling(1e14, 80, "cpu", "bfloat16")
    assert not worth_compiling(1e14, 8, "cuda", "bfloat16")
    assert worth_compiling(1e18, 32, "cuda", "bfloat16")
    assert not worth_compiling(1e30, 8, "mps", "bfloat16")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "auto"),
        (["--compile"], "on"),
        (["--compile", "--lr", "0.1"], "on"),
        (["--no_compile"], "off"),
        (["--no-compile"], "off"),
        (["--compile", "auto"], "auto"),
        (["--compile", "off"], "off"),
    ],
)
def test_the_flag_alone_means_on(words, expected):
    assert parse_config(words).speed.compile == expected


def test_a_switch_before_a_study_file_takes_none_of_its_words():
    assert with_values(["--compile", "study.yaml"]) == ["--compile", "on", "study.yaml"]


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "on"), ("false", "off"), ("auto", "auto"), ("on", "on")]
)
def test_files_may_say_true_and_false_as_they_did(tmp_path, written, meant):
    file = tmp_path / "settings.yaml"
    file.write_text(f"compile: {written}\n", encoding="utf-8")
    assert parse_config(["--config", str(file)]).speed.compile == meant
    assert config_of(parse_yaml(file.read_text(encoding="utf-8"))).speed.compile == meant


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="compile"):
        make_config(compile="always")


class Notes(shared.Listener):
    def __init__(self):
        self.said = []

    def note(self, message):
        self.said.append(message)


def _told(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def test_a_short_run_is_not_compiled_and_says_so(tiny, tmp_path):
    made = run(make_config(**tiny, **QUICK, save_dir=tmp_path))
    assert (_told(made)["compiled"], _told(made)["compile_seconds"]) == (False, 0)


@compiles
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_worthy_run_is_compiled_and_goes_on_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "worth_compiling", lambda *_: True)
    notes = Notes()
    made = run(make_config(**tiny, **QUICK, save_dir=tmp_path, run_name="worthy"), notes)
    assert _told(made)["compiled"] is True, notes.said[-1]
    assert _told(made)["compile_seconds"] > 0
    # Resumed where it would no longer be worth it: more arms are trained as the first was.
    monkeypatch.setattr(shared, "worth_compiling", lambda *_: False)
    asked = []
    real = shared.compiled
    monkeypatch.setattr(shared, "compiled", lambda *given: asked.append(given) or real(*given))
    again = QUICK | {"strategies": ["baseline", "fixed"]}
    run(make_config(**tiny, **again, save_dir=tmp_path, run_name="worthy", resume=LAST))
    assert len(asked) == 1


def test_without_a_compiler_auto_goes_on_and_on_does_not(tiny, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(shared, "worth_compiling", lambda *_: True)
    monkeypatch.setattr("iterbatch.model.compiled.Compiled._run", fails)
    notes = Notes()
    made = run(make_config(**tiny, **QUICK, save_dir=tmp_path, run_name="auto"), notes)
    assert _told(made)["compiled"] is False
    assert any("layers cannot be compiled" in said and "no C++ compiler" in said for said in notes.said)
    with pytest.raises(ModelError, match="cannot be compiled"):
        run(make_config(**tiny, **QUICK, save_dir=tmp_path, run_name="on", compile="on"))
