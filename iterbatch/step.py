"""The one place that spends compute: fresh pass, repeat, update, probe; each is charged to the ledger when it is spent.

What does not live here: how often a batch is repeated (:mod:`iterbatch.strategy`) and what a pass costs (:mod:`iterbatch.budget`).
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from iterbatch.budget import Allowance, FlopModel, Ledger
from iterbatch.data_loader import IGNORED, Batch, MicroBatch
from iterbatch.model import adapter_parameters, copy_adapter, set_adapter
from iterbatch.record import BatchRecord


@dataclass(frozen=True)
class StepSettings:
    """How an update is made."""

    lr: float  # peak learning rate
    warmup: float = 0.03  # share of the budget
    clip_norm: float = 1.0


def schedule(fraction: float, warmup: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine to 0.

    Args:
        fraction: Of the budget spent, 0 to 1.
        warmup: Share of the budget for the rise.
    """
    if fraction < warmup:
        return fraction / warmup
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def token_nats(model: Any, micro: MicroBatch) -> Tensor:
    """Cross-entropy of every position of a micro-batch, in nats: (rows x length) float32, 0 where there is no label."""
    options = {}
    if micro.attention_mask is not None:
        options = {"attention_mask": micro.attention_mask, "position_ids": (micro.attention_mask.cumsum(1) - 1).clamp(min=0)}
    logits = model(input_ids=micro.input_ids, use_cache=False, **options).logits  # (rows, length, vocabulary)
    return functional.cross_entropy(logits.flatten(0, 1).float(), micro.labels.flatten(), ignore_index=IGNORED, reduction="none")


def make_optimizer(model: Any, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW on the adapters; beta2 0.99 follows the gradient of a short fine-tuning run."""
    return torch.optim.AdamW(adapter_parameters(model).values(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


class TrainingStep:
    """``step`` as a strategy sees it: ``step(batch)`` is the fresh pass, ``step.again()`` a repeat.

    Args:
        model: PEFT model, prepared by the accelerator.
        optimizer: Over the adapters, prepared by the accelerator.
        accelerator: Places tensors, casts, synchronises gradients. Its ``accumulate()`` is not used: it would mix batches when one is repeated.
        flop_model: What a pass costs.
        ledger: What has been spent.
        allowance: What may be spent; the learning rate follows it.
        settings: Learning rate and clipping.
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
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.flop_model, self.ledger, self.allowance, self.settings = flop_model, ledger, allowance, settings
        self.learning_rate = 0.0
        self._parameters = list(adapter_parameters(model).values())
        self._recorded = (ledger.flops, ledger.skipped_updates)  # as of the last record

    # -- what a strategy uses ----------------------------------------------------------------------------------------------------------

    def __call__(self, batch: Batch) -> float:
        """Fresh pass on a new batch, and its update. Returns the initial loss, mean nats a label token."""
        self._batch = self._place(batch)
        self._label_tokens = self._total(batch.label_tokens)
        loss, self._gradient_norm = self._pass()
        self.ledger.batches += 1
        self.ledger.flops_fresh += self._flops(self.flop_model.fresh)
        self.ledger.tokens_unique += self._label_tokens if batch.first_exposure else 0
        return loss

    def again(self) -> float:
        """A repeat on the same batch, and its update. Returns its loss before that update."""
        loss, _ = self._pass()
        self.ledger.flops_repeat += self._flops(self.flop_model.repeat)
        return loss

    def affords_repeat(self) -> bool:
        """Whether one more repeat fits into the budget."""
        return self.allowance.affords(self.ledger, self._flops(self.flop_model.repeat), self._label_tokens)

    @property
    def price_ratio(self) -> float:
        """Price ratio rho of the current batch."""
        return self.flop_model.price_ratio(self._batch.shapes)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the adapter."""
        return copy_adapter(self.model)

    def score(self, batch: Batch, adapter: dict[str, Tensor]) -> float:
        """Loss of a batch under a saved adapter, charged as a probe; the adapter in training is put back."""
        current = copy_adapter(self.model)
        set_adapter(self.model, adapter)
        placed = self._place(batch)
        with torch.no_grad(), self.accelerator.autocast():
            nats = torch.stack([token_nats(self.model, micro).sum() for micro in placed.micro_batches]).sum()
        set_adapter(self.model, current)
        self.ledger.flops_probe += self.flop_model.forward(batch.shapes) * self.accelerator.num_processes
        return float(self._reduced(nats)) / self._total(batch.label_tokens)

    def record(self, losses: list[float], planned: int) -> BatchRecord:
        """The record of the current batch, with all that was charged since the last record, a probe before its fresh pass included.

        Seconds are filled in by the loop, whose clock is still running.
        """
        flops, skipped = self._recorded
        self._recorded = (self.ledger.flops, self.ledger.skipped_updates)
        return BatchRecord(
            batch=self._batch.index,
            epoch=self._batch.epoch,
            initial_loss=losses[0],
            losses=losses,
            repeats_planned=planned,
            repeats_done=len(losses),
            learning_rate=self.learning_rate,
            gradient_norm=self._gradient_norm,
            tokens=self._label_tokens,
            flops=self.ledger.flops - flops,
            seconds=0.0,
            skipped_updates=self.ledger.skipped_updates - skipped,
        )

    # -- how a pass is made ------------------------------------------------------------------------------------------------------------

    def _pass(self) -> tuple[float, float]:
        """Forward, backward and update on the current batch; returns its loss and the gradient's norm before clipping."""
        self._set_learning_rate()
        nats = torch.zeros((), device=self.accelerator.device)
        last = len(self._batch.micro_batches) - 1
        for index, micro in enumerate(self._batch.micro_batches):
            # Gradients are averaged over processes: times their number, over all label tokens, makes that the mean a token.
            with contextlib.nullcontext() if index == last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    micro_nats = token_nats(self.model, micro).sum()
                self.accelerator.backward(micro_nats * (self.accelerator.num_processes / self._label_tokens))
            nats += micro_nats.detach()
        norm = self._update()
        # Read off the device only now, with the update queued: an accelerator never idles for the decision.
        loss, norm = torch.stack([self._reduced(nats) / self._label_tokens, norm]).tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.ledger.updates += finite
        self.ledger.skipped_updates += not finite
        self.ledger.tokens_trained += self._label_tokens
        return loss, norm

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
        self.learning_rate = self.settings.lr * schedule(fraction, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def _place(self, batch: Batch) -> Batch:
        micro_batches = tuple(micro.to(self.accelerator.device) for micro in batch.micro_batches)
        return Batch(micro_batches, batch.index, batch.epoch)

    def _flops(self, price: Callable[[list[tuple[int, int]]], float]) -> float:
        return price(self._batch.shapes) * self.accelerator.num_processes

    def _reduced(self, value: Tensor) -> Tensor:
        """Sum over processes, so that all of them decide alike: a rank-local decision would hang the job."""
        return self.accelerator.reduce(value, "sum") if self.accelerator.num_processes > 1 else value

    def _total(self, count: int) -> int:
        if self.accelerator.num_processes == 1:
            return count
        return int(self._reduced(torch.tensor(count, device=self.accelerator.device)))
