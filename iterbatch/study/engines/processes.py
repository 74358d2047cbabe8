"""Pairs over worker processes: starts workers, watches them, and records the pair of one that crashed.

A worker claims a pair by a file lock, which ends with its process, and ends with the process that started
it. What is finished is in the folder, so a study that was stopped is resumed by training what is missing.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.write import write_json
from iterbatch.runtime.interrupt import Interrupts, Stopped
from iterbatch.strategy.own import SOURCES
from iterbatch.study.engines import claims, worker
from iterbatch.study.live import Live, Show
from iterbatch.study.pairs import Notify, Pair

WAIT = 0.5  # seconds between two looks at the folder
REPLACED = 5  # workers in a row that somebody else may stop without a pair being done
ASKED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)  # exit codes


class Processes:
    """Trains pairs in several processes at a time; the cores are shared out among them.

    A pair that crashes or diverges is infinity, the others are trained.

    Args:
        workers: Processes at a time.
        notify: Is notified of every pair that ends.
        show: Is shown where the study stands.
    """

    def __init__(self, workers: int, notify: Notify = lambda _: None, show: Show = lambda _: None) -> None:
        self.workers, self.notify, self.show = workers, notify, show

    def train(self, pairs: Sequence[Pair]) -> None:
        """Train those that have not ended; those that failed before are tried again.

        Raises:
            RunError: where the workers cannot even begin, or are stopped again and again.
            Stopped: where it was asked to stop.
        """
        end_orphans(pairs, self.notify)
        for pair in pairs:
            (pair.folder / layout.FAILED).unlink(missing_ok=True)
            if not claims.is_held(pair):
                claims.claim_file(pair).unlink(missing_ok=True)
        with Interrupts() as interrupts:
            Watch(pairs, self.workers, interrupts, self.notify, self.show).run()


def end_orphans(pairs: Sequence[Pair], notify: Notify) -> None:
    """End workers whose parent is gone and that have not noticed yet: the study is this process's."""
    folder = pairs[0].run_dir / layout.WORKERS  # of claims, and of those that have claimed nothing yet
    for claim in map(claims.read_claim, sorted(folder.glob("*.json"))):
        process = None if claim is None or claim.joined else claim.process
        if process is not None:
            notify(_("a worker of an earlier start, process {pid}, is ended first").format(pid=process.pid))
            end([process])


