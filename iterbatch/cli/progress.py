"""What a person at a terminal sees before and while a run goes."""

import math
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
from rich.table import Table
from rich.text import Text

from iterbatch.bench.listener import Listener
from iterbatch.bench.prepare import Plan
from iterbatch.config import BenchConfig
from iterbatch.records.machine import busy
from iterbatch.records.record import BatchRecord, EvalRecord
from iterbatch.records.result import ArmResult
from iterbatch.report.wording import plain


class RichListener(Listener):
    """Live progress: one bar an arm with loss, repeats, tokens a second and time left."""

    def __init__(self, console: Console, config: BenchConfig) -> None:
        self.console, self.config = console, config
        self.arms = len(config.strategy.strategies) * len(config.training.seeds)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.run_dir: Path | None = None  # when it is known
        self._started = 0
        self._task = TaskID(0)
        self._tokens, self._seconds, self._passes, self._batches = 0, 0.0, 0, 0

    def __enter__(self) -> "RichListener":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def note(self, message: str) -> None:
        """Print it above the bars."""
        self.console.print(Text(f"note: {plain(message)}", style="yellow"))

    def planned(self, plan: Plan, run_dir: Path) -> None:
        """Print what is about to happen."""
        self.run_dir = run_dir
        self.console.print(
            Text(
                f"{plan.parameters / 1e6:,.1f} M parameters, {plan.trainable_parameters / 1e6:,.2f} M of "
                f"them trained; {plan.blocks:,} blocks of {plan.max_length} tokens, "
                f"loss on {_loss_on(plan)}; "
                f"{plan.batches:,} batches an arm, {self.arms} arm(s); {at_work()}; to {run_dir}"
            )
        )
        if (crowd := busy()) is not None:
            self.note(crowd)

    def arm_started(self, strategy: str, seed: int) -> None:
        """Start its bar."""
        self._started += 1
        name = plain(f"{strategy}, seed {seed} ({self._started}/{self.arms})")
        self._task = self.progress.add_task(name, total=1.0, shown="")
        self._tokens, self._seconds, self._passes, self._batches = 0, 0.0, 0, 0

    def batch_done(self, record: BatchRecord, fraction: float) -> None:
        """Move the bar."""
        self._tokens += record.tokens * record.repeats_done
        self._seconds += record.seconds
        self._passes += record.repeats_done
        self._batches += 1
        rate = self._tokens / self._seconds if self._seconds else 0.0
        mean = self._passes / self._batches
        loss = f"loss {record.initial_loss:.3f}"
        shown = f"batch {record.batch + 1} {loss} repeats {mean:.2f} {rate:,.0f} tok/s"
        if record.skipped_updates:
            self.note(f"batch {record.batch}: loss or gradient not finite, update skipped")
        self.progress.update(self._task, completed=min(fraction, 1.0), shown=shown)

    def arm_done(self, result: ArmResult) -> None:
        """Leave its line with the result."""
        ppl = f"{result.val_ppl:.3f}" if math.isfinite(result.val_ppl) else "not finite"
        shown = f"validation perplexity {ppl}, repeats {result.mean_repeats:.2f}"
        self.progress.update(self._task, completed=1.0, shown=shown)
        if result.stopped:
            self.note(f"{result.strategy} stopped early: {result.stopped}")

    def evaluated(self, record: EvalRecord) -> None:
        """Show the first evaluation, the base's."""
        if record.fraction == 0 and self._started == 1:
            self.console.print(Text(f"validation perplexity before training: {record.ppl:,.3f}"))


def at_work() -> str:
    """How many processes and threads train."""
    import torch

    from iterbatch.runtime.processes import count

    processes, threads = count(), torch.get_num_threads()
    return f"{processes} process(es), {threads} thread(s) each"


def _loss_on(plan: Plan) -> str:
    """All, assistant or completion; of each how many documents where there are several."""
    if len(plan.loss_on) == 1:
        return next(iter(plan.loss_on))
    return ", ".join(f"{part} ({count:,} documents)" for part, count in plan.loss_on.items())


def _scored(plan: Plan, split: str) -> str:
    silent = plan.without_loss[split]
    return f"{plan.scored[split]}, {silent:,} more without loss" if silent > 0 else f"{plan.scored[split]}"


def plan_table(plan: Plan, config: BenchConfig) -> Table:
    """What ``--dry_run`` prints."""
    table = Table(title="Plan (one baseline arm; repeats come on top)", show_header=False)
    rows = {
        "parameters": f"{plan.parameters:,} ({plan.trainable_parameters:,} trained)",
        "training text": f"{plan.documents:,} documents, {plan.blocks:,} blocks of {plan.max_length} tokens",
        "loss on": _loss_on(plan),
        "batches": f"{plan.batches:,}",
        "updates": f"{plan.batches:,}",
        "tokens": f"{plan.tokens:,} that the loss is on",
        "compute": f"{plan.flops / 1e9:,.1f} GFLOPs",
        "price ratio of a repeat": f"{plan.price_ratio:.2f}",
        "peak memory, estimated": f"{plan.memory_mb:,.0f} MB",
        **{f"scored of {split}": _scored(plan, split) for split in plan.scored},
        "processes": at_work(),
        "arms": f"{len(config.strategy.strategies)} strategies x {len(config.training.seeds)} seeds",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
