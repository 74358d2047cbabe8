"""``iterbatch report``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from iterbatch.cli.command import Words, print_answers
from iterbatch.config import Knob
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.report import page


@dataclass(frozen=True)
class Report:
    """Write report.html, report.md, metrics.csv, table.tex, the summary and the figures of a run anew.

    From its records alone. Several runs or comparisons are set side by side, in a folder of their own.
    """

    run_dirs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], Knob("Folder of a run or a comparison, or of several.")
    ]
    out: Annotated[
        Path | None,
        Knob("Of several: folder for their report. Default: beside the first of them, named after all."),
    ] = None
    mauve: Annotated[
        Path | None,
        Knob(
            "Local folder of a language model (Hugging Face format) to embed texts with, for MAUVE "
            '(pip install "iterbatch[mauve]").'
        ),
    ] = None

    def execute(self, words: Words, console: Console) -> int:
        """Write it, and print its answers."""
        if not self.run_dirs:
            raise ConfigError(_("give the folder of a run, or of several; `iterbatch list` shows them"))
        first = self.run_dirs[0]
        if len(self.run_dirs) == 1 and self.out is None:
            print_answers(console, page.write(first, self.mauve), first)
            return 0
        if self.mauve is not None:
            raise ConfigError(_("--mauve is for one run at a time; score each one first"))
        folder = self.out or first.resolve().with_name(
            "+".join(each.resolve().name for each in self.run_dirs)
        )
        print_answers(console, page.write_several(self.run_dirs, folder), folder)
        return 0
