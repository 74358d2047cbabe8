"""A worker process: ``python -m iterbatch.study.engines.worker RUN_DIR`` trains pairs until none is left."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from iterbatch.bench.listener import Listener
from iterbatch.bench.prepare import prepare
from iterbatch.errors import UserError
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries
from iterbatch.records import layout
from iterbatch.records.course import Running
from iterbatch.records.record import BatchRecord
from iterbatch.records.write import finite, write_json
from iterbatch.runtime.interrupt import Stopped
from iterbatch.strategy import register
from iterbatch.study.engines.in_process import train_cell
from iterbatch.study.pairs import Pair, pairs_of
from iterbatch.study.study_folder import from_folder

TOLD_EVERY = 2.0  # seconds between two words of how far a pair is
WAIT = 0.5  # seconds between two looks at the folder
GRACE = 30.0  # seconds between being asked to stop and being ended


@dataclass(frozen=True)
class Claim:
    """The process that is training a pair; its number alone may come to mean another process."""

    pid: int
    began: float  # seconds since the epoch
    host: str

    @classmethod
    def of(cls, pid: int) -> "Claim":
        """Of a process of this machine.

        Raises:
            psutil.NoSuchProcess: where there is none.
        """
        return cls(pid, psutil.Process(pid).create_time(), socket.gethostname())

    @property
    def process(self) -> psutil.Process | None:
        """The process, if it is still there and on this machine."""
        try:
            found = psutil.Process(self.pid)
            same = self.host == socket.gethostname() and found.create_time() == self.began
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


def claim_file(pair: Pair) -> Path:
    """Says which process is training a pair."""
    return pair.run_dir / layout.WORKERS / f"{pair.name.replace('/', '~')}.json"


def lock_of(pair: Pair) -> FileLock:
    """Held while a pair is trained; the system's, so it ends with its process."""
    return FileLock(claim_file(pair).with_suffix(".lock"), blocking=False)


def read_claim(file: Path) -> Claim | None:
    """Who is training a pair, or was; None where nobody is, or it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Claim(int(content["pid"]), float(content["began"]), str(content["host"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_running(pair: Pair) -> Running:
    """How far a pair is that is claimed."""
    try:
        content = json.loads(claim_file(pair).read_text(encoding="utf-8"))
        loss = content.get("loss")
        loss = float(loss) if isinstance(loss, int | float) else None
        return Running(
            pair.name, pair.folder, float(content.get("fraction", 0.0)), loss, str(content.get("doing", ""))
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return Running(pair.name, pair.folder)


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
    study = from_folder(run_dir)
    pairs = pairs_of(study, run_dir)
    for cell in study.cells:
        mine = [pair for pair in pairs if pair.cell.name == cell.name]
        if all(pair.ended for pair in mine):
            continue
        with contextlib.closing(claim_in_turn(mine)) as claims:
            folder, config = run_dir / cell.name, cell.config
            teller = Teller({pair.name: pair for pair in mine}, cell.name)
            for _ in train_cell(folder, claims, lambda config=config: prepare(config), teller, _fail):
                pass


class Teller(Listener):
    """Says in the claim how far its pair is, now and then."""

    def __init__(self, pairs: Mapping[str, Pair], cell: str) -> None:
        self._pairs, self._cell, self._told = pairs, cell, 0.0
        self._claim, self._pair = Claim.of(os.getpid()), next(iter(pairs.values()))

    def arm_started(self, strategy: str, seed: int) -> None:
        """Another pair."""
        self._pair = next(
            each for each in self._pairs.values() if (each.arm.name, each.seed) == (strategy, seed)
        )
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


def _fail(pair: Pair, problem: Exception) -> None:
    """Whatever it is, the other pairs are trained."""
    traceback.print_exception(problem)
    known = isinstance(problem, UserError)
    pair.fail(" ".join(str(problem).split()) if known else f"{type(problem).__name__}: {problem}")


def _forget(pair: Pair) -> None:
    """Delete the claim of a pair that is done with; one that is left says nothing of what has ended."""
    with contextlib.suppress(PermissionError):  # Windows deletes no file that another process is reading
        claim_file(pair).unlink(missing_ok=True)


def claim_in_turn(pairs: Sequence[Pair]) -> Generator[Pair]:
    """Pairs one at a time, each held against other workers until the next is asked for."""
    while True:
        waiting = False
        for pair in pairs:
            if pair.ended:
                continue
            source = pair.waits_for(pairs)
            if source is not None and not source.ended:
                waiting = True
                continue
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(lock_of(pair))
                except Timeout:
                    continue
                if pair.ended:
                    continue
                if claim_file(pair).exists():  # of a worker that crashed, whose end is still to be recorded
                    waiting = True
                    continue
                if source is not None and source.broken:
                    pair.fail(_("it is made from {name}, which failed").format(name=source.name))
                    continue
                write_json(claim_file(pair), asdict(Claim.of(os.getpid())))
                held.callback(_forget, pair)
                yield pair
                break  # from the first pair again: what it waited for may be there now
        else:
            if not waiting:
                return
            time.sleep(WAIT)


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
