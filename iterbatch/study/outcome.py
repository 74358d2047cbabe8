"""What a run or a comparison has left, for Python and notebooks."""

from __future__ import annotations

import html
import math
import statistics
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.report.answers import cautions, conclusion
from iterbatch.report.comparison import CellScores, read_cells
from iterbatch.report.scores import ArmScores
from iterbatch.report.wording import plain

if TYPE_CHECKING:
    import pandas as pd


class Outcome:
    """What a run or a comparison has left: its table, its best arm, its report; a table in a notebook.

    Args:
        folder: Of the run or comparison.

    Raises:
        RunError: where the folder holds no finished arm.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.cells: list[CellScores] = read_cells(self.folder)

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def report(self) -> Path:
        """The report, a page to open in a browser."""
        return self.folder / layout.REPORT

    @property
    def conclusion(self) -> str:
        """What it says in a sentence; of a study of several cells, a line each."""
        return "\n".join(
            f"{cell.name}: {conclusion(cell)}" if cell.name else conclusion(cell) for cell in self.cells
        )

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row an arm; perplexities and costs are means over seeds.

        Columns: ``cell``, ``arm``, ``seeds``, ``val_ppl``, ``test_ppl``, ``test_ppl_sd`` (standard deviation
        over seeds), ``delta`` (log test perplexity minus the baseline's, with ``delta_low`` and
        ``delta_high``, 95%), ``p`` (after Holm's correction), ``passes`` (a batch), ``flops``, ``compute``
        (times the baseline's), ``train_seconds``, ``tokens_unique``. NaN where there is none.
        """
        import pandas as pd

        return pd.DataFrame([_row(cell, arm) for cell in self.cells for arm in cell.arms if arm.finished])

    @property
    def best(self) -> str:
        """The arm with the lowest mean test perplexity, whatever it cost, of those that failed with no seed.

        Whether that is more than chance says ``conclusion``.

        Raises:
            RunError: where there are several cells, or no arm has a finite perplexity.
        """
        if len(self.cells) > 1:
            raise RunError(
                _("{folder} has {count} cells, each with its own best arm; see .table").format(
                    folder=self.folder, count=len(self.cells)
                )
            )
        found = {
            arm.name: arm.values(lambda result: result.test_ppl)
            for arm in self.cells[0].arms
            if not arm.failures
        }
        means = {name: statistics.fmean(values) for name, values in found.items() if values}
        if not means:
            raise RunError(_("no arm of {folder} has a finite test perplexity").format(folder=self.folder))
        return min(means, key=lambda name: means[name])

    def __repr__(self) -> str:
        return f"{self.conclusion}\n\n{self.table.to_string(index=False)}\n\nReport: {self.report}"

    def _repr_html_(self) -> str:
        """For a notebook."""
        said = [plain(line) for line in self.conclusion.splitlines()]
        said += [plain(each) for cell in self.cells for each in cautions(cell)]
        words = "".join(f"<p>{html.escape(line)}</p>" for line in said)
        link = f'<p><a href="{html.escape(self.report.as_posix())}">report.html</a></p>'
        table = self.table.to_html(index=False, escape=True, na_rep="", float_format="{:,.4g}".format)
        return f"{words}{table}{link}"


def _row(cell: CellScores, arm: ArmScores) -> dict[str, object]:
    test = arm.values(lambda result: result.test_ppl)
    compared = next((each for each in cell.against_baseline if each.arm == arm.name), None)
    interval = None if compared is None else compared.interval
    return {
        "cell": cell.name,
        "arm": arm.name,
        "seeds": len(arm.finished),
        "val_ppl": arm.mean(lambda result: result.val_ppl),
        "test_ppl": arm.mean(lambda result: result.test_ppl),
        "test_ppl_sd": statistics.stdev(test) if len(test) > 1 else math.nan,
        "delta": math.nan if compared is None else compared.estimate,
        "delta_low": math.nan if interval is None else interval.low,
        "delta_high": math.nan if interval is None else interval.high,
        "p": math.nan if compared is None else compared.p_adjusted,
        "passes": arm.mean(lambda result: result.mean_repeats),
        "flops": arm.mean(lambda result: result.flops),
        "compute": cell.compute_ratio(arm.name),
        "train_seconds": arm.mean(lambda result: result.train_seconds),
        "tokens_unique": arm.mean(lambda result: result.tokens_unique),
    }
