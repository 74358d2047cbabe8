"""One arm: one strategy with one seed, trained, evaluated, and its records left in its folder."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from iterbatch import report
from iterbatch.budget import Allowance, Ledger
from iterbatch.cut import CutModel
from iterbatch.evaluate import Score, score
from iterbatch.generate import Sampling, generate, text_metrics
from iterbatch.loop import fit
from iterbatch.model import flop_model, reset_adapter
from iterbatch.prepare import Plan, Prepared, make_stream
from iterbatch.record import BatchRecord, EvalRecord, RecordWriter, peak_memory_mb, reset_peak_memory, write_json, write_text
from iterbatch.reuse import Prefetch, Reuse
from iterbatch.step import StepSettings, TrainingStep, make_optimizer
from iterbatch.strategy import make_strategy

PROMPTS, PROMPT_TOKENS = 5, 32


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

    Args:
        prepared: Text and tokenizer.
        plan: What a baseline arm does.
        model: The PEFT model.
        placed: The same weights as a :class:`iterbatch.cut.CutModel`, prepared by the accelerator.
        reuse: Where prefix activations come from.
        accelerator: Of the run.
    """

    def __init__(self, prepared: Prepared, plan: Plan, model: Any, placed: Any, reuse: Reuse, accelerator: Any) -> None:
        self.prepared, self.plan, self.model, self.placed, self.reuse, self.accelerator = prepared, plan, model, placed, reuse, accelerator
        self.cut: CutModel = accelerator.unwrap_model(placed)  # for scoring, where processes may do different numbers of forwards
        self.prompts = _prompts(prepared)
        reset_adapter(model, seed=0)  # a new adapter adds nothing, so this is the base itself
        self.validation = self.score("validation")
        self.samples = self.sample()

    def score(self, split: str) -> Score:
        """Score a split with the model as it is."""
        tokenizer = self.prepared.base.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        batch_size = self.prepared.config.training.eval_batch_size
        text, source = self.prepared.texts[split], self.reuse.sources[split]
        return score(self.cut, text, self.accelerator, source=source, batch_size=batch_size, pad_id=pad)

    def sample(self) -> dict[str, Any]:
        """Continue the fixed prompts, greedy and sampled, and measure the text."""
        tokenizer = self.prepared.base.tokenizer
        result: dict[str, Any] = {}
        for name, greedy in (("greedy", True), ("sampled", False)):
            with self.accelerator.autocast():
                tokens = generate(self.model, self.prompts, tokenizer, Sampling(), greedy=greedy)
            result[name] = {"texts": [tokenizer.decode(text) for text in tokens], **text_metrics(tokens)}
        return result


def _prompts(prepared: Prepared) -> list[list[int]]:
    """The openings of the first validation documents that are long enough, all of one length."""
    windows = [window.input_ids[1:] for window in prepared.texts["validation"].windows]
    length = min(PROMPT_TOKENS, max(len(ids) for ids in windows) or 1, max(1, prepared.base.context - Sampling().new_tokens))
    return [ids[:length] for ids in windows if len(ids) >= length][:PROMPTS]


def _figures(samples: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of samples without their texts."""
    return {decoding: {name: value for name, value in result.items() if name != "texts"} for decoding, result in samples.items()}


class ArmRun:
    """One strategy with one seed: trains, evaluates, and leaves its records."""

    def __init__(self, shared: Shared, listener: Listener, folder: Path) -> None:
        self.shared, self.listener, self.folder = shared, listener, folder
        self.prepared, self.plan, self.model, self.accelerator = shared.prepared, shared.plan, shared.model, shared.accelerator

    def train(self, strategy: str, seed: int) -> None:
        """Train the arm from its start to its end."""
        config, accelerator = self.prepared.config, self.accelerator
        self.label = f"{strategy}/seed{seed}"
        if accelerator.is_main_process and self.folder.exists():
            shutil.rmtree(self.folder)  # an arm that was cut off starts anew
        reset_peak_memory()
        reset_adapter(self.model, seed)
        self.shared.cut.train()
        optimizer = accelerator.prepare_optimizer(make_optimizer(self.model, config.lr, config.training.weight_decay))
        if accelerator.scaler is not None:  # float16: every arm starts with the same loss scale
            accelerator.scaler.load_state_dict(torch.amp.GradScaler().state_dict())
        self.ledger, self.allowance = Ledger(), self._allowance()
        flops = flop_model(self.model, config.model.gradient_checkpointing)
        settings = StepSettings(config.lr, config.training.warmup, config.training.clip_norm, config.speed.reuse != "off")
        source = self.shared.reuse.sources["train"]
        step = TrainingStep(self.shared.placed, optimizer, accelerator, flops, self.ledger, self.allowance, settings, source)
        stream = Prefetch(make_stream(self.prepared, seed, accelerator.process_index, accelerator.num_processes), source)
        self.listener.arm_started(strategy, seed)
        self._open_records()
        try:
            arm = make_strategy(strategy, config.strategy, seed)
            stopped = fit(arm, stream, step, self.ledger, self.allowance, self, config.training.evals)
            self._finish(strategy, seed, stopped)
        finally:
            self._close_records()
            stream.close()
            accelerator.free_memory()  # forgets this arm's optimizer

    def _allowance(self) -> Allowance:
        unit, passes = self.prepared.config.training.match, self.plan.batches
        amount, last = {"epochs": (float(passes), 1.0), "flops": (self.plan.flops, self.plan.last_pass_flops)}[unit]
        return Allowance(unit, amount, passes, last)

    # -- what the loop tells -----------------------------------------------------------------------------------------------------------

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
            **dataclasses.asdict(result),
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

    def _open_records(self) -> None:
        main = self.accelerator.is_main_process
        self._batches = RecordWriter(self.folder / "batches.jsonl") if main else None
        self._evals = RecordWriter(self.folder / "evals.jsonl") if main else None

    def _close_records(self) -> None:
        for writer in (self._batches, self._evals):
            if writer is not None:
                writer.close()

    def _finish(self, strategy: str, seed: int, stopped: str | None) -> None:
        """Score the end, write adapter and samples, and at last the result, which marks the arm as finished."""
        memory = peak_memory_mb()
        validation, test = self.shared.score("validation"), self.shared.score("test")
        self._keep_score(test, "test", 1.0)
        if not self.accelerator.is_main_process:
            return
        self.model.save_pretrained(self.folder / "adapter")
        samples = self.shared.sample()
        prompts = [self.prepared.base.tokenizer.decode(prompt) for prompt in self.shared.prompts]
        content = {"prompts": prompts, "base": self.shared.samples, "trained": samples}
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
            "text": _figures(samples),
            "base_text": _figures(self.shared.samples),
            "stopped": stopped,
        }
        write_json(self.folder / "result.json", result)
        self.listener.arm_done(result)
