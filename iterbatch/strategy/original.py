"""The four strategies of the original experiment: pure rules of plain numbers under thin classes."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from iterbatch.data.data_loader import Batch
from iterbatch.records.record import BatchRecord
from iterbatch.strategy.scheduler import MAX_REPEATS, GainLearner
from iterbatch.strategy.base import Adapter, BaseTrainingStrategy, Step

# --------------------------------------------------------------------------------------------------------------------------------------
# baseline: every batch once


class BaselineStrategy(BaseTrainingStrategy):
    """Every batch once: k = 1."""

    def repeats(self, initial_loss: float) -> int:
        """Always 1."""
        return 1


# --------------------------------------------------------------------------------------------------------------------------------------
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


class ABRStrategy(BaseTrainingStrategy):
    """Adaptive Batch Repetition: the higher the initial loss, the more passes. See :func:`abr_repeats`."""

    def __init__(self, threshold: float = 2.0, max_repeats: int = MAX_REPEATS) -> None:
        self.threshold, self.max_repeats = threshold, max_repeats

    def repeats(self, initial_loss: float) -> int:
        """By the ratio of the initial loss to the threshold."""
        return abr_repeats(initial_loss, self.threshold, self.max_repeats)


# --------------------------------------------------------------------------------------------------------------------------------------
# window: trend, level and volatility of the last initial losses


def window_repeats(losses: Sequence[float], window_size: int, threshold: float, extra: int) -> int:
    """Passes from the last initial losses: rising and high gets all extra passes, falling and low none, anything else about half.

    With a line fitted to the window by least squares: *trend* is its rise over the window, *volatility* the standard deviation of the losses
    around it, *level* the window's mean. The trend counts as rising or falling only where it exceeds the volatility, so that noise is not
    taken for a trend. Otherwise the adjustment is half of ``extra``, rounded up where the level is high and down where it is low.

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
    noise = max(volatility, 1e-9 * max(1.0, abs(float(window.mean()))))  # a constant window must not rise by rounding
    if trend > noise and high:
        adjustment = extra
    elif trend < -noise and not high:
        adjustment = 0
    else:
        adjustment = -(-extra // 2) if high else extra // 2
    return min(1 + adjustment, MAX_REPEATS)


class SlidingWindowStrategy(BaseTrainingStrategy):
    """Looks back on the last ``window_size`` initial losses. See :func:`window_repeats`."""

    def __init__(self, window_size: int = 5, threshold: float = 2.0, max_repeats: int = 1) -> None:
        self.threshold, self.extra = threshold, max_repeats
        self.window: deque[float] = deque(maxlen=window_size)

    def repeats(self, initial_loss: float) -> int:
        """By trend, level and volatility of the window that ends with this batch."""
        self.window.append(initial_loss)
        return window_repeats(list(self.window), self.window.maxlen or 0, self.threshold, self.extra)

    def state_dict(self) -> dict[str, Any]:
        """The window."""
        return {"window": list(self.window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the window."""
        self.window.clear()
        self.window.extend(state["window"])


# --------------------------------------------------------------------------------------------------------------------------------------
# learnable: a scheduler trained on measured gain


class LearnableSchedulingStrategy(BaseTrainingStrategy):
    """Repeats while the expected gain of one more pass beats its price; learns the gains from paired probes.

    On a share ``probe_rate`` of the batches it keeps the adapter as it was before the batch's last pass, and lets ``step`` score the next
    batch under it. That batch's own fresh pass gives its loss with the last pass taken, so their difference is what this one pass was worth on
    text the model had not seen (EVIDENCE: paired snapshot probe). Probes need unseen text: after the first epoch the learned policy goes on
    unchanged. See :mod:`iterbatch.strategy.scheduler` for the decision and the network.
    """

    def __init__(self, max_repeats: int = MAX_REPEATS, probe_rate: float = 0.1, seed: int = 0) -> None:
        self.learner = GainLearner(max_repeats, seed)
        self.probe_rate = probe_rate
        self._random = np.random.default_rng([seed, 1])
        self._kept: Adapter | None = None  # adapter before the last pass of the batch before, while a probe is open
        self._open: tuple[tuple[float, float], int, float] | None = None  # its features, its passes, its learning rate

    def train_batch(self, batch: Batch, step: Step) -> BatchRecord:
        """As every strategy, with the adapter kept before the last pass of a probed batch and the probe of the batch before settled."""
        score_before = step.score(batch, self._kept) if self._open and batch.first_exposure else None
        probing = batch.first_exposure and self._random.random() < self.probe_rate
        kept = step.snapshot() if probing else None
        losses = [step(batch)]
        self._settle(score_before, losses[0])
        planned = self._planned(losses[0], step.price_ratio, explore=probing)
        while len(losses) < planned and math.isfinite(losses[-1]) and step.affords_repeat():
            kept = step.snapshot() if probing else None
            losses.append(step.again())
        if math.isfinite(losses[0]):
            self.observe(losses)
        self._kept, self._open = kept, None
        if probing and math.isfinite(losses[0]):
            self._open = (self.learner.features(losses[0]), len(losses), step.learning_rate)
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

    def _settle(self, score_before: float | None, score_after: float) -> None:
        if self._open is None or score_before is None or not math.isfinite(score_before - score_after):
            return
        features, passes, learning_rate = self._open
        self.learner.learn(features, passes, (score_before - score_after) / learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """The learner, the random state, and the open probe with its adapter."""
        return {"learner": self.learner.state_dict(), "random": self._random.bit_generator.state, "kept": self._kept, "open": self._open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all of it over."""
        self.learner.load_state_dict(state["learner"])
        self._random.bit_generator.state = state["random"]
        self._kept, self._open = state["kept"], state["open"]
