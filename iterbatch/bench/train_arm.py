"""One arm with one seed: trained, evaluated, and its records left in its folder.

Resumes where a checkpoint is.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from iterbatch.bench.arm import Arm
from iterbatch.bench.arm_records import ArmRecords
from iterbatch.bench.card import write_card
from iterbatch.bench.job import Job
from iterbatch.bench.listener import Listener
from iterbatch.bench.prepare import make_stream
from iterbatch.bench.shared import Shared
from iterbatch.config import Every
from iterbatch.errors import RunError
from iterbatch.evaluation.memorisation import memorised, passes_of_blocks
from iterbatch.evaluation.perplexity import Score
from iterbatch.language import _
from iterbatch.model.flops import flop_model
from iterbatch.model.lora import copy_adapter, reset_adapter, set_adapter
from iterbatch.model.sharded import shard_like, whole
from iterbatch.records import layout
from iterbatch.records.machine import peak_memory_mb, reset_peak_memory
from iterbatch.records.record import BatchRecord, read_records
from iterbatch.records.result import ArmResult, ArmSettings
from iterbatch.records.scheduler import keep_scheduler
from iterbatch.records.write import whole_or_not, write_json
from iterbatch.reuse.prefetch import Prefetch
from iterbatch.runtime.checkpoint import Checkpoints, Part, RandomStates, remove_checkpoints
from iterbatch.runtime.interrupt import Stopped
from iterbatch.runtime.processes import from_main
from iterbatch.strategy import BaseTrainingStrategy, make_strategy
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.training.charges import Account
from iterbatch.training.health import Health
from iterbatch.training.loop import fit
from iterbatch.training.passes import Passes, make_optimizer
from iterbatch.training.step import StepSettings, TrainingStep

if TYPE_CHECKING:
    from peft import PeftModel

ROLLBACKS = 3  # of an arm, at most


@dataclass
class Progress:
    """Where an arm stands between two batches."""

    evaluated: int = -1  # evaluations made after the one at the start; -1: not even that
    health: Health = field(default_factory=Health)
    stopped: str | None = None  # why it ended before its budget was spent

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take all of it over."""
        self.evaluated, self.stopped = state["evaluated"], state["stopped"]
        self.health = Health(**state["health"])


