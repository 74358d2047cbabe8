"""Repeats in a training loop of one's own: any model, any optimizer, plain PyTorch or Accelerate.

A causal language model of the LLaMA layout whose lowest layers are frozen goes the way of our own loop, so
its repeats skip the frozen prefix. Any other model is taken whole.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iterbatch.data.batch import IGNORED, Batch, MicroBatch
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.model.base import SUPPORTED
from iterbatch.model.cut import CutModel
from iterbatch.model.flops import flop_model
from iterbatch.records.record import BatchRecord
from iterbatch.reuse.prefix import PrefixSource
from iterbatch.strategy import BaseTrainingStrategy
from iterbatch.strategy.for_loop import needs_no_more_than_passes, strategy_for_loop
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.training.charges import Account
from iterbatch.training.noise import GradientNoise
from iterbatch.training.open_batch import OpenBatch
from iterbatch.training.passes import Pass, Passes
from iterbatch.training.step import Extras, StepSettings, TrainingStep
from iterbatch.training.whole_step import UNLIMITED, WholeStep, Window, weights_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

KNOWN = {"input_ids", "labels", "attention_mask"}  # what a batch may hold where the prefix is reused

Loss = Callable[[nn.Module, Any], Tensor]


class Repeater:
    """Trains a batch as often as a strategy says: ``record = repeater(batch)``, in place of a training step.

    A call makes the fresh pass (forward, backward, clipping, update), asks the strategy, and makes the
    repeats. The optimizer's gradients must be zero before, and are zero after it.

    Args:
        model: Any module, on its device and in training mode; with Accelerate, as it was prepared.
        optimizer: Over its parameters; with Accelerate, as it was prepared.
        strategy: A name of ``iterbatch.STRATEGIES``, a class or instance of one's own, or ``FILE.py:CLASS``.
        loss: ``loss(model, batch)``, a scalar with a gradient. Default: ``model(**batch).loss``.
        scheduler: Of the learning rate; its ``step()`` is called once a batch, after the fresh pass.
        accelerator: The one of one's own loop, if it has one.
        clip_norm: Largest gradient norm of an update; default: not clipped.
        budget: Passes in all; when it is spent, :attr:`exhausted` is true and no batch is repeated.
        probe: Batches that are never trained on, for strategies that measure what a pass gained
            (``learnable``).
        reuse: Whether repeats may skip a frozen prefix.
        seed: For strategies that draw random numbers.
        knobs: Of the strategy, by name.

    Raises:
        ConfigError: for a strategy that needs more than a loop can give, and knobs that it has not.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        strategy: str | type[BaseTrainingStrategy] | BaseTrainingStrategy = "abr",
        *,
        loss: Loss | None = None,
        scheduler: Any = None,
        accelerator: Any = None,
        clip_norm: float = math.inf,
        budget: int | None = None,
        probe: Sequence[Any] = (),
        reuse: bool = True,
        seed: int = 0,
        **knobs: Any,
    ) -> None:
        self.strategy = strategy_for_loop(strategy, seed, knobs, probes=bool(probe))
        accelerator = accelerator or PlainAccelerator(model)
        _check_accelerator(accelerator)
        passes = UNLIMITED if budget is None else budget
        allowance = Allowance("updates", passes, passes)
        shared = Ledger(), allowance, scheduler
        alone = getattr(accelerator, "num_processes", 1) == 1
        self.reuses = reuse and loss is None and alone and has_frozen_prefix(model)
        self._batches = 0
        if not self.reuses:
            needs_no_more_than_passes(self.strategy)
        if self.reuses:
            self._step: Any = _cut_step(model, optimizer, accelerator, clip_norm, shared, probe)
        else:
            passes = _WholePasses(model, optimizer, accelerator, clip_norm, loss or _own_loss)
            self._step = WholeStep(passes, *shared, probe)

    @property
    def ledger(self) -> Ledger:
        """What has been spent; FLOPs only where the prefix is reused."""
        return self._step.ledger

    @property
    def exhausted(self) -> bool:
        """Whether the budget of passes is spent."""
        return self._step.allowance.exhausted(self.ledger)

    def __call__(self, batch: Any) -> BatchRecord:
        """Train a batch, and repeat it as the strategy says.

        Args:
            batch: As one's loss takes it; a list of batches is an accumulation window, one update a pass. A
                list of tensors is one batch, as a DataLoader gives it.

        Returns:
            Its losses, one a pass, and what was planned and done.

        Raises:
            ConfigError: where the batch is not what the model takes.
        """
        # A DataLoader gives the parts of one batch as a list of tensors.
        several = isinstance(batch, list) and not any(isinstance(each, Tensor) for each in batch)
        micro_batches = batch if several else [batch]
        if not micro_batches:
            raise ConfigError(_("a batch is an empty list; give at least one micro-batch"))
        index, self._batches = self._batches, self._batches + 1
        if self.reuses:
            batch = Batch(tuple(map(as_micro_batch, micro_batches)), index)
            if not batch.label_tokens:
                raise ConfigError(_("the batch has no label to learn from; leave it out"))
        else:
            batch = Window(micro_batches, index)
        self._step.begin()
        begun = time.perf_counter()
        record = self.strategy.train_batch(batch, self._step)
        return _with_seconds(record, time.perf_counter() - begun)

    def state_dict(self) -> dict[str, Any]:
        """What the strategy has learned and what was spent.

        Batches that wait for a spaced repeat are left out.
        """
        return {
            "strategy": self.strategy.state_dict(),
            "ledger": self.ledger.state_dict(),
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.strategy.load_state_dict(state["strategy"])
        self.ledger.load_state_dict(state["ledger"])
        self._batches = state["batches"]


def _check_accelerator(accelerator: Any) -> None:
    """See that passes mean what they say.

    Raises:
        ConfigError: where several processes would decide alone, or gradients be divided twice.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if isinstance(accelerator, PlainAccelerator) and distributed and torch.distributed.get_world_size() > 1:
        raise ConfigError(_("several processes must decide alike; give accelerator=, the one of your loop"))
    if getattr(accelerator, "gradient_accumulation_steps", 1) != 1:
        raise ConfigError(
            _("Accelerate divides gradients by its gradient_accumulation_steps; give 1, and windows as lists")
        )


def _with_seconds(record: BatchRecord, seconds: float) -> BatchRecord:
    return BatchRecord(**{**vars(record), "seconds": seconds})


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


class PlainAccelerator:
    """What passes need of Accelerate, for a loop without it: one process, no scaler.

    Autocast is the caller's, around the whole call.
    """

    num_processes, scaler = 1, None

    def __init__(self, model: nn.Module) -> None:
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    autocast = staticmethod(contextlib.nullcontext)

    @staticmethod
    def no_sync(_: nn.Module) -> contextlib.AbstractContextManager[None]:
        """There is nobody to synchronise with."""
        return contextlib.nullcontext()

    @staticmethod
    def backward(loss: Tensor) -> None:
        """Gradients."""
        loss.backward()

    @staticmethod
    def clip_grad_norm_(parameters: Any, norm: float) -> Tensor:
        """Clip, and give the norm before."""
        return nn.utils.clip_grad_norm_(parameters, norm)


class _UsersRate:
    """A learning rate that is the user's: a pass may only scale it, for itself."""

    optimizer: Any

    @contextlib.contextmanager
    def rate_kept(self) -> Any:
        """After the block every group has its learning rate back."""
        groups = self.optimizer.param_groups
        self._rates = [group["lr"] for group in groups]
        try:
            yield
        finally:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate

    def take_rate(self, rate: float) -> None:
        """Scale every group as the first one is."""
        for group, own in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = own * (rate / self._rates[0] if self._rates[0] else 1.0)


def _drop_gradients_where_not_finite(optimizer: Any, norm: Tensor) -> None:
    """An update without gradients changes nothing, in any optimizer."""
    if not math.isfinite(float(norm)):
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """After the block every module trains, or does not, as before."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


# ------------------------------------------------------------------------------------------------------------
# With a frozen prefix


def has_frozen_prefix(model: Any) -> bool:
    """Whether a model is a LLaMA with LoRA on its upper layers alone, as our own loop trains it."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return False
    causal = model.get_base_model()
    config, layers = getattr(causal, "config", None), getattr(getattr(causal, "model", None), "layers", None)
    known = getattr(config, "model_type", "") in SUPPORTED
    sdpa = getattr(config, "_attn_implementation", "") == "sdpa"
    if not known or not sdpa or not isinstance(layers, nn.ModuleList):
        return False
    inside = {id(parameter) for parameter in layers.parameters()}
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not trained or any("lora_" not in name or id(each) not in inside for name, each in trained.items()):
        return False
    return CutModel(model).cut > 0


def as_micro_batch(batch: Any) -> MicroBatch:
    """A batch as Transformers takes it: its labels at their own places, not at those that predict them.

    Raises:
        ConfigError: where it holds something else than tokens, labels and a mask.
    """
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys() <= KNOWN:
        held = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError(
            _(
                "to reuse the frozen prefix a batch holds input_ids, labels and perhaps attention_mask; "
                "this one: {held}. Leave the rest out, or give reuse=False"
            ).format(held=held)
        )
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise ConfigError(
            _("attention_mask has {count} dimensions, not 2; give reuse=False").format(count=mask.ndim)
        )
    ahead = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    if mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        mask = None  # padding, if any, is on the right: causal attention does not see it
    return MicroBatch(ids, ahead, mask)


class _CutPasses(_UsersRate, Passes):
    """Passes of our own loop, with the user's optimizer and learning rate."""

    def make(
        self,
        batch: OpenBatch,
        rate: float,
        adjust: Callable[[float], None] | None = None,
        noise: GradientNoise | None = None,
    ) -> Pass:
        """As in our own loop."""
        torch.clear_autocast_cache()  # it would keep the weights of before the update
        with self.rate_kept():
            return super().make(batch, rate, adjust, noise)

    def score(self, batch: OpenBatch) -> Tensor:
        """As in our own loop; every module keeps its mode."""
        torch.clear_autocast_cache()
        with _modes_kept(self.model):
            return super().score(batch)

    def _skip_where_not_finite(self, norm: Tensor) -> None:
        _drop_gradients_where_not_finite(self.optimizer, norm)


class _CutStep(TrainingStep):
    """The step of our own loop, with the user's scheduler."""

    scheduler: Any = None

    def _rate(self) -> float:
        self.learning_rate = self.passes.optimizer.param_groups[0]["lr"]
        return self.learning_rate

    def _fresh(self, made: Pass, *, counts: bool = True) -> float:
        loss = super()._fresh(made, counts=counts)
        if counts and self.scheduler is not None:
            self.scheduler.step()
        return loss


def _cut_step(
    model: Any, optimizer: Any, accelerator: Any, clip_norm: float, shared: Any, probe: Sequence[Any]
) -> _CutStep:
    ledger, allowance, scheduler = shared
    cut = CutModel(model)
    account = Account(flop_model(model), ledger, allowance)
    extras = Extras([Batch((as_micro_batch(each),)) for each in probe])
    step = _CutStep(
        _CutPasses(cut, optimizer, accelerator, clip_norm),
        account,
        StepSettings(lr=0.0),
        PrefixSource(cut, accelerator.device),
        lambda index: Batch((), index),
        extras,
    )
    step.scheduler = scheduler
    return step


# ------------------------------------------------------------------------------------------------------------
# Any model


class _WholePasses(_UsersRate):
    """Passes through a whole model."""

    def __init__(
        self, model: nn.Module, optimizer: Any, accelerator: Any, clip_norm: float, loss: Loss
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.clip_norm, self._loss = clip_norm, loss
        self._parameters = [each for group in optimizer.param_groups for each in group["params"]]

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def make(self, window: Window) -> Pass:
        """One pass over a window, with its update."""
        torch.clear_autocast_cache()  # it would keep the weights of before the update
        total = torch.zeros((), device=self.accelerator.device)
        last = len(window.micro_batches) - 1
        weights = weights_of(window.micro_batches)
        for place, (micro, weight) in enumerate(zip(window.micro_batches, weights, strict=True)):
            apart = contextlib.nullcontext() if place == last else self.accelerator.no_sync(self.model)
            with apart:
                with self.accelerator.autocast():
                    loss = self._loss(self.model, micro)
                self.accelerator.backward(loss * weight)
            if weight:  # a micro-batch without a label has no loss
                total += loss.detach().float() * weight
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self._parameters, self.clip_norm))
        if self.accelerator.scaler is None:
            _drop_gradients_where_not_finite(self.optimizer, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Pass(self._mean(total), float(norm))

    @torch.no_grad()
    def score(self, batch: Any) -> float:
        """Its loss as the model is now, without dropout."""
        torch.clear_autocast_cache()
        with _modes_kept(self.model), self.accelerator.autocast():
            self.model.eval()
            loss = self._loss(self.model, batch)
        return self._mean(loss.float())

    def _mean(self, value: Tensor) -> float:
        """Over processes, so that all of them decide alike."""
        several = self.accelerator.num_processes > 1
        return float(self.accelerator.reduce(value, "mean") if several else value)
