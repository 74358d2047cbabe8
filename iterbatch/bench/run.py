"""Arms by seeds, paired: the same initial adapter and the same data order for every strategy of a seed.

What lives here: the run's manifest, and one arm after the other. What does not: the run's folder (:mod:`iterbatch.runtime.run_folder`), one arm
(:mod:`iterbatch.bench.train_arm`) and everything that can be told from records alone (:mod:`iterbatch.report.summary`).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from iterbatch.runtime import run_folder as folder
from iterbatch.report import summary as report
from iterbatch.bench.train_arm import ArmRun, Listener, Shared
from iterbatch.runtime.checkpoint import remove_checkpoints
from iterbatch.config import BenchConfig
from iterbatch.model.cut import CutModel, compiled
from iterbatch.data.data_loader import order_digest, tokenizer_digest
from iterbatch.errors import RunError
from iterbatch.runtime.interrupt import Interrupts
from iterbatch.model.load import PRECISION, load_model
from iterbatch.bench.prepare import Plan, Prepared, make_plan, prepare
from iterbatch.runtime.processes import from_main, is_main, make_accelerator
from iterbatch.records.record import environment, write_json
from iterbatch.reuse.prefix import open_reuse
from iterbatch.study.study_file import Arm, arms_of

OUT_OF_MEMORY = (
    "out of memory. Records and the last checkpoint are kept: free memory and go on by --resume, or start a new run with a smaller --batch_size (and "
    "more --grad_accum), a smaller --max_length or --eval_batch_size, --gradient_checkpointing, adapters on fewer layers (--lora_layers top:N), or "
    "--load_in 4bit"
)


# --------------------------------------------------------------------------------------------------------------------------------------
# The manifest


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
    listener, arms = listener or Listener(), arms_of(config)
    run_dir = from_main(folder.find_folder(config) if is_main() else None)
    prepared = prepare(config)
    with folder.hold(run_dir, config) if is_main() else contextlib.nullcontext(), set_up(prepared, run_dir, listener) as shared:
        for seed in config.training.seeds:
            for arm in arms:
                _train(shared, arm, seed, listener, run_dir)
                if shared.accelerator.is_main_process:
                    report.write(run_dir)
    return run_dir


@contextlib.contextmanager
def set_up(prepared: Prepared, run_dir: Path, listener: Listener) -> Iterator[Shared]:
    """Everything that the arms of a run share, ready on the device; the manifest is written.

    Raises:
        RunError: where what is done with it runs out of memory.
    """
    config = prepared.config
    model = load_model(prepared.base, config.model)
    accelerator = make_accelerator(PRECISION[prepared.base.dtype], config, run_dir)
    for message in prepared.corpus.notes:
        listener.note(f"{prepared.corpus.source}: {message}")
    # Once a run: Accelerate silently skips a model that it has prepared before, and its gradients would then not be synchronised.
    placed = accelerator.prepare_model(CutModel(model))
    cut, shape = accelerator.unwrap_model(placed), (config.training.batch_size, config.max_length)
    try:
        with (
            compiled(placed, accelerator, shape) if config.speed.compile else contextlib.nullcontext(0.0) as cold_start,
            open_reuse(prepared, cut, accelerator.device, listener.note) as reuse,
            Interrupts() as interrupts,
        ):
            if cold_start:
                listener.note(f"layers compiled in {cold_start:.0f} s, off every arm's clock")
            plan = make_plan(prepared, model, accelerator.num_processes, reuse.stored_blocks)
            if accelerator.is_main_process and not (run_dir / "manifest.json").exists():
                write_json(run_dir / "manifest.json", {**_manifest(prepared, plan), "compile_seconds": cold_start})
            listener.planned(plan, run_dir)
            yield Shared(prepared, plan, model, placed, reuse, accelerator, interrupts)
    except (MemoryError, RuntimeError) as problem:
        if not _out_of_memory(problem):
            raise
        raise RunError(OUT_OF_MEMORY) from problem
    finally:
        if config.run.log_with != ("none",):
            accelerator.end_training()


def _out_of_memory(problem: BaseException) -> bool:
    """Torch has a class for it on GPUs only."""
    words = str(problem).lower()
    return isinstance(problem, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def _train(shared: Shared, arm: Arm, seed: int, listener: Listener, run_dir: Path) -> None:
    where = run_dir / arm.name / f"seed{seed}"
    if from_main((where / "result.json").exists()):
        listener.note(f"{arm.name}, seed {seed}: finished before, kept")
        if shared.accelerator.is_main_process:
            remove_checkpoints(where)  # where the run was killed between the two
    else:
        ArmRun(shared, listener, where).train(arm, seed)
