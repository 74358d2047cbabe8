"""``iterbatch worker``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from iterbatch.cli.command import Words, exit_code, print_answers, printer
from iterbatch.config import Knob
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries


@dataclass(frozen=True)
class Worker:
    """Join a comparison from any machine that sees its folder: train its pairs until none is left.

    Start as many as there is room for, on as many machines. iterbatch compare ... --workers 0 begins a
    comparison without training anything itself. The worker that trains the last pair writes the report.
    """

    run_dir: Annotated[tyro.conf.Positional[Path], Knob("Folder of a comparison.")]
    strategies: Annotated[
        tuple[str, ...], Knob("Strategies of your own that it has, each as FILE.py:CLASS.")
    ] = ()

    def execute(self, words: Words, console: Console) -> int:
        """Train what is left, and say how much that was."""
        quiet_libraries()
        from iterbatch.study.engines.worker import join

        try:
            joined = join(self.run_dir, self.strategies, printer(console))
        except KeyboardInterrupt as stopped:
            console.print(Text(_("Stopped. The same command goes on, each pair from its last checkpoint.")))
            return exit_code(stopped)
        console.print(Text(_("Pairs trained here: {count}").format(count=joined.trained)))
        if joined.open:
            console.print(
                Text(
                    _(
                        "{count} more are being trained elsewhere; give this command again where a machine "
                        "there has died"
                    ).format(count=joined.open)
                ),
                soft_wrap=True,
            )
        if joined.cells:
            print_answers(console, joined.cells, self.run_dir)
        return 0
