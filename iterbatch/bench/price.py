"""What a fresh pass and a repeat cost on this machine, for several placements of the adapters.

Measures the passes that training makes (:mod:`iterbatch.training.step`), on random tokens: the time
does not depend on what they say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from iterbatch.bench.map import FAR, nearest
from iterbatch.config import BenchConfig
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.model.base import PRECISION, load_base
from iterbatch.model.cut import CutModel
from iterbatch.model.flops import flop_model
from iterbatch.model.lora import adapted_layers, attach_adapter
from iterbatch.model.weights import load_weights
from iterbatch.records.machine import peak_memory_mb, reset_peak_memory
from iterbatch.reuse.prefix import PrefixSource
from iterbatch.runtime.processes import make_accelerator
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.training.charges import Account
from iterbatch.training.passes import Passes, make_optimizer
from iterbatch.training.step import StepSettings, TrainingStep

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

CHEAP = 0.6  # a repeat at most this dear is where repetition was seen to pay
LEAST_ROUNDS, MOST_ROUNDS = 3, 25


@dataclass(frozen=True)
class Placement:
    """One placement of the adapters. Times are medians over rounds, of one batch."""

    lora_layers: str
    price_ratio_measured: float  # median over rounds of repeat / fresh
    price_ratio_flops: float
    fresh_ms: float
    repeat_ms: float
    prefix_ms: float
    evaluation_ms: float  # forward alone, all layers, without gradients
    peak_memory_mb: float  # of the process, or of the accelerator where there is one
    parameters: int  # trained
    rounds: int


def placements(layers: int) -> list[str]:
    """All, top half, top quarter and top 2 of the layers, without doubles, as ``--lora_layers`` has them."""
    tops = sorted({count for count in (layers // 2, layers // 4, 2) if 0 < count < layers}, reverse=True)
    return ["all", *(f"top:{count}" for count in tops)]


def recommend(measured: list[Placement]) -> tuple[Placement, str]:
    """The placement with the most adapted layers whose repeat is cheap, or else the cheapest; and why."""
    cheap = [placement for placement in measured if placement.price_ratio_measured <= CHEAP]
    if cheap:
        return (
            cheap[0],
            _(
                "the most layers whose repeats cost at most {cheap:g} of a fresh pass, and so do later "
                "epochs with --reuse epoch"
            ).format(cheap=CHEAP),
        )
    best = min(measured, key=lambda placement: placement.price_ratio_measured)
    return best, _(
        "no placement brings a repeat to {cheap:g} of a fresh pass here; this one comes nearest"
    ).format(cheap=CHEAP)


def measure(
    config: BenchConfig, seconds: float, notify: Callable[[str], None] = lambda _: None
) -> list[Placement]:
    """Measure every placement in turn, round after round: a machine whose speed drifts treats all alike.

    Args:
        config: Model, batch size and block length; the text is not used.
        seconds: Time for the rounds; at least ``LEAST_ROUNDS`` are made.
        notify: Is notified of how far it is.

    Raises:
        UserError: where the model cannot be used.
    """
    base = load_base(config)
    if base.layers < 2:
        raise ConfigError(
            _("'{model_path}' has {layers} layer; there is no placement to choose").format(
                model_path=config.model_path, layers=base.layers
            )
        )
    accelerator = make_accelerator(PRECISION[base.dtype])
    model = load_weights(base, config.model)
    times: dict[str, list[tuple[float, ...]]] = {spec: [] for spec in placements(base.layers)}
    facts: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        elapsed = time.perf_counter() - start
        if done >= LEAST_ROUNDS and elapsed + elapsed / done > seconds:
            break
        for spec in reversed(
            times
        ):  # cheapest first: memory that a process has freed still counts as its own
            adapted = attach_adapter(model, base.dtype, config.model, adapted_layers(spec, base.layers))
            reset_peak_memory()
            probe = Probe(adapted, accelerator, config)
            times[spec].append(probe.round())
            figures = {
                "price_ratio_flops": probe.price_ratio_flops,
                "parameters": probe.parameters,
                "peak_memory_mb": peak_memory_mb(),
            }
            facts.setdefault(spec, figures)
            model = adapted.unload()
            accelerator.free_memory()
            notify(_("round {done}, --lora_layers {spec}").format(done=done + 1, spec=spec))
    return [_placement(spec, rounds, facts[spec]) for spec, rounds in times.items()]


def _placement(spec: str, rounds: list[tuple[float, ...]], facts: dict[str, Any]) -> Placement:
    fresh, repeat, prefix, evaluation = (
        1e3 * statistics.median(column) for column in zip(*rounds, strict=True)
    )
    ratio = statistics.median(each[1] / each[0] for each in rounds)
    return Placement(
        spec,
        ratio,
        fresh_ms=fresh,
        repeat_ms=repeat,
        prefix_ms=prefix,
        evaluation_ms=evaluation,
        rounds=len(rounds),
        **facts,
    )


class Probe:
    """The passes of one placement: one round of each after a warm-up."""

    def __init__(self, model: PeftModel, accelerator: Accelerator, config: BenchConfig) -> None:
        self.accelerator = accelerator
        self.cut = CutModel(model.train())
        self.cut.to(accelerator.device)
        optimizer = accelerator.prepare_optimizer(make_optimizer(model, config.lr, 0.0))
        prices = flop_model(model, config.model.gradient_checkpointing)
        passes = Passes(self.cut, optimizer, accelerator, config.training.clip_norm)
        account, source = (
            Account(prices, Ledger(), Allowance("epochs", 1e6, 1)),
            PrefixSource(self.cut, accelerator.device),
        )
        self.batches = _random_batches(config, model.config.vocab_size)
        self.step = TrainingStep(passes, account, StepSettings(config.lr), source, self.batches.batch)
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shapes = next(self.batches).shapes
        self.price_ratio_flops, self.fresh_flops = prices.price_ratio(shapes), prices.fresh(shapes)

    def round(self) -> tuple[float, float, float, float]:
        """Seconds of a fresh pass, a repeat, the prefix and an evaluation."""
        self.step(next(self.batches))
        batch = next(self.batches).to(self.accelerator.device)
        with self.accelerator.autocast():
            prefix = self._timed(lambda: [self.cut.prefix(micro) for micro in batch.micro_batches])
            with torch.no_grad():
                evaluation = self._timed(
                    lambda: [self.cut(self.cut.prefix(micro), micro) for micro in batch.micro_batches]
                )
        fresh, repeat = self._timed(lambda: self.step(batch)), self._timed(self.step.again)
        return fresh, repeat, prefix, evaluation

    def _timed(self, work: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def _random_batches(config: BenchConfig, vocabulary: int) -> BatchStream:
    rows = config.training.batch_size * config.training.grad_accum
    tokens = torch.randint(
        0, vocabulary, (4 * rows, config.max_length), generator=torch.Generator().manual_seed(0)
    )
    blocks, training = Blocks.of(tokens.numpy()), config.training
    return BatchStream(blocks, training.batch_size, training.grad_accum, seed=0)


def tokens_of(config: BenchConfig) -> int:
    """Tokens of a batch, every block full."""
    return config.training.batch_size * config.training.grad_accum * config.max_length


def as_json(measured: list[Placement], config: BenchConfig) -> dict[str, Any]:
    """What ``--json`` prints."""
    chosen, reason = recommend(measured)
    return {
        "batch_size": config.training.batch_size,
        "grad_accum": config.training.grad_accum,
        "max_length": config.max_length,
        "placements": [
            {**asdict(each), "measured_elsewhere": _elsewhere(tokens_of(config), each)} for each in measured
        ],
        "recommended": chosen.lora_layers,
        "reason": reason,
    }


def _elsewhere(tokens: int, placement: Placement) -> dict[str, Any]:
    cell = nearest(tokens, placement.price_ratio_flops)
    return {**asdict(cell), "too_far": cell.distance(tokens, placement.price_ratio_flops) > FAR}
