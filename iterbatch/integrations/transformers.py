"""Repeats inside Transformers' ``Trainer`` and TRL's ``SFTTrainer``.

The Trainer's loop counts batches. When it has made its update on one, and before its schedule moves on, the
strategy is asked and the repeats are made: epochs, evaluation, saving, resuming and short windows stay the
Trainer's own, and one pass a batch is the Trainer as it is, to the last bit.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from iterbatch.errors import ConfigError, RunError
from iterbatch.integrations.allowance import LoopAllowance
from iterbatch.integrations.trainer_passes import TrainerPasses, TrainerWindow
from iterbatch.language import _
from iterbatch.records.record import BatchRecord
from iterbatch.runtime.checkpoint import as_json, from_json
from iterbatch.strategy.base import SPACED
from iterbatch.strategy.for_loop import Given, needs_no_more_than_passes, strategy_for_loop
from iterbatch.training.budget import Ledger
from iterbatch.training.whole_step import FollowingStep

SAMPLING = (
    "GRPO",
    "RLOO",
    "PPO",
    "OnlineDPO",
    "NashMD",
    "XPO",
    "GKD",
    "GOLD",
    "Distillation",
    "SDFT",
    "SDPO",
)
SAMPLES = ("_generate_and_score_completions", "generate_on_policy_outputs")  # methods of trainers that do
IN_BACKWARD = ("lomo", "adalomo", "layerwise")  # optimizers that update while the backward pass runs


class RepeatMixin:
    """In front of a trainer's class: ``class Mine(RepeatMixin, SFTTrainer): pass``.

    Its arguments are the trainer's, and those of :func:`repeat_batches`; what is done and spent is in
    :attr:`repeats`.

    Args:
        strategy: A name of ``iterbatch.STRATEGIES``, a class or instance of one's own, or ``FILE.py:CLASS``.
        knobs: Of the strategy, by name.
        match: What a budget counts: ``updates``, ``tokens``, ``flops`` or ``seconds``. None: the epochs end
            training, whatever the repeats cost.
        budget: How much of it; default: what the epochs would cost without repeats.
        probe: Batches that are never trained on, for strategies that measure what a pass gained.

    Raises:
        ConfigError: as :func:`repeat_batches`.
    """

    repeats: Repeats

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(RepeatMixin)]
        if Trainer in before:  # its __init__ would not ask this one
            raise ConfigError(
                _("{name} has RepeatMixin behind its trainer; write class {name}(RepeatMixin, ...)").format(
                    name=cls.__name__
                )
            )

    def __init__(
        self,
        *args: Any,
        strategy: Given = "abr",
        knobs: Mapping[str, Any] | None = None,
        match: str | None = None,
        budget: float | None = None,
        probe: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.repeats = repeat_batches(
            trainer, strategy, match=match, budget=budget, probe=probe, **(knobs or {})
        )


def repeat_batches(
    trainer: Trainer,
    strategy: Given = "abr",
    *,
    match: str | None = None,
    budget: float | None = None,
    probe: Sequence[Any] = (),
    **knobs: Any,
) -> Repeats:
    """Have a trainer that is there already repeat its batches, where its class cannot be changed.

    Args:
        trainer: Not yet training.
        strategy: See :class:`RepeatMixin`, as the rest.
        match: What a budget counts.
        budget: How much of it.
        probe: Batches that are never trained on.
        knobs: Of the strategy, by name.

    Returns:
        What is done and spent.

    Raises:
        ConfigError: for a trainer whose batches cannot be repeated, a strategy that needs more than a loop
            can give, and settings that contradict each other.
    """
    _check_trainer(trainer)
    chosen = strategy_for_loop(strategy, trainer.args.seed, knobs, probes=bool(probe))
    needs_no_more_than_passes(chosen)
    allowance = LoopAllowance(match, budget)
    if match is not None and trainer.args.max_steps > 0:
        raise ConfigError(
            _(
                "max_steps is {steps}, which counts batches, beside a budget in {unit}: only one can end "
                "training. Leave max_steps out and give num_train_epochs, or leave match out"
            ).format(steps=trainer.args.max_steps, unit=match)
        )
    repeats = Repeats(trainer, chosen, allowance, probe)
    trainer.add_callback(_callback_of(repeats))
    return repeats


def _check_trainer(trainer: Any) -> None:
    if not isinstance(trainer, Trainer):
        raise ConfigError(
            _(
                "{name} is not a transformers.Trainer; for a loop of your own there is iterbatch.Repeater"
            ).format(name=type(trainer).__name__)
        )
    kinds = [kind.__name__ for kind in type(trainer).__mro__ if kind.__name__.endswith("Trainer")]
    sampling = [name for name in kinds if any(word in name for word in SAMPLING)]
    sampling += kinds[:1] if any(hasattr(trainer, name) for name in SAMPLES) else []
    if sampling:
        raise ConfigError(
            _(
                "{name} samples its batches from the model that it trains: a repeat would train on an older "
                "model's answers. Supported are Trainer, SFTTrainer and others whose batches are given text"
            ).format(name=sampling[0])
        )
    if any(isinstance(each, RepeatCallback) for each in trainer.callback_handler.callbacks):
        raise ConfigError(_("this trainer repeats its batches already"))
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.is_deepspeed_enabled or any(name in optim for name in IN_BACKWARD):
        what = "DeepSpeed" if trainer.is_deepspeed_enabled else f"optim='{optim}'"
        raise ConfigError(
            _("{what} makes updates of its own within a pass; batches cannot be repeated there").format(
                what=what
            )
        )


class Repeats:
    """What a trainer's batches get, what was done, and what it cost.

    Attributes:
        strategy: That decides.
        records: One :class:`iterbatch.records.record.BatchRecord` a batch, of this process's training.
        ledger: What has been spent.
    """

    def __init__(
        self, trainer: Any, strategy: Any, allowance: LoopAllowance, probe: Sequence[Any] = ()
    ) -> None:
        self.strategy, self.ledger, self.allowance = strategy, Ledger(), allowance
        self.records: list[BatchRecord] = []
        self._passes = TrainerPasses(trainer, allowance, self.ledger)
        self.step = FollowingStep(self._passes, self.ledger, allowance, probe=probe)
        self._trainer, self._since, self._seconds, self._logged = trainer, 0.0, 0.0, 0
        self._at_first = copy.deepcopy((strategy.state_dict(), strategy.placing.state_dict()))
        self._take_the_place_of(trainer)

    def _take_the_place_of(self, trainer: Any) -> None:
        """Stand before three methods of the trainer, whatever class it is of."""
        get, train, log = trainer.get_batch_samples, trainer.training_step, trainer.log

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            if self.allowance.exhausted(self.ledger):  # resumed where it had ended
                return [], None
            samples, items = get(*args, **kwargs)
            self._passes.open(samples, items, self.ledger.batches, self._waiting)
            self._since = time.perf_counter()
            return samples, items

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = train(model, inputs, *args, **kwargs)
            self._passes.add(model, loss)
            return loss

        def log_with_passes(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            log(self._told(logs), *args, **kwargs)

        trainer.get_batch_samples, trainer.training_step = get_batch_samples, training_step
        trainer.log = log_with_passes

    @property
    def _waiting(self) -> int:
        spaced = self.strategy.placement == SPACED
        return len(self.step.held) + self.strategy.gap if spaced else 0

    def begin(self, state: Any) -> None:
        """Training begins, or is resumed from a checkpoint that has said so in the Trainer's state."""
        self.allowance.batches = state.max_steps
        scheduler = self._trainer.lr_scheduler
        if self.allowance.unit is not None and not isinstance(scheduler, LambdaLR):
            raise ConfigError(
                _(
                    "lr_scheduler_type {name} cannot follow a budget; take one such as cosine or linear"
                ).format(name=type(scheduler).__name__)
            )
        saved = state.stateful_callbacks.get(RepeatCallback.__name__) if state.global_step else None
        if state.global_step and not saved:
            raise RunError(
                _("the checkpoint was made without repeats; begin anew, or go on with the plain trainer")
            )
        self._begin_anew()  # the trainer may have trained before
        if saved:
            self.load_state_dict(from_json(saved["attributes"]["saved"]))

    def _begin_anew(self) -> None:
        strategy, placing = copy.deepcopy(self._at_first)
        self.strategy.load_state_dict(strategy)
        self.strategy.placing.load_state_dict(placing)
        self.ledger.load_state_dict(Ledger().state_dict())
        self.allowance.fresh_tokens = 0
        self.step.held.clear()
        self._passes.forget_model()

    def after_update(self) -> None:
        """The Trainer has made its update on the current batch: ask, and repeat."""
        if self._passes.making:
            return
        self._count_seconds()
        window, made = self._passes.close()
        before = self.ledger.train_seconds - self._seconds
        self.step.begin()
        self.step.follow(made)
        self.allowance.fresh_tokens += window.tokens
        if not {"tokens": window.tokens, "flops": window.flops}.get(str(self.allowance.unit), 1):
            raise ConfigError(
                _("what a batch costs in {unit} is not known for this model; give match='updates'").format(
                    unit=self.allowance.unit
                )
            )
        record = self.strategy.train_batch(window, self.step)
        self._count_seconds()
        seconds = self.ledger.train_seconds - before
        self.records.append(BatchRecord(**{**vars(record), "seconds": seconds}))
        self._passes.follow_budget()

    def _count_seconds(self) -> None:
        """Since the batch came, or since this was asked last."""
        now = time.perf_counter()
        several = self._trainer.accelerator.num_processes
        self._seconds, self._since = self._passes.totals(now - self._since)[0] / several, now
        self.ledger.train_seconds += self._seconds

    def after_batch(self, args: Any, control: Any) -> None:
        """End training where the budget is spent, with the Trainer's own last evaluation and checkpoint."""
        if self.allowance.exhausted(self.ledger):
            control.should_training_stop = True
            control.should_evaluate |= args.eval_strategy == "steps"
            control.should_save |= args.save_strategy == "steps"

    def end(self) -> None:
        """Training is over; a warning where the budget is not."""
        if self.allowance.unit is None or not self.records or self.allowance.exhausted(self.ledger):
            return
        told = _(
            "training ended with {share:.0%} of its budget spent, and the learning rate where it stood; "
            "give more num_train_epochs, or a smaller budget"
        ).format(share=self._spent)
        warnings.warn(told, stacklevel=2)

    @property
    def _spent(self) -> float:
        """Share of the budget."""
        return self.allowance.position(self.ledger) / self.allowance.batches

    def _told(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What the Trainer logs of the batches since, and how often they were trained."""
        since, self._logged = self.records[self._logged :], len(self.records)
        if "loss" not in logs or not since:
            return logs
        passes = sum(record.repeats_done + len(record.revisited) for record in since)
        told = {"passes_a_batch": round(passes / len(since), 4), "updates": self.ledger.updates}
        if self.allowance.unit is not None:
            told["budget_spent"] = round(self._spent, 4)
        return {**logs, **told}

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of training depends on, waiting batches included."""
        held = {name: asdict(window) for name, window in self.step.held.items()}
        return {
            "strategy": self.strategy.state_dict(),
            "placing": self.strategy.placing.state_dict(),
            "ledger": self.ledger.state_dict(),
            "fresh_tokens": self.allowance.fresh_tokens,
            "held": held,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.strategy.load_state_dict(state["strategy"])
        self.ledger.load_state_dict(state["ledger"])
        self.allowance.fresh_tokens = state["fresh_tokens"]
        if state["held"] and self._trainer.accelerator.num_processes > 1:
            told = _("batches that waited for a repeat are let go: a checkpoint holds one process's rows")
            warnings.warn(told, stacklevel=2)
            return
        self.strategy.placing.load_state_dict(state["placing"])
        self.step.held.update({name: TrainerWindow(**window) for name, window in state["held"].items()})


class RepeatCallback(TrainerCallback, ExportableState):
    """Where the Trainer's loop gives way. Each trainer's is a class of its own, which knows its repeats."""

    repeats: Repeats

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoints, which its state file is part of."""
        return {"args": {}, "attributes": {"saved": as_json(self.repeats.state_dict())}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over what a checkpoint says."""
        self.repeats.begin(state)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The fresh pass is made."""
        self.repeats.after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The batch is done with."""
        self.repeats.after_batch(args, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """No batch is left."""
        self.repeats.end()


def _callback_of(repeats: Repeats) -> RepeatCallback:
    # With restore_callback_states_from_checkpoint the Trainer replaces a callback by type(callback)(): what
    # it knows must be its class's.
    return type(RepeatCallback.__name__, (RepeatCallback,), {"repeats": repeats})()
