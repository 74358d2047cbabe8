"""``iterbatch price``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text

from iterbatch.checks import check
from iterbatch.cli.command import Words, check_ranges
from iterbatch.config import BenchConfig, DataConfig, Knob, ModelConfig, TrainingConfig, knobs_of
from iterbatch.flags import Group
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries

if TYPE_CHECKING:
    from iterbatch.bench.price import Placement


@dataclass(frozen=True)
class Price:
    """Measure fresh pass, repeat, prefix and evaluation, and recommend a placement of the adapters.

    On all, half, a quarter and two of the layers.
    """

    model: Group[ModelConfig] = field(default_factory=ModelConfig)
    max_length: Annotated[int | None, knobs_of(DataConfig)["max_length"]] = None
    batch_size: Annotated[int, knobs_of(TrainingConfig)["batch_size"]] = 4
    grad_accum: Annotated[int, knobs_of(TrainingConfig)["grad_accum"]] = 1
    seconds: Annotated[float, Knob("Time for the measurements; at least three rounds are made", above=0)] = (
        60.0
    )
    json: Annotated[bool, Knob("Print JSON instead of a table.")] = False

    def execute(self, words: Words, console: Console) -> int:
        """Measure, and print the table."""
        training = TrainingConfig(batch_size=self.batch_size, grad_accum=self.grad_accum)
        config = BenchConfig(model=self.model, data=DataConfig(max_length=self.max_length), training=training)
        check(config)
        check_ranges(self)
        quiet_libraries()
        from iterbatch.bench.price import as_json, measure

        if self.json:
            content = as_json(measure(config, self.seconds), config)
            sys.stdout.write(json.dumps(content, indent=2) + "\n")  # plain, for another program
            return 0
        with console.status(_("loading the model")) as status:
            measured = measure(config, self.seconds, status.update)
        print_prices(console, measured, config)
        return 0


def print_prices(console: Console, measured: "Sequence[Placement]", config: BenchConfig) -> None:
    """The table, and what it recommends."""
    from iterbatch.bench.price import recommend

    training = config.training
    micro = f" x {training.grad_accum}" if training.grad_accum > 1 else ""
    size = _("batch {size}{micro} x {length}").format(
        size=training.batch_size, micro=micro, length=config.max_length
    )
    table = Table(
        title=_("Price of a pass, {size}, median of {rounds} rounds").format(
            size=size, rounds=measured[0].rounds
        )
    )
    for column in (
        "--lora_layers",
        _("fresh ms"),
        _("repeat ms"),
        _("rho measured"),
        _("rho in FLOPs"),
        _("prefix ms"),
        _("evaluation ms"),
        _("peak MB"),
        _("trained"),
    ):
        table.add_column(column, justify="left" if column.startswith("--") else "right")
    for each in measured:
        times = [f"{value:,.1f}" for value in (each.fresh_ms, each.repeat_ms)]
        ratios = [f"{value:.2f}" for value in (each.price_ratio_measured, each.price_ratio_flops)]
        rest = [
            f"{each.prefix_ms:,.1f}",
            f"{each.evaluation_ms:,.1f}",
            f"{each.peak_memory_mb:,.0f}",
            f"{each.parameters:,}",
        ]
        table.add_row(each.lora_layers, *times, *ratios, *rest)
    console.print(table)
    chosen, reason = recommend(list(measured))
    console.print(
        Text(
            _("Recommended: --lora_layers {lora_layers} ({reason}).").format(
                lora_layers=chosen.lora_layers, reason=reason
            )
        )
    )
    console.print(
        Text(
            _(
                "Fewer adapted layers also learn less: compare perplexities at equal compute, with a "
                "higher --lora_rank, before you settle."
            )
        )
    )
    _print_map(console, measured, config)


def _print_map(console: Console, measured: "Sequence[Placement]", config: BenchConfig) -> None:
    """What repeats were worth where most like this they were measured."""
    from iterbatch.bench.map import FAR, WAYS, nearest
    from iterbatch.bench.price import tokens_of

    tokens = tokens_of(config)
    table = Table(title=_("What repeats were worth in the study most like it"))
    for column in ("--lora_layers", *(_(way) for way in WAYS.values()), _("so"), ""):
        table.add_column(column)
    studies: list[str] = []
    for each in measured:
        cell = nearest(tokens, each.price_ratio_flops)
        if cell.name not in studies:
            studies.append(cell.name)
        worth = [cell.worth.get(way) for way in WAYS]
        words = [
            "" if one is None else f"{one.estimate:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in worth
        ]
        far = cell.distance(tokens, each.price_ratio_flops) > FAR
        so = _("too far to say") if far else _(WAYS[cell.best]) if cell.best else _("every batch once")
        table.add_row(each.lora_layers, *words, so, str(studies.index(cell.name) + 1))
    console.print(table)
    lines = [f"{number}: {name}." for number, name in enumerate(studies, start=1)]
    lines.append(
        _(
            "Numbers: compute that every batch once needs to end as low, over what was spent, with a 95% "
            "interval; above 1 it paid. Smaller batches are for where hardware allows them. A rule of thumb: "
            "docs/findings.md says what it rests on."
        )
    )
    console.print(Text("\n".join(lines)))
