"""``iterbatch compare``."""

from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from iterbatch.cli.command import Words, check_ranges, exit_code, print_answers
from iterbatch.cli.progress import StudyProgress, plan_table
from iterbatch.flags import CompareFlags
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries
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
        from iterbatch.study.run import compare

        run_dir = self.run.save_dir / (self.run.run_name or study.name)
        try:
            with StudyProgress(console, quiet=self.run.quiet) as bars:
                cells = compare(
                    study, run_dir, self.workers, bars.notify, bars.show, overwrite=self.run.overwrite
                )
        except KeyboardInterrupt as stopped:
            console.print(Text(_("Stopped. The same command goes on, each pair from its last checkpoint.")))
            return exit_code(stopped)
        print_answers(console, cells, run_dir)
        return 0


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
