"""What a run is worth after it was cut off: exactly what it would have been."""

import errno
import json
import math
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from support.runs import Notes, stop_at

from campaigns.crashes import content
from iterbatch.bench.train_arm import ROLLBACKS, SavePoints
from iterbatch.checks import make_config
from iterbatch.cli.main import main
from iterbatch.config import LAST, Every
from iterbatch.errors import RunError
from iterbatch.model.cut import CutModel
from iterbatch.records.record import BatchRecord, RecordWriter, read_records
from iterbatch.report import figures, page
from iterbatch.runtime.checkpoint import (
    Checkpoints,
    RandomStates,
    checkpoint_files,
    pack,
    read_state,
    remove_checkpoints,
    unpack,
    write_state,
)
from iterbatch.runtime.interrupt import Interrupts, Stopped
from iterbatch.study.run import run as run_bench
from iterbatch.training.budget import Ledger
from iterbatch.training.charges import Account, Charges
from iterbatch.training.health import PATIENCE, Health
from iterbatch.training.passes import Pass

STATE = {
    "tensors": [torch.arange(6).view(2, 3), torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0)],
    "numbers": {1: math.inf, "nan": math.nan, "big": 2**127, "third": 1 / 3, "none": None, "flag": True},
    "array": np.array([1, 2**32 - 1], dtype=np.uint32),
    "text": "ünï\x00\n$tensor",
    "$tensor": {"$float": "a key that looks like a mark"},
}


# -- files ------------------------------------------------------------------------------------------- -----


def test_a_state_comes_back_from_its_file_as_it_was(tmp_path):
    write_state(tmp_path / "state.safetensors", STATE)
    back = read_state(tmp_path / "state.safetensors")
    assert all(
        a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(STATE["tensors"], back["tensors"], strict=True)
    )
    assert math.isnan(back["numbers"].pop("nan"))
    assert back["numbers"] == {name: value for name, value in STATE["numbers"].items() if name != "nan"}
    assert back["array"].dtype == np.uint32
    assert np.array_equal(back["array"], STATE["array"])
    assert (back["text"], back["$tensor"]) == (STATE["text"], STATE["$tensor"])
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_state_that_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(TypeError, match="holds a function; allowed are numbers"):
        pack({"rule": lambda: 1}, {})
    assert unpack(pack((1, (2.0,)), {}), {}) == [1, [2.0]]
    checkpoints, part = _checkpoints(tmp_path, [])
    part.value = object()
    with pytest.raises(RunError, match="no checkpoint can be made: a state_dict holds a object"):
        checkpoints.save()


@pytest.mark.parametrize("damage", ["flipped", "cut short", "empty", "noise", "another format"])
def test_a_damaged_file_is_recognised(tmp_path, damage):
    file = tmp_path / "state.safetensors"
    write_state(file, STATE)
    whole = file.read_bytes()
    spoiled = {
        "flipped": [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 17)],
        "cut short": [whole[:size] for size in range(1, len(whole), 31)],
        "empty": [b""],
        "noise": [bytes(range(256)) * 4, b"{}" * 100],
        "another format": [whole.replace(b'"format":"1"', b'"format":"2"')],
    }[damage]
    for content_ in spoiled:
        file.write_bytes(content_)
        with pytest.raises((ValueError, KeyError, TypeError)):
            read_state(file)


def _checkpoints(folder, warned, value=None):
    part = SimpleNamespace(
        value=value,
        state_dict=lambda: {"value": part.value},
        load_state_dict=lambda state: vars(part).update(state),
    )
    return Checkpoints(folder, {}, {"part": part}, warned.append), part


def test_two_are_kept_and_a_damaged_one_gives_way_to_the_one_before(tmp_path):
    warned = []
    checkpoints, part = _checkpoints(tmp_path, warned)
    for part.value in range(12):
        checkpoints.save()
    assert [file.name for file in checkpoint_files(tmp_path)] == [
        "checkpoint-000011.safetensors",
        "checkpoint-000012.safetensors",
    ]
    assert checkpoints.restore()
    assert part.value == 11
    last = checkpoint_files(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:-1])
    assert checkpoints.restore()
    assert (part.value, len(warned)) == (10, 1)
    assert "checkpoint-000012.safetensors cannot be used" in warned[0]
    checkpoint_files(tmp_path)[0].write_bytes(b"")
    assert not checkpoints.restore()
    checkpoints.save()
    assert checkpoints.restore()
    remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_once_and_leaves_what_is_there(tmp_path, monkeypatch):
    warned = []
    checkpoints, part = _checkpoints(tmp_path, warned, "before")
    checkpoints.save()

    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("iterbatch.runtime.checkpoint.save_file", full)
        part.value = "lost"
        checkpoints.save()
        checkpoints.save()
    assert len(warned) == 1
    assert "No space left" in warned[0]
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-000001.safetensors"]
    assert checkpoints.restore()
    assert part.value == "before"


