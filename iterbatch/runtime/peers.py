"""The processes of a run watch each other: where one is gone the others end, in seconds and with a word."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

from iterbatch.errors import RunError, UserError
from iterbatch.language import _
from iterbatch.runtime.processes import count, gathered, rank

LOOK_EVERY_S = 0.5
GRACE_S = 4.0  # that a process has to notice by itself: one that waits for a GPU never does
BROKEN = ("by peer", "Broken pipe", "gloo", "NCCL", "connection", "timed out", "Timed out")


@dataclass(frozen=True)
class Peer:
    """A process of the run."""

    rank: int
    host: str
    pid: int
    began: float  # a number may be given to another process later

    @classmethod
    def this(cls) -> Peer:
        """The process that asks."""
        return cls(rank(), socket.gethostname(), os.getpid(), psutil.Process().create_time())

    @property
    def gone(self) -> bool:
        """Whether it has ended; False of one on another machine, which is not seen from here."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.began or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class Peers:
    """All processes of a run, and what is said when one of them is gone."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        # Containers may not see each other's processes, however they are called.
        self._seen = [each for each in peers if not each.gone]
        self._lock, self._said = threading.Lock(), False
        self.resume = ""  # the command, as soon as the run has a folder

    @property
    def lost(self) -> list[Peer]:
        """Those that have ended."""
        return [each for each in self._seen if each.gone]

    def message(self, lost: Sequence[Peer]) -> str:
        """What has happened and what to do."""
        who = _(" and ").join(
            _("process {rank} (pid {pid})").format(rank=each.rank, pid=each.pid) for each in lost
        )
        kept = _(
            "{who} of {count} has ended before its time: killed, out of memory, or with an error of its own "
            "above. The others end with it; records and the last checkpoint are kept."
        ).format(who=who or _("another process"), count=count())
        how = _("Resume with as many processes, or another number, by: {command}").format(command=self.resume)
        return f"{kept} {how}" if self.resume else kept

    def problem(self, lost: Sequence[Peer]) -> BaseException:
        """To be raised here: of all that are left one says it, and that is the first that is left."""
        gone = {each.rank for each in lost}
        first = min(each.rank for each in self._seen if each.rank not in gone)
        with self._lock:
            speaks, self._said = first == rank() and not self._said, True
        return RunError(self.message(lost)) if speaks else SystemExit(2)

    def watch(self, ended: threading.Event) -> None:
        """End this process where another one is gone, and this one does not notice."""
        while not ended.wait(LOOK_EVERY_S):
            if self.lost:
                if not ended.wait(GRACE_S):
                    problem = self.problem(self.lost)
                    if isinstance(problem, UserError):
                        sys.stderr.write(_("error: ") + f"{problem}\n")
                        sys.stderr.flush()
                    os._exit(2)
                return


@contextlib.contextmanager
def together() -> Iterator[Peers]:
    """While entered, a process that is gone ends the others.

    Raises:
        RunError: then, in the first process that is left; the others leave it at that.
    """
    if count() == 1:
        yield Peers([])
        return
    ended = threading.Event()
    peers = Peers(gathered(Peer.this()))
    gathered(None)  # nobody goes on, and may end, before everybody has looked
    threading.Thread(target=peers.watch, args=(ended,), daemon=True).start()
    try:
        yield peers
    except UserError:
        raise
    except Exception as problem:  # of a collective, in whatever wrapping
        lost = _soon_lost(peers)
        if not lost and not any(word in str(problem) for word in BROKEN):
            raise
        raise peers.problem(lost) from problem
    finally:
        ended.set()


def _soon_lost(peers: Peers) -> list[Peer]:
    """Connections end a moment before their process."""
    until = time.monotonic() + GRACE_S / 2
    while not (lost := peers.lost) and time.monotonic() < until:
        time.sleep(0.1)
    return lost
