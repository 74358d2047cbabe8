"""A worker process: trains pairs of a study's folder until none is left.

``python -m iterbatch.study.engines.worker RUN_DIR`` is a comparison's own; ``iterbatch worker`` joins
one from any machine that sees its folder, by :func:`join`.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from iterbatch.bench.listener import Listener
from iterbatch.bench.prepare import prepare
from iterbatch.errors import UserError
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries
from iterbatch.records import layout
from iterbatch.records.record import BatchRecord
from iterbatch.records.write import finite, refuse_links, write_json
from iterbatch.report.comparison import CellScores
from iterbatch.runtime.interrupt import Interrupts, Stopped, obeyed
from iterbatch.strategy import register
from iterbatch.study.engines.claims import (
    Claim,
    Joining,
    claim_file,
    claim_in_turn,
    of_a_child,
    read_claim,
    read_running,
)
from iterbatch.study.engines.in_process import train_cell
from iterbatch.study.pairs import Notify, Pair, Study, pairs_of, write_report
from iterbatch.study.study_folder import check_joinable, from_folder, placed

TOLD_EVERY = 2.0  # seconds between two words of how far a pair is
GRACE = 30.0  # seconds between being asked to stop and being ended


def end_with_parent() -> None:
    """Stop when the process that started this one is gone, however it went: then nobody records what is done.

    It holds the other end of this process's input, which says nothing and ends with it.
    """

    def watch() -> None:
        while os.read(0, 1):  # not by sys.stdin, whose lock a reading thread would hold at the end
            pass
        signal.raise_signal(signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def work(run_dir: Path) -> None:
    """Train pairs of a study until none is left that nobody else is training."""
    train(from_folder(run_dir), run_dir, Interrupts(), of_a_child)


def train(
    study: Study,
    run_dir: Path,
    interrupts: Interrupts,
    claim: Callable[[Pair], Claim | None],
    done: Callable[[Pair], None] = lambda _: None,
) -> None:
    """Train pairs that can be claimed, cell by cell; ``done`` is called after each."""
    pairs = pairs_of(study, run_dir)
    for cell in study.cells:
        mine = [pair for pair in pairs if pair.cell.name == cell.name]
        if all(pair.ended for pair in mine):
            continue
        with contextlib.closing(claim_in_turn(mine, claim, interrupts.check)) as claims:
            folder, config = run_dir / cell.name, cell.config
            teller = Teller({pair.name: pair for pair in mine}, cell.name)
            ready = lambda config=config: prepare(config)  # noqa: E731
            for pair in train_cell(folder, claims, ready, teller, fail, interrupts):
                done(pair)


@dataclass(frozen=True)
class Joined:
    """What came of joining a study."""

    trained: int  # pairs that this process has trained to their end
    open: int  # pairs that have not ended: others train them, or did
    cells: list[CellScores]  # of the report, where this process has written it


def join(run_dir: Path, own: Sequence[str] = (), notify: Notify = lambda _: None) -> Joined:
    """Train pairs of a comparison until none is left that nobody else is training; the last one reports.

    Args:
        run_dir: Folder of a comparison that was begun on any machine.
        own: Strategies of one's own that it has, as ``FILE.py:CLASS``.
        notify: Is notified of every pair that ends here.

    Raises:
        ConfigError: where it holds no comparison, or lacks strategies that are to be named.
        RunError: where it was begun by other versions, or locks do not hold in it.
        Stopped: where it was asked to stop; the pair in training goes on from its last checkpoint.
    """
    run_dir = run_dir.resolve()
    for word in own:
        register(word)
    check_joinable(run_dir)
    refuse_links(run_dir, leaving=[layout.TRACKING])
    study = placed(from_folder(run_dir), run_dir)
    pairs, interrupts, mine = pairs_of(study, run_dir), Interrupts(), list[Pair]()

    def done(pair: Pair) -> None:
        mine.append(pair)
        ended = sum(each.ended for each in pairs)
        notify(f"[{ended}/{len(pairs)}] {pair.name}: {pair.outcome}")

    with obeyed():
        train(study, run_dir, interrupts, Joining(notify, interrupts.check).claim, done)
        left = sum(not pair.ended for pair in pairs)
        missing = bool(mine) or not (run_dir / layout.REPORT).exists()
        return Joined(len(mine), left, _reported(run_dir) if missing and not left else [])


def _reported(run_dir: Path) -> list[CellScores]:
    """The report; nothing where another process holds the folder, which writes it."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(run_dir / layout.LOCK, blocking=False))
        except Timeout:
            return []
        return write_report(run_dir)


class Teller(Listener):
    """Says in the claim how far its pair is, now and then."""

    def __init__(self, pairs: Mapping[str, Pair], cell: str) -> None:
        self._pairs, self._cell, self._told = pairs, cell, 0.0
        self._claim, self._pair = Claim.of_this_process(), next(iter(pairs.values()))

    def arm_started(self, strategy: str, seed: int) -> None:
        """Another pair."""
        self._pair = next(
            each for each in self._pairs.values() if (each.arm.name, each.seed) == (strategy, seed)
        )
        self._claim = read_claim(claim_file(self._pair)) or self._claim  # with the number of its try
        self._tell()

    def batch_done(self, record: BatchRecord, fraction: float) -> None:
        """Say so where the last word is some seconds old."""
        if time.monotonic() - self._told >= TOLD_EVERY:
            self._tell(fraction, record.initial_loss)

    def doing(self, what: str) -> None:
        """Say it at once: it may take long."""
        known = read_running(self._pair)
        self._tell(known.fraction, known.loss, what)

    def _tell(self, fraction: float = 0.0, loss: float | None = None, doing: str = "") -> None:
        self._told = time.monotonic()
        told = {"fraction": fraction, "loss": finite(loss), "doing": doing}
        with contextlib.suppress(OSError):  # another process may be reading it; the next word will do
            write_json(claim_file(self._pair), asdict(self._claim) | told)


def fail(pair: Pair, problem: Exception) -> None:
    """Whatever it is, the other pairs are trained."""
    traceback.print_exception(problem)
    known = isinstance(problem, UserError)
    pair.fail(" ".join(str(problem).split()) if known else f"{type(problem).__name__}: {problem}")


if __name__ == "__main__":
    quiet_libraries()
    end_with_parent()
    try:
        for strategy in sys.argv[2:]:  # of one's own
            register(strategy)
        work(Path(sys.argv[1]))
    except Stopped as stopped:
        raise SystemExit(stopped.exit_code) from None
    except UserError as problem:
        raise SystemExit(_("error: ") + str(problem)) from None
