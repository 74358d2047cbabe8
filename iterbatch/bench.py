"""Arms by seeds, paired: the same initial adapter and the same data order for every strategy of a seed.

What lives here: the run's folder, its manifest, and one arm after the other. What does not: one arm (:mod:`iterbatch.arm`) and everything
that can be told from records alone (:mod:`iterbatch.report`).
"""

import contextlib
import dataclasses
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from iterbatch import report
from iterbatch.arm import ArmRun, Listener, Shared
from iterbatch.config import BenchConfig
from iterbatch.cut import CutModel, compiled
from iterbatch.data_loader import order_digest, tokenizer_digest
from iterbatch.errors import RunError
from iterbatch.model import PRECISION, load_model
from iterbatch.prepare import Plan, Prepared, make_plan, prepare
from iterbatch.processes import from_main, is_main, make_accelerator
from iterbatch.record import environment, write_json, write_text
from iterbatch.reuse import open_reuse

RESUMABLE = ("strategies", "seeds", "save_dir", "log_with", "eval_batch_size")  # may differ when a run is gone on with


# --------------------------------------------------------------------------------------------------------------------------------------
# The run's folder


def find_folder(config: BenchConfig) -> Path:
    """The run's folder, checked before long work but not made yet.

    Raises:
        RunError: where it exists without ``--resume`` or ``--overwrite``, does not exist with ``--resume``, was made by another
            configuration, or cannot be written.
    """
    name = config.run.run_name or f"{config.data.dataset.replace('/', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = config.run.save_dir / name
    if config.run.resume:
        _check_same_experiment(config, folder)
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not config.run.overwrite:
            raise RunError(f"{folder} exists already; go on with it by --resume, replace it by --overwrite, or give another --run_name")
        if not (folder / "config.yaml").exists():
            raise RunError(f"{folder} is not the folder of a run (it has no config.yaml), so --overwrite leaves it alone; give another --run_name")
    try:
        config.run.save_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.run.save_dir).close()
    except OSError as problem:
        raise RunError(f"--save_dir {config.run.save_dir} cannot be written ({problem.strerror}); give another one") from problem
    return folder


def _make_folder(folder: Path, config: BenchConfig) -> None:
    if folder.exists() and config.run.overwrite:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (config.run.resume and (folder / "config.yaml").exists()):
        write_text(folder / "config.yaml", config.to_yaml())


def _check_same_experiment(config: BenchConfig, folder: Path) -> None:
    if not (folder / "config.yaml").exists():
        raise RunError(f"there is no run to go on with at {folder}; leave --resume out to start it")
    then, now = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")), config.flat()
    changed = [f"--{key} was {then.get(key)}, now {value}" for key, value in now.items() if key not in RESUMABLE and then.get(key) != value]
    if changed:
        raise RunError(f"{folder} was made with other settings, its arms could not be compared: {'; '.join(changed)}. Give another --run_name")


def _manifest(prepared: Prepared, plan: Plan) -> dict[str, Any]:
    config = prepared.config
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **environment(),
        "model": {
            "name": config.model.model_name,
            "type": prepared.base.config.model_type,
            "dtype": prepared.base.dtype,
            "tokenizer_sha256": tokenizer_digest(prepared.base.tokenizer),
        },
        "data": {
            "source": Path(prepared.corpus.source).name if config.data.data_dir else prepared.corpus.source,
            "licence": prepared.corpus.licence,
            "sha256": prepared.corpus.digest(),
            "documents": {split: len(documents) for split, documents in prepared.corpus.splits.items()},
            "notes": prepared.corpus.notes,
            "order_sha256": {str(seed): order_digest(len(prepared.blocks), seed, config.training.epochs) for seed in config.training.seeds},
        },
        "seeds": list(config.training.seeds),
        "plan": dataclasses.asdict(plan),
    }


# --------------------------------------------------------------------------------------------------------------------------------------
# The run


def run(config: BenchConfig, listener: Listener | None = None) -> Path:
    """Train every strategy with every seed and report.

    Args:
        config: A checked configuration.
        listener: Is told how it goes.

    Returns:
        The run's folder.

    Raises:
        UserError: before any training, where something the user gave cannot be used.
    """
    listener = listener or Listener()
    run_dir = from_main(find_folder(config) if is_main() else None)
    prepared = prepare(config)
    model = load_model(prepared.base, config.model)
    if is_main():
        _make_folder(run_dir, config)
    accelerator = make_accelerator(PRECISION[prepared.base.dtype], config, run_dir)
    for message in prepared.corpus.notes:
        listener.note(f"{prepared.corpus.source}: {message}")
    # Once a run: Accelerate silently skips a model that it has prepared before, and its gradients would then not be synchronised.
    placed = accelerator.prepare_model(CutModel(model))
    cut, shape = accelerator.unwrap_model(placed), (config.training.batch_size, config.max_length)
    with (
        compiled(placed, accelerator, shape) if config.speed.compile else contextlib.nullcontext(0.0) as cold_start,
        open_reuse(prepared, cut, accelerator.device, listener.note) as reuse,
    ):
        if cold_start:
            listener.note(f"layers compiled in {cold_start:.0f} s, off every arm's clock")
        plan = make_plan(prepared, model, accelerator.num_processes, reuse.stored_blocks)
        if accelerator.is_main_process and not (run_dir / "manifest.json").exists():
            write_json(run_dir / "manifest.json", {**_manifest(prepared, plan), "compile_seconds": cold_start})
        listener.planned(plan, run_dir)
        try:
            _train_arms(Shared(prepared, plan, model, placed, reuse, accelerator), listener, run_dir)
        finally:
            if config.run.log_with != ("none",):
                accelerator.end_training()
    return run_dir


def _train_arms(shared: Shared, listener: Listener, run_dir: Path) -> None:
    config = shared.prepared.config
    for seed in config.training.seeds:
        for strategy in config.strategy.strategies:
            folder = run_dir / strategy / f"seed{seed}"
            if from_main((folder / "result.json").exists()):
                listener.note(f"{strategy}, seed {seed}: finished before, kept")
            else:
                ArmRun(shared, listener, folder).train(strategy, seed)
            if shared.accelerator.is_main_process:
                report.write(run_dir)
