"""The stream on which a scheduler's learning is tested: linear regression with a drifting target.

d = 50, spectrum 1 to 0.05, 16 rows a batch, noise per batch uniform in a range. It plays the role
of ``step``: losses are half mean squared errors, and the true gain of every pass is known. What a probe says
a pass gained is that and noise, whose standard deviation is a multiple of what first passes gain here.
"""

import numpy as np

from iterbatch.records.record import BatchRecord
from iterbatch.strategy.base import MAX_REPEATS

DIMENSIONS, ROWS = 50, 16
COMMON = 0.8  # correlation of the noise within a probe, as in real runs


class Draw:
    """One batch of the stream."""

    index = 0

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs


class SyntheticStep:
    """``step`` over the stream; see :class:`iterbatch.strategy.Step`.

    Args:
        noise: Range of a batch's own noise.
        rate: Learning rate.
        drift: Of the target, a batch.
        price_ratio: Of a repeat.
        seed: Of all that is drawn.
        probe_noise: Standard deviation of a measured gain, over the mean gain of first passes.
        truth: ``as it is``; ``no repeat gains`` measures what is true of first passes and nothing of repeats;
            ``shuffled`` measures the gain of any earlier pass.
    """

    def __init__(
        self,
        noise=(0.5, 3.0),
        rate=0.1,
        drift=0.1,
        price_ratio=0.25,
        seed=0,
        probe_noise=0.0,
        truth="as it is",
    ):
        self.random = np.random.default_rng(seed)
        self.spectrum = np.linspace(1, 0.05, DIMENSIONS)
        self.target = self.random.normal(size=DIMENSIONS)
        self.weights = np.zeros(DIMENSIONS)
        self.noise, self.rate, self.drift, self.price_ratio = noise, rate, drift, price_ratio
        self.probe_price = 0.25 * 0.5 * price_ratio  # a quarter of the rows, forward alone
        self.probe_noise, self.truth = probe_noise, truth
        self.measured: list[tuple[float, float]] = []  # gain as probed, true gain
        self.curves: list[list[float]] = []  # of each batch: what each of five passes would have gained
        self._noise_random = np.random.default_rng([seed, 7])
        self._past, self._reading, self._true = [], 0.0, 0.0

    def draw(self):
        inputs = self.random.normal(size=(ROWS, DIMENSIONS)) * np.sqrt(self.spectrum)
        noise = self.random.uniform(*self.noise) * self.random.normal(size=ROWS)
        batch = Draw(inputs, inputs @ self.target + noise)
        self.curves.append(self._curve(batch))
        self.passes = 0
        return batch

    def move_target(self):
        self.target = self.target + self.drift * self.random.normal(size=DIMENSIONS) / np.sqrt(DIMENSIONS)

    def loss(self, batch, weights):
        return float(np.mean((batch.outputs - batch.inputs @ weights) ** 2) / 2)

    def true_loss(self, weights):
        return float(((weights - self.target) ** 2) @ self.spectrum / 2)

    def _after_pass(self, batch, weights):
        return weights + self.rate * batch.inputs.T @ (batch.outputs - batch.inputs @ weights) / ROWS

    def _curve(self, batch):
        weights, gains = self.weights, []
        for _ in range(MAX_REPEATS):
            after = self._after_pass(batch, weights)
            gains.append(self.true_loss(weights) - self.true_loss(after))
            weights = after
        if self.truth == "no repeat gains":
            gains[1:] = [0.0] * (MAX_REPEATS - 1)
        return gains

    def _pass(self):
        loss = self.loss(self.batch, self.weights)
        self.weights = self._after_pass(self.batch, self.weights)
        self.passes += 1
        return loss

    def __call__(self, batch):
        self.batch = batch
        return self._pass()

    def again(self):
        return self._pass()

    def affords_repeat(self):
        return True

    def probe(self, number):
        if self.passes:
            gain = self.curves[-1][self.passes - 1]
            scale = abs(np.mean([curve[0] for curve in self.curves[-20:]]))
            if self.passes == 1:
                self._shared = self._noise_random.normal()
            noise = COMMON**0.5 * self._shared + (1 - COMMON) ** 0.5 * self._noise_random.normal()
            seen = gain + self.probe_noise * scale * noise
            self.measured.append((seen, gain))
            self._past.append(seen)
            if self.truth == "shuffled":
                seen = self._past[self._noise_random.integers(len(self._past))]
            self._reading -= seen
        return self._reading

    def record(self, losses, planned):
        return BatchRecord(0, 0, losses[0], losses, planned, len(losses), self.rate, 0.0, ROWS, 0.0, 0.0)


def play(strategy, step, batches):
    """Train ``batches`` batches; return (initial loss, passes) of each as an array."""
    rows = []
    for _ in range(batches):
        record = strategy.train_batch(step.draw(), step)
        step.move_target()
        rows.append((record.initial_loss, record.repeats_done))
    return np.array(rows)


def gain_per_compute(step, passes, first=0):
    """What batches gained a unit of compute, at the states met: these passes, over the best same k for all.

    Args:
        step: That was played on.
        passes: (batches,) that each got.
        first: Batch to count from.
    """
    gained = np.cumsum(np.array(step.curves)[first:], axis=1)
    passes = np.asarray(passes, dtype=int)[first:]
    fixed = [gained[:, k - 1].mean() / (1 + (k - 1) * step.price_ratio) for k in range(1, MAX_REPEATS + 1)]
    own = gained[np.arange(len(passes)), passes - 1].mean() / (1 + (passes - 1) * step.price_ratio).mean()
    return own / max(fixed)
