"""Pairs in this process, one after the other."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from iterbatch.bench.listener import Listener
from iterbatch.bench.prepare import Plan, Prepared, prepare
from iterbatch.bench.shared import set_up
from iterbatch.bench.train_arm import train_arm
from iterbatch.language import _
from iterbatch.records.course import Running
from iterbatch.records.record import BatchRecord, EvalRecord
from iterbatch.records.result import ArmResult
from iterbatch.runtime.checkpoint import remove_checkpoints
from iterbatch.runtime.interrupt import Interrupts
from iterbatch.runtime.processes import from_main, is_main
from iterbatch.study.live import Live
from iterbatch.study.pairs import Cell, Pair, report_progress

TOLD_EVERY = 2.0  # seconds between two looks at where the study stands


class InProcess:
    """Trains pairs with live progress. An error ends the run; what has been trained stays.

    Args:
        cells: Made ready at once, so that what can be known to be wrong is known before long work.
        listener: Is notified of how it goes.

    Raises:
        UserError: where a model or text cannot be used.
    """

    def __init__(self, cells: Sequence[Cell], listener: Listener) -> None:
        self.listener = listener
        self._prepared = {cell.name: prepare(cell.config) for cell in cells}

    def train(self, pairs: Sequence[Pair]) -> None:
        """Train those that have not ended, cell by cell, and keep the summary up to date."""
        live = Live(pairs, self.listener.note)
        try:
            self._train(pairs, live)
        except BaseException:
            if is_main():
                live.stopped()
            raise

    def _train(self, pairs: Sequence[Pair], live: Live) -> None:
        for cell, prepared in self._prepared.items():
            mine = [pair for pair in pairs if pair.cell.name == cell]
            if not mine:
                continue
            folder = mine[0].run_dir / cell
            watched = Watched(self.listener, mine, live) if is_main() else self.listener
            for pair in train_cell(folder, self._left(mine), lambda ready=prepared: ready, watched):
                if is_main():
                    report_progress(pair)

    def _left(self, pairs: Sequence[Pair]) -> Iterator[Pair]:
        for pair in pairs:
            if from_main(pair.ended):
                self.listener.note(
                    _("{name}, seed {seed}: finished before, kept").format(name=pair.arm.name, seed=pair.seed)
                )
                if is_main():
                    remove_checkpoints(pair.folder)  # where the run was killed between the two
            else:
                yield pair


class Watched(Listener):
    """Tells a listener everything, and a study's live report how far its pair is."""

    def __init__(self, listener: Listener, pairs: Sequence[Pair], live: Live) -> None:
        self._listener, self._pairs, self._live = listener, pairs, live
        self.estimates = listener.estimates
        self._running, self._told = Running("", Path()), 0.0

    def note(self, message: str) -> None:
        """Pass it on."""
        self._listener.note(message)

    def planned(self, plan: Plan, run_dir: Path) -> None:
        """Pass it on."""
        self._listener.planned(plan, run_dir)

    def arm_started(self, strategy: str, seed: int) -> None:
        """Another pair is trained from now on."""
        pair = next(each for each in self._pairs if (each.arm.name, each.seed) == (strategy, seed))
        self._running = Running(pair.name, pair.folder)
        self._listener.arm_started(strategy, seed)

    def batch_done(self, record: BatchRecord, fraction: float) -> None:
        """Take note of how far it is."""
        self._listener.batch_done(record, fraction)
        loss = record.initial_loss if math.isfinite(record.initial_loss) else None
        self._running = replace(self._running, fraction=fraction, loss=loss, doing="")
        if time.monotonic() - self._told >= TOLD_EVERY:
            self._told = time.monotonic()
            self._live.update([self._running])

    def doing(self, what: str) -> None:
        """Take note of what it does instead of training."""
        self._listener.doing(what)
        self._running = replace(self._running, doing=what)

    def evaluated(self, record: EvalRecord) -> None:
        """Pass it on."""
        self._listener.evaluated(record)

    def arm_done(self, result: ArmResult) -> None:
        """Pass it on."""
        self._listener.arm_done(result)


def _raise(pair: Pair, problem: Exception) -> None:
    raise problem


def train_cell(
    folder: Path,  # of the cell
    pairs: Iterable[Pair],  # of the cell; asked for one at a time
    ready: Callable[[], Prepared],  # asked for when the first pair comes
    listener: Listener,
    on_error: Callable[[Pair, Exception], None] = _raise,
    interrupts: Interrupts | None = None,  # who may be asked to stop
) -> Iterator[Pair]:
    """Train pairs over one model and text; yields each when it is done with."""
    coming = iter(pairs)
    pair = next(coming, None)
    if pair is None:
        return
    with set_up(ready(), folder, listener, interrupts) as shared:
        while pair is not None:
            try:
                train_arm(shared, pair.arm, pair.seed, pair.folder, listener)
            except Exception as problem:
                on_error(pair, problem)
            yield pair
            pair = next(coming, None)
