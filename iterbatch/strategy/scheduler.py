"""The scheduler that learns: a small network of expected gains, and the rule that stops repeating.

What lives here: ``SchedulerLLaMA``, the stopping rule, and the learner that feeds one into the
other. What does not: batches and probes, which are the strategy's
(:class:`iterbatch.strategy.LearnableSchedulingStrategy`).
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_REPEATS = 5  # the original experiment's range is 1 to 5 passes
MEMORY = 2000  # probes kept for training; old ones describe a model that no longer exists
ENOUGH = 8  # probes of a pass before its gain is believed
CLIP_Z = 5.0
RECENT = 256  # batches that the features are standardised over


def stopping_rule(gains_lower: Sequence[float], rate: float, price_ratio: float) -> int:
    """Passes to make: while the next one's gain, taken low, beats what its price would buy elsewhere.

    ``k = max { k : m_j > lambda * rho for all 2 <= j <= k }``, where a fresh pass costs 1 and a
    repeat rho. With rho = 1 and gains that do not rise with j this is 1.

    Args:
        gains_lower: Lower bound of the held-out gain m_j of pass j = 1, 2, ...
        rate: lambda, gain a unit of compute achieved so far, >= 0.
        price_ratio: rho, cost of a repeat over cost of a fresh pass, > 0.

    Source: optimal stopping with a price (marginal value theorem; Dinkelbach's fractional programming).
    """
    passes = 1
    while passes < len(gains_lower) and gains_lower[passes] > rate * price_ratio:
        passes += 1
    return passes


class SchedulerLLaMA(nn.Module):
    """A fully connected net from standardised initial loss and perplexity to each pass's expected gain.

    The number of repeats follows from the gains by :func:`stopping_rule`, so the output lies within
    1 and ``max_repeats`` by construction.
    """

    def __init__(self, max_repeats: int = MAX_REPEATS, hidden: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, max_repeats))
        for parameter in self.net[2].parameters():
            nn.init.zeros_(parameter)  # before any evidence, no pass is expected to gain anything

    def forward(
        self,
        features: Tensor,  # (..., 2) standardised loss and perplexity
    ) -> Tensor:
        """Expected gains (..., max_repeats), in units of the gains' running scale."""
        return self.net(features)


def standardise(value: float, recent: np.ndarray) -> float:
    """Distance from the mean of recent values in their standard deviations, within +-5.

    0 before there is a spread.
    """
    deviation = float(recent.std()) if len(recent) > 1 else 0.0
    return float(np.clip((value - recent.mean()) / deviation, -CLIP_Z, CLIP_Z)) if deviation > 0 else 0.0


class GainLearner:
    """Learns the gain of each pass from probes, and decides.

    ``D`` is the drop of the next fresh batch's loss that one pass brought, over the learning rate
    it was made with; its mean is the gain m_k of that pass. The network regresses D on the batch's
    features, for the pass that was probed only. lambda follows the gains and costs of the passes
    made. Only probed batches explore: by a Thompson draw from the gains' uncertainty, and at random
    often at first, never less than one time in twenty. All other batches use the gains' lower
    bounds, so that without evidence every batch is trained once.
    """

    def __init__(self, max_repeats: int = MAX_REPEATS, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = SchedulerLLaMA(max_repeats)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=3e-3, weight_decay=1e-4)
        self.max_repeats = max_repeats
        self.random = np.random.default_rng([seed, 2])
        self.recent: deque[float] = deque(maxlen=RECENT)  # initial losses
        self.probes: deque[tuple[float, float, int, float]] = deque(maxlen=MEMORY)  # two features, passes, D
        self.seen = 0
        self.gain, self.cost = 0.0, 0.0  # discounted sums; lambda is their ratio
        self._margin = np.full(
            max_repeats, np.inf
        )  # uncertainty of each gain, in D's unit; inf where hardly probed
        self._scale = 1.0  # root mean square of D

    def features(self, loss: float) -> tuple[float, float]:
        """Initial loss and perplexity, standardised by the last batches."""
        recent = np.array(self.recent)
        return standardise(loss, recent), standardise(perplexity(loss), perplexity(recent))

    def note(self, loss: float) -> None:
        """Take a batch's initial loss into the standardisation."""
        self.recent.append(loss)

    def decide(self, loss: float, price_ratio: float, explore: bool) -> int:
        """Passes for a batch of this initial loss, at this price of a repeat."""
        gains = self.gains(loss)
        if not explore:
            passes = stopping_rule((gains - self._margin).tolist(), self.rate, price_ratio)
        elif self.random.random() < self.exploration:
            passes = int(self.random.integers(1, self.max_repeats + 1))
        else:  # a Thompson draw: passes whose gain is not known yet are tried more often
            drawn = gains + self._margin * self.random.normal(size=self.max_repeats)
            passes = stopping_rule(drawn.tolist(), self.rate, price_ratio)
        self.gain = 0.99 * self.gain + float(gains[:passes].sum())
        self.cost = 0.99 * self.cost + 1 + (passes - 1) * price_ratio
        return passes

    @property
    def rate(self) -> float:
        """lambda: expected gain a fresh pass's worth of compute, over about the last hundred batches."""
        return max(0.0, self.gain / self.cost) if self.cost else 0.0

    @property
    def exploration(self) -> float:
        """Share of probed batches with random passes: from 0.5, halved after 50 probes, floor 0.05."""
        return max(0.05, 0.5 / (1 + self.seen / 50))

    def gains(self, loss: float) -> np.ndarray:
        """(max_repeats,) expected gain of each pass, in D's own unit."""
        with torch.no_grad():
            return self._scale * self.network(torch.tensor(self.features(loss))).double().numpy()

    def learn(self, features: tuple[float, float], passes: int, gain: float) -> None:
        """Take in one probe: D of the last of ``passes`` passes on a batch with these features."""
        self.probes.append((*features, passes, gain))
        self.seen += 1
        if self.seen <= 32 or self.seen % 8 == 0:
            self._fit()

    def _fit(self, rounds: int = 16) -> None:
        """A few regression steps over the kept probes, then the margins."""
        rows = torch.tensor(list(self.probes), dtype=torch.float32)
        self._scale = max(float(rows[:, 3].square().mean().sqrt()), 1e-12)
        inputs, picked, target = rows[:, :2], rows[:, 2].long() - 1, rows[:, 3] / self._scale
        for _ in range(rounds):
            predicted = self.network(inputs).gather(1, picked[:, None])[:, 0]
            loss = (predicted - target).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        with torch.no_grad():
            residual = target - self.network(inputs).gather(1, picked[:, None])[:, 0]
        spread = float(residual.square().mean().sqrt()) * self._scale
        counts = np.bincount(picked.numpy(), minlength=self.max_repeats)
        # A batch away from the mean is known less well than the mean: 1.5 standard errors of the mean
        # stand for both.
        self._margin = np.where(counts >= ENOUGH, 1.5 * spread / np.sqrt(np.maximum(counts, 1)), np.inf)

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer, probes, scales and random state."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.bit_generator.state,
            "recent": np.array(self.recent),  # arrays: a checkpoint may copy this state before every batch
            "probes": np.array(self.probes, dtype=np.float64).reshape(-1, 4),
            "seen": self.seen,
            "gain": self.gain,
            "cost": self.cost,
            "scale": self._scale,
            "margin": [margin if math.isfinite(margin) else None for margin in self._margin.tolist()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.bit_generator.state = state["random"]
        self.recent = deque(state["recent"].tolist(), maxlen=RECENT)
        self.probes = deque(((a, b, int(k), d) for a, b, k, d in state["probes"].tolist()), maxlen=MEMORY)
        self.seen, self.gain, self.cost = state["seen"], state["gain"], state["cost"]
        self._scale = state["scale"]
        self._margin = np.array([math.inf if margin is None else margin for margin in state["margin"]])


def perplexity(loss: Any) -> Any:
    """exp(loss), for numbers and arrays; a loss above 20 counts as 20."""
    return np.exp(np.minimum(loss, 20.0))
