"""Passes over a Trainer's windows, made with its own loss, clipping, optimizer and events."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iterbatch.data.batch import IGNORED
from iterbatch.errors import ModelError
from iterbatch.integrations.allowance import LoopAllowance
from iterbatch.model.base import SUPPORTED
from iterbatch.model.flops import FlopModel, flop_model
from iterbatch.reuse.in_model import PrefixReuse, reuse_of
from iterbatch.training.budget import Ledger
from iterbatch.training.passes import Pass
from iterbatch.training.whole_step import UnmeasuredPass, Window


@dataclass(eq=False)
class TrainerWindow(Window):
    """A window, with the count that the Trainer divides its loss by."""

    items: Any = None


@contextlib.contextmanager
def _own_metrics_kept(trainer: Any) -> Iterator[None]:
    """TRL's trainers average what every ``compute_loss`` finds: what is found here is left out of it."""
    names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(trainer, name)]
    before = {name: copy.deepcopy(getattr(trainer, name)) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


class TrainerPasses:
    """The window that is open, and the one way to make a further pass over one.

    Args:
        trainer: Whose loop it is.
        allowance: Its schedule follows it, where there is a budget.
        ledger: What has been spent.
    """

    def __init__(self, trainer: Any, allowance: LoopAllowance, ledger: Ledger) -> None:
        self._trainer, self._allowance, self._ledger = trainer, allowance, ledger
        self.making = False  # a further pass, which tells the trainer's callbacks as the trainer does
        self._window = TrainerWindow((), 0)
        self._model: Any = None  # as the trainer wraps it
        self._sum: Tensor | None = None
        self._prices: FlopModel | None = None
        self._reuse: PrefixReuse | None = None

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self._trainer.optimizer.param_groups[0]["lr"])

    # -- the fresh pass, which the trainer makes -------------------------------------------------------------

    def open(self, samples: Sequence[Mapping[str, Any]], items: Any, index: int, waiting: int) -> None:
        """Take note of the micro-batches that come next; copies, because SFTTrainer writes into them.

        ``waiting`` is how many other batches may still be repeated.
        """
        if self._model is None:
            self._look_at_model()
        copies = [dict(micro) for micro in samples]
        if self._reuse is not None:
            self._reuse.window = max(self._reuse.window, len(copies) * (1 + waiting))
        epoch = int((self._trainer.state.epoch or 0) + 1e-6)
        self._window = TrainerWindow(copies, index, epoch, self._label_tokens(copies, items), items=items)
        self._sum = None

    def add(self, model: Any, loss: Tensor) -> None:
        """A micro-batch of the current pass is done."""
        self._model = model
        self._sum = loss if self._sum is None else self._sum + loss

    def close(self) -> tuple[TrainerWindow, Pass]:
        """The window, and its fresh pass."""
        window = self._window
        window.flops, window.repeat_flops = self._flops(window)
        return window, UnmeasuredPass(self._loss())

    # -- further passes --------------------------------------------------------------------------------------

    def make(self, window: Window) -> Pass:
        """One more pass over a window, with its update."""
        with _own_metrics_kept(self._trainer):
            return self._make(window)

    def _make(self, window: Window) -> Pass:
        assert isinstance(window, TrainerWindow)
        trainer, model, last = self._trainer, self._model, len(window.micro_batches) - 1
        self._follow_budget_within_a_batch()
        self.making, self._sum = True, None
        count, trainer.current_gradient_accumulation_steps = (
            trainer.current_gradient_accumulation_steps,
            len(window.micro_batches),
        )
        try:
            model.zero_grad()
            for place, micro in enumerate(window.micro_batches):
                trainer.accelerator.gradient_state._set_sync_gradients(place == last)
                apart = contextlib.nullcontext() if place == last else trainer.accelerator.no_sync(model)
                with apart:
                    trainer.training_step(model, dict(micro), window.items)
                trainer.current_flos += float(trainer.floating_point_ops(micro))
            norm = self._update()
        finally:
            self.making, trainer.current_gradient_accumulation_steps = False, count
        window.repeat_flops = self._flops(window)[0]
        return Pass(self._loss(), norm) if norm is not None else UnmeasuredPass(self._loss())

    def _update(self) -> float | None:
        trainer = self._trainer
        norm = None
        if trainer.args.max_grad_norm > 0:
            norm = float(
                trainer.accelerator.clip_grad_norm_(self._model.parameters(), trainer.args.max_grad_norm)
            )
        tell = trainer.callback_handler
        trainer.control = tell.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.step()
        trainer.control = tell.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        return norm

    @torch.no_grad()
    def score(self, batch: Any) -> float:
        """Loss of a batch as the model is now, without dropout."""
        trainer, model = self._trainer, self._model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with _own_metrics_kept(trainer), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
        finally:
            for module, training in modes.items():
                module.training = training
        return self._mean(loss.detach().float().mean())

    # -- schedule --------------------------------------------------------------------------------------------

    def forget_model(self) -> None:
        """Training begins, perhaps on another model."""
        self._model = self._prices = self._reuse = None

    def follow_budget(self) -> None:
        """Have the trainer's schedule, which moves on after this, stand where the budget is spent."""
        if self._allowance.unit is not None:
            self._trainer.lr_scheduler.last_epoch = self._allowance.position(self._ledger) - 1

    def _follow_budget_within_a_batch(self) -> None:
        if self._allowance.unit is None:
            return
        scheduler, place = self._trainer.lr_scheduler, self._allowance.position(self._ledger)
        for group, base, rule in zip(
            self._trainer.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * rule(place)

    # -- numbers ---------------------------------------------------------------------------------------------

    def _loss(self) -> float:
        """Of the pass that was made: its micro-batches' losses are shares of it."""
        assert self._sum is not None
        return self._mean(self._sum.float())

    def _mean(self, value: Tensor) -> float:
        """Over processes, so that all of them decide alike."""
        accelerator = self._trainer.accelerator
        several = accelerator.num_processes > 1
        return float(accelerator.reduce(value, "mean") if several else value)

    def _label_tokens(self, window: Sequence[Mapping[str, Any]], items: Any) -> int:
        """Of a window, over all processes."""
        trainer = self._trainer
        if items is not None and trainer.args.average_tokens_across_devices:
            # One for each GPU of a DataParallel, all alike.
            return int(items.flatten()[0] if isinstance(items, Tensor) else items)
        labels = [micro["labels"] for micro in window if isinstance(micro.get("labels"), Tensor)]
        return round(
            self.totals(sum(int((each[..., 1:] != IGNORED).sum()) for each in labels if each.ndim > 1))[0]
        )

    def totals(self, *values: float) -> list[float]:
        """Sums over processes of numbers that differ between them: whoever decides by them decides alike."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return list(values)
        return accelerator.reduce(torch.tensor(values, device=accelerator.device), "sum").tolist()

    def _look_at_model(self) -> None:
        """Price passes as our own loop does, where the model is a LLaMA with LoRA."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        self._reuse = reuse_of(model)
        if hasattr(model, "peft_config") and getattr(model.config, "model_type", "") in SUPPORTED:
            with contextlib.suppress(ModelError):
                self._prices = flop_model(model, self._trainer.args.gradient_checkpointing)

    def _flops(self, window: Window) -> tuple[float, float]:
        """Of the pass that was just made over a window, and of one that is given all of its prefix."""
        if self._prices is None:
            whole = sum(float(self._trainer.floating_point_ops(micro)) for micro in window.micro_batches)
            whole = self.totals(whole)[0]
            return whole, whole
        shapes = [tuple(micro["input_ids"].shape) for micro in window.micro_batches]
        given, prefix = self._prices.repeat(shapes), self._prices.prefix.of(shapes)
        if self._reuse is None:
            whole = self.totals(given + prefix)[0]
            return whole, whole
        made, given = self.totals(given + self._prices.prefix.of(self._reuse.take_computed()), given)
        return made, given
