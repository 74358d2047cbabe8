"""Several processes that share each batch train as one does."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from iterbatch import bench
from iterbatch.config import make_config
from iterbatch.record import BatchRecord, read_records


@pytest.mark.skipif(sys.platform != "linux", reason="the test starts two processes over gloo as Linux does")
def test_two_processes_equal_one_for_every_arm(tiny, tmp_path):
    shared = tiny | {"strategies": ["abr", "learnable"], "probe_rate": 1.0, "grad_accum": 2, "max_train_tokens": 704, "save_dir": tmp_path}
    one = bench.run(make_config(**shared, batch_size=4, run_name="one"))
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
        assert len(pairs[0]) == len(pairs[1]) == 3  # 22 blocks, the last batch short: one process then has fewer rows than the other
        for first, second in zip(*pairs, strict=True):
            assert second.losses == pytest.approx(first.losses, rel=1e-4)
            assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-3)
            assert (second.tokens, second.repeats_done) == (first.tokens, first.repeats_done)
