"""What a person at a terminal sees before and while a run goes."""

import math
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from iterbatch.bench.listener import Listener
from iterbatch.bench.prepare import Plan
from iterbatch.config import BenchConfig
from iterbatch.language import _
from iterbatch.records.course import Course, about
from iterbatch.records.machine import busy
from iterbatch.records.record import BatchRecord, EvalRecord
from iterbatch.records.result import ArmResult
from iterbatch.report.wording import plain

WIDE = 100  # columns of a terminal that has room for more than loss and time left
EVERY_S = 30.0  # seconds between two lines, where there is no terminal


class RichListener(Listener):
    """Live progress: a bar an arm, with its loss and the time that is left.

    Where nobody watches, as in a file, a line now and then instead.
    """

    estimates = True

    def __init__(self, console: Console, config: BenchConfig) -> None:
        self.console, self.config = console, config
        self.arms = len(config.strategy.strategies) * len(config.training.seeds)
        wide = console.width >= WIDE
        self.progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=_one_line(max_width=32)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TaskProgressColumn(),
            TextColumn("{task.fields[shown]}", markup=False, table_column=_one_line()),
            *([TimeElapsedColumn()] if wide else []),
            TextColumn(_("left")),
            TimeRemainingColumn(compact=not wide),
            console=console,
            disable=not console.is_terminal or config.run.quiet,
            expand=True,
        )
        self.run_dir: Path | None = None  # when it is known
        self._wide, self._started, self._name, self._task = wide, 0, "", TaskID(0)
        self._tokens, self._seconds, self._passes, self._batches = 0, 0.0, 0, 0
        self._begun = self._said = time.monotonic()
        self._first = 0.0  # fraction at its first batch here

    def __enter__(self) -> "RichListener":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def _print(self, text: str, style: str = "") -> None:
        if not self.config.run.quiet:
            self.console.print(Text(plain(text), style=style))

    def note(self, message: str) -> None:
        """Print it above the bars."""
        self._print(_("note: {message}").format(message=message), "yellow")

    def planned(self, plan: Plan, run_dir: Path) -> None:
        """Print what is about to happen."""
        self.run_dir = run_dir
        self._print(
            _(
                "{parameters:,.1f} M parameters, {trainable_parameters:,.2f} M of them trained; "
                "{blocks:,} blocks of {max_length} tokens, loss on {loss_on}; {batches:,} batches an "
                "arm, {arms} arm(s), {lasting}; {at_work}; to {run_dir}"
            ).format(
                parameters=plan.parameters / 1e6,
                trainable_parameters=plan.trainable_parameters / 1e6,
                blocks=plan.blocks,
                max_length=plan.max_length,
                loss_on=_loss_on(plan),
                batches=plan.batches,
                arms=self.arms,
                lasting=_lasting(plan, self.config, self.arms),
                at_work=at_work(self.config),
                run_dir=run_dir,
            )
        )
        if (crowd := busy()) is not None:
            self.note(crowd)

    def arm_started(self, strategy: str, seed: int) -> None:
        """Start its bar."""
        self._started += 1
        self._name = plain(f"{strategy}, seed {seed} ({self._started}/{self.arms})")
        self._task = self.progress.add_task(self._name, total=1.0, shown="")
        self._tokens, self._seconds, self._passes, self._batches = 0, 0.0, 0, 0
        self._begun = self._said = time.monotonic()

    def batch_done(self, record: BatchRecord, fraction: float) -> None:
        """Move the bar."""
        if self._batches == 0:
            self._first = min(fraction, 1.0)  # a resumed arm begins further on
        self._tokens += record.tokens * record.repeats_done
        self._seconds += record.seconds
        self._passes += record.repeats_done
        self._batches += 1
        if record.skipped_updates:
            self.note(
                _("batch {batch}: loss or gradient not finite, update skipped").format(batch=record.batch)
            )
        shown = _("loss {loss:.3f}").format(loss=record.initial_loss)
        if self._wide:
            rate = self._tokens / self._seconds if self._seconds else 0.0
            shown = _("batch {batch}  {shown}  {passes:.2f} passes a batch").format(
                batch=record.batch + 1, shown=shown, passes=self._passes / self._batches
            )
            shown += f"  {rate:,.0f} tokens/s"
        self.progress.update(self._task, completed=min(fraction, 1.0), shown=shown)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._said >= EVERY_S:
            self._said = now
            moved = min(fraction, 1.0) - self._first
            left = (now - self._begun) * (1 - min(fraction, 1.0)) / moved if moved > 0 else 0.0
            self._print(
                _("{name}: {fraction:.0%}, {shown}, {left:,.0f} s left").format(
                    name=self._name, fraction=min(fraction, 1.0), shown=shown, left=left
                )
            )

    def doing(self, what: str) -> None:
        """Say so in the bar."""
        self.progress.update(self._task, shown=what)

    def arm_done(self, result: ArmResult) -> None:
        """Leave its line with the result."""
        ppl = f"{result.val_ppl:,.3f}" if math.isfinite(result.val_ppl) else _("not finite")
        shown = _("val. perplexity {ppl}").format(ppl=ppl)
        shown += (
            _(", {mean_repeats:.2f} passes a batch").format(mean_repeats=result.mean_repeats)
            if self._wide
            else ""
        )
        self.progress.update(self._task, completed=1.0, shown=shown)
        if not self.console.is_terminal:
            self._print(f"{self._name}: {shown}, {time.monotonic() - self._begun:,.0f} s")
        if result.stopped:
            self.note(
                _("{strategy} stopped early: {stopped}").format(
                    strategy=result.strategy, stopped=result.stopped
                )
            )

    def evaluated(self, record: EvalRecord) -> None:
        """Show the first evaluation, the base's."""
        if record.fraction == 0 and self._started == 1:
            self._print(_("validation perplexity before training: {ppl:,.3f}").format(ppl=record.ppl))


