"""Several processes that share each batch train as one does."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from accelerate import Accelerator
from conftest import ROOT

from campaigns.crashes import content
from iterbatch.checks import make_config
from iterbatch.cli.main import main
from iterbatch.config import LAST
from iterbatch.errors import ConfigError, RunError
from iterbatch.plain_yaml import dump_yaml
from iterbatch.records.record import BatchRecord, read_records
from iterbatch.runtime.processes import _check_launch
from iterbatch.study.run import run as run_bench

pytestmark = pytest.mark.slow

EVERY = ("abr", "learnable", "window", "excess", "fixed", "inverse", "small_batches")
# The gradient of a micro-batch is each process's own, unless it is sharded.
SHARDED = ("abr", "learnable", "gradient_noise", "small_batches")
STOPPING = """
import os
import sys
from iterbatch.bench.train_arm import SavePoints
from iterbatch.runtime.processes import rank
from iterbatch.cli.main import main

real, places = SavePoints.here, [0]

def stopping(points):
    places[0] += 1
    if places[0] == 8 and rank() == 1:  # the process that does not write is told to stop, or is killed
        if os.environ.get("KILLED"):
            os.kill(os.getpid(), 9)
        points.shared.interrupts.requested = 15
    real(points)

SavePoints.here = stopping
raise SystemExit(main(["train", *sys.argv[1:]]))
"""

BREAKING = """
import itertools
import sys

from accelerate import Accelerator

real, calls = Accelerator.backward, itertools.count()

def breaking(self, loss, **more):
    real(self, loss * float("nan") if next(calls) == 3 else loss, **more)  # a pass that is to be skipped

