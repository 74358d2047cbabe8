"""An arm: one strategy with its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from iterbatch.checks import config_of
from iterbatch.config import BenchConfig
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.strategy import REFERENCE, STRATEGIES, needs_source, source_of
from iterbatch.strategy.base import OTHER_PASSES


@dataclass(frozen=True)
class Arm:
    """One strategy with its settings in a comparison."""

    name: str  # of its folder
    strategy: str  # a key of STRATEGIES
    config: BenchConfig  # the cell's, with this arm's own learning rate and knobs
    own: Mapping[str, Any] = field(default_factory=dict)  # what it sets for itself

    @property
    def source(self) -> str | None:
        """The arm whose records it needs."""
        given = self.config.strategy.source
        return source_of(self.strategy, given) if needs_source(self.strategy) else None

    def source_seed(self, seed: int) -> int:
        """The seed of the source that this arm's own seed takes: the same, or its neighbour's.

        Neighbours take each other's, so that no seed waits for all others; the last of an odd number takes
        the one before it.

        Raises:
            ConfigError: where there is no other.
        """
        if STRATEGIES[self.strategy].made_from != OTHER_PASSES:
            return seed
        seeds = self.config.training.seeds
        if len(seeds) < 2:
            raise ConfigError(
                _(
                    "'{name}' takes the passes of another seed, and there is one only; give --seeds more"
                ).format(name=self.name)
            )
        place = seeds.index(seed)
        other = place + 1 if place % 2 == 0 and place + 1 < len(seeds) else place - 1
        return seeds[other]


def arms_of(config: BenchConfig) -> tuple[Arm, ...]:
    """The arms of a run without a study: each strategy by its own name."""
    return tuple(Arm(name, name, config) for name in config.strategy.strategies)


def make_arm(name: str, own: Mapping[str, Any], config: BenchConfig) -> Arm:
    """An arm with what it sets for itself.

    Args:
        name: Of the arm; also its strategy where it names no other.
        own: ``strategy``, training settings and knobs, by flag.
        config: Of its cell.
    """
    settings = {key: value for key, value in own.items() if key != "strategy"}
    mine = config_of({**config.flat(), "strategies": [REFERENCE], **settings})
    return Arm(name, own.get("strategy", name), mine, own)
