"""How the learning rates of a study were found: every arm's loss at every rate that was tried."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iterbatch.records import layout
from iterbatch.records.write import write_json


@dataclass(frozen=True)
class Curve:
    """The trials of one arm."""

    rates: tuple[float, ...]  # in the order they were made
    losses: tuple[
        tuple[float, ...], ...
    ]  # of each rate and tuning seed, nats a token; infinity where it failed

    @property
    def table(self) -> np.ndarray:
        """(rates, seeds)."""
        return np.array(self.losses)

    @property
    def means(self) -> list[float]:
        """Mean loss of each rate over the seeds."""
        return [float(np.mean(losses)) for losses in self.losses]

    @property
    def best(self) -> float | None:
        """The rate of the lowest mean; None where every trial failed."""
        loss, rate = min(zip(self.means, self.rates, strict=True))
        return rate if math.isfinite(loss) else None

    def at_edge(self, rate: float) -> bool:
        """Whether a rate is the lowest or the highest that was tried."""
        return rate in (min(self.rates), max(self.rates))


Curves = dict[str, dict[str, Curve]]  # cell to arm to its trials


def write_curves(folder: Path, curves: Curves) -> None:
    """Write them into the folder of trials."""

    def trials(curve: Curve) -> list[list[object]]:
        return [[rate, list(losses)] for rate, losses in zip(curve.rates, curve.losses, strict=True)]

    content = {cell: {arm: trials(curve) for arm, curve in arms.items()} for cell, arms in curves.items()}
    write_json(folder / layout.TUNING, content)


def read_curves(folder: Path) -> Curves:
    """The trials that a folder keeps; empty where it keeps none, or what cannot be read.

    Earlier versions had one seed, and wrote a number instead of a list.
    """
    try:
        content = json.loads((folder / layout.TUNING).read_text(encoding="utf-8"))
        return {
            str(cell): {str(arm): _curve(trials) for arm, trials in arms.items() if trials}
            for cell, arms in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _curve(trials: Any) -> Curve:
    rates, losses = [], []
    for rate, found in trials:
        rates.append(float(rate))
        several = found if isinstance(found, list) else [found]
        losses.append(tuple(math.inf if loss is None else float(loss) for loss in several))
    return Curve(tuple(rates), tuple(losses))
