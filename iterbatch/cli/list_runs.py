"""``iterbatch list``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from iterbatch.cli.command import Words
from iterbatch.config import Knob
from iterbatch.errors import RunError, UserError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.report.comparison import CellScores, cells_of
from iterbatch.report.wording import number, plain
from iterbatch.runtime.run_folder import is_locked


@dataclass(frozen=True)
class ListRuns:
    """Show the runs and comparisons of a folder, the last one first."""

    folder: Annotated[tyro.conf.Positional[Path], Knob("Folder of runs, as --save_dir.")] = Path("results")

    def execute(self, words: Words, console: Console) -> int:
        """Print a row a run."""
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(
                _("{folder} is not a folder; give the one that --save_dir named").format(folder=self.folder)
            )
        found = [each for each in self.folder.iterdir() if _is_run(each)] if self.folder.is_dir() else []
        if not found:
            console.print(
                Text(_("{folder} holds no run yet; `iterbatch train` makes one.").format(folder=self.folder))
            )
            return 0
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for column in (_("run"), _("begun"), _("done"), _("best arm"), _("test perplexity")):
            right = column in (_("done"), _("test perplexity"))
            table.add_column(column, justify="right" if right else "left")
        for row in sorted(map(_row, found), key=lambda row: row[1], reverse=True):
            table.add_row(*(Text(plain(cell)) for cell in row))
        console.print(table)
        console.print(
            Text(_("`iterbatch report {folder}/RUN` tells what one says.").format(folder=self.folder))
        )
        return 0


def _is_run(folder: Path) -> bool:
    try:
        return folder.is_dir() and any((folder / name).is_file() for name in (layout.STUDY, layout.CONFIG))
    except OSError:  # that may not be looked into
        return False


def _row(folder: Path) -> tuple[str, str, str, str, str]:
    """Name, when it was begun, how much is done, its best arm and that one's test perplexity."""
    try:
        cells = cells_of(folder)
    except UserError:
        return folder.name, _begun([folder]), "damaged", "", ""
    ended = sum(len(arm.seeds) for cell in cells for arm in cell.arms)
    whole = ended + sum(len(cell.open) for cell in cells)
    state = _(" in training") if is_locked(folder) else ""
    name, ppl = _best(cells)
    return folder.name, _begun([cell.run_dir for cell in cells]), f"{ended}/{whole}{state}", name, ppl


def _best(cells: list[CellScores]) -> tuple[str, str]:
    if len(cells) > 1:
        return _("{count} cells").format(count=len(cells)), ""
    fair = [arm for cell in cells for arm in cell.arms if not arm.failures and arm.budget_share == 1]
    found = {arm.name: arm.mean(lambda result: result.test_ppl) for arm in fair}
    known = {name: ppl for name, ppl in found.items() if ppl == ppl}  # not NaN
    best = min(known, key=lambda name: known[name], default="")
    return best, number(known[best]) if best else ""


def _begun(folders: list[Path]) -> str:
    for folder in folders:
        try:
            manifest = json.loads((folder / layout.MANIFEST).read_text(encoding="utf-8"))
            return str(manifest["started"])[:16].replace("T", " ")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return ""
