"""What a person at a terminal sees while a run goes and when it ends. Printing happens here and in :mod:`iterbatch.cli.main` only."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from iterbatch.report import stats
from iterbatch.bench.train_arm import Listener
from iterbatch.config import BenchConfig
from iterbatch.errors import RunError
from iterbatch.bench.prepare import Plan
from iterbatch.bench.price import Placement, recommend
from iterbatch.records.record import BatchRecord, EvalRecord
from iterbatch.report.summary import COLUMNS, StrategySummary, hint, plain
from iterbatch.report.comparison import CellScores
from iterbatch.reuse.store import StoreInfo, stores_folder


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
        self._started = 0
        self._task: Any = None

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
                f"{plan.parameters / 1e6:,.1f} M parameters, {plan.trainable_parameters / 1e6:,.2f} M of them trained; {plan.blocks:,} blocks of "
                f"{plan.max_length} tokens; {plan.batches:,} batches an arm, {self.arms} arm(s); to {run_dir}"
            )
        )

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
        shown = f"batch {record.batch + 1} loss {record.initial_loss:.3f} repeats {self._passes / self._batches:.2f} {rate:,.0f} tok/s"
        if record.skipped_updates:
            self.note(f"batch {record.batch}: loss or gradient not finite, update skipped")
        self.progress.update(self._task, completed=min(fraction, 1.0), shown=shown)

    def arm_done(self, result: dict[str, Any]) -> None:
        """Leave its line with the result."""
        ppl = "not finite" if result["val_ppl"] is None else f"{result['val_ppl']:.3f}"
        self.progress.update(self._task, completed=1.0, shown=f"validation perplexity {ppl}, repeats {result['mean_repeats']:.2f}")
        if result["stopped"]:
            self.note(f"{result['strategy']} stopped early: {result['stopped']}")

    def evaluated(self, record: EvalRecord) -> None:
        """Show the first evaluation, the base's."""
        if record.fraction == 0 and self._started == 1:
            self.console.print(Text(f"validation perplexity before training: {record.ppl:,.3f}"))


def result_table(summaries: list[StrategySummary]) -> Table:
    """The table at the end of a run."""
    table = Table(title="Result")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "strategy" else "right", overflow="fold")
    for summary in summaries:
        table.add_row(*(Text(plain(cell)) for cell in summary.cells()))
    return table


def print_result(console: Console, summaries: list[StrategySummary], run_dir: Path) -> None:
    """Table, what to keep in mind, the folder, and what to try next."""
    console.print(result_table(summaries))
    if (note := hint(summaries)) is not None:
        console.print(Text(note))
    console.print(Text(f"Records, adapters, samples and figures are in {run_dir} (begin with summary.md)."))
    console.print(Text(f'Next: iterbatch generate {run_dir} --prompt "The with statement"'))


