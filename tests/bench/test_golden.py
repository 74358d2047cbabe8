"""Same numbers: what every strategy did on a tiny model, as records of an earlier version have it."""

import dataclasses
import json
from pathlib import Path

import pytest

from iterbatch.checks import make_config
from iterbatch.records.record import BatchRecord, read_records
from iterbatch.strategy import STRATEGIES
from iterbatch.study.run import run as run_bench

GOLDEN = Path(__file__).parent / "golden_batches.jsonl"
CLOSE = {"initial_loss", "losses", "gradient_norm", "learning_rate"}  # to rounding; all else is equal


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_folder):
    config = make_config(
        model_name=str(tiny_folder),
        dtype="float32",
        strategies=list(STRATEGIES),
        loss_threshold=3.0,
        probe_rate=0.5,
        probe_budget=1.0,
        lora_layers="top:1",
        max_length=32,
        max_train_tokens=1024,
        max_eval_tokens=200,
        batch_size=1,
        grad_accum=2,
        seeds=[0, 1],
        match="flops",
        lr=0.01,
        evals=1,
        prompts=1,
        log_with=["none"],
        save_dir=tmp_path_factory.mktemp("golden"),
        run_name="run",
    )
    return run_bench(config)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_does_what_it_did(trained, strategy):
    lines = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    expected = [line for line in lines if line.pop("strategy") == strategy]
    found = [*read_records(trained / strategy / "seed0" / "batches.jsonl", BatchRecord)]
    assert len(found) == len(expected) > 0
    for record, golden in zip(map(dataclasses.asdict, found), expected, strict=True):
        for name, value in golden.items():
            assert record[name] == (pytest.approx(value, rel=1e-3) if name in CLOSE else value), name