class _AdapterState:
    """The adapter as a part of a checkpoint: whole, also where it is sharded."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        return dict(copy_adapter(self._model))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_adapter(self._model, state)


class _OptimizerState:
    """The optimizer likewise: its averages are sharded as its parameters are."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        state = self._optimizer.state_dict()
        whole_of = {
            number: {name: whole(value) for name, value in own.items()}
            for number, own in state["state"].items()
        }
        return {**state, "state": whole_of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
        shares = {
            number: {
                name: shard_like(value, parameters[number]) if name != "step" else value
                for name, value in own.items()
            }
            for number, own in state["state"].items()
        }
        self._optimizer.load_state_dict({**state, "state": shares})


@dataclass(frozen=True)
class ArmParts:
    """Everything that an arm consists of, as at its start."""

    strategy: BaseTrainingStrategy
    stream: Prefetch
    step: TrainingStep
    records: ArmRecords
    progress: Progress
    checkpoints: Checkpoints
    points: SavePoints

    @classmethod
    def of(cls, job: Job) -> ArmParts:
        """Made anew, the adapter and all random states included."""
        shared, config, seed = job.shared, job.arm.config, job.seed
        accelerator, training = shared.accelerator, config.training
        reset_adapter(shared.model, seed)
        shared.cut.train()
        optimizer = make_optimizer(shared.model, config.lr, training.weight_decay)
        passes = Passes(
            shared.placed, accelerator.prepare_optimizer(optimizer), accelerator, training.clip_norm
        )
        prices = flop_model(shared.model, config.model.gradient_checkpointing)
        account = Account(prices, Ledger(), job.allowance())
        source = shared.reuse.sources["train"]
        stream = make_stream(shared.prepared, seed, accelerator.process_index, accelerator.num_processes)
        settings = StepSettings(config.lr, training.warmup, config.speed.reuse != "off")
        strategy = make_strategy(job.arm.strategy, config.strategy.knobs, seed, job.source())
        job.warm(strategy, stream)
        step = TrainingStep(passes, account, settings, source, stream.batch, job.extras(strategy, stream))
        prefetch, progress = Prefetch(stream, source), Progress()
        records = ArmRecords(job.folder, account.ledger, accelerator, job.listener, job.tracking)
        at_start: dict[str, Part] = {
            **records.writers,
            "strategy": strategy,
            "placing": strategy.placing,
            "stream": prefetch,
            "progress": progress,
        }
        live: dict[str, Part] = {
            "adapter": _AdapterState(shared.model),
            "optimizer": _OptimizerState(passes.optimizer),
            "ledger": account.ledger,
            "step": step,
            "random": RandomStates(seed, lambda: account.ledger.passes, stream.batch_rows, job.listener.note),
        }
        if accelerator.scaler is not None:  # float16: every arm starts with the same loss scale
            accelerator.scaler.load_state_dict(torch.amp.GradScaler().state_dict())
            live["scaler"] = accelerator.scaler
        checkpoints = Checkpoints(job.folder, at_start, live, job.listener.note)
        points = SavePoints(shared, step, records, progress, checkpoints, Every(config.run.checkpoint_every))
        step.after_pass = points.here
        return cls(strategy, prefetch, step, records, progress, checkpoints, points)

    def close(self, shared: Shared) -> None:
        """Close the records, end the prefetching, and forget the optimizer."""
        self.records.close()
        self.stream.close()
        shared.accelerator.free_memory()


class SavePoints:
    """Where an arm may be saved, and its run stopped."""

    def __init__(
        self,
        shared: Shared,
        step: TrainingStep,
        records: ArmRecords,
        progress: Progress,
        checkpoints: Checkpoints,
        every: Every,
    ) -> None:
        self.shared, self.step, self.every = shared, step, every
        self._records, self._progress, self._checkpoints = records, progress, checkpoints

    def here(self) -> None:
        """Within a batch: make a checkpoint where one is due, or where the run is to stop.

        Raises:
            Stopped: then.
        """
        accelerator, requested = self.shared.accelerator, self.shared.interrupts.requested
        healthy = self._progress.health.good and self.step.finite  # none to return to that is broken already
        stop, due = requested is not None, healthy and self.every.due(self.step.ledger.passes)
        if accelerator.num_processes > 1:  # all of them or none; the clock that counts is the main process's
            mine = [stop, due and accelerator.is_main_process]
            votes: Any = accelerator.reduce(
                torch.tensor(mine, dtype=torch.float32, device=accelerator.device), "sum"
            )
            stop, due = (votes > 0).tolist()
        if stop or due:
            with self.step.ledger.paused():
                self._save()
        if stop:
            raise Stopped(requested or signal.SIGTERM)

    def between_batches(self) -> None:
        """Make a checkpoint that resumes with the next batch."""
        self.step.begin()
        self._checkpoints.begin()
        self._save()

    def _save(self) -> None:
        self._records.sync()
        self._checkpoints.save()
        self.every.restart(self.step.ledger.passes)


# ------------------------------------------------------------------------------------------------------------
# From its first batch to its result


def train_arm(shared: Shared, arm: Arm, seed: int, folder: Path, listener: Listener) -> None:
    """Train an arm to its end, from its last checkpoint where its folder holds one.

    Raises:
        RunError: where the arm that it is made from, or that sets its budget, is not finished.
        Stopped: where the run was asked to stop; a checkpoint has been made.
    """
    job = Job(shared, arm, seed, folder, listener)
    reset_peak_memory()
    listener.arm_started(arm.name, seed)
    parts = _resumed(job) or _begun(job)
    try:
        _train(job, parts)
        _finish(job, parts)
    finally:
        parts.close(shared)


def _resumed(job: Job) -> ArmParts | None:
    """The arm as its last checkpoint has it; None where it has none, and then nothing is left of it."""
    if not from_main((job.folder / layout.BATCHES).exists()):
        return None
    parts, ledger = ArmParts.of(job), None
    try:
        if parts.checkpoints.restore():
            ledger = parts.step.ledger
            where = _("after {passes} passes on {batches} batches").format(
                passes=ledger.passes, batches=ledger.batches
            )
            job.listener.note(
                _("{name}, seed {seed}: resumed {where}").format(
                    name=job.arm.name, seed=job.seed, where=where
                )
            )
            return parts
    finally:
        if ledger is None:
            parts.close(job.shared)
    if job.shared.accelerator.is_main_process:  # stopped before its first checkpoint: starts anew
        shutil.rmtree(job.folder)
    return None


def _begun(job: Job) -> ArmParts:
    parts = ArmParts.of(job)
    parts.checkpoints.begin()
    if foreseen := parts.strategy.foresee(math.log(job.shared.validation.ppl)):
        job.listener.note(f"{job.arm.name}: {foreseen}")
    return parts


def _train(job: Job, parts: ArmParts) -> None:
    """Train; an arm that diverges returns to its last checkpoint where that is wished for, or stops."""
    training, ledger, progress = job.shared.config.training, parts.step.ledger, parts.progress
    parts.points.every.restart(ledger.passes)
    if training.on_divergence == "rollback":
        parts.points.between_batches()  # there is always one to return to
    while progress.stopped is None:
        reason = _until_diverged(job, parts)
        if reason is None:
            break
        forgiven = training.on_divergence == "rollback" and ledger.rollbacks < ROLLBACKS
        if not (forgiven and _roll_back(job, parts, reason)):
            progress.stopped = reason
    parts.points.between_batches()


def _until_diverged(job: Job, parts: ArmParts) -> str | None:
    """Train until the budget is spent, evaluated at equal fractions of it.

    Or until the arm has diverged: then, why.
    """
    shared, step, progress, records = job.shared, parts.step, parts.progress, parts.records
    training = shared.config.training
    if progress.evaluated < 0:  # at the start every arm is the base, whose score is known
        records.evaluation(shared.validation, "validation", 0.0)
        progress.evaluated = 0
    parts.checkpoints.begin()
    for record in fit(parts.strategy, parts.stream, step):
        records.batch(record, step.allowance)
        if (diverged := progress.health.judge(record, training.explosion)) is not None:
            return diverged
        reached = _evaluations_due(step.allowance, step.ledger, training.evals)
        if reached > progress.evaluated:
            progress.evaluated = reached
            job.listener.doing(_("scoring validation"))
            score = shared.score("validation", parts.points.here)
            records.evaluation(score, "validation", reached / training.evals)
        parts.checkpoints.begin()
    return None


def _evaluations_due(allowance: Allowance, ledger: Ledger, evals: int) -> int:
    return evals if allowance.exhausted(ledger) else math.floor(evals * allowance.fraction(ledger) + 1e-9)


def _roll_back(job: Job, parts: ArmParts, reason: str) -> bool:
    ledger = parts.step.ledger
    before = dataclasses.replace(ledger)
    if not parts.checkpoints.restore():
        return False
    ledger.keep_spent(before)
    where = _("back to batch {batches} with half the learning rate").format(batches=ledger.batches)
    fault = re.split("[;\uff1b]", reason)[0]  # the advice after it is for an arm that stops
    job.listener.note(f"{job.label}: {fault}; {where}")
    return True


# ------------------------------------------------------------------------------------------------------------
# What it leaves


def _finish(job: Job, parts: ArmParts) -> None:
    """Score the end, write adapter and samples, and at last the result, which marks the arm as finished."""
    shared, folder, between = job.shared, job.folder, parts.points.here
    memory = peak_memory_mb()
    job.listener.doing(_("scoring validation and test"))
    scores = {split: shared.score(split, between) for split in ("validation", "test")}
    parts.records.evaluation(scores["test"], "test", 1.0)
    job.listener.doing(_("writing samples"))
    weights = copy_adapter(shared.model)
    samples = shared.sample(between) if shared.cut.sharded or shared.accelerator.is_main_process else None
    if samples is None or not shared.accelerator.is_main_process:
        return
    try:
        with whole_or_not(folder / layout.ADAPTER) as scratch:
            shared.model.save_pretrained(str(scratch), state_dict=weights)
            write_card(scratch, shared.prepared, job.arm, job.seed, scores)
    except SafetensorError as problem:  # what safetensors makes of a full disk
        where = folder / layout.ADAPTER
        raise RunError(
            _("{where} could not be written ({problem}); make room and resume by --resume").format(
                where=where, problem=problem
            )
        ) from problem
    if kept := parts.strategy.keepsake():
        keep_scheduler(folder, kept)
    documents = {
        name: {"tokens": each.document_tokens, "nats": each.document_nats} for name, each in scores.items()
    }
    write_json(folder / layout.DOCUMENTS, documents)
    tokenizer = shared.prepared.base.tokenizer
    content = {
        "prompts": [tokenizer.decode(prompt) for prompt in shared.prompts],
        "human": [tokenizer.decode(text) for text in shared.human],
        "base": shared.samples.as_json(),
        "trained": samples.as_json(),
    }
    write_json(folder / layout.SAMPLES, content)
    result = _result(job, parts, scores, memory)
    result = dataclasses.replace(result, text=samples.metrics, memorised=_memorised(job, parts))
    result.write(folder)
    remove_checkpoints(folder)
    job.listener.arm_done(result)


def _result(job: Job, parts: ArmParts, scores: Mapping[str, Score], memory: float) -> ArmResult:
    shared, ledger, arm = job.shared, parts.step.ledger, job.arm
    validation, test = scores["validation"], scores["test"]
    return ArmResult(
        strategy=arm.name,
        seed=job.seed,
        val_ppl=validation.ppl,
        test_ppl=test.ppl,
        val_word_ppl=validation.word_ppl,
        bits_per_byte=validation.bits_per_byte,
        batches=ledger.batches,
        updates=ledger.updates,
        mean_repeats=ledger.passes / ledger.batches,
        tokens_unique=ledger.tokens_unique,
        tokens_trained=ledger.tokens_trained,
        flops=ledger.flops,
        train_seconds=ledger.train_seconds,
        tokens_per_second=ledger.tokens_trained / ledger.train_seconds,
        peak_memory_mb=memory,
        test_word_ppl=test.word_ppl,
        test_bits_per_byte=test.bits_per_byte,
        base_val_ppl=shared.validation.ppl,
        flops_fresh=ledger.flops_fresh,
        flops_repeat=ledger.flops_repeat,
        flops_probe=ledger.flops_probe,
        flops_saved=ledger.flops_saved,
        seconds_saved=ledger.seconds_saved,
        seconds_charged=ledger.seconds_charged,
        store_gb=shared.reuse.store_gb,
        skipped_updates=ledger.skipped_updates,
        nonfinite_losses=ledger.nonfinite_losses,
        nonfinite_gradients=ledger.nonfinite_gradients,
        scaler_skips=ledger.scaler_skips,
        rollbacks=ledger.rollbacks,
        flops_lost=ledger.flops_lost,
        processes=shared.accelerator.num_processes,
        arm=ArmSettings(arm.strategy, arm.source, arm.config.lr, arm.config.training.budget_share),
        base_text=shared.samples.metrics,
        stopped=parts.progress.stopped,
    )


def _memorised(job: Job, parts: ArmParts) -> Any:
    """See :mod:`iterbatch.evaluation.memorisation`.

    The records are read back, so a resumed arm counts all passes.
    """
    shared = job.shared
    if shared.accelerator.num_processes > 1:  # each process would see its own rows only
        return None
    stream, batch_size = parts.stream.stream, shared.config.training.eval_batch_size
    passes = passes_of_blocks(read_records(job.folder / layout.BATCHES, BatchRecord), stream)
    source = shared.reuse.sources["train"]
    with shared.accelerator.autocast():
        return memorised(shared.cut, shared.model, stream, passes, source, batch_size, shared.base_nats)
