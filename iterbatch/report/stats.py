"""Paired comparisons: intervals over seeds and documents, time to target, and how many seeds an effect needs.

What lives here: numbers to numbers. What does not: reading a run's folder
(:mod:`iterbatch.report.comparison`) and telling what it means (:mod:`iterbatch.report.summary`).

The data of one comparison is a table of paired differences, seeds by documents: both are samples,
of all the seeds and all the documents there could be. Every document is scored with every seed, so
the two are crossed, and the variance of the mean has a part from each: ``Var = a / S + b / D + e /
(S D)``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import optimize, stats

from iterbatch.language import _

LEVEL = 0.95
RESAMPLES, DRAWS = 999, 2000
MOST_SEEDS = 10_000  # that a power calculation looks at
LEAST_COVERAGE = 0.935  # of an interval that may be chosen, in simulation


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval and the p-value of no difference."""

    estimate: float
    low: float
    high: float
    p: float
    method: str


# ------------------------------------------------------------------------------------------------------------
# The table of a comparison


def difference(nats: np.ndarray, reference: np.ndarray, tokens: np.ndarray) -> tuple[float, np.ndarray]:
    """Difference of two arms' log perplexity, and each (seed, document)'s part in it.

    Log perplexity is a ratio, nats over tokens. Its parts are those of the ratio's linear
    approximation, so that a mean over a resampled table is the ratio of the resampled documents, to
    first order: ``z_sd = delta + D (d_sd - delta t_d) / T``.

    Args:
        nats: (seeds, documents) of the arm.
        reference: (seeds, documents) of the arm it is compared with, the same seeds.
        tokens: (documents,) label tokens.

    Returns:
        delta, nats a token, below 0 where the arm is better; and z, (seeds, documents), with mean delta.
    """
    paired, total = nats - reference, tokens.sum()
    delta = float(paired.sum(axis=1).mean() / total)
    return delta, delta + len(tokens) * (paired - delta * tokens) / total


def components(table: np.ndarray) -> tuple[float, float, float]:
    """Variance components of crossed tables, by analysis of variance; none below 0.

    a of seeds, b of documents, e of their interaction.

    Args:
        table: (..., seeds, documents); over leading axes the mean squares are averaged.
    """
    by_seed, by_document, rest, _ = (np.mean(each) for each in _mean_squares(table))
    seeds, documents = table.shape[-2:]
    return (
        float(max(by_seed - rest, 0.0) / documents),
        float(max(by_document - rest, 0.0) / seeds),
        float(rest),
    )


