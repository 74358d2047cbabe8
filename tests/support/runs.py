"""Whole runs: flags, listeners, and where they may be stopped."""

from iterbatch.bench.listener import Listener
from iterbatch.bench.train_arm import SavePoints


class Notes(Listener):
    """Keeps what it is notified of."""

    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def flag_words(values):
    """Settings as a command line."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def stop_at(monkeypatch, number, signum=15):
    """Ask the run to stop at its so-many-th place where it can."""
    real, seen = SavePoints.here, [0]

    def counting(points):
        seen[0] += 1
        if seen[0] == number:
            points.shared.interrupts.requested = signum
        return real(points)

    monkeypatch.setattr(SavePoints, "here", counting)
