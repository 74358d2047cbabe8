"""What repeats were worth where they were measured, by tokens a batch and price of a repeat: a rule of thumb.

The cells are those of the committed studies; ``studies/findings.py`` writes them from the records.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from iterbatch.language import N_, _

FILE = Path(__file__).parent.parent / "assets" / "evidence" / "map.json"
WAYS = {"at_once": N_("repeats at once"), "later": N_("repeats later"), "smaller": N_("smaller batches")}
REPEATS = ("at_once", "later")
FAR = 1.0  # a cell further off than this says little: half or twice the tokens, or a price 0.25 away


@dataclass(frozen=True)
class Worth:
    """Compute that every batch once needs to end as low, over what was spent, with its 95% interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class MapCell:
    """One cell of a study in which ways to repeat were held against every batch once."""

    study: str
    model: str
    text: str
    tokens: int  # a batch
    price_ratio: float  # in FLOPs
    seeds: int
    worth: Mapping[str, Worth]  # by way, a key of ``WAYS``

    @property
    def name(self) -> str:
        """What was trained, on what, in what batches, with how many seeds."""
        return _(
            "{model} on {text}, {tokens:,} tokens a batch, a repeat at {ratio:.2f}, {seeds} seeds"
        ).format(
            model=self.model, text=self.text, tokens=self.tokens, ratio=self.price_ratio, seeds=self.seeds
        )

    @property
    def best(self) -> str | None:
        """The way to repeat that paid most beyond chance; None where none did."""
        paid = {way: self.worth[way] for way in REPEATS if way in self.worth and self.worth[way].low > 1}
        return max(paid, key=lambda way: paid[way].estimate, default=None)

    def distance(self, tokens: int, price_ratio: float) -> float:
        """How far a setting is off: 1 is twice or half the tokens, or a price 0.25 away."""
        return abs(math.log2(tokens / self.tokens)) + 4 * abs(price_ratio - self.price_ratio)


@cache
def cells() -> tuple[MapCell, ...]:
    """All that were measured."""
    return tuple(_cell(each) for each in json.loads(FILE.read_text(encoding="utf-8")))


def _cell(content: Mapping[str, Any]) -> MapCell:
    worth = {way: Worth(*numbers) for way, numbers in content["worth"].items()}
    return MapCell(**{**content, "worth": worth})


def nearest(tokens: int, price_ratio: float, among: Sequence[MapCell] | None = None) -> MapCell:
    """The cell that is most like a setting; of two as near the one with more seeds.

    Args:
        tokens: A batch.
        price_ratio: Of a repeat, in FLOPs.
        among: Cells; default: all.
    """
    chosen = cells() if among is None else among
    return min(chosen, key=lambda cell: (cell.distance(tokens, price_ratio), -cell.seeds))