def end(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Ask processes to stop, and end those that do not within the time of grace; returns those."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            process.resume()  # one that was halted hears it only when it goes on
    _, deaf = psutil.wait_procs(processes, timeout=worker.GRACE)
    for process in deaf:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(deaf)
    return deaf


class Watch:
    """The workers of one study while they run."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        workers: int,
        interrupts: Interrupts,
        notify: Notify,
        show: Show = lambda _: None,
    ) -> None:
        self.live = Live(pairs, notify, show)
        self.pairs, self.run_dir, self.interrupts, self.notify = pairs, pairs[0].run_dir, interrupts, notify
        self.workers = min(workers, len(pairs))
        self.running: dict[int, subprocess.Popen[bytes]] = {}  # by number
        self._replaced = 0  # workers since the last pair that was done
        self._waited: set[str] = set()  # pairs of others that were waited for
        self._known = {pair.name for pair in pairs if pair.ended}

    def run(self) -> None:
        """Until every pair has ended or the study is asked to stop."""
        left = [pair for pair in self.pairs if not pair.ended]
        before = _("{count} finished before").format(count=len(self.pairs) - len(left))
        self.notify(
            _("{count} pairs of arm and seed, {before}, {workers} at a time").format(
                count=len(self.pairs), before=before, workers=self.workers
            )
        )
        for number in range(min(self.workers, len(left))):
            self.start(number)
        try:
            while self.running or self._wait_for_others():
                if self.interrupts.requested is not None:
                    self.stop()
                time.sleep(WAIT)
                self._notify_of_ended()
                claimed = [each for each in self.pairs if not each.ended and claims.claim_file(each).exists()]
                self.live.update([claims.read_running(each) for each in claimed])
                for number, process in list(self.running.items()):
                    if process.poll() is not None:
                        del self.running[number]
                        self._ended(number, process)
            # Workers get a terminal's Ctrl-C too, and may all have stopped by themselves.
            self.interrupts.check()
        except BaseException:
            self.live.stopped()
            raise
        finally:
            for process in self.running.values():
                process.kill()
                process.wait()

    def _wait_for_others(self) -> bool:
        """Whether pairs are open that another machine trains, say; once one is free, it is trained here."""
        left = [pair for pair in self.pairs if not pair.ended]
        if not left or self.interrupts.requested is not None:
            return False
        if free := [pair for pair in left if not claims.is_held(pair)]:
            for pair in free:
                claims.claim_file(pair).unlink(missing_ok=True)  # of one that ended elsewhere
            self.start(0)
        elif left[0].name not in self._waited:
            claim = claims.read_claim(claims.claim_file(left[0]))
            who = (
                _("another process")
                if claim is None
                else _("process {pid} on {host!r}").format(pid=claim.pid, host=claim.host)
            )
            self.notify(_("waiting for {name}, which {who} is training").format(name=left[0].name, who=who))
            self._waited.add(left[0].name)
        return True

    def start(self, number: int) -> None:
        """Start a worker. Its input is a pipe from this process, by which it knows when this one is gone."""
        threads = str(max(1, threads_to_share() // self.workers))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUTF8": "1"}
        own = [
            SOURCES[name].words for name in sorted({pair.arm.strategy for pair in self.pairs} & {*SOURCES})
        ]
        command = [sys.executable, "-m", worker.__name__, str(self.run_dir), *own]
        with self._log(number).open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        self.running[number] = process
        with contextlib.suppress(psutil.NoSuchProcess):
            known = claims.Claim.of(process.pid)
            write_json(self.run_dir / layout.WORKERS / f"worker{number}.json", asdict(known))

    def _log(self, number: int) -> Path:
        return self.run_dir / layout.WORKERS / f"worker{number}.log"

    def _ended(self, number: int, process: subprocess.Popen[bytes]) -> None:
        """A worker has nothing left to do, was stopped, or has crashed: then so has its pair."""
        if process.returncode == 0 or self.interrupts.requested is not None:
            return
        claimed = [pair for pair in self.pairs if not pair.ended and _claimed_by(pair, process.pid)]
        asked = process.returncode in ASKED or (process.returncode < 0 and not claimed)
        for pair in claimed:
            claims.claim_file(pair).unlink(missing_ok=True)
            if not asked:
                _fail(
                    pair,
                    _("its process ended with exit code {returncode}").format(returncode=process.returncode),
                )
        self._notify_of_ended()
        if asked:
            self._replaced += 1
            self.notify(
                _("worker {number} was stopped from outside; another takes its place").format(number=number)
            )
        if not (claimed or asked) or self._replaced > REPLACED:
            self._terminate()
            log = self._log(number).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = "\n".join(log[-12:]) or _("exit code {returncode}").format(returncode=process.returncode)
            raise RunError(
                _("workers are stopped from outside, {replaced} in a row; the last one said:\n{last}").format(
                    replaced=self._replaced, last=last
                )
                if asked
                else _("a worker could not begin:\n{last}").format(last=last)
            )
        if any(not pair.ended for pair in self.pairs):
            self.start(number)

    def _notify_of_ended(self) -> None:
        for pair in self.pairs:
            if pair.name not in self._known and pair.ended:
                self._known.add(pair.name)
                self._replaced = 0
                self.notify(f"[{len(self._known)}/{len(self.pairs)}] {pair.name}: {pair.outcome}")

    def stop(self) -> None:
        """Ask all workers to make a checkpoint and stop; wait for them.

        Raises:
            Stopped: always.
        """
        self._terminate()
        raise Stopped(self.interrupts.requested or signal.SIGTERM)

    def _terminate(self) -> None:
        numbers = {process.pid: number for number, process in self.running.items()}
        for process in end([psutil.Process(pid) for pid in numbers if psutil.pid_exists(pid)]):
            self.notify(
                _("worker {numbers} did not stop within {grace:.0f} s and was ended").format(
                    numbers=numbers[process.pid], grace=worker.GRACE
                )
            )
        for process in self.running.values():
            process.wait()
        self.running.clear()


def _claimed_by(pair: Pair, pid: int) -> bool:
    claim = claims.read_claim(claims.claim_file(pair))
    return claim is not None and claim.pid == pid


def _fail(pair: Pair, reason: str) -> None:
    try:
        pair.fail(reason)
    except OSError as problem:
        raise RunError(
            _(
                "{name} failed ({reason}), and its folder cannot be written: {problem}, {filename}. What "
                "has ended is kept; the same command goes on"
            ).format(name=pair.name, reason=reason, problem=problem.strerror, filename=problem.filename)
        ) from problem


def threads_to_share() -> int:
    """Threads for all workers together: ``OMP_NUM_THREADS`` where the user set it, else the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else cores()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
