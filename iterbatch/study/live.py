"""A study while it is trained: where it stands, when it will end, and its report so far."""

import contextlib
import time
from collections.abc import Callable, Sequence

from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.course import Course, Pace, Running
from iterbatch.report import growing
from iterbatch.study.pairs import Notify, Pair

EVERY_S = 120.0  # seconds between two reports of a study that is being trained
REST = 40.0  # times as long as a report took to write, at least, until the next one

Show = Callable[[Course], None]


class Live:
    """Shows where the pairs of a study stand, and writes its report now and then.

    Args:
        pairs: Of the study.
        notify: Is notified where a report cannot be written; training goes on.
        show: Is shown where the study stands, whenever that is known anew.
    """

    def __init__(self, pairs: Sequence[Pair], notify: Notify, show: Show = lambda _: None) -> None:
        self.pairs, self.run_dir, self._notify, self._show = pairs, pairs[0].run_dir, notify, show
        self._shares = {pair.name: pair.arm.config.training.budget_share for pair in pairs}
        self._pace = Pace()
        self._ended = {pair.name for pair in pairs if pair.ended}  # before
        self._first: dict[str, float] = {}  # fraction at which a pair was first seen: it may be resumed
        self._course = Course(len(pairs), 0, (), None)
        self._due = time.monotonic() + EVERY_S / 8  # the first one soon

    def update(self, running: Sequence[Running]) -> None:
        """Take note of what is being trained; report where that is due."""
        self._course = self._where(running)
        self._show(self._course)
        if time.monotonic() >= self._due:
            self._report(reload=True)

    def _where(self, running: Sequence[Running]) -> Course:
        """Where the study stands."""
        ended = {pair.name for pair in self.pairs if pair.ended}
        now = {each.name: min(each.fraction, 1.0) for each in running if each.name not in ended}
        for name, fraction in now.items():
            if fraction > 0:
                self._first.setdefault(name, fraction)
        moved = sum(
            self._shares[name] * (now.get(name, 1.0) - self._first.get(name, 0.0))
            for name in (ended - self._ended) | now.keys()
        )
        rest = sum(
            share * (1 - now.get(name, 0.0)) for name, share in self._shares.items() if name not in ended
        )
        still = tuple(each for each in running if each.name in now)
        return Course(len(self.pairs), len(ended), still, self._pace.left(moved, rest))

    def stopped(self) -> None:
        """The study has been stopped before its end: a last page, which waits for nothing."""
        self._course = self._where(self._course.running)
        if (self.run_dir / layout.REPORT).exists():
            self._report(reload=False)

    def _report(self, *, reload: bool) -> None:
        begun = time.monotonic()
        try:
            growing.write(self.run_dir, self._course, reload=reload)
        except Exception as problem:  # whatever it is: a page is no reason to end training
            with contextlib.suppress(Exception):
                self._notify(
                    _("the report so far could not be written ({problem}); training goes on").format(
                        problem=problem
                    )
                )
        took = time.monotonic() - begun
        self._due = time.monotonic() + max(EVERY_S, REST * took)