def test_records_are_cut_back_and_lost_ones_are_noticed(tmp_path):
    file = tmp_path / "batches.jsonl"
    with RecordWriter(file) as writer:
        writer.write(_record(1.0))
        state = writer.state_dict()
        writer.write(_record(2.0))
    with RecordWriter(file) as writer:
        writer.load_state_dict(state)
        writer.write(_record(3.0))
        assert writer.size == file.stat().st_size
    assert [record.initial_loss for record in read_records(file, BatchRecord)] == [1.0, 3.0]
    file.write_bytes(file.read_bytes()[: state["size"] - 1])
    with RecordWriter(file) as writer, pytest.raises(ValueError, match="has lost records"):
        writer.load_state_dict(state)


def _record(loss, gradient_norm=1.0):
    return BatchRecord(0, 0, loss, [loss], 1, 1, 1e-3, gradient_norm, 10, 1.0, 0.1)


def test_random_states_go_on_where_they_were():
    notes = []
    states = RandomStates(0, lambda: 5, 8, notes.append)
    saved = unpack(*_packed(states.state_dict()))
    first = (torch.rand(3), np.random.rand(3), __import__("random").random())  # noqa: NPY002
    states.load_state_dict(saved)
    again = (torch.rand(3), np.random.rand(3), __import__("random").random())  # noqa: NPY002
    assert torch.equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert first[2] == again[2]
    assert not notes
    two = {"processes": saved["processes"] * 2}
    with pytest.raises(RunError, match=r"made by 2 process\(es\) and cannot be resumed by 1"):
        states.load_state_dict(two)  # of an earlier version, which did not say how large a batch was
    drawn = []
    for _ in range(2):
        states.load_state_dict(two | {"batch_rows": 8})
        drawn.append((float(torch.rand(())), float(np.random.rand()), __import__("random").random()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert "drawn anew" in notes[0]


def _packed(state):
    tensors = {}
    return pack(state, tensors), tensors


def test_every_counts_seconds_or_updates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seconds, updates = Every("1.5"), Every("3u")
    for every in (seconds, updates):
        every.restart(10)
    assert not seconds.due(99)
    now[0] = 101.5
    assert seconds.due(10)
    assert [updates.due(count) for count in (12, 13)] == [False, True]
    for bad in ("", "0", "-1", "5m", "1e9", "u", "٣"):
        with pytest.raises(ValueError, match="write seconds or updates"):
            Every(bad)


# -- whole runs -------------------------------------------------------------------------------------- -----


@pytest.fixture
def quick(tiny, tmp_path, monkeypatch):
    """Run with some flags, undisturbed; returns the folder.

    Without figures and long samples, which no checkpoint touches.
    """
    monkeypatch.setattr(figures, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(page, "write", lambda *_: [])
    flags = tiny | {
        "prompts": 1,
        "loss_threshold": 3.0,
        "probe_rate": 1.0,
        "probe_budget": 1.0,
        "epochs": 2,
        "save_dir": tmp_path,
        "checkpoint_every": "9999u",
    }
    return lambda name, listener=None, **more: run_bench(
        make_config(**flags | {"run_name": name} | more), listener
    )


@pytest.mark.parametrize("strategy", ["baseline", "abr", "learnable", "window"])
@pytest.mark.parametrize(
    "variant",
    [
        {"reuse": "batch"},
        {"reuse": "epoch", "lora_dropout": 0.1, "grad_accum": 2},
        {"reuse": "off", "match": "flops"},
    ],
)
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(quick, monkeypatch, strategy, variant):
    flags = {"strategies": [strategy], "lora_layers": "top:1", "batch_size": 2, **variant}
    _check_stopped_anywhere(quick, monkeypatch, flags, [4, 7, 13, 22, 36])


@pytest.mark.parametrize(
    ("strategies", "places", "more"),
    [
        (["spaced"], [5, 11, 20, 33], {}),
        (["excess"], [5, 20], {}),
        (["weighted"], [9], {}),
        (["selective"], [9, 22], {}),
        (["abr", "permuted", "small_batches"], [40, 70, 95], {"block": 8}),
        (["abr", "inverse", "profile"], [40, 90, 130], {"seeds": [0, 1]}),
        (["abr"], [7, 12, 19], {"placement": "spaced", "loss_threshold": "auto", "gap": 2}),
        (["learnable"], [7, 16, 25], {"placement": "spaced", "gap": 2, "probe_rate": 0.5}),
        (["window"], [5, 14], {"placement": "spaced", "gap": 1, "reuse": "epoch"}),
        (["gradient_noise"], [5, 14], {"batch_size": 1, "grad_accum": 2}),
        (["learnable", "frozen"], [20, 40], {}),
    ],
)
def test_a_control_stopped_anywhere_ends_as_if_it_had_not_been(quick, monkeypatch, strategies, places, more):
    flags = {"strategies": strategies, "lora_layers": "top:1", "batch_size": 2, **more}
    _check_stopped_anywhere(quick, monkeypatch, flags, places, least=1)


def _check_stopped_anywhere(quick, monkeypatch, flags, places, least=2):
    expected = content(quick("undisturbed", **flags))
    stops, resume = 0, None
    for place in places:
        with monkeypatch.context() as patch:
            stop_at(patch, place)
            try:
                run_dir = quick("disturbed", resume=resume, **flags)
            except Stopped:
                resume, stops = LAST, stops + 1
            else:
                break
    else:
        run_dir = quick("disturbed", resume=LAST, **flags)
    assert stops >= least
    found = content(run_dir)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_a_checkpoint_within_the_repeats_of_a_batch_does_none_of_them_again(quick, monkeypatch):
    flags = {"strategies": ["abr"], "batch_size": 2, "evals": 1}
    with monkeypatch.context() as patch:
        real = SavePoints.here

        def at_the_second_pass(points):
            if len(points.step.journal.losses) == 2:
                points.shared.interrupts.requested = signal.SIGINT
            return real(points)

        patch.setattr(SavePoints, "here", at_the_second_pass)
        with pytest.raises(Stopped) as stopped:
            quick("run", **flags)
    assert stopped.value.exit_code == 130
    passes, real_pass = [], CutModel.forward
    monkeypatch.setattr(
        CutModel,
        "forward",
        lambda model, hidden, micro: (passes.append(model.training), real_pass(model, hidden, micro))[1],
    )
    run_dir = quick("run", resume=LAST, **flags)
    result = json.loads((run_dir / "abr/seed0/result.json").read_text(encoding="utf-8"))
    assert sum(passes) == result["updates"] - 2
    assert next(read_records(run_dir / "abr/seed0/batches.jsonl", BatchRecord)).repeats_done == 2


def test_the_store_of_a_stopped_run_serves_the_run_that_goes_on(quick, monkeypatch):
    flags = {"strategies": ["baseline"], "lora_layers": "top:1", "reuse": "epoch"}
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(Stopped):
            quick("run", **flags)
    listener = Notes()
    run_dir = quick("run", listener, resume=LAST, **flags)
    assert any("resumed after" in note for note in listener.notes)
    assert json.loads((run_dir / "baseline/seed0/result.json").read_text(encoding="utf-8"))["flops_saved"] > 0


def test_an_arm_whose_checkpoints_are_damaged_starts_anew_and_says_so(quick, monkeypatch):
    flags = {"strategies": ["abr"], "checkpoint_every": "1u"}
    expected = content(quick("undisturbed", **flags))
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Stopped):
            quick("run", **flags)
    files = sorted((_folder(quick) / "run/abr/seed0").glob("checkpoint-*"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-20])
    listener = Notes()
    found = content(quick("run", listener, resume=LAST, **flags))
    assert not list((_folder(quick) / "run/abr/seed0").glob("checkpoint-*"))
    (
        _folder(quick) / "run/abr/seed0/checkpoint-000099.safetensors"
    ).touch()  # left by a kill after the result was there
    quick("run", resume=LAST, **flags)
    assert not list((_folder(quick) / "run/abr/seed0").glob("checkpoint-*"))
    assert sum("cannot be used" in note for note in listener.notes) == 2
    assert [name for name in expected if found.get(name) != expected[name]] == []


def _folder(quick):
    return quick.__closure__[0].cell_contents["save_dir"]


def test_a_clock_that_is_set_back_changes_nothing(quick, monkeypatch):
    flags = {"strategies": ["window"], "checkpoint_every": "1u"}
    expected = content(quick("undisturbed", **flags))
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now.__setitem__(0, now[0] - 1000) or now[0])
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        with pytest.raises(Stopped):
            quick("run", **flags)
    found = content(quick("run", resume=LAST, **flags))
    assert [name for name in expected if found.get(name) != expected[name]] == []


def test_one_process_at_a_time(quick, tmp_path):
    run_dir = quick("run", strategies=["baseline"])
    with FileLock(run_dir / "lock"):
        (run_dir / "holder.json").write_text(json.dumps({"pid": 4321, "host": "elsewhere"}), encoding="utf-8")
        with pytest.raises(RunError, match="in use by process 4321 on 'elsewhere'"):
            quick("run", strategies=["baseline"], resume=LAST)
        with pytest.raises(RunError, match="in use by"):
            quick("run", strategies=["baseline"], overwrite=True)
    assert (run_dir / "summary.md").exists()
    quick("run", strategies=["baseline"], resume=LAST)  # whoever left holder.json is gone
    assert not (run_dir / "holder.json").exists()


def test_a_full_disk_under_the_records_ends_the_run_with_a_word_and_it_goes_on(
    tiny, quick, tmp_path, monkeypatch, capsys
):
    words = [
        "--strategies",
        "abr",
        "--save_dir",
        str(tmp_path),
        "--run_name",
        "run",
        "--checkpoint_every",
        "1u",
    ]
    words += [
        word
        for name, value in tiny.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [str(value)]))
    ]
    real, written = RecordWriter.write, [0]

    def full(writer, record):
        written[0] += isinstance(record, BatchRecord)
        if written[0] == 4:
            writer._file.write('{"batch": 3, "ep')
            writer._file.flush()
            raise OSError(errno.ENOSPC, "No space left on device", str(writer.path))
        real(writer, record)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        assert main(["train", *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "batches.jsonl: No space left on device" in said
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    records = list(read_records(tmp_path / "run/abr/seed0/batches.jsonl", BatchRecord))
    assert [record.batch for record in records] == list(range(4))


def test_out_of_memory_says_what_to_lower_and_loses_nothing(quick, monkeypatch):
    flags = {"strategies": ["abr"], "checkpoint_every": "1u"}
    expected = content(quick("undisturbed", **flags))
    real, passes = CutModel.forward, [0]

    def greedy(model, hidden, micro):
        passes[0] += model.training
        if passes[0] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(model, hidden, micro)

    with monkeypatch.context() as patch:
        patch.setattr(CutModel, "forward", greedy)
        with pytest.raises(
            RunError, match=r"out of memory.*--batch_size .*--gradient_checkpointing.*--lora_layers top:N"
        ):
            quick("run", **flags)
    found = content(quick("run", resume=LAST, **flags))
    assert [name for name in expected if found.get(name) != expected[name]] == []


# -- numerical faults -------------------------------------------------------------------------------- -----


def test_an_arm_is_judged_by_its_own_first_losses():
    health = Health()
    assert [health.judge(_record(loss), explosion=1.0) for loss in (5.0, 4.0, 3.0)] == [None] * 3
    assert [health.judge(_record(9.0), 1.0) for _ in range(3)] == [None] * 3
    assert not health.good
    assert health.judge(_record(3.0), 1.0) is None
    assert health.good
    reasons = [health.judge(_record(9.0), 1.0) for _ in range(PATIENCE)]
    assert reasons[:-1] == [None] * (PATIENCE - 1)
    assert "more than 1 nats above" in reasons[-1]
    assert "not finite" in [health.judge(_record(2.0, math.nan), 1.0) for _ in range(PATIENCE)][-1]


def _broken_while(condition):
    real = CutModel.forward

    def broken(model, hidden, micro):
        nats = real(model, hidden, micro)
        return nats * float("nan") if model.training and condition() else nats

    return broken


def test_rollback_halves_the_learning_rate_and_charges_what_it_undoes(quick, monkeypatch):
    flags = {
        "strategies": ["baseline"],
        "batch_size": 1,
        "on_divergence": "rollback",
        "checkpoint_every": "1u",
    }
    calm = quick("calm", **flags)
    ledgers, passes = [], [0]
    real_save = SavePoints.between_batches
    monkeypatch.setattr(
        SavePoints,
        "between_batches",
        lambda points: (ledgers.append(points.step.ledger), real_save(points))[1],
    )

    def once():  # from the sixth pass on until the arm has been sent back
        passes[0] += 1
        return passes[0] > 5 and ledgers[-1].rollbacks == 0

    with monkeypatch.context() as patch:
        patch.setattr(CutModel, "forward", _broken_while(once))
        listener = Notes()
        run_dir = quick("run", listener, **flags)
    result = json.loads((run_dir / "baseline/seed0/result.json").read_text(encoding="utf-8"))
    undisturbed = json.loads((calm / "baseline/seed0/result.json").read_text(encoding="utf-8"))
    assert (result["rollbacks"], result["nonfinite_losses"], result["skipped_updates"]) == (1, PATIENCE, 0)
    assert result["stopped"] is None
    assert result["batches"] == undisturbed["batches"]
    assert result["flops_lost"] == pytest.approx(result["flops"] - undisturbed["flops"])
    records = list(read_records(run_dir / "baseline/seed0/batches.jsonl", BatchRecord))
    assert [record.batch for record in records] == list(range(result["batches"]))
    assert sum(record.flops for record in records) == pytest.approx(undisturbed["flops"])
    rates = [
        record.learning_rate for record in read_records(calm / "baseline/seed0/batches.jsonl", BatchRecord)
    ]
    assert records[-2].learning_rate == pytest.approx(rates[-2] / 2)
    assert any("half the learning rate" in note for note in listener.notes)
    page = (run_dir / "summary.md").read_text(encoding="utf-8")
    assert "10 passes with a loss that was not finite" in page
    assert "1 returns to a checkpoint" in page


def test_an_arm_that_diverges_again_and_again_is_stopped(quick, monkeypatch):
    flags = {"strategies": ["baseline"], "batch_size": 1, "on_divergence": "rollback"}
    monkeypatch.setattr(CutModel, "forward", _broken_while(lambda: True))
    result = json.loads((quick("run", **flags) / "baseline/seed0/result.json").read_text(encoding="utf-8"))
    assert result["rollbacks"] == ROLLBACKS
    assert "10 batches in a row" in result["stopped"]


def test_an_exploding_loss_stops_the_arm(tiny, tmp_path, monkeypatch):
    real, passes = CutModel.forward, [0]

    def exploding(model, hidden, micro):
        passes[0] += model.training
        return real(model, hidden, micro) + (3.0 if model.training and passes[0] > PATIENCE else 0.0)

    monkeypatch.setattr(CutModel, "forward", exploding)
    flags = {"strategies": ["baseline"], "batch_size": 1, "epochs": 4, "evals": 1, "max_train_tokens": 1024}
    run_dir = run_bench(make_config(**tiny | flags | {"save_dir": tmp_path, "run_name": "run"}))
    result = json.loads((run_dir / "baseline/seed0/result.json").read_text(encoding="utf-8"))
    assert "nats above the first ones" in result["stopped"]
    assert result["batches"] == 2 * PATIENCE
    assert (run_dir / "ppl_vs_flops.png").exists()  # although there is no evaluation to draw


def test_faults_are_told_apart():
    passes = SimpleNamespace(accelerator=SimpleNamespace(scaler=None))
    charges = Charges(Account(None, Ledger(), None), passes, keeps=False)
    batch = SimpleNamespace(label_tokens=1)
    for made in (Pass(1.0, 1.0), Pass(math.nan, 1.0), Pass(1.0, math.inf)):
        charges._count(made, batch)
    passes.accelerator.scaler = object()
    charges._count(Pass(1.0, math.inf), batch)
    ledger = charges.ledger
    assert (ledger.updates, ledger.skipped_updates) == (1, 3)
    assert (ledger.nonfinite_losses, ledger.nonfinite_gradients, ledger.scaler_skips) == (1, 1, 1)


# -- signals ----------------------------------------------------------------------------------------- -----


def test_signals_are_noted_first_and_obeyed_the_second_time():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        interrupts.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            interrupts.check()
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones():
    command = [sys.executable, "-m", "campaigns.crashes", "--kills", "3", "--seed", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "3 kills" in finished.stdout
    assert "unequal: none" in finished.stdout
