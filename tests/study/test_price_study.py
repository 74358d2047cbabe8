"""studies/price.py: which runs it asks for, what resting adapters cost, and what it says of records."""

import importlib
from pathlib import Path

import pytest

from iterbatch.checks import make_config
from iterbatch.model.base import load_base
from iterbatch.model.flops import flop_model
from iterbatch.model.weights import load_model

ROOT = Path(__file__).parents[2]
SHAPES = [(4, 128)]


@pytest.fixture(scope="module")
def price():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "studies"))
        yield importlib.import_module("price")


def _model(layers):
    config = make_config(dtype="float32", lora_layers=layers)
    return load_model(load_base(config), config.model, meta=True)


def test_adapters_at_rest_cost_as_if_only_those_above_were_there(price):
    model = _model("all")
    whole, resting = flop_model(model), price.rested(model, 6)
    assert resting == flop_model(_model("top:2"))
    assert resting.repeat(SHAPES) < whole.repeat(SHAPES)
    assert flop_model(model) == whole  # nothing of it stays


def _line(price, run):
    """Three documents, harder at a rate other than 0.002 and with fewer epochs."""
    loss = 3 + abs(run.lr - 0.002) * 100 + 0.1 / run.epochs + 0.01 * (run.seed % 7)
    scored = {
        "loss": loss,
        "nats": [100 * loss + 1, 200 * loss - 2, 300 * loss + 1],
        "tokens": [100, 200, 300],
    }
    measured = {"batches": 4, "flops": float(run.epochs), "flops_of_a_fresh_pass": 1.0, "seconds": 2.0}
    return price.asdict(run) | measured | {"validation": scored, "test": scored}


def _played(price, plan):
    """Records of a plan that was run to its end."""
    lines = []
    while runs := list(price.missing(plan, lines)):
        lines.append(_line(price, runs[0]))
        assert len(lines) < 100
    return lines


def _plan(price, *rates):
    arm = price.Arm("all", "all", (8,), 2, (1, 2, 3), ((3, 1 / 3, 4),))
    return price.Plan("casino", 1, 1, 1, 1, rates, (arm,), seeds=(0, 1, 2))


def test_a_plan_tunes_beyond_an_edge_then_trains_at_the_best_rate(price):
    plan = _plan(price, 0.004, 0.008)
    lines = _played(price, plan)
    trials = [line for line in lines if line["seed"] in plan.tuning_seeds]
    finals = [line for line in lines if line not in trials]
    assert {line["lr"] for line in trials} == {0.001, 0.002, 0.004, 0.008}
    assert lines[: len(trials)] == trials  # no run before its rate is known
    assert len(trials) == 4 * len(plan.tuning_seeds)
    assert {line["lr"] for line in finals if not line["rest_below"]} == {0.002}
    assert {line["lr"] for line in finals if line["rest_below"]} == {0.001, 0.002}  # and at half of it
    assert len(finals) == 3 * 5  # three seeds of three plain runs and two that rest
    assert not list(price.missing(plan, lines))


def test_what_all_layers_reach_at_their_best_is_worth_one(price, capsys):
    plan = _plan(price, 0.001, 0.002, 0.004)
    price.report(plan, _played(price, plan))
    said = capsys.readouterr().out
    assert "best at 3 epochs" in said
    (best,) = [line for line in said.splitlines() if line.startswith("all, 3 epochs:")]
    assert "difference +0.0000" in best and "worth 1.00" in best
    (fewer,) = [line for line in said.splitlines() if line.startswith("all, 2 epochs:")]
    assert "worth 1.00" in fewer  # what is saved is what is lost: the ladder itself
