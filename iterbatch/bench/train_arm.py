"""One arm: one strategy with one seed, trained, evaluated, and its records left in its folder."""

import dataclasses
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError

from iterbatch.evaluation import memorisation as memory
from iterbatch.report import summary as report
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.runtime.checkpoint import Checkpoints, Every, RandomStates, remove_checkpoints
from iterbatch.model.cut import CutModel
from iterbatch.errors import RunError
from iterbatch.evaluation.perplexity import Score, score
from iterbatch.evaluation.generate import Sampling, generate, text_metrics
from iterbatch.runtime.interrupt import Interrupts, Stopped
from iterbatch.training.loop import Progress, fit
from iterbatch.model.load import copy_adapter, flop_model, reset_adapter, set_adapter
from iterbatch.bench.prepare import Plan, Prepared, make_stream
from iterbatch.runtime.processes import from_main
from iterbatch.records.record import (
    BatchRecord,
    EvalRecord,
    RecordWriter,
    peak_memory_mb,
    read_records,
    reset_peak_memory,
    whole_or_not,
    write_json,
    write_text,
)
from iterbatch.reuse.prefix import Prefetch, Reuse
from iterbatch.training.step import StepSettings, TrainingStep, make_optimizer
from iterbatch.strategy import make_strategy
from iterbatch.study.study_file import Arm

PROMPT_TOKENS = 32
TOGETHER = 64  # prompts continued at once
ROLLBACKS = 3  # of an arm, at most


class Listener:
    """Who is told how a run goes. This one stays silent; the command line shows progress."""

    def note(self, message: str) -> None:
        """Something the user should know."""

    def planned(self, plan: Plan, run_dir: Path) -> None:
        """The run is about to start."""

    def arm_started(self, strategy: str, seed: int) -> None:
        """An arm is about to start."""

    def batch_done(self, record: BatchRecord, fraction: float) -> None:
        """A batch has been trained; ``fraction`` of the arm's budget is spent."""

    def evaluated(self, record: EvalRecord) -> None:
        """An evaluation has been made."""

    def arm_done(self, result: dict[str, Any]) -> None:
        """An arm is finished."""


class Shared:
    """What the arms of a run share: the model, the text, and what the untrained base scores and writes, computed once.

    ``between`` is called where a run may stop: :class:`ArmRun` puts its own there, to make a checkpoint first.

    Args:
        prepared: Text and tokenizer.
        plan: What a baseline arm does.
        model: The PEFT model.
        placed: The same weights as a :class:`iterbatch.model.cut.CutModel`, prepared by the accelerator.
        reuse: Where prefix activations come from.
        accelerator: Of the run.
        interrupts: Tell whether the run was asked to stop.
    """

    def __init__(self, prepared: Prepared, plan: Plan, model: Any, placed: Any, reuse: Reuse, accelerator: Any, interrupts: Interrupts) -> None:
        self.prepared, self.plan, self.model, self.placed, self.reuse, self.accelerator = prepared, plan, model, placed, reuse, accelerator
        self.interrupts, self.between = interrupts, interrupts.check
        self.cut: CutModel = accelerator.unwrap_model(placed)  # for scoring, where processes may do different numbers of forwards
        self.prompts, self.human = ([part[side] for part in _prompts(prepared)] for side in (0, 1))
        reset_adapter(model, seed=0)  # a new adapter adds nothing, so this is the base itself
        self.validation = self.score("validation")
        self.samples = self.sample()

    def score(self, split: str) -> Score:
        """Score a split with the model as it is."""
        tokenizer = self.prepared.base.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        batch_size = self.prepared.config.training.eval_batch_size
        text, source = self.prepared.texts[split], self.reuse.sources[split]
        between = self.between if self.accelerator.num_processes == 1 else lambda: None  # several must stop at the same place
        return score(self.cut, text, self.accelerator, source=source, batch_size=batch_size, pad_id=pad, between=between)

    def sample(self) -> dict[str, Any]:
        """Continue the fixed prompts, greedy and sampled, and measure the text."""
        tokenizer = self.prepared.base.tokenizer
        result: dict[str, Any] = {}
        for name, greedy in (("greedy", True), ("sampled", False)):
            if self.accelerator.num_processes == 1:
                self.between()
            tokens: list[list[int]] = []
            for start in range(0, len(self.prompts), TOGETHER):
                with self.accelerator.autocast():
                    tokens += generate(self.model, self.prompts[start : start + TOGETHER], tokenizer, Sampling(seed=start), greedy=greedy)
            result[name] = {"texts": [tokenizer.decode(text) for text in tokens], **text_metrics(tokens)}
        return result


