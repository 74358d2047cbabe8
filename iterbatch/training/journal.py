"""Being resumed in the middle of a batch: what ``step`` has answered is written down and answered again.

A batch that training stopped in is given to the strategy again from its beginning. Up to where it
stopped, the verbs of ``step`` give the answers of then and spend nothing; from there on they work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from iterbatch.training.open_batch import Bill

if TYPE_CHECKING:
    from iterbatch.data.batch import Batch


@dataclass(frozen=True)
class Reading:
    """What holds after an answer, and what comes after it depends on."""

    learning_rate: float = 0.0  # of the last pass
    gradient_norm: float = 0.0  # of the fresh pass
    bill: Bill = field(default_factory=Bill)  # of the current batch


@dataclass(frozen=True)
class Entry:
    """One answer."""

    answer: Any
    reading: Reading

    def packed(self) -> list[Any]:
        """As plain values."""
        reading = self.reading
        return [
            self.answer,
            reading.learning_rate,
            reading.gradient_norm,
            reading.bill.flops,
            reading.bill.seconds,
        ]

    @classmethod
    def unpacked(cls, state: list[Any]) -> Entry:
        """What :meth:`packed` gave."""
        answer, learning_rate, gradient_norm, flops, seconds = state
        return cls(answer, Reading(learning_rate, gradient_norm, Bill(flops, seconds)))


class Journal:
    """The answers about the current batch: those given, and those of before a stop still to be given."""

    def __init__(self) -> None:
        self._given: list[Entry] = []
        self._again: list[Entry] = []

    @property
    def replaying(self) -> bool:
        """Whether the next answer is one of before."""
        return bool(self._again)

    @property
    def losses(self) -> list[float]:
        """The answers that are numbers: losses of passes and probes."""
        return [entry.answer for entry in self._given if isinstance(entry.answer, float)]

    def begin(self) -> None:
        """A new batch begins, or one is resumed."""
        self._given = []

    def give_again(self) -> Entry:
        """The next answer of before."""
        entry = self._again.pop(0)
        self._given.append(entry)
        return entry

    def write(self, answer: Any, reading: Reading) -> None:
        """Write an answer down."""
        self._given.append(Entry(answer, reading))

    def state_dict(self) -> dict[str, Any]:
        """All answers about the current batch."""
        return {"answers": [entry.packed() for entry in self._given + self._again]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give these answers again."""
        self._given, self._again = [], [Entry.unpacked(entry) for entry in state["answers"]]


Verb = TypeVar("Verb", bound=Callable[..., Any])


def journalled(
    *, opens: Callable[..., tuple[Batch, Batch]] | None = None, passes: bool = False
) -> Callable[[Verb], Verb]:
    """A verb of :class:`iterbatch.training.step.TrainingStep` whose answers are journalled.

    Args:
        opens: From the verb's arguments to the batch that it makes the current one, and the whole
            that it is of.
        passes: Whether it makes a pass, after which a checkpoint may be made.
    """

    def decorate(work: Verb) -> Verb:
        @functools.wraps(work)
        def verb(step: Any, *given: Any) -> Any:
            if opens is not None:
                step.open(*opens(*given))
            if step.journal.replaying:
                entry = step.journal.give_again()
                step.take_reading(entry.reading)
                if not step.journal.replaying:
                    step.fetch_again()
                return entry.answer
            answer = work(step, *given)
            step.journal.write(answer, step.reading)
            if passes:
                step.after_pass()
            return answer

        return verb  # pyright: ignore[reportReturnType]

    return decorate
