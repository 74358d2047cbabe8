"""The same numbers again: fresh caches, any number of workers, with and without reuse, other threads."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from safetensors.numpy import load_file
from support.runs import flag_words
from support.studies import study_file

from campaigns.comparisons import outcome

pytestmark = pytest.mark.slow
ARMS = {"baseline": None, "abr": {"loss_threshold": 2.75}, "fixed2": {"strategy": "fixed"}}


def _iterbatch(words, cache, threads=1):
    environment = os.environ | {
        "ITERBATCH_CACHE": str(cache),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "iterbatch", *words]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.fixture
def ran(tiny, tmp_path):
    """A function that trains two arms with other settings, in a cache of its own; gives the run's folder."""

    def run(name, threads=1, **settings):
        own = {"strategies": ["baseline", "abr"], "loss_threshold": 2.75, "lora_layers": "top:1"}
        flags = tiny | own | {"save_dir": tmp_path, "run_name": name} | settings
        _iterbatch(["train", *flag_words(flags)], tmp_path / f"cache-{name}", threads)
        return tmp_path / name

    return run


def _result(run_dir, arm="abr"):
    return json.loads((run_dir / arm / "seed0/result.json").read_text(encoding="utf-8"))


def _losses(run_dir, arm="abr"):
    lines = (run_dir / arm / "seed0/batches.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["losses"] for line in lines]


def _adapter(run_dir, arm="abr"):
    return load_file(run_dir / arm / "seed0/adapter/adapter_model.safetensors")


def test_the_same_command_twice(ran):
    first, second = (outcome(ran("run" if number else "other", reuse="epoch")) for number in (0, 1))
    assert first == second


def test_any_number_of_workers(tiny_folder, tmp_path):
    file = study_file(tmp_path, tiny_folder, ARMS, reuse="epoch", lora_layers="top:1")
    found = {}
    for workers in (1, 4):
        words = ["compare", str(file), "--workers", str(workers), "--save_dir", str(tmp_path / str(workers))]
        _iterbatch(words, tmp_path / f"cache{workers}", threads=workers)  # one each
        found[workers] = outcome(tmp_path / str(workers) / "study")
    assert found[1] == found[4]


def test_reuse_changes_what_is_paid_and_nothing_else(ran):
    off, batch, epoch = (
        ran(name, reuse=name, reuse_dtype="float32", epochs=2) for name in ("off", "batch", "epoch")
    )
    for run_dir in (batch, epoch):
        for arm in ("baseline", "abr"):
            assert _losses(run_dir, arm) == _losses(off, arm)
            ours, theirs = _adapter(run_dir, arm), _adapter(off, arm)
            assert all((ours[name] == theirs[name]).all() for name in theirs)
    flops = {
        name: _result(run_dir)["flops"]
        for name, run_dir in (("off", off), ("batch", batch), ("epoch", epoch))
    }
    assert flops["off"] > flops["batch"] > flops["epoch"]
    saved = {name: _result(run_dir)["flops_saved"] for name, run_dir in (("off", off), ("batch", batch))}
    assert saved["off"] == 0
    assert flops["batch"] + saved["batch"] == pytest.approx(flops["off"], rel=1e-9)


def test_other_threads_change_the_last_digits_only(ran):
    one, two = ran("one"), ran("two", threads=2)
    for ours, theirs in zip(_losses(one), _losses(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert _result(one)["test_ppl"] == pytest.approx(_result(two)["test_ppl"], rel=1e-3)
