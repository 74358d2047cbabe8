"""What an arm may spend, what it has spent, and what a pass costs.

What lives here: the FLOP model, the ledger, the allowance. What does not: spending, which happens in :mod:`iterbatch.training.step` alone.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

UNITS = ("epochs", "flops", "updates", "tokens", "seconds")
Shape = tuple[int, int]  # (rows, length) of a micro-batch


# --------------------------------------------------------------------------------------------------------------------------------------
# What a pass costs


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer as the FLOP model sees it.

    Each projection is (inputs, outputs, rank), rank 0 where it has no adapter.
    """

    attention_in: tuple[tuple[int, int, int], ...]  # q, k, v
    attention_out: tuple[tuple[int, int, int], ...]  # o
    mlp_in: tuple[tuple[int, int, int], ...]  # gate, up
    mlp_out: tuple[tuple[int, int, int], ...]  # down
    score_width: int  # heads x head width

    @property
    def adapted(self) -> bool:
        """Whether any projection has an adapter."""
        groups = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out)
        return any(rank for group in groups for _, _, rank in group)


@dataclass(frozen=True)
class Cost:
    """FLOPs as a function of tokens n and block length L: ``n * (per_token + per_token_length * L)``."""

    per_token: float = 0.0
    per_token_length: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.per_token + other.per_token, self.per_token_length + other.per_token_length)

    def of(self, shapes: Sequence[Shape]) -> float:
        """FLOPs of micro-batches of these shapes."""
        return float(sum(rows * length * (self.per_token + self.per_token_length * length) for rows, length in shapes))


def _forward(layer: LayerShape) -> Cost:
    projections = (*layer.attention_in, *layer.attention_out, *layer.mlp_in, *layer.mlp_out)
    linear = sum(2 * inputs * outputs + 2 * rank * (inputs + outputs) for inputs, outputs, rank in projections)
    return Cost(linear, 4 * layer.score_width)  # QK^T and AV over the full square, as the field counts them


def _backward(layer: LayerShape, live: bool) -> tuple[Cost, bool]:
    """Backward of one layer; ``live`` says whether its input needs a gradient. Returns the cost and whether its output does.

    Frozen weights have no gradient. A projection costs its input-gradient (2 in out) where its input is live, an adapter its two weight
    gradients and the gradient between its matrices, and its own input-gradient where its input is live.
    """
    total = 0.0
    scores = 0.0
    for group in (layer.attention_in, layer.attention_out, layer.mlp_in, layer.mlp_out):
        for inputs, outputs, rank in group:
            total += (2 * inputs * outputs + 2 * rank * inputs) * live + 2 * rank * (inputs + 2 * outputs)
        live = live or any(rank for _, _, rank in group)
        if group is layer.attention_in:
            scores = 8.0 * layer.score_width * live
    return Cost(total, scores), live


@dataclass(frozen=True)
class FlopModel:
    """Analytic FLOPs of LoRA training with frozen weights. A multiply-add counts 2; norms, softmax and the optimizer count nothing.

    Forward: 2N a token, attention scores, adapters, head. Backward: input-gradients from the head down to the lowest adapter, and adapter
    gradients. Source: this project; tested against ``torch.utils.flop_counter``.
    """

    prefix: Cost  # forward of the layers below the lowest adapter
    adapted_forward: Cost
    adapted_backward: Cost
    head: Cost  # forward; its input-gradient costs the same
    checkpointing: bool = False

    @classmethod
    def of(cls, layers: Sequence[LayerShape], hidden: int, vocabulary: int, checkpointing: bool = False) -> "FlopModel":
        """Build from the layers in order, input side first."""
        cut = next((index for index, layer in enumerate(layers) if layer.adapted), len(layers))
        prefix = sum((_forward(layer) for layer in layers[:cut]), Cost())
        forward, backward, live = Cost(), Cost(), False
        for layer in layers[cut:]:
            forward = forward + _forward(layer)
            cost, live = _backward(layer, live)
            backward = backward + cost
        return cls(prefix, forward, backward, Cost(2.0 * hidden * vocabulary), checkpointing)

    def forward(self, shapes: Sequence[Shape]) -> float:
        """FLOPs of scoring without gradients."""
        return (self.prefix + self.adapted_forward + self.head).of(shapes)

    def fresh(self, shapes: Sequence[Shape]) -> float:
        """FLOPs of a fresh pass: forward and backward of everything."""
        recompute = self.adapted_forward if self.checkpointing else Cost()
        return self.forward(shapes) + (self.adapted_backward + self.head + recompute).of(shapes)

    def repeat(self, shapes: Sequence[Shape]) -> float:
        """FLOPs of a pass that is given its prefix activations: a fresh pass without the prefix."""
        return self.fresh(shapes) - self.prefix.of(shapes)

    def price_ratio(self, shapes: Sequence[Shape]) -> float:
        """rho: cost of a repeat over cost of a fresh pass; 1 where there is no prefix."""
        return self.repeat(shapes) / self.fresh(shapes)