Accelerator.backward = breaking
"""


def _two(*command, **more):
    """Run a script or module in two processes."""
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **more,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launch, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the test starts two processes over gloo as Linux does")
@pytest.mark.parametrize(
    ("strategies", "reuse"),
    [
        (EVERY, {}),
        (("abr", "excess"), {"lora_layers": "top:1", "reuse": "epoch", "epochs": 2, "match": "flops"}),
        (("abr", "window"), {"lora_layers": "top:1", "placement": "spaced", "gap": 1, "loss_threshold": 3.0}),
        (SHARDED, {"sharding": "fsdp", "gradient_checkpointing": True}),
        (
            ("abr", "small_batches"),
            {"sharding": "fsdp", "lora_layers": "top:1", "reuse": "epoch", "epochs": 2, "match": "flops"},
        ),
    ],
    ids=["all layers", "reuse", "spaced", "sharded", "sharded, reuse"],
)
def test_two_processes_equal_one_for_every_arm(tiny, tmp_path, monkeypatch, strategies, reuse):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path / "cache"))
    shared = (
        tiny
        | reuse
        | {
            "strategies": list(strategies),
            "probe_rate": 1.0,
            "probe_budget": 1.0,
            "prompts": 1,
            "grad_accum": 2,
            "max_train_tokens": 704,
            "save_dir": tmp_path,
        }
    )
    script = tmp_path / "breaking.py"
    command = ["-m", "iterbatch", "train"]
    if broken := "gradient_checkpointing" in reuse:
        start = "from iterbatch.cli.main import main\nraise SystemExit(main(['train', *sys.argv[1:]]))\n"
        script.write_text(BREAKING + start, encoding="utf-8")
        command = [str(script)]
        monkeypatch.setattr(Accelerator, "backward", Accelerator.backward)  # is put back
        exec(BREAKING, {})
    one = run_bench(make_config(**shared, batch_size=4, run_name="one"))
    if reuse.get("reuse"):  # the two processes fill a store of their own
        shutil.rmtree(tmp_path / "cache" / "activations")
    file = tmp_path / "two.yaml"
    file.write_text(dump_yaml(make_config(**shared, batch_size=2).flat()), encoding="utf-8")
    done = _two(*command, "--config", str(file), "--run_name", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Result") == 1  # one process talks
    for strategy in strategies:
        pairs = [
            list(read_records(folder / strategy / "seed0" / "batches.jsonl", BatchRecord))
            for folder in (one, tmp_path / "two")
        ]
        # 22 blocks, the last batch short: one process then has fewer rows than the other.
        assert len(pairs[0]) == len(pairs[1]) >= 2
        for first, second in zip(*pairs, strict=True):
            assert second.losses == pytest.approx(first.losses, rel=1e-4)
            assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-3, nan_ok=True)
            assert second.skipped_updates == first.skipped_updates
            assert (second.tokens, second.repeats_done) == (first.tokens, first.repeats_done)
            assert second.flops == pytest.approx(first.flops)
    if broken:
        assert sum(each.skipped_updates for each in _records(tmp_path / "two", strategies[0])) == 1
    if reuse.get("reuse"):
        rows = [
            json.loads((folder / "summary.json").read_text(encoding="utf-8"))[0]
            for folder in (one, tmp_path / "two")
        ]
        assert rows[0]["store_gb"] == rows[1]["store_gb"] > 0
        assert rows[0]["flops_saved"] == pytest.approx(rows[1]["flops_saved"])


@pytest.mark.skipif(sys.platform != "linux", reason="the test starts two processes over gloo as Linux does")
def test_two_processes_stop_together_and_go_on_exactly(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path / "cache"))
    shared = tiny | {
        "strategies": ["abr"],
        "batch_size": 2,
        "lora_layers": "top:1",
        "lora_dropout": 0.1,
        "loss_threshold": 3.0,
        "prompts": 1,
        "save_dir": tmp_path,
    }
    file, script = tmp_path / "two.yaml", tmp_path / "stopping.py"
    file.write_text(dump_yaml(make_config(**shared).flat()), encoding="utf-8")
    script.write_text(STOPPING, encoding="utf-8")
    undisturbed = _two("-m", "iterbatch", "train", "--config", str(file), "--run_name", "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    stopped = _two(str(script), "--config", str(file), "--run_name", "disturbed")
    said = " ".join(stopped.stdout.split())
    assert "torchrun --nproc_per_node 2 -m iterbatch train --resume" in said, stopped.stderr[-2000:]
    with pytest.raises(RunError, match="give --batch_size 4 --grad_accum 1"):
        run_bench(make_config(**shared, run_name="disturbed", resume=LAST))
    done = _two("-m", "iterbatch", "train", "--resume", str(tmp_path / "disturbed"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed after 8 passes" in done.stdout
    expected, found = (content(tmp_path / name) for name in ("undisturbed", "disturbed"))
    assert [name for name in expected if found.get(name) != expected[name]] == []


@pytest.mark.skipif(sys.platform != "linux", reason="the test starts two processes over gloo as Linux does")
def test_a_killed_process_ends_the_job_and_one_process_finishes_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path / "cache"))
    shared = tiny | {
        "strategies": ["baseline", "abr"],
        "lora_layers": "top:1",
        "loss_threshold": 3.0,
        "grad_accum": 2,
        "checkpoint_every": "1u",
        "prompts": 1,
        "save_dir": tmp_path,
    }
    one = run_bench(make_config(**shared, batch_size=2, run_name="one"))
    file, script = tmp_path / "two.yaml", tmp_path / "stopping.py"
    file.write_text(dump_yaml(make_config(**shared, batch_size=1, sharding="fsdp").flat()), encoding="utf-8")
    script.write_text(STOPPING, encoding="utf-8")
    killed = _two(str(script), "--config", str(file), "--run_name", "two", KILLED="1")
    said = " ".join(killed.stderr.split())
    assert killed.returncode == 1
    assert "error: process 1 (pid" in said
    assert "torchrun --nproc_per_node 2 -m iterbatch train --resume" in said
    assert "iterbatch/" not in said.split("ChildFailedError")[0]  # no traceback of ours
    with pytest.raises(RunError, match=r"made by 2 process\(es\) that shared 4 blocks.*give --batch_size 2"):
        run_bench(make_config(**shared, batch_size=1, run_name="two", resume=LAST))
    two = run_bench(make_config(**shared, batch_size=2, run_name="two", resume=LAST))
    for strategy in shared["strategies"]:
        first, second = (_records(folder, strategy) for folder in (one, two))
        assert [each.losses for each in second] == [pytest.approx(each.losses, rel=1e-4) for each in first]
        assert [each.flops for each in second] == [pytest.approx(each.flops) for each in first]
    assert len(_records(two, "abr")) >= 4
    page = (two / "report.md").read_text(encoding="utf-8")
    assert "Processes: 1 and 2, layers sharded by FSDP" in page
    assert "Batch: 4 blocks (2 micro-batches of 2)" in page


@pytest.mark.skipif(sys.platform != "linux", reason="the test starts two processes over gloo as Linux does")
def test_more_processes_than_blocks_train_as_one(tiny, tmp_path, monkeypatch):
    """A block and a window: one of the processes has neither, and runs along."""
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path / "cache"))
    strategies = ["abr", "excess", "small_batches"]
    few = {"max_train_tokens": 32, "max_eval_tokens": 20, "epochs": 3, "reuse": "epoch", "prompts": 1}
    more = {"strategies": strategies, "lora_layers": "top:1", "loss_threshold": 3.0, "save_dir": tmp_path}
    shared = tiny | few | more
    one = run_bench(make_config(**shared, batch_size=2, run_name="one"))
    shutil.rmtree(tmp_path / "cache" / "activations")
    file = tmp_path / "two.yaml"
    file.write_text(dump_yaml(make_config(**shared, batch_size=1, sharding="fsdp").flat()), encoding="utf-8")
    done = _two("-m", "iterbatch", "train", "--config", str(file), "--run_name", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    for strategy in strategies:
        first, second = (_records(folder, strategy) for folder in (one, tmp_path / "two"))
        assert [each.losses for each in second] == [pytest.approx(each.losses, rel=1e-4) for each in first]
        assert [each.flops for each in second] == [pytest.approx(each.flops) for each in first]


BUSY = """
import os
import signal
import time

from iterbatch.runtime.peers import together
from iterbatch.runtime.processes import rank

signal.signal(signal.SIGTERM, signal.SIG_IGN)
with together() as peers:
    peers.resume = "as before"
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # as one does that waits for a GPU
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the test starts two processes over gloo as Linux does")
def test_a_process_that_notices_nothing_is_ended_all_the_same(tmp_path):
    script = tmp_path / "busy.py"
    script.write_text(BUSY, encoding="utf-8")
    begun = time.monotonic()
    done = _two(str(script))
    said = " ".join(done.stderr.split())
    assert "error: process 1 (pid" in said
    assert "by: as before" in said
    assert time.monotonic() - begun < 45  # its start included, beside other tests


def test_only_train_shares_its_work_and_only_over_gpus_that_are_there(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert main(["compare", "study.yaml"]) == 2
    assert "only iterbatch train shares its work" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("iterbatch.runtime.processes._on_cpu", lambda: False)
    with pytest.raises(ConfigError, match=r"4 processes on a machine with 2 GPU\(s\)"):
        _check_launch()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"set up for FSDP.*give --sharding fsdp"):
        _check_launch()


def _records(folder, strategy):
    return list(read_records(folder / strategy / "seed0" / "batches.jsonl", BatchRecord))
