"""What every command is, and what several of them print."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from iterbatch.config import range_problems
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.report.answers import answer_line, answers, cautions, conclusion
from iterbatch.report.comparison import CellScores
from iterbatch.report.wording import plain
from iterbatch.study.pairs import Notify

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Words:
    """What was typed."""

    command: str
    arguments: Sequence[str]


class Command(Protocol):
    """A dataclass whose fields are the command's flags."""

    def execute(self, words: Words, console: Console) -> int:
        """Do what was asked; returns the exit code."""
        ...


def check_ranges(flags: Any) -> None:
    """Check the flags of a command.

    Raises:
        ConfigError: with one line for each that is out of range.
    """
    if problems := range_problems(flags):
        raise ConfigError("\n".join(problems))


def printer(console: Console) -> Notify:
    """Prints notes, whatever is in them, a line each."""
    return lambda text: console.print(Text(plain(text)), soft_wrap=True)


def exit_code(stopped: KeyboardInterrupt) -> int:
    """Of a command that was asked to stop."""
    return getattr(stopped, "exit_code", EXIT_INTERRUPTED)


def print_answers(console: Console, cells: Sequence[CellScores], folder: Path) -> None:
    """What a comparison says, and where its report is."""
    for cell in cells:
        if cell.name:
            console.print(Text(f"\n{plain(cell.name)}", style="bold"))
        console.print(Text(plain(conclusion(cell)), style="bold"))
        for each in (*map(answer_line, answers(cell)), *cautions(cell)):
            console.print(Text(f"- {plain(each)}"), soft_wrap=True)
    console.print(Text("\n" + _("Report: {file}").format(file=folder / layout.REPORT)), soft_wrap=True)
