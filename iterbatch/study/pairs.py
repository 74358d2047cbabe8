"""A study, checked, and its pairs: arms by seeds, in one cell or several. There is one way through them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from iterbatch.bench.arm import Arm
from iterbatch.config import BenchConfig
from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.read import failure_of
from iterbatch.records.result import read_result
from iterbatch.records.write import write_json
from iterbatch.report import page, summary
from iterbatch.report.comparison import CellScores
from iterbatch.runtime.processes import is_main
from iterbatch.strategy import REFERENCE

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """Arms by seeds under one model, text and budget; a study has one or several."""

    name: str  # of its folder in the study's; empty where it is the study's own
    config: BenchConfig
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Study:
    """Arms by seeds, checked."""

    name: str
    cells: tuple[Cell, ...]
    tune: Mapping[str, Any] = field(default_factory=dict)  # of its file: how learning rates are to be found


@dataclass(frozen=True)
class Pair:
    """One arm with one seed, in its cell."""

    cell: Cell
    arm: Arm
    seed: int
    run_dir: Path  # of the study

    @property
    def folder(self) -> Path:
        """Where its records go."""
        return layout.arm_folder(self.run_dir / self.cell.name, self.arm.name, self.seed)

    @property
    def name(self) -> str:
        """As it is shown."""
        return "/".join(part for part in (self.cell.name, self.arm.name, self.folder.name) if part)

    @property
    def ended(self) -> bool:
        """Whether it has a result, or has failed."""
        return layout.ended(self.folder)

    @property
    def broken(self) -> bool:
        """Whether it has crashed or diverged."""
        return failure_of(self.folder) is not None or bool(read_result(self.folder).stopped)

    @property
    def outcome(self) -> str:
        """How it ended, in a few words."""
        if (reason := failure_of(self.folder)) is not None:
            return _("failed: {reason}").format(reason=reason)
        result = read_result(self.folder)
        ppl = f"{result.val_ppl:,.3f}" if result.finite else _("not finite")
        stopped = _(", stopped early: {stopped}").format(stopped=result.stopped) if result.stopped else ""
        return _("validation perplexity {ppl}, {train_seconds:,.0f} s{stopped}").format(
            ppl=ppl, train_seconds=result.train_seconds, stopped=stopped
        )

    def fail(self, reason: str) -> None:
        """Record that it has failed; it scores infinity."""
        write_json(self.folder / layout.FAILED, {"reason": reason[:500]})

    def waits_for(self, pairs: "Sequence[Pair]") -> "Pair | None":
        """The pair of the same seed that must have ended before."""
        training = self.cell.config.training
        by_seconds = training.match == "seconds" and training.budget is None
        wanted = self.arm.source or (REFERENCE if by_seconds and self.arm.strategy != REFERENCE else None)
        seed = self.arm.source_seed(self.seed) if self.arm.source else self.seed
        mine = (self.cell.name, seed, wanted)
        return next((pair for pair in pairs if (pair.cell.name, pair.seed, pair.arm.name) == mine), None)


def pairs_of(study: Study, run_dir: Path) -> list[Pair]:
    """All pairs, seed by seed within a cell, so that a study that is cut short has whole pairings.

    One that is made from another seed's arm comes after that.
    """
    left = [
        Pair(cell, arm, seed, run_dir)
        for cell in study.cells
        for seed in cell.config.training.seeds
        for arm in cell.arms
    ]
    found: list[Pair] = []
    while left:
        ready = next((each for each in left if each.waits_for(left) is None), left[0])
        left.remove(ready)
        found.append(ready)
    return found


class Engine(Protocol):
    """A way to train pairs."""

    def train(self, pairs: Sequence[Pair]) -> None:
        """Train those that have not ended.

        Raises:
            Stopped: where it was asked to stop; pairs in training go on from their last checkpoints.
        """
        ...


def run_pairs(pairs: Sequence[Pair], engine: Engine) -> list[CellScores]:
    """Train every pair that has not ended, and report.

    Args:
        pairs: Of one study; its folder is held.
        engine: Trains them.

    Returns:
        The cells of the report, in the main process.

    Raises:
        RunError: where pairs cannot be trained, or there is nothing to report.
        Stopped: where it was asked to stop.
    """
    engine.train(pairs)
    return write_report(pairs[0].run_dir) if is_main() else []


def write_report(run_dir: Path) -> list[CellScores]:
    """Report on a study whose pairs have ended.

    Raises:
        RunError: where there is nothing to report.
    """
    try:
        return page.write(run_dir)
    except RunError:  # every pair failed, perhaps: no page may go on waiting
        (run_dir / layout.REPORT).unlink(missing_ok=True)
        raise


def report_progress(pair: Pair) -> None:
    """A pair has ended: what can be said so far."""
    summary.write(pair.run_dir)
