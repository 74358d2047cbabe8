"""The examples run as they stand, and repeat."""

import runpy
import sys

import pytest
from conftest import ROOT

EXAMPLES = {
    "transformers_trainer": ("--out",),
    "trl_sft": ("--out",),
    "lightning_module": (),
    "accelerate_loop": (),
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs_and_repeats(tmp_path, monkeypatch, capsys, name):
    pytest.importorskip({"trl_sft": "trl", "lightning_module": "lightning"}.get(name, "transformers"))
    words = [word for flag in EXAMPLES[name] for word in (flag, str(tmp_path))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--epochs", "1", *words])
    module = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    trained = module["main"]()
    ledger = trained.ledger if name == "accelerate_loop" else trained.repeats.ledger
    assert ledger.updates > ledger.batches > 1
    assert f"{ledger.updates} updates" in capsys.readouterr().out


def test_every_example_is_tested():
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == {*EXAMPLES}
