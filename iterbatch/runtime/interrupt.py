"""Ctrl-C and SIGTERM: a run stops at the next place where a checkpoint can be made."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from iterbatch.language import _


class Stopped(KeyboardInterrupt):
    """A run has stopped because it was asked to, with everything saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(_("stopped by {name}").format(name=signal.Signals(signum).name))
        self.exit_code = 128 + signum


class Interrupts:
    """While entered, SIGINT and SIGTERM are noted instead of obeyed.

    The second one of a kind is obeyed at once.

    In a thread other than the main one signals do not arrive, and nothing changes.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {
                signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.requested == signum:
            raise Stopped(signum)
        self.requested = signum

    def check(self) -> None:
        """Stop here, if it was asked for.

        Raises:
            Stopped: then.
        """
        if self.requested is not None:
            raise Stopped(self.requested)


@contextlib.contextmanager
def obeyed() -> Iterator[None]:
    """SIGTERM outside of :class:`Interrupts` stops at once, as Ctrl-C does, and what is held is let go."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
