"""The strategies: pure rules of plain numbers under thin classes.

A strategy sees losses and ``step``. It never sees the optimizer, the data order, the data set's name or evaluation scores. To add one: write a
class with ``repeats``, add a line to ``STRATEGIES`` and a card to ``docs/strategies/``.
"""

from collections.abc import Sequence
from typing import Any

from iterbatch.config import StrategyConfig
from iterbatch.strategy.scheduler import MAX_REPEATS
from iterbatch.strategy.base import Adapter, BaseTrainingStrategy, Step
from iterbatch.strategy.controls import (
    ExcessStrategy,
    FixedStrategy,
    HigherLRStrategy,
    InverseStrategy,
    PermutedStrategy,
    RandomStrategy,
    ScaledLRStrategy,
    SelectiveStrategy,
    SmallBatchesStrategy,
    SpacedStrategy,
    WeightedStrategy,
    loss_of_rank,
)
from iterbatch.strategy.original import (
    ABRStrategy,
    BaselineStrategy,
    LearnableSchedulingStrategy,
    SlidingWindowStrategy,
    abr_repeats,
    window_repeats,
)

__all__ = [
    "STRATEGIES",
    "ABRStrategy",
    "Adapter",
    "BaseTrainingStrategy",
    "BaselineStrategy",
    "LearnableSchedulingStrategy",
    "SlidingWindowStrategy",
    "Step",
    "abr_repeats",
    "loss_of_rank",
    "make_strategy",
    "window_repeats",
]

STRATEGIES: dict[str, type[BaseTrainingStrategy]] = {
    "baseline": BaselineStrategy,
    "abr": ABRStrategy,
    "learnable": LearnableSchedulingStrategy,
    "window": SlidingWindowStrategy,
    "fixed": FixedStrategy,
    "permuted": PermutedStrategy,
    "random": RandomStrategy,
    "inverse": InverseStrategy,
    "excess": ExcessStrategy,
    "scaled_lr": ScaledLRStrategy,
    "higher_lr": HigherLRStrategy,
    "weighted": WeightedStrategy,
    "spaced": SpacedStrategy,
    "small_batches": SmallBatchesStrategy,
    "selective": SelectiveStrategy,
}


def make_strategy(name: str, knobs: StrategyConfig, seed: int, source: Sequence[int] | None = None) -> BaseTrainingStrategy:
    """Build a strategy with its knobs.

    Args:
        name: A key of ``STRATEGIES``.
        knobs: The flags of the strategy group.
        seed: For a strategy that draws random numbers.
        source: Passes of each batch of the arm that a control is made from; only where ``needs_source``.
    """
    kind, most = STRATEGIES[name], knobs.max_repeats
    by_threshold = {"threshold": knobs.loss_threshold, "max_repeats": most or MAX_REPEATS}
    settings: dict[str, dict[str, Any]] = {
        "abr": by_threshold,
        "learnable": {"max_repeats": min(most or MAX_REPEATS, MAX_REPEATS), "probe_rate": knobs.probe_rate, "seed": seed},
        "window": {"window_size": knobs.window_size, "threshold": knobs.loss_threshold, "max_repeats": most or 1},
        "fixed": {"passes": most or 2},
        "selective": {"seed": seed},
        **dict.fromkeys(("inverse", "excess", "scaled_lr", "weighted", "spaced"), by_threshold),
    }
    if kind.needs_source:
        return kind(source=source or [], seed=seed)  # pyright: ignore[reportCallIssue]
    return kind(**settings.get(name, {}))
