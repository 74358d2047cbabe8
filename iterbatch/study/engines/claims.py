"""Who is training which pair: a lock of the system while it is trained, and a claim that says who holds it.

The lock ends with its process, however that ends; the claim is left then, and says that it did not end well.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.course import Running
from iterbatch.records.write import write_json
from iterbatch.study.pairs import Notify, Pair

WAIT = 0.5  # seconds between two looks at the folder
QUIET = 10.0  # seconds for which a claim must say nothing new before its pair is taken over
TRIES = 3  # of a pair whose process ended while it was trained


@dataclass(frozen=True)
class Claim:
    """The process that is training a pair; its number alone may come to mean another process."""

    pid: int
    began: float  # seconds since the epoch
    host: str
    tries: int = 1  # of the pair, this one included
    joined: bool = False  # by `iterbatch worker`: it is no child of the comparison's own process

    @classmethod
    def of(cls, pid: int, *, joined: bool = False) -> "Claim":
        """Of a process of this machine.

        Raises:
            psutil.NoSuchProcess: where there is none.
        """
        return cls(pid, psutil.Process(pid).create_time(), socket.gethostname(), joined=joined)

    @classmethod
    def of_this_process(cls) -> "Claim":
        """Of the one that asks."""
        return cls.of(os.getpid())

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
        tries, joined = int(content.get("tries", 1)), bool(content.get("joined", False))
        return Claim(int(content["pid"]), float(content["began"]), str(content["host"]), tries, joined)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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


@contextlib.contextmanager
def holding(pair: Pair) -> Iterator[bool]:
    """Hold a pair against other processes; False where one of them holds it."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock_of(pair))
        except Timeout:
            yield False
            return
        yield True


def is_held(pair: Pair) -> bool:
    """Whether a process holds a pair."""
    with holding(pair) as free:
        return not free


@contextlib.contextmanager
def claimed(pair: Pair, claim: Claim) -> Iterator[None]:
    """Say who trains a pair that is held, as long as it is."""
    write_json(claim_file(pair), asdict(claim))
    try:
        yield
    finally:
        forget(pair)


def forget(pair: Pair) -> None:
    """Delete the claim of a pair that is done with; one that is left says nothing of what has ended."""
    with contextlib.suppress(PermissionError):  # Windows deletes no file that another process is reading
        claim_file(pair).unlink(missing_ok=True)


def of_a_child(pair: Pair) -> Claim | None:
    """The claim of a comparison's own worker; None where one is left: its parent records that end."""
    return None if claim_file(pair).exists() else Claim.of_this_process()


def claim_in_turn(
    pairs: Sequence[Pair],
    claim: Callable[[Pair], Claim | None] = of_a_child,
    check: Callable[[], None] = lambda: None,
) -> Generator[Pair]:
    """Pairs one at a time, each held against other workers until the next is asked for.

    Args:
        pairs: Of a study.
        claim: What this process claims a pair by that it holds; None where it must wait.
        check: Called between two looks at the folder; raises where this process is to stop.
    """
    while True:
        waiting = False
        check()
        for pair in pairs:
            if pair.ended:
                continue
            source = pair.waits_for(pairs)
            if source is not None and not source.ended:
                waiting = True
                continue
            with holding(pair) as free:
                if not free or pair.ended:
                    continue
                if (mine := claim(pair)) is None:
                    waiting = True
                    continue
                if source is not None and source.broken:
                    fail_with_source(pair, source)
                    continue
                with claimed(pair, mine):
                    yield pair
                break  # from the first pair again: what it waited for may be there now
        else:
            if not waiting:
                return
            time.sleep(WAIT)


def fail_with_source(pair: Pair, source: Pair) -> None:
    """Record that a pair has failed because what it is made from has."""
    pair.fail(_("it is made from {name}, which failed").format(name=source.name))


class Joining:
    """How a process claims that has joined from any machine: nobody but it records what ended there.

    Args:
        notify: Is notified of pairs that are taken over.
        check: Called while a claim is watched; raises where this process is to stop.
    """

    def __init__(self, notify: Notify, check: Callable[[], None]) -> None:
        self._notify, self._check = notify, check
        self._mine = Claim.of(os.getpid(), joined=True)

    def claim(self, pair: Pair) -> Claim | None:
        """The claim of a pair whose lock is held; None where it has failed too often.

        Raises:
            RunError: where the process that claimed it goes on: then locks do not hold in this folder.
        """
        if not claim_file(pair).exists():
            return self._mine
        left = self._watched(pair)
        if not claim_file(pair).exists() or pair.ended:
            return None  # its parent has recorded its end
        tries = left.tries if left is not None else 1
        who = _("a process") if left is None else _process_of(left)
        if tries >= TRIES:
            pair.fail(
                _("{who} ended while it was trained, the last of {tries} tries").format(who=who, tries=tries)
            )
            forget(pair)
            return None
        self._notify(
            _("{name}: {who} ended while it was trained; resumed, try {number} of {tries}").format(
                name=pair.name, who=who, number=tries + 1, tries=TRIES
            )
        )
        return replace(self._mine, tries=tries + 1)

    def _watched(self, pair: Pair) -> Claim | None:
        """The claim that is left, watched for a while: on some disks locks hold on one machine only."""
        file, until = claim_file(pair), time.monotonic() + QUIET
        before, left = _text(file), read_claim(file)
        while time.monotonic() < until:
            self._check()
            time.sleep(min(WAIT, QUIET))
            now = _text(file)
            if now is None or pair.ended:
                break
            if now != before:
                raise RunError(
                    _(
                        "{name} is trained by {who} although its lock is free: locks of files do not hold "
                        "between the machines that share {run_dir}. Mount it with locks (NFS 4, or Lustre "
                        "with the option flock), or use one machine at a time"
                    ).format(
                        name=pair.name,
                        who=_("a process") if left is None else _process_of(left),
                        run_dir=pair.run_dir,
                    )
                )
        return left


def _process_of(claim: Claim) -> str:
    return _("process {pid} on {host!r}").format(pid=claim.pid, host=claim.host)


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None
