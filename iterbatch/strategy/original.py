"""The four strategies of the original experiment: pure rules of plain numbers under thin classes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from iterbatch.config import Knob
from iterbatch.strategy.base import Adapter, BaseTrainingStrategy, Step, make_repeats
from iterbatch.strategy.scheduler import MAX_REPEATS, GainLearner

if TYPE_CHECKING:
    from iterbatch.data.batch import Batch
    from iterbatch.records.record import BatchRecord

# ------------------------------------------------------------------------------------------------------------
# baseline: every batch once


@dataclass(eq=False)
class BaselineStrategy(BaseTrainingStrategy):
    """Every batch once: k = 1."""

    summary: ClassVar[str] = "once"

    def repeats(self, initial_loss: float) -> int:
        """Always 1."""
        return 1


# ------------------------------------------------------------------------------------------------------------
# abr: Adaptive Batch Repetition


def abr_repeats(loss: float, threshold: float, max_repeats: int) -> int:
    """``min(int(loss / threshold), max_repeats)`` where the loss is above the threshold, else 1.

    Args:
        loss: Initial loss, nats a token, >= 0.
        threshold: Loss above which a batch may be repeated, nats a token, > 0.
        max_repeats: Most passes, the first included, >= 1.

    Source: the original experiment.
    """
    return min(int(loss / threshold), max_repeats) if loss > threshold else 1


@dataclass(eq=False)
class ABRStrategy(BaseTrainingStrategy):
    """Adaptive Batch Repetition: the higher the initial loss, the more passes. See :func:`abr_repeats`."""

    summary: ClassVar[str] = (
        "`min(int(loss / threshold), max_repeats)` where its initial loss is above the threshold"
    )
    question: ClassVar[str] = "Does ABR beat training every batch once?"
    rival: ClassVar[str] = "baseline"

    loss_threshold: Annotated[
        float, Knob("initial loss, in nats a token, above which a batch is repeated", above=0)
    ] = 2.0
    max_repeats: Annotated[int, Knob("most passes a batch, the first included", at_least=1)] = MAX_REPEATS

    def repeats(self, initial_loss: float) -> int:
        """By the ratio of the initial loss to the threshold."""
        return abr_repeats(initial_loss, self.loss_threshold, self.max_repeats)


# ------------------------------------------------------------------------------------------------------------
# window: trend, level and volatility of the last initial losses


def window_repeats(losses: Sequence[float], window_size: int, threshold: float, extra: int) -> int:
    """Passes from the last initial losses.

    Rising and high gets all extra passes, falling and low none, anything else about half.

    With a line fitted to the window by least squares: *trend* is its rise over the window, *volatility* the
    standard deviation of the losses around it, *level* the window's mean. The trend counts as
    rising or falling only where it exceeds the volatility, so that noise is not taken for a trend.
    Otherwise the adjustment is half of ``extra``, rounded up where the level is high and down where
    it is low.

    Args:
        losses: Initial losses, oldest first, nats a token, the current batch's last.
        window_size: Losses needed for a decision, >= 2; with fewer there is no evidence and the answer is 1.
        threshold: Mean loss above which the level is high, nats a token, > 0.
        extra: Most extra passes, >= 0; the total stays within 5.

    Source: the original experiment names the three signals; the thresholds between them are this project's.
    """
    if len(losses) < window_size:
        return 1
    window = np.asarray(losses[-window_size:], dtype=np.float64)
    position = np.arange(window_size) - (window_size - 1) / 2
    slope = float(position @ window / (position @ position))
    trend = slope * (window_size - 1)
    volatility = float(np.std(window - window.mean() - slope * position))
    high = float(window.mean()) > threshold
    # A constant window must not rise by rounding.
    noise = max(volatility, 1e-9 * max(1.0, abs(float(window.mean()))))
    if trend > noise and high:
        adjustment = extra
    elif trend < -noise and not high:
        adjustment = 0
    else:
        adjustment = -(-extra // 2) if high else extra // 2
    return min(1 + adjustment, MAX_REPEATS)


@dataclass(eq=False)
class SlidingWindowStrategy(BaseTrainingStrategy):
    """Looks back on the last ``window_size`` initial losses. See :func:`window_repeats`."""

    summary: ClassVar[str] = "by trend, level and volatility of the last initial losses"

    loss_threshold: Annotated[
        float, Knob("mean loss of the window, in nats a token, above which the level is high", above=0)
    ] = 2.0
    max_repeats: Annotated[int, Knob("most extra passes", at_least=1)] = 1
    window_size: Annotated[int, Knob("initial losses that it looks back on", at_least=2)] = 5

    def __post_init__(self) -> None:
        self.window: deque[float] = deque(maxlen=self.window_size)

    def repeats(self, initial_loss: float) -> int:
        """By trend, level and volatility of the window that ends with this batch."""
        self.window.append(initial_loss)
        return window_repeats(list(self.window), self.window_size, self.loss_threshold, self.max_repeats)

    def state_dict(self) -> dict[str, Any]:
        """The window."""
        return {"window": list(self.window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the window."""
        self.window.clear()
        self.window.extend(state["window"])


