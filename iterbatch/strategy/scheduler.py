"""The scheduler that learns: a small network of expected gains, and the rule that stops repeating.

What lives here: ``SchedulerLLaMA``, the stopping rule, and the learner that feeds one into the
other. What does not: batches and probes, which are the strategy's
(:class:`iterbatch.strategy.learnable.LearnableSchedulingStrategy`).
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.strategy.base import MAX_REPEATS

VERSION = 1  # of a kept scheduler
MEMORY = 150  # probes after which one counts a third: old ones describe a model that no longer exists
KEPT = 2000  # probes kept for training
RECENT = 256  # batches that the features are standardised over
SCALE = 64  # gains that their scale is taken of
ENOUGH = 6  # probes of a pass before it is judged
CAUTION = 0.6  # standard errors by which a pass must beat its price before it is made
CURIOSITY = 1.0  # standard errors by which the second may miss its price and still be open to question
SPENT = 0.03  # of all compute, at most, for probes and what they try
# Correlation of the noise in the gains of one probe, which share its text: 0.7 to 0.9 in all but one group
# of real probes (docs/log.md, 7).
COMMON = 0.8
ALIKE = 30.0  # probes that it takes before batches are held to differ
STEPS = 20  # of the optimizer, a probe
CLIP_Z = 5.0
# Prior: gain of the first pass 0 +- 1 in units of the gains' scale, decay 0.5 +- 0.5.
PRIOR_PRECISION = (1.0, 4.0)


# ------------------------------------------------------------------------------------------------------------
# Pure rules


def gain_curve(first: float, decay: float, passes: int = MAX_REPEATS) -> list[float]:
    """Expected gain of each pass: m_j = first * decay ** (j - 1)."""
    return [first * decay**place for place in range(passes)]


def gain_rate(gains: Sequence[float], passes: int, price_ratio: float) -> float:
    """Gain a fresh pass's worth of compute where every batch gets so many passes."""
    return sum(gains[:passes]) / (1 + (passes - 1) * price_ratio)


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


def standardise(value: float, recent: np.ndarray) -> float:
    """Distance from the mean of recent values in their standard deviations, within +-5.

    0 before there is a spread.
    """
    deviation = float(recent.std()) if len(recent) > 1 else 0.0
    return float(np.clip((value - recent.mean()) / deviation, -CLIP_Z, CLIP_Z)) if deviation > 0 else 0.0


def perplexity(loss: Any) -> Any:
    """exp(loss), for numbers and arrays; a loss above 20 counts as 20."""
    return np.exp(np.minimum(loss, 20.0))


# ------------------------------------------------------------------------------------------------------------
# The network


class SchedulerLLaMA(nn.Module):
    """A fully connected net from standardised initial loss and perplexity to a curve of expected gains.

    Two outputs: the gain of the first pass, and how it decays from pass to pass, between 0 and 1, so that
    gains fall. The number of passes, 1 to 5, follows from the curve by :func:`stopping_rule`.
    """

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(2, hidden), nn.Linear(hidden, 2)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)  # before any evidence, no pass is expected to gain anything

    def forward(
        self,
        features: Tensor,  # (..., 2) standardised loss and perplexity
    ) -> tuple[Tensor, Tensor]:
        """Gain of the first pass in units of the gains' scale, and its decay a pass, (...) each."""
        out = self.out(torch.tanh(self.hidden(features)))
        return out[..., 0], torch.sigmoid(out[..., 1])


@dataclass(frozen=True)
class Probe:
    """What the passes on one batch gained."""

    features: tuple[float, float]  # standardised initial loss and perplexity
    gains: tuple[float, ...]  # of each pass made, nats a token of the probe text
    scale: float  # root mean square of the gains around then, nats

    def row(self) -> list[float]:
        """As numbers: features, scale, gains with NaN for passes that were not made."""
        return [*self.features, self.scale, *self.gains, *[math.nan] * (MAX_REPEATS - len(self.gains))]

    @classmethod
    def of(cls, row: Sequence[float]) -> "Probe":
        """What :meth:`row` gave.

        Raises:
            ValueError: where a number is missing or not finite.
        """
        loss, ppl, scale, *gains = map(float, row)
        made = tuple(gain for gain in gains if not math.isnan(gain))
        if not made or len(gains) != MAX_REPEATS or not all(map(math.isfinite, (loss, ppl, scale, *made))):
            raise ValueError(_("a probe is damaged"))
        return cls((loss, ppl), made, scale)


