"""``iterbatch compare``."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from iterbatch.cli.command import Words, check_ranges, exit_code, print_answers
from iterbatch.cli.progress import StudyProgress, plan_table
from iterbatch.errors import typed
from iterbatch.flags import CompareFlags
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries
from iterbatch.strategy.own import SOURCES
from iterbatch.study.pairs import Study
from iterbatch.study.study_file import load_study, study_of_flags


@dataclass(frozen=True)
class Compare(CompareFlags):
    """Train arms by seeds at the same budget, score them, and write a report.

    The same command resumes a comparison that was stopped. Arms come from a study file, or from
    --strategies. Flags override the file's settings.
    """

    def execute(self, words: Words, console: Console) -> int:
        """Train what is missing, and print the answers."""
        check_ranges(self)
        quiet_libraries()
        path = self.study
        study = study_of_flags(words.arguments) if path is None else load_study(path, words.arguments)
        if self.run.dry_run:
            _print_plans(study, console)
            return 0
        from iterbatch.study.engines.choose import choose
        from iterbatch.study.run import compare

        run_dir = self.run.save_dir / (self.run.run_name or study.name)
        try:
            with StudyProgress(console, quiet=self.run.quiet) as bars:
                engine = choose(self.engine, self.workers, self.address, bars.notify, bars.show)
                cells = compare(study, run_dir, engine, overwrite=self.run.overwrite)
        except KeyboardInterrupt as stopped:
            console.print(Text(_("Stopped. The same command goes on, each pair from its last checkpoint.")))
            return exit_code(stopped)
        if engine is None:
            _print_how_to_join(study, run_dir, console)
        else:
            print_answers(console, cells, run_dir)
        return 0


def _print_how_to_join(study: Study, run_dir: Path, console: Console) -> None:
    names = {arm.strategy for cell in study.cells for arm in cell.arms}
    own = [SOURCES[name].words for name in sorted(names & {*SOURCES})]
    command = typed("iterbatch", "worker", run_dir.resolve(), *(["--strategies", *own] if own else []))
    console.print(
        Text(_("Begun. Any machine that sees its folder joins by: {command}").format(command=command)),
        soft_wrap=True,
    )


def _print_plans(study: Study, console: Console) -> None:
    from iterbatch.bench.estimate import with_seconds
    from iterbatch.bench.prepare import plan

    for cell in study.cells:
        prepared, planned = plan(cell.config)
        console.print(Text(cell.name or study.name, style="bold"))
        shares = [arm.config.training.budget_share for arm in cell.arms]
        console.print(
            plan_table(
                with_seconds(planned, prepared.base, cell.config), cell.config, sum(shares), len(shares)
            )
        )
