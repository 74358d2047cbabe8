"""From Python and notebooks: what a run gives back, and what its settings may be."""

import dataclasses
import functools
import json
import operator
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from support.studies import study_file

import iterbatch
from iterbatch.checks import GROUPS
from iterbatch.settings import Settings
from iterbatch.strategy import BaseTrainingStrategy, knobs


@pytest.fixture(scope="module")
def flags(tiny_folder):
    """Settings of a run that takes a second or two."""
    return {
        "model_name": str(tiny_folder),
        "dtype": "float32",
        "max_length": 64,
        "max_train_tokens": 1024,
        "max_eval_tokens": 400,
        "batch_size": 2,
        "evals": 1,
        "prompts": 1,
        "log_with": ["none"],
    }


def test_a_run_gives_back_its_table_its_best_arm_and_its_report(flags, tmp_path, capsys):
    made = iterbatch.run(
        **flags,
        strategies=["baseline", "abr"],
        loss_threshold=4.0,
        seeds=[0, 1],
        match="flops",
        save_dir=tmp_path,
    )
    assert "baseline, seed 0" in capsys.readouterr().out  # progress is shown
    assert made.folder.parent == tmp_path
    assert made.report.is_file()
    table = made.table.set_index("arm")
    results = [
        json.loads(file.read_text("utf-8")) for file in sorted(made.folder.glob("abr/seed*/result.json"))
    ]
    assert table.loc["abr", "test_ppl"] == pytest.approx(sum(each["test_ppl"] for each in results) / 2)
    assert table.loc["abr", "seeds"] == 2
    assert table.loc["abr", "compute"] == pytest.approx(1.0, abs=0.1)
    assert table.loc["abr", "delta_low"] < table.loc["abr", "delta"] < table.loc["abr", "delta_high"]
    assert made.best == table["test_ppl"].idxmin()
    assert made.conclusion.startswith("For the same compute, ")
    for shown in (repr(made), made._repr_html_()):
        assert "For the same compute, " in shown
        assert "abr" in shown
        assert "report.html" in shown
    again = iterbatch.Outcome(made.folder)
    assert again.table.equals(made.table)


def test_a_listener_hears_instead_and_nothing_is_shown(flags, tmp_path, capsys):
    config = iterbatch.make_config(**flags, strategies=["baseline"], save_dir=tmp_path)
    made = iterbatch.run(config, iterbatch.Listener())
    assert capsys.readouterr().out == ""
    assert made.best == "baseline"
    with pytest.raises(iterbatch.UserError, match="not both: epochs"):
        iterbatch.run(config, epochs=1)


def test_a_study_from_python(tiny_folder, tmp_path, capsys):
    arms = {"baseline": None, "fixed2": {"strategy": "fixed"}}
    file = study_file(tmp_path, tiny_folder, arms, seeds=[0])
    made = iterbatch.compare(file, save_dir=tmp_path / "results")
    assert set(made.table["arm"]) == {"baseline", "fixed2"}
    assert "[2/2]" in capsys.readouterr().out


def test_names_of_the_data_are_inert_in_a_notebook(flags, tmp_path):
    made = iterbatch.run(
        iterbatch.make_config(**flags, strategies=["baseline"], save_dir=tmp_path), iterbatch.Listener()
    )
    nasty = "<script>alert(1)<"
    (made.folder / "baseline").rename(made.folder / nasty)
    (made.folder / "study.json").unlink()
    assert "<script" not in iterbatch.Outcome(made.folder)._repr_html_()


WRONG = {
    "epochs": ("3", "'epochs' is '3', a str; it must be a whole number"),
    "lr": (True, "'lr' is True, a bool; it must be a number or None"),
    "seeds": (3, "'seeds' is 3, a int; it must be a list, each a whole number"),
    "lora_targets": (["q_proj", 1], "it must be a list, each a text"),
    "strategies": ("abr", "'strategies' is 'abr', a str; it must be a list, each a text"),
    "data_dir": (5, "'data_dir' is 5, a int; it must be a path or None"),
    "loss_threshold": ([1], "it must be a number or a text"),
    "match": ("flop", "it must be 'epochs' or 'flops' or 'updates' or 'tokens' or 'seconds'"),
    "max_length": (2.5, "'max_length' is 2.5, a float; it must be a whole number or None"),
    "overwrite": (1, "'overwrite' is 1, a int; it must be True or False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_type_is_refused_by_name(name):
    value, message = WRONG[name]
    with pytest.raises(iterbatch.UserError) as caught:
        iterbatch.make_config(**{name: value})
    assert message in str(caught.value)


def test_all_wrong_types_are_told_together():
    with pytest.raises(iterbatch.UserError) as caught:
        iterbatch.make_config(epochs="3", lr="high")
    assert len(str(caught.value).splitlines()) == 2


def _as_given(hint):
    """What a user may write for a setting."""
    if get_origin(hint) is tuple:
        return Sequence[get_args(hint)[0]]
    if get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_as_given, get_args(hint)))
    return str | Path if hint is Path else hint


def test_the_typed_settings_are_all_of_them():
    hints = {name: hint for kind in GROUPS.values() for name, hint in get_type_hints(kind).items()}
    told = {name: hint for name, hint in hints.items() if name not in ("knobs", "config")}
    builtin = {name: shared for name, shared in knobs().items() if name in Settings.__annotations__}
    told |= {
        name: each.kind if each.default is not None else each.kind | None for name, each in builtin.items()
    }
    expected = {name: _as_given(hint) for name, hint in told.items()}
    expected["strategies"] = Sequence[str | type[BaseTrainingStrategy]]
    found = get_type_hints(Settings, localns={"BaseTrainingStrategy": BaseTrainingStrategy})
    assert found.keys() == expected.keys()
    for name, hint in expected.items():
        assert _parts(found[name]) == _parts(hint), name
    fields = {each.name for kind in GROUPS.values() for each in dataclasses.fields(kind)}
    assert fields - {"knobs", "config"} <= found.keys()


def _parts(hint):
    parts = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType, Literal) else {hint}
    return {part for each in parts for part in (get_args(each) if get_origin(each) is Literal else [each])}