def plan_table(plan: Plan, config: BenchConfig) -> Table:
    """What ``--dry_run`` prints."""
    table = Table(title="Plan (one baseline arm; repeats come on top)", show_header=False)
    rows = {
        "parameters": f"{plan.parameters:,} ({plan.trainable_parameters:,} trained)",
        "blocks": f"{plan.blocks:,} of {plan.max_length} tokens",
        "batches": f"{plan.batches:,}",
        "updates": f"{plan.batches:,}",
        "tokens": f"{plan.tokens:,} label tokens",
        "compute": f"{plan.flops / 1e9:,.1f} GFLOPs",
        "price ratio of a repeat": f"{plan.price_ratio:.2f}",
        "peak memory, estimated": f"{plan.memory_mb:,.0f} MB",
        "scored tokens": ", ".join(f"{split} {tokens:,}" for split, tokens in plan.eval_tokens.items()),
        "arms": f"{len(config.strategy.strategies)} strategies x {len(config.training.seeds)} seeds",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def print_prices(console: Console, measured: list[Placement], config: BenchConfig) -> None:
    """The table of ``iterbatch price``, and what it recommends."""
    size = f"batch {config.training.batch_size}{f' x {config.training.grad_accum}' if config.training.grad_accum > 1 else ''} x {config.max_length}"
    table = Table(title=f"Price of a pass, {size}, median of {measured[0].rounds} rounds")
    for column in ("--lora_layers", "fresh ms", "repeat ms", "rho measured", "rho in FLOPs", "prefix ms", "evaluation ms", "peak MB", "trained"):
        table.add_column(column, justify="left" if column.startswith("--") else "right")
    for each in measured:
        times = [f"{value:,.1f}" for value in (each.fresh_ms, each.repeat_ms)]
        ratios = [f"{value:.2f}" for value in (each.price_ratio_measured, each.price_ratio_flops)]
        rest = [f"{each.prefix_ms:,.1f}", f"{each.evaluation_ms:,.1f}", f"{each.peak_memory_mb:,.0f}", f"{each.parameters:,}"]
        table.add_row(each.lora_layers, *times, *ratios, *rest)
    console.print(table)
    chosen, reason = recommend(measured)
    console.print(Text(f"Recommended: --lora_layers {chosen.lora_layers} ({reason})."))
    console.print(Text("Fewer adapted layers also learn less: compare perplexities at equal compute, with a higher --lora_rank, before you settle."))


def print_stores(console: Console, stores: list[StoreInfo]) -> None:
    """The table of ``iterbatch cache list``."""
    if not stores:
        console.print(Text(f"No activations are kept in {stores_folder()}."))
        return
    table = Table(title=Text(str(stores_folder())))
    for column in ("key", "model", "text", "frozen layers", "dtype", "stored", "GB", "in use"):
        table.add_column(column, justify="right" if column in ("stored", "GB") else "left")
    for each in stores:
        header, key = each.header, each.header.get("key")
        key = key if isinstance(key, dict) else {}
        shown = [plain(str(header.get(name, "?"))) for name in ("model", "text")] + [str(key.get(name, "?")) for name in ("cut", "dtype")]
        cells = [
            plain(each.key),
            *shown,
            f"{each.stored} of {plain(str(header.get('items', '?')))}",
            f"{each.gigabytes:.3f}",
            "yes" if each.in_use else "",
        ]
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(Text(f"{sum(each.gigabytes for each in stores):.3f} GB in all. iterbatch cache clear [KEY ...] frees it."))


def print_power(console: Console, cells: list[CellScores], effect: float, power: float) -> None:
    """The table of ``iterbatch power``."""
    table = Table(title=Text(f"Seeds to find a difference of {effect:g} nats a token with a chance of {power:.0%}, at 5% two-sided"))
    for column in ("cell", "arm", "seeds so far", "spread over seeds", "error from documents", "seeds needed"):
        table.add_column(column, justify="left" if column in ("cell", "arm") else "right")
    rows = 0
    for cell in cells:
        for each in cell.against_baseline:
            if not math.isnan(each.deviation):
                documents = cell.documents(each.arm)
                needed = stats.seeds_needed(each.deviation, effect, power, document_error=each.document_error, documents=documents)
                shown = f"{needed:,}" if needed <= stats.MOST_SEEDS else "more text" if each.document_error else f"more than {stats.MOST_SEEDS:,}"
                figures = (str(len(each.seeds)), f"{each.deviation:.4f}", f"{each.document_error:.4f}", shown)
                table.add_row(*map(Text, (plain(cell.name), plain(each.arm), *figures)))
                rows += 1
    if not rows:
        raise RunError("there is no arm with two seeds that the baseline has too; the spread over seeds cannot be known from fewer")
    console.print(table)
    console.print(
        Text(
            "Spread: standard deviation over seeds of the difference of log test perplexity to the baseline; with few seeds it is rough. Error from "
            "documents: what no number of seeds takes away; where it hides the effect, score on more text (--max_eval_tokens). For one arm alone: "
            "with several, Holm's correction asks for more."
        )
    )
