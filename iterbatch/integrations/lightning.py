"""Repeats inside Lightning: a module whose training step is its own, optimised by hand.

Lightning's loop goes on counting batches, evaluating and saving. Accumulation and clipping are done here,
because Lightning refuses them where optimisation is by hand; one pass a batch is automatic optimisation to
the last bit. ``global_step`` counts updates, as everywhere in Lightning, repeats included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.records.record import BatchRecord
from iterbatch.strategy.for_loop import Given, needs_no_more_than_passes, strategy_for_loop
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.training.whole_step import UNLIMITED, FollowingStep, UnmeasuredPass, Window

AUTOMATIC = (
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)  # of Lightning's own loop
NAME = "iterbatch"  # of what is kept in a checkpoint


class RepeatMixin:
    """In front of a module's class: ``class Mine(RepeatMixin, MyModule): pass``.

    The module goes on returning the loss from ``training_step``, has one optimizer, and may have schedulers,
    which step once a batch. What is done and spent is in :attr:`repeats`.

    Args:
        strategy: A name of ``iterbatch.STRATEGIES``, a class or instance of one's own, or ``FILE.py:CLASS``.
        knobs: Of the strategy, by name.
        accumulate: Micro-batches of an update; in place of ``Trainer(accumulate_grad_batches=...)``.
        clip_norm: Largest gradient norm; in place of ``Trainer(gradient_clip_val=...)``.
        budget: Passes in all; training stops when they are spent.
        probe: Batches that are never trained on, for strategies that measure what a pass gained.
        seed: For strategies that draw random numbers.

    Raises:
        ConfigError: for a strategy that needs more than a loop can give, and settings out of range.
    """

    repeats: Repeats

    def __init__(
        self,
        *args: Any,
        strategy: Given = "abr",
        knobs: Mapping[str, Any] | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        budget: int | None = None,
        probe: Sequence[Any] = (),
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        module: Any = self
        if not isinstance(module, LightningModule):
            raise ConfigError(
                _("{name} is no LightningModule; write class Mine(RepeatMixin, YourModule)").format(
                    name=type(self).__name__
                )
            )
        if accumulate < 1 or (budget is not None and budget < 1):
            raise ConfigError(_("accumulate and budget are whole numbers from 1 on"))
        own = [name for name in AUTOMATIC if getattr(type(self), name) is not getattr(LightningModule, name)]
        if own:
            raise ConfigError(
                _(
                    "{name} overrides {own}, which Lightning does not ask where optimisation is by hand"
                ).format(name=type(self).__name__, own=", ".join(own))
            )
        chosen = strategy_for_loop(strategy, seed, dict(knobs or {}), probes=bool(probe))
        needs_no_more_than_passes(chosen)
        module.automatic_optimization = False
        passes = ModulePasses(module, super().training_step, accumulate, clip_norm)  # pyright: ignore
        self.repeats = Repeats(passes, chosen, budget, probe)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step on a micro-batch; the last of a window is followed by its updates."""
        return self.repeats.micro_batch(args, kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As the module's; what a repeat would log is left out, so that means are those of batches."""
        if not self.repeats.passes.making:
            super().log(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def on_fit_start(self) -> None:
        """See that the budget can end training."""
        super().on_fit_start()  # pyright: ignore[reportAttributeAccessIssue]
        self.repeats.check_end()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip, where gradients are no longer scaled."""
        super().on_before_optimizer_step(optimizer)  # pyright: ignore[reportAttributeAccessIssue]
        self.repeats.passes.clip(optimizer)

    def on_train_epoch_end(self) -> None:
        """Schedulers that step once an epoch do."""
        super().on_train_epoch_end()  # pyright: ignore[reportAttributeAccessIssue]
        self.repeats.passes.step_schedulers("epoch")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the rest of training depends on."""
        super().on_save_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        checkpoint[NAME] = self.repeats.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        super().on_load_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        if NAME in checkpoint:
            self.repeats.load_state_dict(checkpoint[NAME])


class Repeats:
    """What a module's batches get, what was done, and what it cost.

    Attributes:
        strategy: That decides.
        records: One :class:`iterbatch.records.record.BatchRecord` a batch, of this process's training.
        ledger: What has been spent.
    """

    def __init__(
        self, passes: ModulePasses, strategy: Any, budget: int | None, probe: Sequence[Any] = ()
    ) -> None:
        self.passes, self.strategy, self.ledger = passes, strategy, Ledger()
        self.records: list[BatchRecord] = []
        amount = UNLIMITED if budget is None else budget
        self.allowance = Allowance("updates", amount, amount)
        self.step = FollowingStep(passes, self.ledger, self.allowance, probe=probe)

    def check_end(self) -> None:
        """See that Lightning lets a budget end training.

        Raises:
            ConfigError: where it is told to go on.
        """
        trainer = self.passes.module.trainer
        if self.allowance.amount < UNLIMITED and (trainer.min_epochs or trainer.min_steps):
            raise ConfigError(
                _("a budget cannot end training before min_epochs or min_steps; leave them out")
            )

    def micro_batch(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Take a micro-batch; make the updates where it is the last of its window."""
        output = self.passes.add(args, kwargs)
        if self.passes.complete:
            window, made = self.passes.close(self.ledger.batches)
            self.step.begin()
            self.step.follow(made)
            self.records.append(self.strategy.train_batch(window, self.step))
            self.passes.step_schedulers("step")
            if self.allowance.exhausted(self.ledger):
                self.passes.module.trainer.should_stop = True
        return output

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of training depends on, waiting batches included."""
        return {
            "strategy": self.strategy.state_dict(),
            "placing": self.strategy.placing.state_dict(),
            "ledger": self.ledger.state_dict(),
            "held": {name: (each.micro_batches, each.index) for name, each in self.step.held.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.strategy.load_state_dict(state["strategy"])
        self.strategy.placing.load_state_dict(state["placing"])
        self.ledger.load_state_dict(state["ledger"])
        self.step.held.update({name: Window(*each) for name, each in state["held"].items()})


class ModulePasses:
    """Passes by a module's own training step, backward, optimizer and precision.

    Args:
        module: Of Lightning.
        forward: Its training step, as its author wrote it.
        accumulate: Micro-batches of an update.
        clip_norm: Largest gradient norm, or None.
    """

    def __init__(
        self, module: LightningModule, forward: Callable[..., Any], accumulate: int, clip_norm: float | None
    ) -> None:
        self.module, self._forward = module, forward
        self._accumulate, self._clip_norm = accumulate, clip_norm
        self.making = False  # a further pass, whose logs are left out
        self._window: list[tuple[Sequence[Any], dict[str, Any]]] = []
        self._sum: Tensor | None = None

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def complete(self) -> bool:
        """Whether the window that is open is the whole of an update."""
        full = len(self._window) >= self._accumulate
        return bool(self._window) and (full or self.module.trainer.is_last_batch)

    def add(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Loss and gradient of a micro-batch of the fresh pass; a step that returns None leaves it out."""
        kept = tuple(dict(each) if isinstance(each, dict) else each for each in args)
        output = self._gradient(args, kwargs)
        if output is not None:
            self._window.append((kept, kwargs))
        return output

    def close(self, index: int) -> tuple[Window, UnmeasuredPass]:
        """The update of the fresh pass."""
        window, self._window = Window(self._window, index), []
        return window, self._update()

    def make(self, window: Window) -> UnmeasuredPass:
        """One more pass over a window, with its update."""
        torch.clear_autocast_cache()  # it would keep the weights of before the update
        self.making = True
        try:
            for args, kwargs in window.micro_batches:
                copies = [dict(each) if isinstance(each, dict) else each for each in args]
                self._gradient(copies, kwargs)
            return self._update()
        finally:
            self.making = False

    @torch.no_grad()
    def score(self, batch: Any) -> float:
        """Loss of a batch as the module is now, without dropout."""
        torch.clear_autocast_cache()
        modes = {part: part.training for part in self.module.modules()}
        self.module.eval()
        self.making = True
        try:
            batch = self.module.trainer.strategy.batch_to_device(batch)
            return self._mean(_loss_of(self._forward(batch, 0)))
        finally:
            self.making = False
            for part, training in modes.items():
                part.training = training

    def clip(self, optimizer: Any) -> None:
        """Clip the gradient of an update that is about to be made."""
        if self._clip_norm is not None:
            self.module.clip_gradients(
                optimizer, gradient_clip_val=self._clip_norm, gradient_clip_algorithm="norm"
            )

    def step_schedulers(self, interval: str) -> None:
        """Step those of an interval, as automatic optimisation does after a batch or an epoch."""
        trainer = self.module.trainer
        place = trainer.fit_loop.epoch_loop.batch_idx if interval == "step" else trainer.current_epoch
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                raise ConfigError(
                    _("ReduceLROnPlateau waits for an evaluation; with repeats take another schedule")
                )
            if config.interval == interval and (place + 1) % config.frequency == 0:
                self.module.lr_scheduler_step(config.scheduler, None)

    @property
    def _optimizer(self) -> Any:
        optimizer: Any = self.module.optimizers()
        if isinstance(optimizer, list) or isinstance(
            getattr(optimizer, "optimizer", None), torch.optim.LBFGS
        ):
            raise ConfigError(_("repeats need one optimizer, which updates once a pass"))
        return optimizer

    def _gradient(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        output = self._forward(*args, **kwargs)
        if output is None:
            return None
        loss = _loss_of(output) / self._accumulate
        self.module.manual_backward(loss)
        shown = loss.detach().float()
        self._sum = shown if self._sum is None else self._sum + shown
        return output

    def _update(self) -> UnmeasuredPass:
        optimizer = self._optimizer
        optimizer.step()
        optimizer.zero_grad()
        made, self._sum = self._sum, None
        return UnmeasuredPass(math.nan if made is None else self._mean(made))

    def _mean(self, value: Tensor) -> float:
        """Over processes, so that all of them decide alike."""
        return float(self.module.trainer.strategy.reduce(value, reduce_op="mean"))


def _loss_of(output: Any) -> Tensor:
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ConfigError(
            _("training_step returns {name}; it must return the loss, or a dict with it").format(
                name=type(output).__name__
            )
        )
    return loss
