"""``iterbatch power``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from iterbatch.cli.command import Words, check_ranges
from iterbatch.config import Knob
from iterbatch.errors import RunError
from iterbatch.report import stats
from iterbatch.report.comparison import CellScores, read_cells
from iterbatch.report.wording import plain


@dataclass(frozen=True)
class Power:
    """How many seeds a paired comparison needs to find an effect, from the spread over its seeds so far."""

    run_dir: Annotated[tyro.conf.Positional[Path], Knob("Folder of a comparison with at least two seeds.")]
    effect: Annotated[
        float,
        Knob(
            "Difference of log perplexity to be found, nats a token; 0.01 is about 1% of perplexity", above=0
        ),
    ] = 0.01
    power: Annotated[float, Knob("Chance to find it", above=0, below=1)] = 0.8

    def execute(self, words: Words, console: Console) -> int:
        """Print a row for every arm."""
        check_ranges(self)
        print_power(console, read_cells(self.run_dir), self.effect, self.power)
        return 0


def print_power(console: Console, cells: Sequence[CellScores], effect: float, power: float) -> None:
    """The table of ``iterbatch power``."""
    table = Table(
        title=Text(
            f"Seeds to find a difference of {effect:g} nats a token with a chance of {power:.0%}, at 5% "
            "two-sided"
        )
    )
    for column in (
        "cell",
        "arm",
        "seeds so far",
        "spread over seeds",
        "error from documents",
        "seeds needed",
    ):
        table.add_column(column, justify="left" if column in ("cell", "arm") else "right")
    rows = 0
    for cell in cells:
        for each in cell.against_baseline:
            if not math.isnan(each.deviation):
                documents = cell.documents(each.arm)
                needed = stats.seeds_needed(
                    each.deviation, effect, power, document_error=each.document_error, documents=documents
                )
                shown = (
                    f"{needed:,}"
                    if needed <= stats.MOST_SEEDS
                    else "more text"
                    if each.document_error
                    else f"more than {stats.MOST_SEEDS:,}"
                )
                values = (str(len(each.seeds)), f"{each.deviation:.4f}", f"{each.document_error:.4f}", shown)
                table.add_row(*map(Text, (plain(cell.name), plain(each.arm), *values)))
                rows += 1
    if not rows:
        raise RunError(
            "there is no arm with two seeds that the baseline has too; the spread over seeds cannot be "
            "known from fewer"
        )
    console.print(table)
    console.print(
        Text(
            "Spread: standard deviation over seeds of the difference of log test perplexity to the "
            "baseline; with few seeds it is rough. Error from "
            "documents: what no number of seeds takes away; where it hides the effect, score on more text "
            "(--max_eval_tokens). For one arm alone: "
            "with several, Holm's correction asks for more."
        )
    )
