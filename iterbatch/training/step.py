"""The one place that spends compute: fresh pass, repeat, update, probe; each is charged to the ledger when it is spent.

What does not live here: how often a batch is repeated (:mod:`iterbatch.strategy`) and what a pass costs (:mod:`iterbatch.training.budget`).
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iterbatch.training.budget import Allowance, FlopModel, Ledger, Shape
from iterbatch.model.cut import CutModel
from iterbatch.data.data_loader import Batch, MicroBatch
from iterbatch.model.load import adapter_parameters, copy_adapter, set_adapter
from iterbatch.records.record import BatchRecord
from iterbatch.reuse.prefix import PrefixSource, Receipt


@dataclass(frozen=True)
class StepSettings:
    """How an update is made."""

    lr: float  # peak learning rate
    warmup: float = 0.03  # share of the budget
    clip_norm: float = 1.0
    reuse: bool = True  # keep the prefix activations of a batch for its repeats


def schedule(fraction: float, warmup: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine to 0.

    Args:
        fraction: Of the budget spent, 0 to 1.
        warmup: Share of the budget for the rise.
    """
    if fraction < warmup:
        return fraction / warmup
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def make_optimizer(model: Any, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW on the adapters; beta2 0.99 follows the gradient of a short fine-tuning run."""
    return torch.optim.AdamW(adapter_parameters(model).values(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


class Snapshot(dict[str, Tensor]):
    """A copy of the adapter, by parameter."""


_NUMBERS = ("learning_rate", "_gradient_norm", "_prefix_flops", "_prefix_seconds")  # what a pass leaves in the step for what comes after it


class TrainingStep:
    """``step`` as a strategy sees it: ``step(batch)`` is the fresh pass, ``step.again()`` a repeat.

    Args:
        model: A :class:`iterbatch.model.cut.CutModel`, prepared by the accelerator.
        optimizer: Over the adapters, prepared by the accelerator.
        accelerator: Places tensors, casts, synchronises gradients. Its ``accumulate()`` is not used: it would mix batches when one is repeated.
        flop_model: What a pass costs.
        ledger: What has been spent.
        allowance: What may be spent; the learning rate follows it.
        settings: Learning rate, clipping, reuse.
        source: Of the training text's prefix activations; default: without a store.
        after_pass: Called after each pass, where a checkpoint may be made.
        batch_at: Any batch of the stream by its index, for batches that were held when a checkpoint was made.

    What it has told the strategy about the current batch is part of its state: a batch that was cut off between two passes is given to the
    strategy again, is told the same up to there, and goes on.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        accelerator: Any,
        flop_model: FlopModel,
        ledger: Ledger,
        allowance: Allowance,
        settings: StepSettings,
        source: PrefixSource | None = None,
        after_pass: Callable[[], None] = lambda: None,
        batch_at: Callable[[int], Batch] | None = None,
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.flop_model, self.ledger, self.allowance, self.settings = flop_model, ledger, allowance, settings
        self.learning_rate = 0.0
        cut: CutModel = accelerator.unwrap_model(model)
        self._source = source or PrefixSource(cut, accelerator.device)
        self._keeps = settings.reuse and cut.cut > 0
        self._parameters = list(adapter_parameters(model).values())
        self._after_pass, self._batch_at = after_pass, batch_at
        self._held: dict[int, tuple[Batch, dict[int, Tensor]]] = {}  # by index: batches for later, with their prefix activations
        self._base_nats: dict[int, float] = {}  # by block: nats under the base
        self._gradient_norm = 0.0
        self._told: list[tuple[Any, dict[str, float]]] = []  # about the current batch: each answer, and the numbers that held after it
        self._replay: list[tuple[Any, dict[str, float]]] = []  # answers from before an interruption that are still to be given again
        self._recorded = (0.0, 0)
        self._revisited: list[int] = []  # while the current batch was
        self._entered: Batch | None = None
        self._enter(Batch(()))

    def begin(self) -> None:
        """A batch is about to begin, or to go on."""
        self._told, self._revisited = [], []
        if not self._replay:
            self._recorded = (self.ledger.flops - self.ledger.flops_lost, self.ledger.skipped_updates)

    # -- what a strategy uses ----------------------------------------------------------------------------------------------------------

    def __call__(self, batch: Batch) -> float:
        """Fresh pass on a new batch, and its update. Returns the initial loss, mean nats a label token."""
        self._enter(batch)
        return self._tell(self._fresh, passed=True)

    def again(self) -> float:
        """A repeat on the same batch, and its update. Returns its loss before that update."""
        return self._tell(self._repeat, passed=True)

    def affords_repeat(self) -> bool:
        """Whether one more repeat fits into the budget."""
        return self._tell(lambda: self.allowance.affords(self.ledger, self._repeat_flops, self._label_tokens))

    @property
    def price_ratio(self) -> float:
        """Price ratio rho of the current batch: 1 where its fresh pass was given its prefix as well."""
        fresh = self.flop_model.repeat(self._batch.shapes) + self._prefix_flops
        return self._repeat_flops / fresh

    def snapshot(self) -> Snapshot:
        """A copy of the adapter."""
        return self._tell(lambda: Snapshot(copy_adapter(self.model)))

    def score(self, batch: Batch, adapter: dict[str, Tensor]) -> float:
        """Loss of a batch under a saved adapter, charged as a probe; the adapter in training is put back."""
        self._enter(batch)  # the activations stay for its fresh pass, which follows
        return self._tell(lambda: self._probe(adapter))

    def record(self, losses: list[float], planned: int, done: int | None = None) -> BatchRecord:
        """The record of the current batch, with all that was charged since it began, a probe before its fresh pass included.

        Seconds are filled in by the loop, whose clock is still running. ``done`` is for a batch whose passes are not its losses.
        """
        flops, skipped = self._recorded
        return BatchRecord(
            batch=self._batch.index,
            epoch=self._batch.epoch,
            initial_loss=losses[0],
            losses=losses,
            repeats_planned=planned,
            repeats_done=len(losses) if done is None else done,
            learning_rate=self.learning_rate,
            gradient_norm=self._gradient_norm,
            tokens=self._batch_tokens,
            flops=self.ledger.flops - self.ledger.flops_lost - flops,
            seconds=0.0,
            skipped_updates=self.ledger.skipped_updates - skipped,
            revisited=self._revisited,
        )

    # -- what some controls use --------------------------------------------------------------------------------------------------------

    def scaled(self, batch: Batch, factor: Callable[[float], float]) -> float:
        """Fresh pass whose update takes ``factor(initial loss)`` times the learning rate. Price: a fresh pass, and a wait for its loss."""
        self._enter(batch)
        return self._tell(lambda: self._fresh(lambda loss: self._take_rate(self.learning_rate * factor(loss))), passed=True)

    def weighted(self, batch: Batch, weight: Callable[[float], float]) -> float:
        """Fresh pass whose loss counts ``weight(initial loss)`` times, before clipping. Price: a fresh pass, and a wait for its loss."""
        self._enter(batch)
        return self._tell(lambda: self._fresh(lambda loss: self._weigh_gradient(weight(loss))), passed=True)

    def part(self, batch: Batch, number: int, parts: int) -> float:
        """Fresh pass on one of ``parts`` shares of the rows, with Adam's beta2 to the power of the share: the same half-life in tokens.

        Price: the share's. The batch counts as one, at its first part.
        """
        self._enter(batch.part(number, parts))
        self._batch_tokens = self._total(batch.label_tokens)
        return self._tell(lambda: self._share(self._label_tokens / self._batch_tokens, counts=number == 0), passed=True)

    def forward(self, batch: Batch) -> float:
        """Loss of a new batch without gradients. Price: a forward, as a probe; the prefix is there for the fresh pass, if one follows."""
        self._enter(batch)
        return self._tell(self._probe)

    def skip(self) -> None:
        """Let the current batch go untrained; it counts as a batch."""
        self._tell(self._skip, passed=True)

    def base_loss(self) -> float:
        """Loss of the current batch under the base. Price: a forward of the adapted part, as a probe, the first time a block is met."""
        return self._tell(self._base_loss)

    def hold(self) -> int:
        """Keep the current batch, with its prefix activations, for later. Price: their memory."""
        self._held[self._batch.index] = (self._batch, self._kept)
        return self._batch.index

    def revisit(self, held: int) -> float:
        """One pass and update on a held batch. Price: a repeat."""
        self._revisited.append(held)
        return self._tell(lambda: self._revisit(held), passed=True)

    def release(self, held: int) -> None:
        """Let a held batch go."""
        self._held.pop(held, None)

    # -- how a pass is made ------------------------------------------------------------------------------------------------------------

    def _fresh(self, before_update: Callable[[float], None] | None = None, *, counts: bool = True) -> float:
        batch = self._batch
        loss, self._gradient_norm = self._pass(before_update)
        self.ledger.batches += counts
        self.ledger.flops_fresh += self.flop_model.repeat(batch.shapes) + self._charge_prefix()
        self.ledger.tokens_unique += self._label_tokens if batch.first_exposure else 0
        return loss

    def _repeat(self) -> float:
        loss, _ = self._pass()
        self.ledger.flops_repeat += self.flop_model.repeat(self._batch.shapes) + self._charge_prefix()
        if self._keeps:
            self.ledger.flops_saved += self.flop_model.prefix.of(self._batch.shapes)
            self.ledger.seconds_saved += self._prefix_seconds
        return loss

    def _probe(self, adapter: dict[str, Tensor] | None = None) -> float:
        """Loss of the current batch without gradients, under a given adapter or the one in training."""
        loss = float(self._reduced(self._score(adapter).sum())) / self._label_tokens
        self._charge_probe(self._batch.shapes)
        return loss

    def _score(self, adapter: dict[str, Tensor] | None) -> Tensor:
        """Nats of each row of the current batch; the adapter in training is put back."""
        current = copy_adapter(self.model)
        set_adapter(self.model, adapter or current)
        nats = []
        with torch.no_grad(), self.accelerator.autocast():
            for index, micro in enumerate(self._batch.micro_batches):
                nats.append(self.model(self._hidden(index, micro), micro).sum(dim=1))
        set_adapter(self.model, current)
        return torch.cat(nats)

    def _charge_probe(self, shapes: Sequence[Shape]) -> None:
        """Charge a forward over ``shapes``, and the prefix of the current batch if it was fetched for it."""
        prefix = self._charge_prefix()  # due for the fresh pass anyway, unless that computes it once more
        self.ledger.flops_fresh += prefix if self._keeps else 0.0
        self.ledger.flops_probe += self.flop_model.forward(shapes) - self.flop_model.prefix.of(shapes) + (0.0 if self._keeps else prefix)

    def _base_loss(self) -> float:
        """The table of the base's nats a block, filled where it has none. Rows without a block have no entry, and are scored each time."""
        blocks = [block for micro in self._batch.micro_batches for block in micro.blocks or ()]
        known = len(blocks) == self._batch.rows and all(block in self._base_nats for block in blocks)
        if self._total(known) == self.accelerator.num_processes:  # all processes score, or none
            nats = torch.tensor(sum(self._base_nats[block] for block in blocks), device=self.accelerator.device)
        else:
            blank = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in copy_adapter(self.model).items()}
            rows = self._score(blank)  # an adapter whose B is 0 adds nothing
            self._base_nats.update(zip(blocks, rows.tolist(), strict=False))
            nats = rows.sum()
            self._charge_probe(self._batch.shapes)
        return float(self._reduced(nats)) / self._label_tokens

    def _share(self, share: float, *, counts: bool) -> float:
        groups = self.optimizer.param_groups
        before = [group["betas"] for group in groups]
        for group, (beta1, beta2) in zip(groups, before, strict=True):
            group["betas"] = (beta1, beta2**share)
        try:
            return self._fresh(counts=counts)
        finally:
            for group, betas in zip(groups, before, strict=True):
                group["betas"] = betas

    def _skip(self) -> None:
        self.ledger.batches += 1

    def _revisit(self, held: int) -> float:
        current = (self._batch, self._kept, self._label_tokens, self._gradient_norm, self._prefix_flops, self._prefix_seconds)
        self._batch, self._kept = self._held[held]
        self._label_tokens = self._total(self._batch.label_tokens)
        loss = self._repeat()
        self._batch, self._kept, self._label_tokens, self._gradient_norm, self._prefix_flops, self._prefix_seconds = current
        return loss

    def _take_rate(self, rate: float) -> None:
        self.learning_rate = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _weigh_gradient(self, weight: float) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad *= weight

    def _pass(self, before_update: Callable[[float], None] | None = None) -> tuple[float, float]:
        """Forward, backward and update on the current batch; returns its loss and the gradient's norm before clipping.

        ``before_update`` is told the loss, if it is finite, when the gradient is there, at the price of a wait for it.
        """
        self._set_learning_rate()
        nats = torch.zeros((), device=self.accelerator.device)
        last = len(self._batch.micro_batches) - 1
        for index, micro in enumerate(self._batch.micro_batches):
            # Gradients are averaged over processes: times their number, over all label tokens, makes that the mean a token.
            with contextlib.nullcontext() if index == last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    micro_nats = self.model(self._hidden(index, micro), micro).sum()
                self.accelerator.backward(micro_nats * (self.accelerator.num_processes / self._label_tokens))
            nats += micro_nats.detach()
        if before_update is not None and math.isfinite(known := float(self._reduced(nats)) / self._label_tokens):
            before_update(known)
        norm = self._update()
        # Read off the device only now, with the update queued: an accelerator never idles for the decision.
        loss, norm = torch.stack([self._reduced(nats) / self._label_tokens, norm]).tolist()
        self._count(loss, norm)
        return loss, norm

    def _count(self, loss: float, norm: float) -> None:
        ledger, finite = self.ledger, math.isfinite(loss) and math.isfinite(norm)
        ledger.tokens_trained += self._label_tokens
        ledger.updates += finite
        ledger.skipped_updates += not finite
        if not math.isfinite(loss):
            ledger.nonfinite_losses += 1
        elif not finite and self.accelerator.scaler is None:
            ledger.nonfinite_gradients += 1
        elif not finite:
            ledger.scaler_skips += 1

    def _update(self) -> Tensor:
        """Clip and step. Where the gradient is not finite the fused optimizer skips the update on the device, without being asked."""
        norm = self.accelerator.clip_grad_norm_(self._parameters, self.settings.clip_norm)
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.accelerator.device)
        if self.accelerator.scaler is None:
            getattr(self.optimizer, "optimizer", self.optimizer).found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _set_learning_rate(self) -> None:
        fraction = self.allowance.schedule_fraction(self.ledger)
        self._take_rate(self.settings.lr * schedule(fraction, self.settings.warmup) * 0.5**self.ledger.rollbacks)

    # -- the frozen prefix -------------------------------------------------------------------------------------------------------------

    def _enter(self, batch: Batch) -> None:
        """Make a batch the current one, unless a probe has done so; activations of the one before it are let go."""
        if batch is not self._entered:
            self._entered, self._batch = batch, batch.to(self.accelerator.device)
            self._kept: dict[int, Tensor] = {}  # micro-batch to its prefix activations
            self._receipts: list[Receipt] = []  # not charged yet
            self._prefix_flops = self._prefix_seconds = 0.0
            self._label_tokens = self._batch_tokens = self._total(self._batch.label_tokens)

    def _hidden(self, index: int, micro: MicroBatch) -> Tensor:
        """Prefix activations of a micro-batch: kept from the fresh pass, or fetched."""
        if index in self._kept:
            return self._kept[index]
        hidden, receipt = self._source.fetch(micro)
        self._receipts.append(receipt)
        if self._keeps:
            self._kept[index] = hidden
        return hidden

    def _charge_prefix(self) -> float:
        """Charge what was fetched since the last charge, as if this arm ran alone; returns its FLOPs.

        An arm pays for a block when it meets it first, computed or served: in FLOPs, and in the seconds recorded when it was computed. Later it
        pays for what is computed. Called after a loss has been read: the device is done, and storing costs it nothing.
        """
        if not self._receipts:
            return 0.0
        seconds_computed = self._source.settle()
        computed, served, seconds_served = self._totals(
            sum(receipt.computed for receipt in self._receipts),
            sum(receipt.served for receipt in self._receipts),
            sum(receipt.seconds_served for receipt in self._receipts),
        )
        self._receipts.clear()
        seconds_served /= self.accelerator.num_processes  # they work side by side
        self._prefix_seconds = seconds_computed + seconds_served
        length = self._batch.shapes[0][1]
        if self._batch.first_exposure:
            self.ledger.train_seconds += seconds_served
            self.ledger.seconds_charged += seconds_served
            self._prefix_flops = self.flop_model.prefix.of(self._batch.shapes)
        else:
            self.ledger.flops_saved += self.flop_model.prefix.of([(int(served), length)])
            self.ledger.seconds_saved += seconds_served
            self._prefix_flops = self.flop_model.prefix.of([(int(computed), length)])
        return self._prefix_flops

    @property
    def _repeat_flops(self) -> float:
        prefix = 0.0 if self._keeps else self.flop_model.prefix.of(self._batch.shapes)
        return self.flop_model.repeat(self._batch.shapes) + prefix

    # -- going on from a checkpoint ----------------------------------------------------------------------------------------------------

    def _tell(self, answer: Callable[[], Any], *, passed: bool = False) -> Any:
        """Answer the strategy, or, in a batch that was cut off, give the answer it was given then."""
        if self._replay:
            told, numbers = self._replay.pop(0)
            vars(self).update(numbers)
            self._told.append((told, numbers))
            if not self._replay:
                self._fetch_again()
            return told
        told = answer()
        kept = weakref.ref(told) if isinstance(told, Snapshot) else told  # a copy that the strategy has let go of is let go of here too
        self._told.append((kept, {name: getattr(self, name) for name in _NUMBERS}))
        if passed:
            self._after_pass()
        return told

    @property
    def midway(self) -> bool:
        """Whether the coming batch was cut off between two of its passes."""
        return bool(self._replay)

    @property
    def finite(self) -> bool:
        """Whether all losses told about the current batch, and its gradient, were finite."""
        return all(math.isfinite(told) for told, _ in self._told if isinstance(told, float)) and math.isfinite(self._gradient_norm)

    def _fetch_again(self) -> None:
        """The prefix activations that were held when the batch was cut off; they have been charged."""
        if self._keeps:
            with self.ledger.paused(), self.accelerator.autocast():
                for index, micro in enumerate(self._batch.micro_batches):
                    self._hidden(index, micro)
                self._source.settle()
            self._receipts.clear()

    def _take_held(self, indices: Sequence[int]) -> None:
        """Batches that were held when a checkpoint was made, made again as they were."""
        self._held = {}
        for index in indices:
            assert self._batch_at is not None
            self._enter(self._batch_at(index))
            self._fetch_again()
            self.hold()

    def state_dict(self) -> dict[str, Any]:
        """What was told about the current batch, and what was recorded before it."""
        told = [(kept() if isinstance(kept, weakref.ref) else kept, numbers) for kept, numbers in self._told]
        base = {"blocks": np.array(list(self._base_nats), dtype=np.int64), "nats": np.array(list(self._base_nats.values()))}
        return {"told": told + self._replay, "recorded": self._recorded, "held": list(self._held), "base": base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of a batch, or at its beginning where nothing had been told."""
        self._replay = [(Snapshot(told) if isinstance(told, dict) else told, numbers) for told, numbers in state["told"]]
        self._recorded = tuple(state["recorded"])
        self._base_nats = dict(zip(state["base"]["blocks"].tolist(), state["base"]["nats"].tolist(), strict=True))
        self._take_held(state["held"])
        self._enter(Batch(()))

    # -- processes ---------------------------------------------------------------------------------------------------------------------

    def _reduced(self, value: Tensor) -> Tensor:
        """Sum over processes, so that all of them decide alike: a rank-local decision would hang the job."""
        return self.accelerator.reduce(value, "sum") if self.accelerator.num_processes > 1 else value

    def _total(self, count: int) -> int:
        return int(self._totals(count)[0])

    def _totals(self, *values: float) -> Sequence[float]:
        """Sums over processes of numbers that are known on the host."""
        if self.accelerator.num_processes == 1:
            return values
        return self._reduced(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)).tolist()
