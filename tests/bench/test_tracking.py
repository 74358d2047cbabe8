"""Trackers, read back: one run an arm and seed, under the run's name, and nothing lost."""

import json
import os
import struct
import tempfile
from collections import defaultdict

import pytest

from iterbatch.checks import make_config
from iterbatch.records.record import BatchRecord, EvalRecord, read_records
from iterbatch.study.run import run as run_bench

os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp())  # read when trackio is imported

ARMS = ("baseline/seed0", "baseline/seed1", "abr/seed0", "abr/seed1")
NAMES = {"initial_loss", "passes", "learning_rate", "gradient_norm", "flops", "train_seconds"}


def _train(tiny, folder, tracker):
    flags = {**tiny, "log_with": [tracker], "prompts": 1, "loss_threshold": 2.0}
    return run_bench(
        make_config(**flags, strategies=["baseline", "abr"], seeds=[0, 1], save_dir=folder, run_name="mine")
    )


def _written(run_dir, label):
    """What the arm's own records say: batches made to initial loss, and to the losses of repeats."""
    records = list(read_records(run_dir / label / "batches.jsonl", BatchRecord))
    evals = list(read_records(run_dir / label / "evals.jsonl", EvalRecord))
    return records, [each for each in evals if each.split == "validation"]


def _check(run_dir, label, found):
    """Found: name to (step, value) pairs."""
    records, evals = _written(run_dir, label)
    assert found.keys() >= NAMES | {"validation_ppl", "test_ppl"}
    assert dict(found["initial_loss"]) == {
        each.batch + 1: pytest.approx(each.initial_loss, rel=1e-6) for each in records
    }
    repeated = {each.batch + 1: each.losses[1] for each in records if len(each.losses) > 1}
    assert dict(found.get("loss_before_pass_2", [])) == {
        step: pytest.approx(loss, rel=1e-6) for step, loss in repeated.items()
    }
    assert [value for _, value in found["validation_ppl"]] == [
        pytest.approx(each.ppl, rel=1e-6) for each in evals
    ]
    assert bool(repeated) is label.startswith("abr")


def test_tensorboard(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = _train(tiny, tmp_path, "tensorboard")
    folders = {file.parent for file in (run_dir / "tracking").rglob("events.out*")}
    assert folders == {run_dir / "tracking" / label for label in ARMS}
    for label in ARMS:
        events = EventAccumulator(str(run_dir / "tracking" / label), size_guidance={"scalars": 0})
        events.Reload()
        found = {
            name: [(each.step, each.value) for each in events.Scalars(name)]
            for name in events.Tags()["scalars"]
        }
        _check(run_dir, label, found)
        _, evals = _written(run_dir, label)
        assert [step for step, _ in found["by_gflops/validation_ppl"]] == [
            round(each.flops / 1e9) for each in evals
        ]
        assert "settings/text_summary" in events.Tags()["tensors"]


def _wandb_records(file):
    """The records of an offline file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_offline(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = _train(tiny, tmp_path, "wandb")
    files = sorted((run_dir / "tracking").rglob("*.wandb"))
    labels = set()
    for file in files:
        found, run, axes = defaultdict(list), None, set()
        for record in _wandb_records(file):
            if record.HasField("run"):
                run = record.run
            if record.HasField("metric"):
                axes.add(record.metric.step_metric)
            if record.HasField("history"):
                row = {
                    each.key or "/".join(each.nested_key): json.loads(each.value_json)
                    for each in record.history.item
                }
                for name, value in row.items():
                    found[name].append((record.history.step.num, value))
        assert run is not None
        assert (run.project, run.run_group) == ("iterbatch", "mine")
        assert "flops" in axes
        labels.add(run.display_name)
        _check(run_dir, run.display_name, found)
    assert labels == {*ARMS}
    assert len(files) == len(ARMS)


def test_mlflow(tiny, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_dir = _train(tiny, tmp_path, "mlflow")
    client = mlflow.tracking.MlflowClient()
    experiment = client.get_experiment_by_name("mine")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(each.info.run_name for each in runs) == sorted(ARMS)
    for each in runs:
        names = each.data.metrics
        found = {
            name: [(point.step, point.value) for point in client.get_metric_history(each.info.run_id, name)]
            for name in names
        }
        _check(run_dir, each.info.run_name, found)


def test_trackio(tiny, tmp_path):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run_dir = _train(tiny, tmp_path, "trackio")
    assert sorted(SQLiteStorage.get_runs("mine")) == sorted(ARMS)
    for label in ARMS:
        found = defaultdict(list)
        for row in SQLiteStorage.get_logs("mine", label):
            for name, value in row.items():
                if name not in ("step", "timestamp"):
                    found[name].append((row["step"], value))
        _check(run_dir, label, found)