@dataclass(frozen=True)
class Belief:
    """What is expected of a batch at the mean, and how surely: in units of the gains' scale."""

    first: float
    decay: float
    covariance: np.ndarray  # (2, 2) of the two

    @property
    def gains(self) -> bool:
        """Whether first passes are known to gain anything: before that nothing can be compared with them."""
        return self.first > CAUTION * math.sqrt(self.covariance[0, 0])

    def edge(self, passes: int, price_ratio: float) -> tuple[float, float]:
        """What the pass after these gains beyond its price, and the standard error of that."""
        here = np.array([self.first, self.decay])
        steps = 1e-4 * np.eye(2)
        slope = np.array(
            [
                (_edge(here + step, passes, price_ratio) - _edge(here - step, passes, price_ratio)) / 2e-4
                for step in steps
            ]
        )
        return _edge(here, passes, price_ratio), math.sqrt(max(0.0, float(slope @ self.covariance @ slope)))


def _edge(curve: np.ndarray, passes: int, price_ratio: float) -> float:
    gains = gain_curve(float(curve[0]), float(curve[1]))
    best = max(gain_rate(gains, made, price_ratio) for made in range(1, passes + 1))
    return gains[passes] - price_ratio * best


def _misfit(residuals: Tensor, made: Tensor) -> Tensor:
    """Squared residuals of each probe (probes,), what its gains have in common counted once.

    That is r' C^-1 r, with C the correlation matrix of the gains of a probe.
    """
    residuals = residuals * made
    passes = made.sum(dim=1)
    shared = COMMON / (1 - COMMON + passes * COMMON)
    return (residuals.square().sum(dim=1) - shared * residuals.sum(dim=1).square()) / (1 - COMMON)


# ------------------------------------------------------------------------------------------------------------
# The learner


