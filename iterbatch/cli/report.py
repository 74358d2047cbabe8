"""``iterbatch report``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from iterbatch.cli.command import Words, print_answers
from iterbatch.config import Knob
from iterbatch.report import page


@dataclass(frozen=True)
class Report:
    """Write report.html, report.md, metrics.csv, the summary and the figures of a run or a comparison anew.

    From its records alone.
    """

    run_dir: Annotated[tyro.conf.Positional[Path], Knob("Folder of a run or a comparison.")]
    mauve: Annotated[
        Path | None,
        Knob(
            "Local folder of a language model (Hugging Face format) to embed texts with, for MAUVE "
            '(pip install "iterbatch[mauve]").'
        ),
    ] = None

    def execute(self, words: Words, console: Console) -> int:
        """Write it, and print its answers."""
        print_answers(console, page.write(self.run_dir, self.mauve), self.run_dir)
        return 0
