"""``iterbatch tune``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from iterbatch.cli.command import Words, check_ranges, exit_code, printer
from iterbatch.config import Knob
from iterbatch.flags import Address, Engine
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries


@dataclass(frozen=True)
class Tune:
    """Find the learning rate of every arm of a study: as many trials for each, from the same range.

    The same command resumes where it stopped. The values found are written into the study file,
    which then says them for every arm.
    """

    study: Annotated[
        tyro.conf.Positional[Path],
        Knob("Study file (YAML); its section tune says trials, low, high and seed."),
    ]
    save_dir: Annotated[Path, Knob("Folder for the trials.")] = Path("results")
    workers: Annotated[int, Knob("Workers, each training one trial at a time", at_least=1)] = 1
    engine: Engine = "processes"
    address: Address = None

    def execute(self, words: Words, console: Console) -> int:
        """Make the trials that are missing, and say what was chosen."""
        check_ranges(self)
        quiet_libraries()
        from iterbatch.study.engines.choose import choose
        from iterbatch.study.tune import tune

        notify = printer(console)
        engine = choose(self.engine, self.workers, self.address, notify)
        assert engine is not None  # --workers is 1 or more
        try:
            tune(self.study, self.save_dir, engine, notify)
        except KeyboardInterrupt as stopped:
            console.print(Text(_("Stopped. The same command resumes it.")))
            return exit_code(stopped)
        return 0