class GainLearner:
    """Learns what passes gain from probes, and decides.

    A probe gives the gains of the first passes on one batch, in nats on text that is never trained on. They
    differ a hundredfold between the beginning and the end of a schedule, and so does their noise: each is
    weighted by its variance, and the network predicts them in units of their scale at the time. Its two
    outputs say how a first pass and its repeats compare, which is all that the stopping rule asks.

    A pass is made where its expected gain, less ``CAUTION`` standard errors, is above its price, and enough
    probes have seen it. A probe measures two passes, and one more only where the last one is not clearly
    below its price. All probes together, with the passes they try, cost ``budget`` of the compute at most: a
    run that is too short to learn from is left alone.
    """

    def __init__(self, max_repeats: int = MAX_REPEATS, seed: int = 0, budget: float = SPENT) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = SchedulerLLaMA()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-2)
        self.max_repeats, self.budget = max_repeats, budget
        self.recent: deque[float] = deque(maxlen=RECENT)  # initial losses
        self.probes: deque[Probe] = deque(maxlen=KEPT)
        self.squares: deque[float] = deque(maxlen=SCALE)  # of the last gains, nats
        self.gain, self.cost = 0.0, 0.0  # discounted sums, expected and spent; lambda is their ratio
        self.paid, self.last_price = 0.0, 1.0  # for learning, in fresh passes: in all, and for the last probe
        self._open = True  # whether a second pass may pay, as far as is known
        self.batches = 0.0  # what training without learning would have cost, in fresh passes
        self._belief: Belief | None = None

    # -- deciding --------------------------------------------------------------------------------------------

    def features(self, loss: float) -> tuple[float, float]:
        """Initial loss and perplexity, standardised by the last batches."""
        recent = np.array(self.recent)
        return standardise(loss, recent), standardise(perplexity(loss), perplexity(recent))

    def note(self, loss: float) -> None:
        """Take a batch's initial loss into the standardisation."""
        self.recent.append(loss)

    def decide(self, loss: float, price_ratio: float) -> int:
        """Passes for a batch of this initial loss, at this price of a repeat."""
        self.batches += 1
        if self._belief is None or not self._belief.gains:
            return 1
        features = self.features(loss)
        gains = self.expected(features)
        surplus = [
            gain - CAUTION * self._error(place, price_ratio, features) for place, gain in enumerate(gains)
        ]
        passes = stopping_rule(surplus, self.rate(price_ratio), price_ratio)
        self.gain = 0.99 * self.gain + sum(gains[:passes])
        self.cost = 0.99 * self.cost + 1 + (passes - 1) * price_ratio
        self.batches += (passes - 1) * price_ratio
        return passes

    def can_pay(self) -> bool:
        """Whether another probe keeps the price of learning within its share of all compute."""
        share = self.budget if self._open else self.budget / 4  # less once things are clear
        return self.paid + self.last_price <= share * self.batches

    def pay(self, scoring: float, wanted: int, made: int, price_ratio: float) -> None:
        """A probe has been made.

        It cost its scoring, and of every pass that it tried beyond those wanted anyway what this is not
        expected to gain.

        Args:
            scoring: Cost of the scores, in fresh passes.
            wanted: Passes that the policy would have made.
            made: Passes that were made.
            price_ratio: Of a repeat.
        """
        first, decay = 1.0, 0.5  # before enough is known
        if self._belief is not None and self._seen(2) >= ENOUGH:
            first, decay = self._belief.first, self._belief.decay
            edge, error = self._belief.edge(1, price_ratio)
            self._open = edge + CURIOSITY * error > 0
        gains = gain_curve(max(first, 0.0), decay)
        best = max(gain_rate(gains, passes, price_ratio) for passes in range(1, self.max_repeats + 1))
        worth = [gain / best if best > 0 else 0.0 for gain in gains]  # in fresh passes
        self.last_price = scoring + sum(max(0.0, price_ratio - each) for each in worth[wanted:made])
        self.paid += self.last_price

    def curious(self, made: int, price_ratio: float) -> bool:
        """Whether a probe that has measured so many passes should measure one more: two at the least.

        One more than that only where the last one is known a little, and not below its price.
        """
        if made == 1 or made >= self.max_repeats:
            return made < self.max_repeats
        if self._belief is None or self._seen(made) < ENOUGH:
            return False
        return self._belief.edge(made - 1, price_ratio)[0] > 0

    def rate(self, price_ratio: float) -> float:
        """lambda: gain expected of a fresh pass's worth of compute, over about the last hundred batches."""
        if self.cost:
            return max(0.0, self.gain / self.cost)
        assert self._belief is not None
        gains = gain_curve(self._belief.first, self._belief.decay)
        return max(0.0, *(gain_rate(gains, passes, price_ratio) for passes in range(1, self.max_repeats + 1)))

    def expected(self, features: tuple[float, float]) -> list[float]:
        """Expected gain of each pass on such a batch, in units of the gains' scale."""
        with torch.no_grad():
            first, decay = (float(each) for each in self.network(torch.tensor(features)))
        return gain_curve(first, decay, self.max_repeats)

    @property
    def scale(self) -> float:
        """Root mean square of the last gains, nats a token; 0 before there is one."""
        return math.sqrt(sum(self.squares) / len(self.squares)) if self.squares else 0.0

    def _error(self, place: int, price_ratio: float, features: tuple[float, float]) -> float:
        """Standard error of a pass's surplus; a batch away from the mean is known less well than the mean."""
        if place == 0:
            return 0.0
        if self._belief is None or self._seen(place + 1) < ENOUGH:
            return math.inf
        error = self._belief.edge(place, price_ratio)[1]
        return error * math.sqrt(1 + features[0] ** 2 + features[1] ** 2)

    def _seen(self, passes: int) -> int:
        return sum(len(probe.gains) >= passes for probe in self.probes)

    # -- learning --------------------------------------------------------------------------------------------

    def learn(self, features: tuple[float, float], gains: Sequence[float]) -> None:
        """Take in one probe: the gains of the first passes on a batch with these features, in nats."""
        self.squares.extend(gain * gain for gain in gains)
        self.probes.append(Probe(features, tuple(gains), max(self.scale, 1e-12)))
        self._fit()

    def _fit(self) -> None:
        """A few regression steps over the kept probes, newer ones weighing more, then the belief."""
        rows = torch.tensor([probe.row() for probe in self.probes], dtype=torch.float32)
        features, gains = rows[:, :2], rows[:, 3:] / rows[:, 2:3]
        age, made = torch.arange(len(rows) - 1, -1, -1), ~gains.isnan()
        weight = (1 - 1 / MEMORY) ** age
        gains = gains.nan_to_num()
        places = torch.arange(MAX_REPEATS)
        for _step in range(STEPS):
            first, decay = self.network(features)
            predicted = first[:, None] * decay[:, None].clamp(min=1e-6) ** places
            # The prior: that batches do not differ, that the first gain is near 0 and the decay near a half.
            alike = ALIKE * self.network.out.weight.square().sum()
            prior = self.network.out.bias[0].square() + 0.05 * self.network.out.bias[1].square()
            misfit = (weight * _misfit(gains - predicted, made)).sum()
            loss = (misfit + prior + alike) / weight.sum().clamp(min=1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self._believe(features, gains, weight, made)

    def _believe(self, features: Tensor, gains: Tensor, weight: Tensor, made: Tensor) -> None:
        """Mean curve over the kept probes, and its covariance by the curvature of the fit and the prior."""
        with torch.no_grad():
            first, decay = self.network(features)
            predicted = first[:, None] * decay[:, None] ** torch.arange(MAX_REPEATS)
            share = weight / weight.sum()
            mean_first, mean_decay = float((first * share).sum()), float((decay * share).sum())
            misfit = float((weight * _misfit(gains - predicted, made)).sum())
            noise = max(misfit / float((weight * made.sum(dim=1)).sum()), 1e-6)
        precision = np.diag(PRIOR_PRECISION)
        place = np.arange(MAX_REPEATS)
        # (passes, 2) of each gain by the first gain and the decay
        slopes = np.stack([mean_decay**place, mean_first * place * mean_decay ** np.maximum(place - 1, 0)], 1)
        for passes, count in enumerate(torch.bincount(made.sum(dim=1), weight, MAX_REPEATS + 1).tolist()):
            if passes:
                apart = np.linalg.inv((1 - COMMON) * np.eye(passes) + COMMON)
                precision = precision + count / noise * slopes[:passes].T @ apart @ slopes[:passes]
        self._belief = Belief(mean_first, mean_decay, np.linalg.inv(precision))

    # -- kept ------------------------------------------------------------------------------------------------

    def start_from(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Begin with what other arms have learned: their probes, in turn.

        Raises:
            RunError: where one of them is of another version or damaged.
        """
        pools = [probes_of(each) for each in kept]
        mixed = [pool[place] for place in range(max(map(len, pools))) for pool in pools if place < len(pool)]
        self.probes.extend(mixed)
        self.squares.extend(gain * gain for probe in mixed[-SCALE:] for gain in probe.gains)
        for _step in range(25):  # from nothing to where steady learning would have come
            self._fit()

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer, probes, scales and belief."""
        belief = self._belief
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "recent": np.array(self.recent),  # arrays: a checkpoint may copy this state before every batch
            "probes": self.rows(),
            "squares": np.array(self.squares),
            "gain": self.gain,
            "cost": self.cost,
            "paid": [self.paid, self.last_price, self.batches, self._open],
            "belief": None if belief is None else [belief.first, belief.decay, belief.covariance],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.recent = deque(state["recent"].tolist(), maxlen=RECENT)
        self.probes = deque(map(Probe.of, state["probes"].tolist()), maxlen=KEPT)
        self.squares = deque(state["squares"].tolist(), maxlen=SCALE)
        self.gain, self.cost = state["gain"], state["cost"]
        self.paid, self.last_price, self.batches, self._open = state["paid"]
        self._belief = None if state["belief"] is None else Belief(*state["belief"])

    def rows(self) -> np.ndarray:
        """(probes, 8) what :meth:`Probe.row` says of each."""
        return np.array([probe.row() for probe in self.probes]).reshape(-1, 3 + MAX_REPEATS)


def probes_of(kept: Mapping[str, Any]) -> list[Probe]:
    """The probes of a kept scheduler.

    Raises:
        RunError: where it is of another version, damaged, or has learned nothing.
    """
    if kept.get("version") != VERSION:
        raise RunError(
            _(
                "the scheduler is of version {then}; this one reads version {version}: train learnable again"
            ).format(then=kept.get("version"), version=VERSION)
        )
    try:
        rows = [[math.nan if value is None else value for value in row] for row in kept["probes"]]
        found = [Probe.of(row) for row in rows]
    except (KeyError, TypeError, ValueError) as problem:
        raise RunError(
            _("the scheduler is damaged ({problem}); train learnable again").format(problem=problem)
        ) from problem
    if not found:
        raise RunError(_("the scheduler has no probes: its run was too short to learn anything"))
    return found
