"""``iterbatch train``."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from iterbatch.cli.command import Words, exit_code
from iterbatch.cli.progress import WIDE, RichListener, plan_table
from iterbatch.config import BenchConfig
from iterbatch.errors import UserError, typed
from iterbatch.flags import TrainFlags, parse_config
from iterbatch.language import _
from iterbatch.plain_yaml import dump_yaml
from iterbatch.quiet import quiet_libraries
from iterbatch.records import layout
from iterbatch.records.read import read_samples
from iterbatch.report import summary
from iterbatch.report.answers import cautions
from iterbatch.report.comparison import CellScores, read_cells
from iterbatch.report.wording import plain


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train LLaMA + LoRA with every strategy and compare perplexity and cost.

    Without any flag: four strategies on the bundled model and text, offline, in a few minutes on a laptop.
    """

    def execute(self, words: Words, console: Console) -> int:
        """Train, and print the table."""
        config = parse_config(words.arguments)
        quiet_libraries()
        return _plan(config, console) if config.run.dry_run else _train(config, console)


def _plan(config: BenchConfig, console: Console) -> int:
    from iterbatch.bench.estimate import with_seconds
    from iterbatch.bench.prepare import plan
    from iterbatch.runtime.processes import is_main

    prepared, planned = plan(config)
    if not is_main():
        return 0
    planned = with_seconds(planned, prepared.base, config)
    console.print(Text(dump_yaml(config.flat())))
    for note in prepared.notes:
        console.print(Text(_("note: {message}").format(message=plain(note))))
    console.print(plan_table(planned, config))
    return 0


def _train(config: BenchConfig, console: Console) -> int:
    from iterbatch.runtime.processes import is_main
    from iterbatch.study.run import run

    listener = RichListener(console, config) if is_main() else None  # of several processes one talks
    try:
        with listener or contextlib.nullcontext():
            run_dir = run(config, listener)
    except KeyboardInterrupt as stopped:
        if listener is not None:
            _say_how_to_resume(console, listener.run_dir, config.strategy.strategies)
        return exit_code(stopped)
    if listener is not None:
        print_result(console, read_cells(run_dir)[0], run_dir)
    return 0


def print_result(console: Console, cell: CellScores, run_dir: Path) -> None:
    """Table, what to keep in mind, the folder, and what to try next."""
    chosen = summary.COLUMNS if console.width >= WIDE else summary.NARROW
    table = Table(title=_("Result"), box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in chosen:
        table.add_column(_(column), justify="left" if column == "strategy" else "right", overflow="fold")
    for row in summary.rows(cell):
        shown = dict(zip(summary.COLUMNS, row, strict=True))
        table.add_row(*(Text(plain(shown[column])) for column in chosen))
    console.print(table)
    if scored := summary.scored_words(cell):
        console.print(Text(_("Scored: {scored}.").format(scored=scored)))
    for caution in cautions(cell):
        console.print(Text(plain(caution)))
    begin = _("begin with {report} or {summary_page}").format(
        report=layout.REPORT, summary_page=layout.SUMMARY_PAGE
    )
    console.print(
        Text(
            _("Records, adapters, samples and figures are in {run_dir} ({begin}).").format(
                run_dir=run_dir, begin=begin
            )
        )
    )
    command = typed("iterbatch", "generate", run_dir, "--prompt", _prompt(cell))
    console.print(Text(_("Next: {command}").format(command=command)), soft_wrap=True)


def _prompt(cell: CellScores) -> str:
    """The beginning of a prompt of the run's own, as it can be typed."""
    for arm in cell.arms:
        for seed in arm.finished:
            with contextlib.suppress(UserError):
                words = " ".join(read_samples(seed.folder).prompts[:1]).split()
                words = [word for word in words if any(map(str.isalnum, word))]  # no rules and rows of dots
                return " ".join(words[:6]) or "The"
    return "The"


def _say_how_to_resume(console: Console, run_dir: Path | None, strategies: Sequence[str]) -> None:
    if run_dir is None:
        console.print(_("Interrupted before the run began."))
        return
    from iterbatch.study.run import how_to_resume

    how = _("Interrupted. To resume where it stopped:\n  {typed}").format(
        typed=how_to_resume(run_dir, strategies)
    )
    console.print(Text(how), soft_wrap=True)
