"""Several processes that share each batch train as one does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from iterbatch import bench
from iterbatch.config import make_config
from iterbatch.record import BatchRecord, read_records


@pytest.mark.skipif(sys.platform != "linux", reason="the test starts two processes over gloo as Linux does")
@pytest.mark.parametrize("reuse", [{}, {"lora_layers": "top:1", "reuse": "epoch", "epochs": 2, "match": "flops"}], ids=["all layers", "reuse"])
def test_two_processes_equal_one_for_every_arm(tiny, tmp_path, monkeypatch, reuse):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path / "cache"))
    shared = tiny | reuse | {"strategies": ["abr", "learnable"], "probe_rate": 1.0, "grad_accum": 2, "max_train_tokens": 704, "save_dir": tmp_path}
    one = bench.run(make_config(**shared, batch_size=4, run_name="one"))
    if reuse:  # the two processes fill a store of their own
        shutil.rmtree(tmp_path / "cache" / "activations")
    file = tmp_path / "two.yaml"
    file.write_text(make_config(**shared, batch_size=2).to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "iterbatch", "train"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "--config", str(file), "--run_name", "two"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Result") == 1  # one process talks
    for strategy in ("abr", "learnable"):
        pairs = [list(read_records(folder / strategy / "seed0" / "batches.jsonl", BatchRecord)) for folder in (one, tmp_path / "two")]
        # 22 blocks, the last batch short: one process then has fewer rows than the other.
        assert len(pairs[0]) == len(pairs[1]) >= 3
        for first, second in zip(*pairs, strict=True):
            assert second.losses == pytest.approx(first.losses, rel=1e-4)
            assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-3)
            assert (second.tokens, second.repeats_done) == (first.tokens, first.repeats_done)
            assert second.flops == pytest.approx(first.flops)
    if reuse:
        rows = [json.loads((folder / "summary.json").read_text(encoding="utf-8"))[0] for folder in (one, tmp_path / "two")]
        assert rows[0]["store_gb"] == rows[1]["store_gb"] > 0
        assert rows[0]["flops_saved"] == pytest.approx(rows[1]["flops_saved"])