# --------------------------------------------------------------------------------------------------------------------------------------
# What has been spent


@dataclass
class Ledger:
    """Where every forward and backward is charged, at the moment it is spent. Evaluation, checkpoints and logging are off its clock."""

    batches: int = 0
    updates: int = 0
    skipped_updates: int = 0  # passes whose loss or gradient was not finite
    tokens_unique: int = 0  # label tokens of text met for the first time
    tokens_trained: int = 0  # label tokens of all passes
    flops_fresh: float = 0.0
    flops_repeat: float = 0.0
    flops_probe: float = 0.0
    train_seconds: float = 0.0
    seconds_charged: float = 0.0  # part of train_seconds: prefixes this arm met first but another had computed, at what they took then
    flops_saved: float = 0.0  # prefixes not computed and not charged: of repeats, and of later epochs
    seconds_saved: float = 0.0  # what those prefixes took when they were computed
    nonfinite_losses: int = 0  # passes
    nonfinite_gradients: int = 0  # passes whose loss was finite
    scaler_skips: int = 0  # passes whose float16 gradient overflowed; the scaler lowers its scale
    rollbacks: int = 0  # returns to a checkpoint after the arm diverged
    flops_lost: float = 0.0  # spent on batches that a return has undone; they stay charged

    @property
    def flops(self) -> float:
        """All FLOPs charged."""
        return self.flops_fresh + self.flops_repeat + self.flops_probe + self.flops_lost

    @property
    def passes(self) -> int:
        """Passes made, whether their update was taken or skipped."""
        return self.updates + self.skipped_updates

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Run the training clock while the block runs."""
        self._start()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the training clock, if it runs, for what is not training; the seconds so far are counted when the block begins."""
        running = self._stop()
        try:
            yield
        finally:
            if running:
                self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()

    def _stop(self) -> bool:
        since: float | None = vars(self).pop("_since", None)
        if since is not None:
            self.train_seconds += time.perf_counter() - since
        return since is not None

    def state_dict(self) -> dict[str, Any]:
        """All counters."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over all counters."""
        for name, value in state.items():
            setattr(self, name, value)

    def keep_spent(self, before: "Ledger") -> None:
        """After a return to earlier counters: what had been spent stays charged, every fault stays counted.

        Args:
            before: The ledger as it was when the arm was sent back.
        """
        for name in ("train_seconds", "nonfinite_losses", "nonfinite_gradients", "scaler_skips"):
            setattr(self, name, getattr(before, name))
        self.flops_lost += before.flops - self.flops
        self.rollbacks = before.rollbacks + 1


@dataclass(frozen=True)
class Allowance:
    """What an arm may spend, in one unit: ``epochs`` is counted in batches, ``tokens`` in trained label tokens.

    The learning rate follows the fraction spent, so every arm ends fully decayed.
    """

    unit: str
    amount: float  # batches for 'epochs'; FLOPs, updates, tokens or seconds for the others
    baseline_passes: int  # fresh passes that the allowance pays for
    last_pass: float = 0.0  # price of the baseline's last pass, in the unit; 0 stands for an average one

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unknown budget unit '{self.unit}'; choose from {', '.join(UNITS)}")
        if not self.amount > 0:
            raise ValueError(f"a budget of {self.amount} {self.unit} pays for nothing; it must be above 0")

    def spent(self, ledger: Ledger) -> float:
        """How much of the unit the ledger shows."""
        return {
            "epochs": ledger.batches,
            "flops": ledger.flops,
            "updates": ledger.passes,
            "tokens": ledger.tokens_trained,
            "seconds": ledger.train_seconds,
        }[self.unit]

    def fraction(self, ledger: Ledger) -> float:
        """Fraction spent; reaches 1 when the arm is over."""
        return self.spent(ledger) / self.amount

    def exhausted(self, ledger: Ledger) -> bool:
        """Whether less than half of the baseline's last pass is left: the arm ends at the pass nearest to its allowance."""
        return self.spent(ledger) > self.amount - 0.5 * (self.last_pass or self._pass(ledger))

    def schedule_fraction(self, ledger: Ledger) -> float:
        """Fraction at the middle of the coming pass: where on its schedule the learning rate stands, above 0 and at most 1."""
        return min(1.0, self.fraction(ledger) + 0.5 * self._pass(ledger) / self.amount)

    def _pass(self, ledger: Ledger) -> float:
        """An average pass, in the unit: the baseline's; in seconds this arm's own, as soon as it has made one."""
        if self.unit == "seconds" and ledger.passes:
            return ledger.train_seconds / ledger.passes
        return self.amount / self.baseline_passes

    def affords(self, ledger: Ledger, repeat_flops: float, label_tokens: int) -> bool:
        """Whether one more repeat fits into what is left. Counted in epochs a repeat is free: that is the original experiment's budget."""
        if self.unit == "epochs":
            return True
        price = {"flops": repeat_flops, "updates": 1, "tokens": label_tokens, "seconds": self._pass(ledger)}[self.unit]
        return self.spent(ledger) + price <= self.amount