# ------------------------------------------------------------------------------------------------------------
# learnable: a scheduler trained on measured gain


@dataclass(frozen=True)
class _OpenProbe:
    """A batch whose last pass is still to be measured, on the batch after it."""

    adapter: Adapter  # before that pass
    features: tuple[float, float]
    passes: int
    learning_rate: float


@dataclass(eq=False)
class LearnableSchedulingStrategy(BaseTrainingStrategy):
    """Repeats while the expected gain of one more pass beats its price; learns the gains from paired probes.

    On a share ``probe_rate`` of the batches it keeps the adapter as it was before the batch's last
    pass, and lets ``step`` score the next batch under it. That batch's own fresh pass gives its
    loss with the last pass taken, so their difference is what this one pass was worth on text the
    model had not seen. Probes need unseen text: after the first epoch the learned policy stays
    unchanged. See :mod:`iterbatch.strategy.scheduler` for the decision and the network.
    """

    summary: ClassVar[str] = (
        "as long as one more pass is expected to gain more than it costs; a small network learns the gains "
        "from probes"
    )

    max_repeats: Annotated[int, Knob("most passes a batch, the first included; 5 at most", at_least=1)] = (
        MAX_REPEATS
    )
    probe_rate: Annotated[
        float,
        Knob(
            "share of batches whose last pass is measured on the next fresh batch",
            at_least=0,
            at_most=1,
        ),
    ] = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self.learner = GainLearner(min(self.max_repeats, MAX_REPEATS), self.seed)
        self._random = np.random.default_rng([self.seed, 1])
        self._open: _OpenProbe | None = None

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
        """As every strategy; settles the probe of the batch before, and opens this batch's, if any."""
        probe = self._open
        score_before = (
            step.score(batch, probe.adapter) if probe is not None and batch.first_exposure else None
        )
        probing = batch.first_exposure and self._random.random() < self.probe_rate
        # Before the last pass; a pass later, another.
        kept: list[Adapter] = [step.snapshot()] if probing else []
        losses = [step(batch)]
        if probe is not None and score_before is not None:
            self._settle(probe, score_before - losses[0])
        planned = self._planned(losses[0], step.price_ratio, explore=probing)

        def keep() -> None:
            if probing:
                kept[:] = [step.snapshot()]

        make_repeats(step, losses, planned, before_each=keep)
        if math.isfinite(losses[0]):
            self.observe(losses)
        self._open = None
        if probing and math.isfinite(losses[0]):
            features = self.learner.features(losses[0])
            self._open = _OpenProbe(kept[0], features, len(losses), step.learning_rate)
        return step.record(losses, planned)

    def repeats(self, initial_loss: float) -> int:
        """The learned policy at a price ratio of 1, without exploration."""
        return self._planned(initial_loss, 1.0, explore=False)

    def observe(self, losses: list[float]) -> None:
        """Standardise the next batch's features with this batch's too."""
        self.learner.note(losses[0])

    def _planned(self, initial_loss: float, price_ratio: float, explore: bool) -> int:
        if not math.isfinite(initial_loss):
            return 1
        return self.learner.decide(initial_loss, price_ratio, explore)

    def _settle(self, probe: _OpenProbe, gain: float) -> None:
        if math.isfinite(gain):
            self.learner.learn(probe.features, probe.passes, gain / probe.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """The learner, the random state, and the open probe with its adapter."""
        probe = None
        if self._open is not None:
            probe = {
                "adapter": self._open.adapter,
                "features": list(self._open.features),
                "passes": self._open.passes,
                "learning_rate": self._open.learning_rate,
            }
        return {
            "learner": self.learner.state_dict(),
            "random": self._random.bit_generator.state,
            "open": probe,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all of it over."""
        self.learner.load_state_dict(state["learner"])
        self._random.bit_generator.state = state["random"]
        probe = state["open"]
        self._open = None
        if probe is not None:
            first, second = probe["features"]
            self._open = _OpenProbe(
                probe["adapter"], (first, second), probe["passes"], probe["learning_rate"]
            )
