"""Pairs over worker processes: starts workers, watches them, and records the pair of one that crashed.

A worker claims a pair by a file lock, which ends with its process. What is finished is in the
folder, so a study that was stopped is resumed by training what is missing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from iterbatch.errors import RunError
from iterbatch.records import layout
from iterbatch.runtime.interrupt import Interrupts, Stopped
from iterbatch.study.engines import worker
from iterbatch.study.pairs import Notify, Pair

WAIT = 0.5  # seconds between two looks at the folder


class Processes:
    """Trains pairs in several processes at a time; the cores are shared out among them.

    A pair that crashes or diverges is infinity, the others are trained.

    Args:
        workers: Processes at a time.
        notify: Is notified of every pair that ends.
    """

    def __init__(self, workers: int, notify: Notify = lambda _: None) -> None:
        self.workers, self.notify = workers, notify

    def train(self, pairs: Sequence[Pair]) -> None:
        """Train those that have not ended; those that failed before are tried again.

        Raises:
            RunError: where the workers cannot even begin.
            Stopped: where it was asked to stop; pairs in training have made a checkpoint.
        """
        for pair in pairs:
            (pair.folder / layout.FAILED).unlink(missing_ok=True)
            worker.claim_file(pair).unlink(missing_ok=True)
        with Interrupts() as interrupts:
            Watch(pairs, self.workers, interrupts, self.notify).run()


class Watch:
    """The workers of one study while they run."""

    def __init__(self, pairs: Sequence[Pair], workers: int, interrupts: Interrupts, notify: Notify) -> None:
        self.pairs, self.run_dir, self.interrupts, self.notify = pairs, pairs[0].run_dir, interrupts, notify
        self.workers = min(workers, len(pairs))
        self.running: dict[int, subprocess.Popen[bytes]] = {}  # by number
        self._known = {pair.name for pair in pairs if pair.ended}

    def run(self) -> None:
        """Until every pair has ended or the study is asked to stop."""
        left = [pair for pair in self.pairs if not pair.ended]
        before = f"{len(self.pairs) - len(left)} finished before"
        self.notify(f"{len(self.pairs)} pairs of arm and seed, {before}, {self.workers} at a time")
        for number in range(min(self.workers, len(left))):
            self.start(number)
        try:
            while self.running:
                if self.interrupts.requested is not None:
                    self.stop()
                time.sleep(WAIT)
                self._notify_of_ended()
                for number, process in list(self.running.items()):
                    if process.poll() is not None:
                        del self.running[number]
                        self._ended(number, process)
            # Workers get a terminal's Ctrl-C too, and may all have stopped by themselves.
            self.interrupts.check()
        finally:
            for process in self.running.values():
                process.kill()

    def start(self, number: int) -> None:
        """Start a worker."""
        threads = str(max(1, cores() // self.workers))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUTF8": "1"}
        command = [sys.executable, "-m", worker.__name__, str(self.run_dir)]
        with self._log(number).open("ab") as log:
            self.running[number] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _log(self, number: int) -> Path:
        return self.run_dir / layout.WORKERS / f"worker{number}.log"

    def _ended(self, number: int, process: subprocess.Popen[bytes]) -> None:
        """A worker has nothing left to do, was stopped, or has crashed: then so has its pair."""
        if process.returncode == 0 or self.interrupts.requested is not None:
            return
        claimed = [pair for pair in self.pairs if not pair.ended and _claimed_by(pair, process.pid)]
        for pair in claimed:
            worker.claim_file(pair).unlink(missing_ok=True)
            pair.fail(f"its process ended with exit code {process.returncode}")
        self._notify_of_ended()
        last = self._log(number).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        if not claimed:
            self._terminate()
            raise RunError("a worker could not begin:\n" + "\n".join(last))
        if any(not pair.ended for pair in self.pairs):
            self.start(number)

    def _notify_of_ended(self) -> None:
        for pair in self.pairs:
            if pair.name not in self._known and pair.ended:
                self._known.add(pair.name)
                self.notify(f"[{len(self._known)}/{len(self.pairs)}] {pair.name}: {pair.outcome}")

    def stop(self) -> None:
        """Ask all workers to make a checkpoint and stop; wait for them.

        Raises:
            Stopped: always.
        """
        self._terminate()
        raise Stopped(self.interrupts.requested or signal.SIGTERM)

    def _terminate(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait()
        self.running.clear()


def _claimed_by(pair: Pair, pid: int) -> bool:
    try:
        return json.loads(worker.claim_file(pair).read_text(encoding="utf-8"))["pid"] == pid
    except (OSError, ValueError, KeyError, TypeError):
        return False


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