def _mean_squares(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean squares of seeds, documents and interaction, and the grand mean, over the last two axes."""
    seeds, documents = table.shape[-2:]
    mean = table.mean(axis=(-2, -1))
    rows, columns = table.mean(axis=-1), table.mean(axis=-2)
    by_seed = documents * ((rows - mean[..., None]) ** 2).sum(axis=-1) / max(seeds - 1, 1)
    by_document = seeds * ((columns - mean[..., None]) ** 2).sum(axis=-1) / max(documents - 1, 1)
    rest = table - rows[..., :, None] - columns[..., None, :] + mean[..., None, None]
    return by_seed, by_document, (rest**2).sum(axis=(-2, -1)) / max((seeds - 1) * (documents - 1), 1), mean


def _variances(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grand mean, and the two parts of its variance.

    From seeds with what is particular to a seed and document, and from documents.
    """
    seeds, documents = table.shape[-2:]
    by_seed, by_document, rest, mean = _mean_squares(table)
    return mean, by_seed / (seeds * documents), np.maximum(by_document - rest, 0.0) / (seeds * documents)


# ------------------------------------------------------------------------------------------------------------
# Intervals. Each takes a table and returns (low, high, p)


def t_interval(table: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """Two t intervals put together: ``half^2 = (t_{S-1} se_seed)^2 + (t_{D-1} se_document)^2``.

    Each variance keeps its own degrees of freedom, so that many documents do not lend theirs to few
    seeds. Source: method of variance estimates recovery, Zou and Donner 2008.
    """
    mean, width = float(table.mean()), float(_half_width(table, 1 - level))
    if not width > 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    tiny = 1e-12
    p: Any = 1.0 if mean == 0 else tiny
    if mean != 0 and _half_width(table, tiny) > abs(mean):
        p = optimize.brentq(lambda alpha: float(_half_width(table, alpha)) - abs(mean), tiny, 1.0)
    return mean - width, mean + width, float(p)


def _half_width(tables: np.ndarray, alpha: float) -> np.ndarray:
    _, from_seeds, from_documents = _variances(tables)
    seeds, documents = tables.shape[-2:]
    by_document = stats.t.isf(alpha / 2, documents - 1) if documents > 1 else 0.0
    return np.sqrt(from_seeds * stats.t.isf(alpha / 2, seeds - 1) ** 2 + from_documents * by_document**2)


def _resampled(table: np.ndarray, random: np.random.Generator, resamples: int) -> np.ndarray:
    """(resamples, seeds, documents): seeds drawn with replacement, then documents, alike for all seeds."""
    seeds, documents = table.shape
    rows = random.integers(seeds, size=(resamples, seeds))
    columns = random.integers(documents, size=(resamples, documents))
    return table[rows[:, :, None], columns[:, None, :]]


def percentile_interval(
    table: np.ndarray, level: float = LEVEL, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Percentiles of the hierarchical bootstrap."""
    means = _resampled(table, np.random.default_rng(seed), resamples).mean(axis=(1, 2))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), _two_sided(float((means <= 0).mean()), resamples)


def bca_interval(
    table: np.ndarray, level: float = LEVEL, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Bias-corrected and accelerated hierarchical bootstrap; the acceleration by leaving out seeds.

    Source: Efron 1987.
    """
    means = _resampled(table, np.random.default_rng(seed), resamples).mean(axis=(1, 2))
    estimate, left_out = (
        table.mean(),
        (table.sum(axis=1).sum() - table.sum(axis=1)) / (table.size - table.shape[1]),
    )
    bias = stats.norm.ppf(
        np.clip(
            ((means < estimate).mean() + (means <= estimate).mean()) / 2, 1 / resamples, 1 - 1 / resamples
        )
    )
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * max((spread**2).sum() ** 1.5, 1e-300))

    def adjusted(share: np.ndarray) -> np.ndarray:
        z = bias + stats.norm.ppf(share)
        return stats.norm.cdf(bias + z / (1 - acceleration * z))

    low, high = np.quantile(means, adjusted(np.array([(1 - level) / 2, (1 + level) / 2])))
    return float(low), float(high), _two_sided(float((means <= 0).mean()), resamples)


def studentised_interval(
    table: np.ndarray, level: float = LEVEL, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Bootstrap t: quantiles of (mean* - mean) / error* over hierarchical resamples."""
    mean, *parts = (float(each) for each in _variances(table))
    error = math.sqrt(sum(parts))
    if not error > 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    means, *parts = _variances(_resampled(table, np.random.default_rng(seed), resamples))
    errors = np.sqrt(parts[0] + parts[1])
    t = (means - mean) / np.maximum(errors, 1e-12 * error)
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    return mean - high * error, mean - low * error, _two_sided(float((t >= mean / error).mean()), resamples)


def _two_sided(share: float, resamples: int) -> float:
    return min(1.0, 2 * max(min(share, 1 - share), 1 / (resamples + 1)))


Method = Callable[..., tuple[float, float, float]]
METHODS: dict[str, Method] = {
    "t": t_interval,
    "studentised": studentised_interval,
    "BCa": bca_interval,
    "percentile": percentile_interval,
}


def simulated_coverage(
    method: str,
    seeds: int,
    documents: int,
    parts: tuple[float, float, float],
    draws: int = DRAWS,
    resamples: int = 299,
    seed: int = 0,
) -> tuple[float, float]:
    """How often a method's 95% interval holds the truth, and its mean width, in such normal tables."""
    random = np.random.default_rng(seed)
    a, b, e = (
        math.sqrt(part) * random.normal(size=(draws, *size))
        for part, size in zip(parts, _sizes(seeds, documents), strict=True)
    )
    tables = a + b + e
    if method == "t":
        mean, half = tables.mean(axis=(1, 2)), _half_width(tables, 1 - LEVEL)
        low, high = mean - half, mean + half
    else:
        low, high = np.array(
            [METHODS[method](table, seed=draw, resamples=resamples)[:2] for draw, table in enumerate(tables)]
        ).T
    return float(((low <= 0) & (high >= 0)).mean()), float((high - low).mean())


def _sizes(seeds: int, documents: int) -> tuple[tuple[int, int], ...]:
    return (seeds, 1), (1, documents), (seeds, documents)


@lru_cache(maxsize=64)
def choose_method(
    seeds: int, documents: int, parts: tuple[float, float, float], draws: int = DRAWS
) -> tuple[str, dict[str, float]]:
    """The method for a study of this size.

    The first of ``METHODS`` whose simulated coverage is at least 93.5%; else the one that covers most.

    Args:
        seeds: Of the study.
        documents: Scored.
        parts: Variance components, of which only the proportions matter.
        draws: Simulated tables; a bootstrap, which takes longer, gets a fifth of them.

    Returns:
        Its name, and every method's coverage.
    """
    documents = min(documents, 100)  # more of them change nothing but the time this takes
    counts = {name: draws if name == "t" else draws // 5 for name in METHODS}
    coverage = {
        name: simulated_coverage(name, seeds, documents, parts, count)[0] for name, count in counts.items()
    }
    chosen = next(
        (name for name, covered in coverage.items() if covered >= LEAST_COVERAGE),
        max(coverage, key=lambda name: coverage[name]),
    )
    return chosen, coverage


def compare(nats: np.ndarray, reference: np.ndarray, tokens: np.ndarray, method: str = "t") -> Interval:
    """Paired difference of log perplexity with its 95% interval; see :func:`difference`.

    Raises:
        ValueError: with fewer than two seeds.
    """
    if len(nats) < 2:
        raise ValueError(_("{count} seed; an interval needs at least 2").format(count=len(nats)))
    delta, table = difference(nats, reference, tokens)
    low, high, p = METHODS[method](table)
    return Interval(delta, low, high, p, method)


def with_luck(interval: Interval, luck: float) -> Interval:
    """An interval that allows for the luck of choosing learning rates, which no number of seeds takes away.

    Args:
        interval: Of a difference.
        luck: Standard error that the choices add, see :func:`choice_luck`; NaN, where it is not known, adds
            nothing.
    """
    if not luck > 0:
        return interval
    estimate, wide = interval.estimate, float(stats.norm.isf((1 - LEVEL) / 2)) * luck
    low, high = (math.hypot(estimate - end, wide) for end in (interval.low, interval.high))
    error = abs(estimate) / float(stats.norm.isf(interval.p / 2)) if interval.p < 1 else math.inf
    p = float(2 * stats.norm.sf(abs(estimate) / math.hypot(error, luck)))
    return Interval(estimate, estimate - low, estimate + high, p, interval.method)


def choice_luck(losses: np.ndarray, draws: int = DRAWS) -> float:
    """By how much the chosen learning rate may miss the best one: root mean square, nats a token.

    The best mean is chosen; the truth may be anywhere around the means, by the scatter between tuning seeds.
    What a seed has in common over all rates misleads nobody, and is taken off. The scatter is that of a
    middling rate: near divergence it is a hundred times as large, and says nothing of the others.

    Args:
        losses: (rates, seeds) of trials; those that failed are infinity, and are left out.
        draws: Of the truth.

    Returns:
        NaN with fewer than two seeds or rates.
    """
    table = losses[np.isfinite(losses).all(axis=1)]
    rates, seeds = table.shape
    if min(rates, seeds) < 2:
        return math.nan
    means = table.mean(axis=1)
    scatter = math.sqrt(_middling_variance(table) / seeds)
    truths = means + scatter * np.random.default_rng(0).normal(size=(draws, rates))
    missed = truths[:, means.argmin()] - truths.min(axis=1)
    return float(np.sqrt((missed**2).mean()))


def _middling_variance(table: np.ndarray) -> float:
    """Variance between seeds of the median rate, as an estimate of all rates' where most are alike."""
    rates, seeds = table.shape
    deviations = table - table.mean(axis=1, keepdims=True)
    rest = deviations - np.median(deviations, axis=0)
    middling = np.median(rest.var(axis=1, ddof=1)) * rates / (rates - 1)
    return float(middling * (seeds - 1) / stats.chi2.median(seeds - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, by Holm's step-down procedure, in the order given.

    Source: Holm 1979.
    """
    order, adjusted, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, (len(p_values) - place) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def probability_of_improvement(values: Sequence[float], reference: Sequence[float]) -> float:
    """Chance that a run of the arm ends below a run of the reference, over all pairs of their seeds.

    A draw counts half.

    Source: Agarwal et al. 2021, arXiv 2108.13264.
    """
    ours, theirs = np.asarray(values)[:, None], np.asarray(reference)[None, :]
    return float(((ours < theirs) + 0.5 * (ours == theirs)).mean())


# ------------------------------------------------------------------------------------------------------------
# Time to target, compute worth, and power


def cost_to_target(costs: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Cost at which a curve first reaches a target loss, on a straight line between evaluations.

    Infinity where it never does.

    Args:
        costs: At each evaluation, rising.
        losses: Nats a token.
        target: Nats a token.
    """
    for place, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        if loss <= target:
            if place == 0 or losses[place - 1] <= loss:
                return cost
            share = (losses[place - 1] - target) / (losses[place - 1] - loss)
            return costs[place - 1] + share * (cost - costs[place - 1])
    return math.inf


def speed_up(reference: Sequence[float], costs: Sequence[float]) -> Interval:
    """How many times less an arm spends to reach the target.

    Geometric mean over seeds of reference cost over its cost, with a t interval.

    An arm that misses with any seed has spent infinity there: its mean is 0, without an interval.
    """
    logs = np.log(np.asarray(reference, dtype=float)) - np.log(np.asarray(costs, dtype=float))
    if not np.isfinite(logs).all():
        return Interval(0.0, math.nan, math.nan, math.nan, "missed")
    mean = float(logs.mean())
    if len(logs) < 2:
        return Interval(math.exp(mean), math.nan, math.nan, math.nan, _("one seed"))
    error = float(logs.std(ddof=1)) / math.sqrt(len(logs))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(logs) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(logs) - 1)) if error else float(mean == 0)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), p, "t")


BEYOND = 20.0  # a logarithm of compute no baseline is ever given


def exchange(compute: Sequence[float], losses: Sequence[float]) -> Callable[[float], float]:
    """From a difference of final loss to the compute that makes it, as a share of the baseline's.

    Args:
        compute: Of baselines that decayed at several budgets, as shares of the usual one, 1 among them.
        losses: Their final losses, nats a token, paired by seed with the usual one: 0 at 1.

    Returns:
        A function: the share of the compute at which the baseline's loss differs by so much, on straight
        lines over the logarithm of compute, which go on beyond the ends; losses that rise with compute on the
        way to the lowest are evened out. Infinite where no compute is known that makes it: below the lowest,
        if that is not the largest budget's, and everywhere if it is the smallest's.
    """
    order = np.argsort(compute)
    places, values = np.log(np.asarray(compute, dtype=float)[order]), np.asarray(losses, dtype=float)[order]
    best = int(np.argmin(values))
    falling = optimize.isotonic_regression(values[: best + 1], increasing=False).x
    # Where two budgets end alike there is no rate of exchange: the mean slope stands in.
    steps, mean = np.diff(places[: best + 1]), (falling[-1] - falling[0]) / (places[best] - places[0] or 1.0)
    slopes = np.minimum(np.diff(falling) / steps, 0.1 * mean)

    def worth(difference: float) -> float:
        if best == 0 or (best < len(values) - 1 and difference < falling[-1]):
            return math.inf
        at = int(np.clip(np.searchsorted(-falling, -difference) - 1, 0, len(slopes) - 1))
        exponent = float(places[at] + (difference - falling[at]) / slopes[at])
        return math.exp(exponent) if exponent < BEYOND else math.inf

    return worth


def seeds_needed(
    deviation: float,
    effect: float,
    power: float = 0.8,
    level: float = LEVEL,
    document_error: float = 0.0,
    documents: int = 2,
) -> int:
    """Fewest seeds with which :func:`t_interval` finds an effect with this power.

    At least 2, ``MOST_SEEDS`` + 1 where more than that are needed.

    Args:
        deviation: Standard deviation over seeds of the paired difference.
        effect: To be found, in the same unit, above 0.
        power: Chance to find it.
        level: One minus the chance to find one that is not there.
        document_error: Standard error from few documents, which no number of seeds takes away; 0 is
            the paired t test.
        documents: Their number.
    """
    if not effect > 0:
        raise ValueError(
            _("an effect of {effect} cannot be looked for; it must be above 0").format(effect=effect)
        )
    from_documents = document_error * float(stats.t.ppf((1 + level) / 2, documents - 1))
    for seeds in range(2, MOST_SEEDS + 1):
        critical = stats.t.ppf((1 + level) / 2, seeds - 1)
        shift = effect / max(deviation, 1e-300) * math.sqrt(seeds)
        if document_error > 0:  # normal, with both parts of the interval's width as they are on average
            error = deviation / math.sqrt(seeds)
            half, spread = math.hypot(critical * error, from_documents), math.hypot(error, document_error)
            if stats.norm.cdf((effect - half) / spread) >= power:
                return seeds
            continue
        if (
            stats.nct.sf(critical, seeds - 1, min(shift, 1e3))
            + stats.nct.cdf(-critical, seeds - 1, min(shift, 1e3))
            >= power
        ):
            return seeds
    return MOST_SEEDS + 1


def expected_best(losses: Sequence[float]) -> list[float]:
    """Expected lowest loss of n = 1, 2, ... trials drawn with replacement from these. Source: Dodge et al.

    2019, arXiv 1909.03004.
    """
    ordered, count = np.sort(np.asarray(losses, dtype=float)), len(losses)
    above = (count - np.arange(count + 1)) / count  # share of trials from each place on
    chances = [above[:-1] ** drawn - above[1:] ** drawn for drawn in range(1, count + 1)]
    return [
        float(sum(chance * loss for chance, loss in zip(each, ordered, strict=True) if chance > 0))
        for each in chances
    ]