def _prompts(prepared: Prepared) -> list[tuple[list[int], list[int]]]:
    """Stretches of validation text, all of one length, each with what follows it there: openings of documents first, then places evenly spread."""
    wanted, new = prepared.config.training.prompts, Sampling().new_tokens
    windows = [window.input_ids[1:].tolist() for window in prepared.texts["validation"].windows]
    length = min(PROMPT_TOKENS, max(map(len, windows)) or 1, max(1, prepared.base.context - new))
    openings = [(ids[:length], ids[length : length + new]) for ids in windows if len(ids) >= length]
    if len(openings) >= wanted:
        return openings[:wanted]
    starts = [(ids, start) for ids in windows for start in range(0, len(ids) - length + 1, 2 * length)]
    places = [(ids[start : start + length], ids[start + length : start + length + new]) for ids, start in starts]
    return [places[round(index * (len(places) - 1) / max(1, wanted - 1))] for index in range(min(wanted, len(places)))]


def _figures(samples: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of samples without their texts."""
    return {decoding: {name: value for name, value in result.items() if name != "texts"} for decoding, result in samples.items()}


class ArmRun:
    """One strategy with one seed: trains, evaluates, and leaves its records. Goes on from a checkpoint where its folder holds one."""

    def __init__(self, shared: Shared, listener: Listener, folder: Path) -> None:
        self.shared, self.listener, self.folder = shared, listener, folder
        self.prepared, self.plan, self.model, self.accelerator = shared.prepared, shared.plan, shared.model, shared.accelerator
        self._batches: RecordWriter | None = None
        self._evals: RecordWriter | None = None

    def train(self, arm: Arm, seed: int) -> None:
        """Train the arm to its end.

        Raises:
            RunError: where the arm that it is made from, or that sets its budget, is not finished.
        """
        self.arm, self.seed, self.label = arm, seed, f"{arm.name}/seed{seed}"
        reset_peak_memory()
        before = self.shared.between
        self.listener.arm_started(arm.name, seed)
        begun = from_main((self.folder / "batches.jsonl").exists())
        self._make()
        try:
            if begun and self.checkpoints.restore():
                self.listener.note(f"{arm.name}, seed {seed}: goes on after {self.ledger.passes} passes on {self.ledger.batches} batches")
            else:
                if begun:  # cut off before its first checkpoint: starts anew
                    self._close()
                    if self.accelerator.is_main_process:
                        shutil.rmtree(self.folder)
                    self._make()
                self.checkpoints.begin()
            self.shared.between = self._stop_or_save
            self._fit()
            self._finish()
        finally:
            self.shared.between = before
            self._close()

    # -- its parts ---------------------------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        """Everything the arm consists of, as at its start."""
        config, seed, accelerator = self.arm.config, self.seed, self.accelerator
        reset_adapter(self.model, seed)
        self.shared.cut.train()
        optimizer = accelerator.prepare_optimizer(make_optimizer(self.model, config.lr, config.training.weight_decay))
        self.ledger, self.allowance, self.progress = Ledger(), self._allowance(), Progress()
        flops = flop_model(self.model, config.model.gradient_checkpointing)
        settings = StepSettings(config.lr, config.training.warmup, config.training.clip_norm, config.speed.reuse != "off")
        source, placed = self.shared.reuse.sources["train"], self.shared.placed
        stream = make_stream(self.prepared, seed, accelerator.process_index, accelerator.num_processes)
        hooks = (self._stop_or_save, stream.batch)
        self.step = TrainingStep(placed, optimizer, accelerator, flops, self.ledger, self.allowance, settings, source, *hooks)
        self.stream = Prefetch(stream, source)
        made_from = None if self.arm.source is None else [record.repeats_done for record in self._records_of(self.arm.source)]
        self.strategy = make_strategy(self.arm.strategy, config.strategy, seed, made_from)
        self.every = Every(config.run.checkpoint_every)
        if accelerator.is_main_process:
            self._batches, self._evals = RecordWriter(self.folder / "batches.jsonl"), RecordWriter(self.folder / "evals.jsonl")
        adapter = SimpleNamespace(state_dict=lambda: copy_adapter(self.model), load_state_dict=lambda state: set_adapter(self.model, state))
        records = {"batches": self._batches, "evals": self._evals} if accelerator.is_main_process else {}
        at_start: dict[str, Any] = {**records, "strategy": self.strategy, "stream": self.stream, "progress": self.progress}
        live: dict[str, Any] = {"adapter": adapter, "optimizer": optimizer, "ledger": self.ledger, "step": self.step, "random": RandomStates()}
        if accelerator.scaler is not None:  # float16: every arm starts with the same loss scale
            accelerator.scaler.load_state_dict(torch.amp.GradScaler().state_dict())
            live["scaler"] = accelerator.scaler
        self.checkpoints = Checkpoints(self.folder, at_start, live, self.listener.note)

    def _memorised(self) -> dict[str, Any] | None:
        """See :mod:`iterbatch.evaluation.memorisation`; the records are read back, so an arm that was gone on with counts all its passes."""
        if self.accelerator.num_processes > 1:  # each process would see its own rows only
            return None
        passes = memory.passes_of_blocks(read_records(self.folder / "batches.jsonl", BatchRecord), self.stream.stream)
        training, cut = self.prepared.config.training, self.shared.cut
        return memory.compare(cut, self.model, self.prepared.blocks, passes, self.accelerator, training.eval_batch_size)

    def _close(self) -> None:
        for writer in (self._batches, self._evals):
            if writer is not None:
                writer.close()
        self.stream.close()
        self.accelerator.free_memory()  # forgets this arm's optimizer

    def _allowance(self) -> Allowance:
        training, plan = self.prepared.config.training, self.plan
        unit, passes = training.match, plan.batches
        if unit == "seconds" and training.budget is None and self.arm.strategy == "baseline":
            unit = "epochs"  # its seconds are what the others may spend
        amounts = {"epochs": passes, "flops": plan.flops, "updates": passes, "tokens": plan.tokens}
        amount = training.budget or (amounts[unit] if unit in amounts else self._baseline_seconds())
        last = {"epochs": 1.0, "updates": 1.0, "flops": plan.last_pass_flops}.get(unit, 0.0)
        return Allowance(unit, float(amount), max(1, round(passes * amount / amounts.get(unit, amount))), last)

    def _baseline_seconds(self) -> float:
        return report.read_result(self._finished("baseline"))["train_seconds"]

    def _records_of(self, arm: str) -> Iterator[BatchRecord]:
        return read_records(self._finished(arm) / "batches.jsonl", BatchRecord)

    def _finished(self, arm: str) -> Path:
        """The folder of another arm of this seed."""
        folder = self.folder.parent.parent / arm / self.folder.name
        if not (folder / "result.json").is_file():
            raise RunError(f"{self.label} is made from {arm}/{self.folder.name}, which is not finished; train that arm first")
        return folder

    # -- training and checkpoints ------------------------------------------------------------------------------------------------------

    def _fit(self) -> None:
        """Train; an arm that diverges returns to its last checkpoint where that is wished for, or stops."""
        training = self.prepared.config.training
        self.every.restart(self.ledger.passes)
        if training.on_divergence == "rollback":
            self._save()  # there is always one to return to
        while self.progress.stopped is None:
            reason = fit(self.strategy, self.stream, self.step, self.ledger, self.allowance, self, training.evals, training.explosion, self.progress)
            if reason is None:
                break
            if training.on_divergence == "stop" or self.ledger.rollbacks >= ROLLBACKS or not self._roll_back(reason):
                self.progress.stopped = reason
        self._save()

    def _roll_back(self, reason: str) -> bool:
        before = dataclasses.replace(self.ledger)
        if not self.checkpoints.restore():
            return False
        self.ledger.keep_spent(before)
        self.listener.note(f"{self.label}: {reason.split(';')[0]}; back to batch {self.ledger.batches} with half the learning rate")
        return True

    def _stop_or_save(self) -> None:
        """Make a checkpoint where one is due, or where the run is to stop here.

        Raises:
            Stopped: then.
        """
        stop = self.shared.interrupts.requested is not None
        due = self.progress.healthy and self.step.finite and self.every.due(self.ledger.passes)  # none to return to that is broken already
        if self.accelerator.num_processes > 1:  # all of them or none; the clock that counts is the main process's
            votes = torch.tensor([stop, due and self.accelerator.is_main_process], dtype=torch.float32, device=self.accelerator.device)
            stop, due = (self.accelerator.reduce(votes, "sum") > 0).tolist()
        if not (stop or due):
            return
        with self.ledger.paused():
            self._save(here=True)
        if stop:
            raise Stopped(self.shared.interrupts.requested or signal.SIGTERM)

    def _save(self, *, here: bool = False) -> None:
        """Make a checkpoint between two batches, or ``here``, within the current one."""
        if not here:
            self.step.begin()
            self.checkpoints.begin()
        for writer in (self._batches, self._evals):
            if writer is not None:
                writer.sync()
        self.checkpoints.save()
        self.every.restart(self.ledger.passes)

    # -- what the loop tells -----------------------------------------------------------------------------------------------------------

    def batch_begins(self) -> None:
        """A checkpoint from here on goes back to here."""
        self.checkpoints.begin()

    def batch_done(self, record: BatchRecord) -> None:
        """Keep the record, show it, track it."""
        if self._batches is not None:
            self._batches.write(record)
        self.listener.batch_done(record, self.allowance.fraction(self.ledger))
        values = {"initial_loss": record.initial_loss, "repeats": record.repeats_done, "learning_rate": record.learning_rate}
        self._track({**values, "gradient_norm": record.gradient_norm, "flops": self.ledger.flops}, record.batch)

    def evaluate(self, fraction: float) -> None:
        """Score validation; at the start every arm is the base, whose score is known."""
        result = self.shared.validation if fraction == 0 else self.shared.score("validation")
        self._keep_score(result, "validation", fraction)

    def _keep_score(self, result: Score, split: str, fraction: float) -> None:
        ledger = self.ledger
        record = EvalRecord(
            split=split,
            fraction=fraction,
            batches=ledger.batches,
            updates=ledger.updates,
            tokens_trained=ledger.tokens_trained,
            flops=ledger.flops,
            train_seconds=ledger.train_seconds,
            nats=result.nats,
            tokens=result.tokens,
            words=result.words,
            bytes=result.bytes,
            ppl=result.ppl,
            word_ppl=result.word_ppl,
            byte_ppl=result.byte_ppl,
            bits_per_byte=result.bits_per_byte,
        )
        if self._evals is not None:
            self._evals.write(record)
        self.listener.evaluated(record)
        self._track({f"{split}_ppl": record.ppl}, record.batches)

    def _track(self, values: dict[str, float], position: int) -> None:
        if self.accelerator.trackers:
            self.accelerator.log({f"{self.label}/{name}": value for name, value in values.items()}, step=position)

    # -- what it leaves ----------------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Score the end, write adapter and samples, and at last the result, which marks the arm as finished."""
        strategy, seed = self.arm.name, self.seed
        memory = peak_memory_mb()
        validation, test = self.shared.score("validation"), self.shared.score("test")
        self._keep_score(test, "test", 1.0)
        if not self.accelerator.is_main_process:
            return
        try:
            with whole_or_not(self.folder / "adapter") as scratch:
                self.model.save_pretrained(scratch)
        except SafetensorError as problem:  # what safetensors makes of a full disk
            raise RunError(f"{self.folder / 'adapter'} could not be written ({problem}); make room and go on by --resume") from problem
        scores = {"validation": validation, "test": test}
        write_json(self.folder / "documents.json", {split: {"tokens": s.document_tokens, "nats": s.document_nats} for split, s in scores.items()})
        samples = self.shared.sample()
        prompts = [self.prepared.base.tokenizer.decode(prompt) for prompt in self.shared.prompts]
        human = [self.prepared.base.tokenizer.decode(text) for text in self.shared.human]
        content = {"prompts": prompts, "human": human, "base": self.shared.samples, "trained": samples}
        write_json(self.folder / "samples.json", content)
        write_text(self.folder / "samples.md", report.samples_page(f"{strategy}, seed {seed}", content))
        ledger = self.ledger
        result = {
            "strategy": strategy,
            "seed": seed,
            "val_ppl": validation.ppl,
            "test_ppl": test.ppl,
            "val_word_ppl": validation.word_ppl,
            "bits_per_byte": validation.bits_per_byte,
            "batches": ledger.batches,
            "updates": ledger.updates,
            "mean_repeats": ledger.passes / ledger.batches,
            "tokens_unique": ledger.tokens_unique,
            "tokens_trained": ledger.tokens_trained,
            "flops": ledger.flops,
            "train_seconds": ledger.train_seconds,
            "tokens_per_second": ledger.tokens_trained / ledger.train_seconds,
            "peak_memory_mb": memory,
            "test_word_ppl": test.word_ppl,
            "test_bits_per_byte": test.bits_per_byte,
            "base_val_ppl": self.shared.validation.ppl,
            "flops_fresh": ledger.flops_fresh,
            "flops_repeat": ledger.flops_repeat,
            "flops_probe": ledger.flops_probe,
            "flops_saved": ledger.flops_saved,
            "seconds_saved": ledger.seconds_saved,
            "seconds_charged": ledger.seconds_charged,
            "store_gb": self.shared.reuse.store_gb,
            "skipped_updates": ledger.skipped_updates,
            "nonfinite_losses": ledger.nonfinite_losses,
            "nonfinite_gradients": ledger.nonfinite_gradients,
            "scaler_skips": ledger.scaler_skips,
            "rollbacks": ledger.rollbacks,
            "flops_lost": ledger.flops_lost,
            "arm": {"strategy": self.arm.strategy, "source": self.arm.source, "lr": self.arm.config.lr},
            "memorised": self._memorised(),
            "text": _figures(samples),
            "base_text": _figures(self.shared.samples),
            "stopped": self.progress.stopped,
        }
        write_json(self.folder / "result.json", result)
        remove_checkpoints(self.folder)
        self.listener.arm_done(result)
