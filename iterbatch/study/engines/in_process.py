"""Pairs in this process, one after the other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from iterbatch.bench.listener import Listener
from iterbatch.bench.prepare import Prepared, prepare
from iterbatch.bench.shared import set_up
from iterbatch.bench.train_arm import train_arm
from iterbatch.runtime.checkpoint import remove_checkpoints
from iterbatch.runtime.processes import from_main, is_main
from iterbatch.study.pairs import Cell, Pair, report_progress


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
        for cell, prepared in self._prepared.items():
            mine = [pair for pair in pairs if pair.cell.name == cell]
            if not mine:
                continue
            folder = mine[0].run_dir / cell
            for pair in train_cell(folder, self._left(mine), lambda ready=prepared: ready, self.listener):
                if is_main():
                    report_progress(pair)

    def _left(self, pairs: Sequence[Pair]) -> Iterator[Pair]:
        for pair in pairs:
            if from_main(pair.ended):
                self.listener.note(f"{pair.arm.name}, seed {pair.seed}: finished before, kept")
                if is_main():
                    remove_checkpoints(pair.folder)  # where the run was killed between the two
            else:
                yield pair


def _raise(pair: Pair, problem: Exception) -> None:
    raise problem


def train_cell(
    folder: Path,  # of the cell
    pairs: Iterable[Pair],  # of the cell; asked for one at a time
    ready: Callable[[], Prepared],  # asked for when the first pair comes
    listener: Listener,
    on_error: Callable[[Pair, Exception], None] = _raise,
) -> Iterator[Pair]:
    """Train pairs over one model and text; yields each when it is done with."""
    coming = iter(pairs)
    pair = next(coming, None)
    if pair is None:
        return
    with set_up(ready(), folder, listener) as shared:
        while pair is not None:
            try:
                train_arm(shared, pair.arm, pair.seed, pair.folder, listener)
            except Exception as problem:
                on_error(pair, problem)
            yield pair
            pair = next(coming, None)
