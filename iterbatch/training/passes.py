"""One pass over a batch: learning rate, forward, backward, clip, update. What it costs is not known here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iterbatch.data.batch import MicroBatch
from iterbatch.model.lora import adapter_parameters
from iterbatch.model.sharded import whole
from iterbatch.training.noise import GradientNoise
from iterbatch.training.open_batch import OpenBatch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer


LEAST_WARMUP = 10  # updates: Adam's averages mean little before


def warmup_share(warmup: float, passes: int) -> float:
    """Share of the budget for the rise: at least ``LEAST_WARMUP`` updates, at most half of it.

    Args:
        warmup: Share that was asked for.
        passes: Fresh passes that the budget pays for.
    """
    return max(warmup, min(LEAST_WARMUP / passes, 0.5))


def schedule(fraction: float, warmup: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine to 0.

    Args:
        fraction: Of the budget spent, 0 to 1.
        warmup: Share of the budget for the rise.
    """
    if fraction < warmup:
        return fraction / warmup
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW on the adapters; beta2 0.99 follows the gradient of a short fine-tuning run."""
    parameters = adapter_parameters(model).values()
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


@dataclass(frozen=True)
class Pass:
    """What a pass shows: both numbers from before its update."""

    loss: float  # mean nats a label token
    gradient_norm: float  # before clipping

    @property
    def finite(self) -> bool:
        """Whether both are; the update was skipped where they are not."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Passes:
    """The model and its optimizer, and the one way to make a pass.

    Args:
        model: A :class:`iterbatch.model.cut.CutModel`, prepared by the accelerator.
        optimizer: Over the adapters, prepared by the accelerator.
        accelerator: Places tensors, casts, synchronises gradients. Its ``accumulate()`` is not
            used: it would mix batches when one is repeated.
        clip_norm: Largest gradient norm of an update.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator, clip_norm: float
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.clip_norm = clip_norm
        self._parameters = list(adapter_parameters(model).values())
        self._sharded = getattr(model, "sharded", False)

    def make(
        self,
        batch: OpenBatch,
        rate: float,  # learning rate of the update
        adjust: Callable[[float], None] | None = None,
        noise: GradientNoise | None = None,
    ) -> Pass:
        """One pass over a batch, with its update.

        ``adjust`` is given the loss, if it is finite, before the update, at the price of a wait for it;
        ``noise`` looks at the gradient of each micro-batch.
        """
        self.take_rate(rate)
        watched = noise is not None and self._sharded  # there a gradient can be seen when it is synchronised
        nats, last = torch.zeros((), device=self.accelerator.device), len(batch.batch.micro_batches) - 1
        # ------------------------------------------------------------------------------------------------
        for index, micro in enumerate(batch.batch.micro_batches):
            apart = index < last and not watched
            with self.accelerator.no_sync(self.model) if apart else contextlib.nullcontext():
                with self.accelerator.autocast():
                    micro_nats = self.model(batch.hidden(index), micro).sum()
                # Gradients are averaged over processes: times their number, over all label tokens, makes that
                # the mean a token.
                self.accelerator.backward(micro_nats * (self.accelerator.num_processes / batch.label_tokens))
            nats += micro_nats.detach()
            if noise is not None and index < last:
                self._look(noise, micro, batch)
        if adjust is not None and math.isfinite(known := float(self.total(nats)) / batch.label_tokens):
            adjust(known)
        norm = whole(torch.as_tensor(self.accelerator.clip_grad_norm_(self._parameters, self.clip_norm)))
        norm = norm.to(self.accelerator.device, torch.float32)
        self._skip_where_not_finite(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Read off the device only now, with the update queued: an accelerator never idles for the decision.
        loss, norm = torch.stack([self.total(nats) / batch.label_tokens, norm]).tolist()
        # ------------------------------------------------------------------------------------------------
        if noise is not None:
            noise.batch(norm, batch, self.totals)
        return Pass(loss, norm)

    def score(self, batch: OpenBatch) -> Tensor:
        """Nats of each row as the adapter is now, without gradients or dropout; (rows,) on this process."""
        self.model.eval()  # dropout would hide what a pass gained
        with torch.no_grad(), self.accelerator.autocast():
            micro_batches = enumerate(batch.batch.micro_batches)
            nats = [self.model(batch.hidden(index), micro).sum(dim=1) for index, micro in micro_batches]
        self.model.train()
        return torch.cat(nats)

    def take_rate(self, rate: float) -> None:
        """Set the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _look(self, noise: GradientNoise, micro: MicroBatch, batch: OpenBatch) -> None:
        """Show the gradient so far: this process's own, or that of all of them where the model is sharded."""
        rows, tokens = len(micro.input_ids), float(micro.label_tokens)
        if self._sharded:
            rows, tokens = micro.rows_in_all, self.totals(tokens)[0] / self.accelerator.num_processes
        share = tokens * self.accelerator.num_processes / batch.label_tokens
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        noise.micro_batch([whole(gradient) for gradient in gradients], rows, share)

    def weigh_gradient(self, weight: float) -> None:
        """Multiply the gradient that is there."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad *= weight

    @contextlib.contextmanager
    def shorter_memory(self, share: float) -> Iterator[None]:
        """For a share of a batch: Adam's beta2 to the power of the share, the same half-life in tokens."""
        groups = self.optimizer.param_groups
        before = [group["betas"] for group in groups]
        for group, (beta1, beta2) in zip(groups, before, strict=True):
            group["betas"] = (beta1, beta2**share)
        try:
            yield
        finally:
            for group, betas in zip(groups, before, strict=True):
                group["betas"] = betas

    def _skip_where_not_finite(self, norm: Tensor) -> None:
        """The fused optimizer skips an update on the device where ``found_inf`` says so."""
        if self.accelerator.scaler is None:
            inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            inner.found_inf = (~torch.isfinite(norm)).float()

    # -- processes -------------------------------------------------------------------------------------------

    def total(self, value: Tensor) -> Tensor:
        """Sum over processes, so that all of them decide alike: a rank-local decision would hang the job."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value, "sum")  # pyright: ignore[reportReturnType]

    def totals(self, *values: float) -> list[float]:
        """Sums over processes of numbers that are known on the host."""
        if self.accelerator.num_processes == 1:
            return list(values)
        return self.total(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)).tolist()