class StudyProgress:
    """Bars of a study: one for all of it with the time that is left, and one for each pair in training.

    Where nobody watches, a line now and then instead.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=_one_line(max_width=36)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TaskProgressColumn(),
            TextColumn("{task.fields[shown]}", markup=False, table_column=_one_line()),
            console=console,
            disable=not console.is_terminal or quiet,
            expand=True,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said = time.monotonic()

    def __enter__(self) -> "StudyProgress":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def notify(self, message: str) -> None:
        """Print a line above the bars."""
        if not self.quiet:
            self.console.print(Text(plain(message)), soft_wrap=not self.console.is_terminal)

    def show(self, course: Course) -> None:
        """Move the bars."""
        left = "" if course.left_s is None else _("{time} left").format(time=about(course.left_s))
        spent = course.ended + sum(each.fraction for each in course.running)
        self._bar(_("all runs"), f"{course.ended}/{course.pairs}  {left}", spent / course.pairs)
        for each in course.running:
            loss = "" if each.loss is None else _("loss {loss:.3f}").format(loss=each.loss)
            self._bar(each.name, each.doing or loss, each.fraction)
        running = {_("all runs"), *(each.name for each in course.running)}
        for name in [name for name in self._tasks if name not in running]:
            self.progress.remove_task(self._tasks.pop(name))
        if not self.console.is_terminal and time.monotonic() - self._said >= EVERY_S:
            self._said = time.monotonic()
            pairs = ", ".join(f"{each.name} {each.fraction:.0%}" for each in course.running)
            time_left = f", {left}" if left else ""
            self.notify(
                _("{ended} of {pairs} runs{time_left}; in training: {pairs2}").format(
                    ended=course.ended, pairs=course.pairs, time_left=time_left, pairs2=pairs
                )
            )

    def _bar(self, name: str, shown: str, fraction: float) -> None:
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(plain(name), total=1.0, shown="")
        self.progress.update(self._tasks[name], completed=min(fraction, 1.0), shown=plain(shown))


def _one_line(max_width: int | None = None) -> Column:
    return Column(no_wrap=True, overflow="ellipsis", max_width=max_width)


def at_work(config: BenchConfig) -> str:
    """How many processes and threads train, and whether the processes share the layers."""
    import torch

    from iterbatch.runtime.processes import count

    processes, threads = count(), torch.get_num_threads()
    shared = _(", layers sharded by FSDP") if config.speed.sharding == "fsdp" and processes > 1 else ""
    words = _("processes: {processes}, threads each: {threads}").format(processes=processes, threads=threads)
    return f"{words}{shared}"


def _loss_on(plan: Plan) -> str:
    """All, assistant or completion; of each how many documents where there are several."""
    if len(plan.loss_on) == 1:
        return next(iter(plan.loss_on))
    return ", ".join(
        _("{part} ({count:,} documents)").format(part=part, count=count)
        for part, count in plan.loss_on.items()
    )


def _scored(plan: Plan, split: str) -> str:
    silent = plan.without_loss[split]
    return (
        _("{scored}, {silent:,} more without loss").format(scored=plan.scored[split], silent=silent)
        if silent > 0
        else f"{plan.scored[split]}"
    )


def _lasting(plan: Plan, config: BenchConfig, shares: float) -> str:
    """How long training will take; empty where that is not known."""
    if not math.isfinite(plan.seconds):
        return _("time not known")
    least = _("at least ") if config.training.match == "epochs" else ""
    whole = plan.seconds * shares * config.training.budget_share
    return _("{least}about {time} of training").format(least=least, time=about(whole))


def plan_table(plan: Plan, config: BenchConfig, shares: float = 0.0, arms: int = 0) -> Table:
    """What ``--dry_run`` prints.

    Args:
        plan: Of one baseline arm.
        config: Of the run, or of the study's cell.
        shares: Budgets of all arms together, in the cell's; default: one for each strategy.
        arms: How many there are; default: one for each strategy.
    """
    strategies, seeds = len(config.strategy.strategies), len(config.training.seeds)
    lasting = _lasting(plan, config, (shares or strategies) * seeds)
    table = Table(title=_("Plan (one baseline arm; repeats come on top)"), show_header=False)
    rows = {
        _("parameters"): _("{parameters:,} ({trained:,} trained)").format(
            parameters=plan.parameters, trained=plan.trainable_parameters
        ),
        _("training text"): _("{documents:,} documents, {blocks:,} blocks of {max_length} tokens").format(
            documents=plan.documents, blocks=plan.blocks, max_length=plan.max_length
        ),
        _("loss on"): _loss_on(plan),
        _("batches"): f"{plan.batches:,}",
        _("updates"): f"{plan.batches:,}",
        _("tokens"): _("{tokens:,} that the loss is on").format(tokens=plan.tokens),
        _("compute"): f"{plan.flops / 1e9:,.1f} GFLOPs",
        _("price ratio of a repeat"): f"{plan.price_ratio:.2f}",
        _("peak memory, estimated"): f"{plan.memory_mb:,.0f} MB",
        **{_("scored of {split}").format(split=split): _scored(plan, split) for split in plan.scored},
        _("processes"): at_work(config),
        _("arms"): _("{arms} arms x {seeds} seeds").format(arms=arms or strategies, seeds=seeds),
        _("time, estimated"): _("{about} an arm; {lasting}").format(
            about=about(plan.seconds), lasting=lasting
        )
        if math.isfinite(plan.seconds)
        else lasting,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
