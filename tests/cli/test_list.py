"""``iterbatch list``, and the help of every command."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from iterbatch.checks import make_config
from iterbatch.cli.main import COMMANDS, EXAMPLES, main
from iterbatch.runtime.run_folder import locked
from iterbatch.study.run import run as run_bench


@pytest.mark.slow
def test_a_row_a_run(tiny, tmp_path, capsys):
    for name, strategies in (("first", ["baseline"]), ("second", ["baseline", "abr"])):
        flags = tiny | {"strategies": strategies, "save_dir": tmp_path, "run_name": name, "seeds": [0, 1]}
        run_bench(make_config(**flags))
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "second/abr/seed1/result.json").unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/study.json").write_text("{", encoding="utf-8")
    with locked(tmp_path / "second"):
        assert main(["list", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"first +20\d\d-\d\d-\d\d \d\d:\d\d +2/2 +baseline +[\d,]+\.\d+", shown)
    assert re.search(r"second +\S+ \S+ +3/4 in training +", shown)
    assert re.search(r"broken +damaged", shown)
    assert "other" not in shown


def test_folders_without_runs(tmp_path, capsys):
    assert main(["list", str(tmp_path)]) == 0
    assert "holds no run yet" in capsys.readouterr().out
    assert main(["list", str(tmp_path / "none")]) == 0
    assert "holds no run yet" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert main(["list", str(tmp_path / "file")]) == 2
    assert "--save_dir" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_can_be_typed(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert EXAMPLES[name]
    for example in EXAMPLES[name]:
        assert example in text
        program, command, *words = shlex.split(example)
        assert (program, command) == ("iterbatch", name)
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", text.replace(example, "")), flag


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are closed otherwise there")
def test_a_reader_who_goes_away_is_no_error():
    command = f"{sys.executable} -m iterbatch train --help | head -n 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert "usage" in done.stdout
    assert done.stderr == ""
