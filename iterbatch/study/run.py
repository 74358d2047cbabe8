"""The doors to a study: ``run`` trains one cell in this process, ``compare`` any number by an engine.

Both go the same way, :func:`iterbatch.study.pairs.run_pairs`, leave the same folder and end with
the same report.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from iterbatch.bench.arm import arms_of
from iterbatch.bench.listener import Listener
from iterbatch.config import BenchConfig
from iterbatch.errors import RunError, typed
from iterbatch.language import _
from iterbatch.report.comparison import CellScores
from iterbatch.runtime.peers import together
from iterbatch.runtime.processes import count, from_main, is_main
from iterbatch.runtime.run_folder import find_folder, hold, locked
from iterbatch.strategy import own
from iterbatch.study.engines.in_process import InProcess
from iterbatch.study.pairs import Cell, Engine, Study, pairs_of, run_pairs
from iterbatch.study.study_folder import begin, keep, keep_tuning


def run(config: BenchConfig, listener: Listener | None = None) -> Path:
    """Train every strategy with every seed and report.

    Args:
        config: A checked configuration.
        listener: Is notified of how it goes.

    Returns:
        The run's folder.

    Raises:
        UserError: before any training, where something the user gave cannot be used.
        Stopped: where it was asked to stop; a checkpoint has been made.
    """
    with together() as peers:
        run_dir = from_main(find_folder(config) if is_main() else None)
        peers.resume = how_to_resume(run_dir, config.strategy.strategies)
        study = Study(run_dir.name, (Cell("", config, arms_of(config)),))
        engine = InProcess(study.cells, listener or Listener())
        with hold(run_dir, config) if is_main() else contextlib.nullcontext():
            if is_main():
                keep(study, run_dir)
            run_pairs(pairs_of(study, run_dir), engine)
        from_main(None)  # no process goes on before everything is written
    return run_dir


def how_to_resume(run_dir: Path, strategies: Sequence[str]) -> str:
    """The command that goes on with a run, in as many processes."""
    launch = ("torchrun", "--nproc_per_node", count(), "-m") if count() > 1 else ()
    return typed(*launch, "iterbatch", "train", "--resume", run_dir, *own.named_again(strategies))


def compare(
    study: Study,
    run_dir: Path,
    engine: Engine | None,
    *,
    overwrite: bool = False,
    keep_arms: bool = False,
) -> list[CellScores]:
    """Train every pair of a study that has no result yet, and report.

    Args:
        study: Checked.
        run_dir: Its folder; a study of the same settings that is there already is resumed.
        engine: Trains its pairs; None only begins it, for `iterbatch worker` on any machine.
        overwrite: Delete an earlier study of this name.
        keep_arms: Let arms that are there already and not in this study stay; they are not trained.

    Raises:
        RunError: where the folder cannot be used, or the workers cannot even begin.
        Stopped: where it was asked to stop; pairs in training go on from their last checkpoints.
    """
    if run_dir.is_symlink() or (run_dir.exists() and not run_dir.is_dir()):
        raise RunError(_("{run_dir} is not a folder; give another --run_name").format(run_dir=run_dir))
    with locked(run_dir):
        begin(study, run_dir, overwrite=overwrite, keep_arms=keep_arms)
        keep_tuning(run_dir)
        return [] if engine is None else run_pairs(pairs_of(study, run_dir), engine)
