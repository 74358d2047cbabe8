"""``step`` over whole models: a pass is all of one's own loss, and a repeat costs what a fresh pass does.

What does not live here: how a pass is made. It is made by the user's loss (:mod:`iterbatch.repeater`), or by
somebody else's trainer (:mod:`iterbatch.integrations`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from iterbatch.data.batch import IGNORED
from iterbatch.records.record import BatchRecord
from iterbatch.training.budget import Ledger
from iterbatch.training.passes import Pass

UNLIMITED = 10**15  # passes


@dataclass(eq=False)
class Window:
    """The micro-batches of one update, and what a pass over them costs where that is known."""

    micro_batches: Sequence[Any]
    index: int
    epoch: int = 0
    tokens: int = 0  # label tokens, over all processes
    flops: float = 0.0  # of a fresh pass
    repeat_flops: float = 0.0


def weights_of(micro_batches: Sequence[Any]) -> list[float]:
    """Of each micro-batch in the loss: its label tokens where all are a language model's, else alike."""
    count = len(micro_batches)
    labels = [each.get("labels") if isinstance(each, Mapping) else None for each in micro_batches]
    tokens = [
        int((each[:, 1:] != IGNORED).sum())
        for each in labels
        if isinstance(each, Tensor) and each.ndim == 2 and each.shape[1] > 1 and not each.is_floating_point()
    ]
    if count == 1 or len(tokens) < count or not sum(tokens):
        return [1 / count] * count
    return [each / sum(tokens) for each in tokens]


@dataclass(frozen=True)
class UnmeasuredPass(Pass):
    """A pass of somebody else's loop, which keeps its gradient's norm to itself."""

    gradient_norm: float = field(default=math.nan)

    @property
    def finite(self) -> bool:
        """Whether its loss is."""
        return math.isfinite(self.loss)


class MakesPasses(Protocol):
    """Makes passes over windows."""

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        ...

    def make(self, window: Window) -> Pass:
        """One pass over a window, with its update."""
        ...

    def score(self, batch: Any) -> float:
        """Loss of a batch as the model is now, without dropout."""
        ...


class Affords(Protocol):
    """A budget, as a step asks it."""

    def affords(self, ledger: Ledger, repeat_flops: float, label_tokens: int, /) -> bool:
        """Whether one more repeat fits into what is left."""
        ...


class WholeStep:
    """``step`` over any model: see :class:`iterbatch.strategy.base.Step`.

    Args:
        passes: Makes them.
        ledger: Counts them.
        allowance: What may be spent.
        scheduler: Of the learning rate, or None.
        probe: Batches that are never trained on.
    """

    price_ratio, probe_price = 1.0, 1 / 3  # a forward is about a third of a pass

    def __init__(
        self,
        passes: MakesPasses,
        ledger: Ledger,
        allowance: Affords,
        scheduler: Any = None,
        probe: Sequence[Any] = (),
    ) -> None:
        self.passes, self.ledger, self.allowance = passes, ledger, allowance
        self._scheduler, self._probe, self._held = scheduler, probe, dict[int, Window]()
        self._window: Window | None = None
        self._first, self._rate, self._skipped, self._flops = Pass(math.nan, math.nan), 0.0, 0, 0.0
        self._revisited: list[int] = []

    def begin(self) -> None:
        """A batch is about to begin."""
        self._revisited, self._skipped = [], self.ledger.skipped_updates

    def __call__(self, batch: Any) -> float:
        """Fresh pass; returns the initial loss."""
        self._window, self._rate = batch, self.passes.learning_rate
        self._flops = self.ledger.flops
        self._first = self._fresh(batch)
        self.ledger.batches += 1
        self.ledger.flops_fresh += batch.flops
        self.ledger.tokens_unique += batch.tokens if batch.epoch == 0 else 0
        if self._scheduler is not None:
            self._scheduler.step()
        return self._first.loss

    def again(self) -> float:
        """A repeat; returns its loss before its update."""
        assert self._window is not None
        return self._repeat(self._window)

    def affords_repeat(self) -> bool:
        """Whether the budget has room for one more."""
        assert self._window is not None
        return self.allowance.affords(self.ledger, self._window.repeat_flops, self._window.tokens)

    def probe(self, number: int) -> float:
        """Loss of a batch that is never trained on."""
        return self.passes.score(self._probe[number % len(self._probe)])

    def hold(self) -> int:
        """Keep the current batch for later."""
        assert self._window is not None
        self._held[self._window.index] = self._window
        return self._window.index

    def revisit(self, held: int) -> float:
        """One pass on a held batch."""
        self._revisited.append(held)
        return self._repeat(self._held[held])

    def release(self, held: int) -> None:
        """Let a held batch go."""
        self._held.pop(held, None)

    def record(self, losses: list[float], planned: int, done: int | None = None) -> BatchRecord:
        """The record of the current batch; FLOPs and tokens are 0 where they are not known."""
        assert self._window is not None
        return BatchRecord(
            batch=self._window.index,
            epoch=self._window.epoch,
            initial_loss=losses[0],
            losses=losses,
            repeats_planned=planned,
            repeats_done=len(losses) if done is None else done,
            learning_rate=self._rate,
            gradient_norm=self._first.gradient_norm,
            tokens=self._window.tokens,
            flops=self.ledger.flops - self._flops,
            seconds=0.0,
            skipped_updates=self.ledger.skipped_updates - self._skipped,
            revisited=self._revisited,
        )

    @property
    def held(self) -> dict[int, Window]:
        """Batches that wait for a repeat, by the name each is held under."""
        return self._held

    def _fresh(self, window: Window) -> Pass:
        return self._counted(self.passes.make(window), window)

    def _repeat(self, window: Window) -> float:
        made = self._counted(self.passes.make(window), window)
        self.ledger.flops_repeat += window.repeat_flops
        self.ledger.flops_saved += window.flops - window.repeat_flops
        return made.loss

    def _counted(self, made: Pass, window: Window) -> Pass:
        self.ledger.updates += made.finite
        self.ledger.skipped_updates += not made.finite
        self.ledger.nonfinite_losses += not math.isfinite(made.loss)
        self.ledger.tokens_trained += window.tokens
        return made


class FollowingStep(WholeStep):
    """``step`` behind somebody else's loop, which has made the fresh pass already.

    Its loop hands over what it made by :meth:`follow`; the strategy then finds it made.
    """

    _made = Pass(math.nan, math.nan)

    def follow(self, made: Pass) -> None:
        """Take note of the fresh pass over the batch that comes next."""
        self._made = made

    def _fresh(self, window: Window) -> Pass:
        return self._counted(self._made, window)
