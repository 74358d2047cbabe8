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
from iterbatch.language import N_, _
from iterbatch.report import stats
from iterbatch.report.comparison import CellScores, Comparison, read_cells
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


COLUMNS = (
    N_("cell"),
    N_("arm"),
    N_("seeds so far"),
    N_("spread over seeds"),
    N_("error from documents"),
    N_("seeds needed"),
)
READING = N_(
    "Spread: standard deviation over seeds of the difference of log test perplexity to the baseline; "
    "with few seeds it is rough. Error from documents: what no number of seeds takes away; where it "
    "hides the effect, score on more text (--max_eval_tokens). For one arm alone: with several, "
    "Holm's correction asks for more."
)


def print_power(console: Console, cells: Sequence[CellScores], effect: float, power: float) -> None:
    """A row an arm, and how to read it.

    Raises:
        RunError: where no arm has two seeds that the baseline has too.
    """
    size = _("a difference of {effect:g} nats a token with a chance of {power:.0%}").format(
        effect=effect, power=power
    )
    table = Table(title=Text(_("Seeds to find {size}, at 5% two-sided").format(size=size)))
    for column in COLUMNS:
        table.add_column(_(column), justify="left" if column in ("cell", "arm") else "right")
    for cell in cells:
        for each in cell.against_baseline:
            if not math.isnan(each.deviation):
                table.add_row(*map(Text, _row(cell, each, effect, power)))
    if not table.rows:
        raise RunError(
            _(
                "there is no arm with two seeds that the baseline has too; the spread over seeds cannot "
                "be known from fewer"
            )
        )
    console.print(table)
    console.print(Text(_(READING)))


def _row(cell: CellScores, each: Comparison, effect: float, power: float) -> tuple[str, ...]:
    documents, error = cell.documents(each.arm), each.document_error
    needed = stats.seeds_needed(each.deviation, effect, power, document_error=error, documents=documents)
    shown = f"{needed:,}"
    if needed > stats.MOST_SEEDS:
        shown = _("more text") if error else _("more than {most_seeds:,}").format(most_seeds=stats.MOST_SEEDS)
    spread = f"{each.deviation:.4f}"
    return plain(cell.name), plain(each.arm), str(len(each.seeds)), spread, f"{error:.4f}", shown
