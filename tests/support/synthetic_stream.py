"""The stream on which a scheduler's learning is tested: linear regression with a drifting target.

d = 50, spectrum 1 to 0.05, 16 rows a batch, noise per batch uniform in a range. It plays the role
of ``step``: losses are half mean squared errors, an adapter is the weight vector, and the true gain
of every pass is known.
"""

import numpy as np

from iterbatch.records.record import BatchRecord

DIMENSIONS, ROWS = 50, 16


class Draw:
    """One batch of the stream."""

    first_exposure = True

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs


class SyntheticStep:
    """``step`` over the stream; see :class:`iterbatch.strategy.Step`."""

    def __init__(
        self, noise=(0.5, 3.0), rate=0.1, drift=0.1, price_ratio=0.25, seed=0, shuffle_rewards=False
    ):
        self.random = np.random.default_rng(seed)
        self.spectrum = np.linspace(1, 0.05, DIMENSIONS)
        self.target = self.random.normal(size=DIMENSIONS)
        self.weights = np.zeros(DIMENSIONS)
        self.noise, self.learning_rate, self.drift, self.price_ratio = noise, rate, drift, price_ratio
        self.true_gains: list[float] = []  # of the passes on the current batch
        self.probed: list[tuple[float, float]] = []  # (probe's D, true gain of the pass it measures)
        self.shuffle_rewards, self.past_rewards = shuffle_rewards, [0.0]

    def draw(self):
        inputs = self.random.normal(size=(ROWS, DIMENSIONS)) * np.sqrt(self.spectrum)
        noise = self.random.uniform(*self.noise) * self.random.normal(size=ROWS)
        return Draw(inputs, inputs @ self.target + noise)

    def move_target(self):
        self.target = self.target + self.drift * self.random.normal(size=DIMENSIONS) / np.sqrt(DIMENSIONS)

    def loss(self, batch, weights):
        return float(np.mean((batch.outputs - batch.inputs @ weights) ** 2) / 2)

    def true_loss(self, weights):
        return float(((weights - self.target) ** 2) @ self.spectrum / 2)

    def _pass(self):
        loss, before = self.loss(self.batch, self.weights), self.true_loss(self.weights)
        residual = self.batch.outputs - self.batch.inputs @ self.weights
        self.weights = self.weights + self.learning_rate * self.batch.inputs.T @ residual / ROWS
        self.true_gains.append(before - self.true_loss(self.weights))
        return loss

    def __call__(self, batch):
        self.batch, self.true_gains = batch, []
        return self._pass()

    def again(self):
        return self._pass()

    def affords_repeat(self):
        return True

    def snapshot(self):
        return self.weights

    def score(self, batch, adapter):
        before, after = self.loss(batch, adapter), self.loss(batch, self.weights)
        self.probed.append((before - after, self.true_gains[-1]))
        if not self.shuffle_rewards:
            return before
        self.past_rewards.append(before - after)
        return after + self.past_rewards[self.random.integers(len(self.past_rewards))]

    def record(self, losses, planned):
        return BatchRecord(
            0, 0, losses[0], losses, planned, len(losses), self.learning_rate, 0.0, ROWS, 0.0, 0.0
        )


def play(strategy, step, batches):
    """Train ``batches`` batches; return (initial loss, passes) of each as an array."""
    rows = []
    for _ in range(batches):
        record = strategy.train_batch(step.draw(), step)
        step.move_target()
        rows.append((record.initial_loss, record.repeats_done))
    return np.array(rows)
