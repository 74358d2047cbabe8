"""Arms by seeds, paired: the same initial adapter and the same data order for every strategy of a seed.

What lives here: preparing a run, its folder, and one arm after the other. What does not: training (:mod:`iterbatch.loop`) and everything that
can be told from records alone (:mod:`iterbatch.report`).
"""

import dataclasses
import importlib.util
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from iterbatch import hub, report
from iterbatch.budget import Allowance, Ledger
from iterbatch.config import BenchConfig
from iterbatch.data_loader import BatchStream, EvalText, order_digest, prepare_blocks, prepare_eval, tokenizer_digest
from iterbatch.documents import NAMED, Corpus, read_corpus, unreachable_dataset
from iterbatch.errors import ConfigError, DataError, RunError, UserError
from iterbatch.evaluate import Sampling, Score, generate, score, text_metrics
from iterbatch.loop import fit
from iterbatch.model import PRECISION, Base, flop_model, load_base, load_model, memory_estimate_mb, reset_adapter
from iterbatch.record import (
    BatchRecord,
    EvalRecord,
    RecordWriter,
    environment,
    peak_memory_mb,
    reset_peak_memory,
    write_json,
    write_text,
)
from iterbatch.step import StepSettings, TrainingStep, make_optimizer
from iterbatch.strategy import make_strategy

PROMPTS, PROMPT_TOKENS = 5, 32
RESUMABLE = ("strategies", "seeds", "save_dir", "log_with", "eval_batch_size")  # may differ when a run is gone on with


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before anything is trained. Counts are of one baseline arm."""

    batches: int
    tokens: int  # label tokens
    flops: float
    blocks: int
    max_length: int
    eval_tokens: dict[str, int]
    trainable_parameters: int
    parameters: int
    memory_mb: float
    price_ratio: float


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


# --------------------------------------------------------------------------------------------------------------------------------------
# Before the first pass


@dataclass(frozen=True)
class Prepared:
    """Text and tokenizer, ready; no weights yet."""

    config: BenchConfig
    base: Base
    corpus: Corpus
    blocks: Any  # (blocks, length) token ids, memory-mapped
    texts: dict[str, EvalText]  # validation and test


def prepare(config: BenchConfig) -> Prepared:
    """Check the model and the text, and cut the text into blocks.

    Raises:
        UserError: with every problem that can be known before long work.
    """
    base, problems = None, _tracker_problems(config)
    try:
        base = load_base(config)
    except UserError as problem:
        problems.append(str(problem))
    if (problem := _dataset_problem(config)) is not None:
        problems.append(problem)
    if problems or base is None:
        raise ConfigError("\n".join(problems))
    tokenizer, data = base.tokenizer, config.data
    template = _chat_template(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    corpus = read_corpus(data.dataset, dataset_config=data.dataset_config, data_dir=data.data_dir, chat_template=template)
    blocks = prepare_blocks(corpus.splits["train"], tokenizer, config.max_length, data.max_train_tokens, data_key=corpus.digest())
    texts = {split: prepare_eval(corpus.splits[split], tokenizer, config.max_length, data.max_eval_tokens) for split in ("validation", "test")}
    return Prepared(config, base, corpus, blocks, texts)


def _chat_template(tokenizer: Any) -> Any:
    return lambda messages: tokenizer.apply_chat_template(messages, tokenize=False)


def _tracker_problems(config: BenchConfig) -> list[str]:
    package = {"comet_ml": "comet_ml", "tensorboard": "tensorboard"}
    return [
        f"--log_with {name} needs its package: pip install {name}"
        for name in config.run.log_with
        if name != "none" and importlib.util.find_spec(package.get(name, name)) is None
    ]


def _dataset_problem(config: BenchConfig) -> str | None:
    """A word with the hub where the text comes from there; the text itself is read later."""
    known = NAMED.get(config.data.dataset)
    name = known.name if known else config.data.dataset
    if config.data.data_dir is not None or "/" not in name or hub.dataset_in_cache(name):
        return None
    problem = hub.problem_with(name, "dataset")
    return None if problem is None else unreachable_dataset(name, problem)


def make_plan(prepared: Prepared, model: Any, processes: int = 1) -> Plan:
    """Count what a baseline arm will do and cost."""
    config = prepared.config
    stream = _stream(prepared, seed=0, rank=0, world=processes)
    flops, tokens = flop_model(model, config.model.gradient_checkpointing), 0
    epoch_flops = 0.0
    for start in range(0, len(prepared.blocks), stream.batch_rows):
        rows = min(stream.batch_rows, len(prepared.blocks) - start)
        epoch_flops += flops.fresh([(rows, config.max_length)])
        tokens += rows * (config.max_length - 1)
    epochs = config.training.epochs
    return Plan(
        batches=stream.batches_per_epoch * epochs,
        tokens=tokens * epochs,
        flops=epoch_flops * epochs,
        blocks=len(prepared.blocks),
        max_length=config.max_length,
        eval_tokens={split: text.tokens for split, text in prepared.texts.items()},
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
        memory_mb=memory_estimate_mb(model, config.training.batch_size, config.max_length),
        price_ratio=flops.price_ratio([(config.training.batch_size, config.max_length)]),
    )


def plan(config: BenchConfig) -> tuple[Prepared, Plan]:
    """Resolve everything and train nothing: what ``--dry_run`` shows. The model is built without storage."""
    prepared = prepare(config)
    return prepared, make_plan(prepared, load_model(prepared.base, config.model, meta=True))


def _stream(prepared: Prepared, seed: int, rank: int, world: int) -> BatchStream:
    training = prepared.config.training
    return BatchStream(prepared.blocks, training.batch_size, training.grad_accum, seed, rank=rank, world=world)


# --------------------------------------------------------------------------------------------------------------------------------------
# The run's folder


def run_folder(config: BenchConfig) -> Path:
    """Make the run's folder, or find it again.

    Raises:
        RunError: where it exists without ``--resume`` or ``--overwrite``, does not exist with ``--resume``, was made by another
            configuration, or cannot be written.
    """
    name = config.run.run_name or f"{config.data.dataset.replace('/', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = config.run.save_dir / name
    if config.run.resume:
        _check_same_experiment(config, folder)
    elif folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if not config.run.overwrite:
            raise RunError(f"{folder} exists already; go on with it by --resume, replace it by --overwrite, or give another --run_name")
        if not (folder / "config.yaml").exists():
            raise RunError(f"{folder} is not the folder of a run (it has no config.yaml), so --overwrite leaves it alone; give another --run_name")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", config.to_yaml())
    except OSError as problem:
        raise RunError(f"{folder} cannot be written ({problem.strerror}); give another --save_dir") from problem
    return folder


def _check_same_experiment(config: BenchConfig, folder: Path) -> None:
    import yaml

    if not (folder / "config.yaml").exists():
        raise RunError(f"there is no run to go on with at {folder}; leave --resume out to start it")
    then, now = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")), config.flat()
    changed = [f"--{key} was {then.get(key)}, now {value}" for key, value in now.items() if key not in RESUMABLE and then.get(key) != value]
    if changed:
        raise RunError(f"{folder} was made with other settings, its arms could not be compared: {'; '.join(changed)}. Give another --run_name")


def _manifest(prepared: Prepared, plan: Plan) -> dict[str, Any]:
    config = prepared.config
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **environment(),
        "model": {
            "name": config.model.model_name,
            "type": prepared.base.config.model_type,
            "dtype": prepared.base.dtype,
            "tokenizer_sha256": tokenizer_digest(prepared.base.tokenizer),
        },
        "data": {
            "source": Path(prepared.corpus.source).name if config.data.data_dir else prepared.corpus.source,
            "licence": prepared.corpus.licence,
            "sha256": prepared.corpus.digest(),
            "documents": {split: len(documents) for split, documents in prepared.corpus.splits.items()},
            "notes": prepared.corpus.notes,
            "order_sha256": {str(seed): order_digest(len(prepared.blocks), seed, config.training.epochs) for seed in config.training.seeds},
        },
        "seeds": list(config.training.seeds),
        "plan": dataclasses.asdict(plan),
    }


# --------------------------------------------------------------------------------------------------------------------------------------
# The run


def make_accelerator(precision: str, config: BenchConfig | None = None, run_dir: Path | None = None) -> Any:
    """Accelerate with the precision of this run, whatever an earlier run of this process had, and with trackers where asked for."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # mixed precision is global to a process in Accelerate; runs of one process may differ
    trackers = [name for name in config.run.log_with if name != "none"] if config and run_dir else []
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers or None, project_dir=str(run_dir) if run_dir else None)
    if trackers and config is not None:
        flat = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.flat().items()}
        accelerator.init_trackers("tracking", config=flat)
    return accelerator


def run(config: BenchConfig, listener: Listener | None = None) -> Path:
    """Train every strategy with every seed and report.

    Args:
        config: A checked configuration.
        listener: Is told how it goes.

    Returns:
        The run's folder.

    Raises:
        UserError: before any training, where something the user gave cannot be used.
    """
    listener = listener or Listener()
    prepared = prepare(config)
    run_dir = _shared(run_folder(config) if _is_main() else None)
    model = load_model(prepared.base, config.model)
    accelerator = make_accelerator(PRECISION[prepared.base.dtype], config, run_dir)
    plan = make_plan(prepared, model, accelerator.num_processes)
    if accelerator.is_main_process and not (run_dir / "manifest.json").exists():
        write_json(run_dir / "manifest.json", _manifest(prepared, plan))
    for message in prepared.corpus.notes:
        listener.note(f"{prepared.corpus.source}: {message}")
    listener.planned(plan, run_dir)
    shared = BaseResults(prepared, model, accelerator)
    try:
        for seed in config.training.seeds:
            for strategy in config.strategy.strategies:
                folder = run_dir / strategy / f"seed{seed}"
                if _shared((folder / "result.json").exists()):
                    listener.note(f"{strategy}, seed {seed}: finished before, kept")
                    continue
                ArmRun(prepared, plan, model, accelerator, shared, listener, folder).train(strategy, seed)
                if accelerator.is_main_process:
                    report.write(run_dir)
    finally:
        if config.run.log_with != ("none",):
            accelerator.end_training()
    if accelerator.is_main_process:
        report.write(run_dir)
    return run_dir


def _is_main() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _shared(value: Any) -> Any:
    """The main process's value, in every process."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if PartialState().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


class BaseResults:
    """What the untrained base scores and writes: the start of every arm, computed once."""

    def __init__(self, prepared: Prepared, model: Any, accelerator: Any) -> None:
        self.prepared, self.accelerator = prepared, accelerator
        self.prompts = _prompts(prepared)
        reset_adapter(model, seed=0)  # a new adapter adds nothing, so this is the base itself
        placed = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
        self.validation = self.score(placed, "validation")
        self.samples = self.sample(model)
        accelerator.unwrap_model(placed, keep_fp32_wrapper=False)
        accelerator.free_memory()

    def score(self, model: Any, split: str) -> Score:
        """Score a split with the model as it is."""
        tokenizer = self.prepared.base.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        batch_size = self.prepared.config.training.eval_batch_size
        return score(model, self.prepared.texts[split], self.accelerator, batch_size=batch_size, pad_id=pad)

    def sample(self, model: Any) -> dict[str, Any]:
        """Continue the fixed prompts, greedy and sampled, and measure the text."""
        tokenizer = self.prepared.base.tokenizer
        result: dict[str, Any] = {}
        for name, greedy in (("greedy", True), ("sampled", False)):
            with self.accelerator.autocast():
                tokens = generate(model, self.prompts, tokenizer, Sampling(), greedy=greedy)
            result[name] = {"texts": [tokenizer.decode(text) for text in tokens], **text_metrics(tokens)}
        return result


def _prompts(prepared: Prepared) -> list[list[int]]:
    """The openings of the first validation documents that are long enough, all of one length."""
    windows = [window.input_ids[1:] for window in prepared.texts["validation"].windows]
    length = min(PROMPT_TOKENS, max(len(ids) for ids in windows) or 1, max(1, prepared.base.context - Sampling().new_tokens))
    return [ids[:length] for ids in windows if len(ids) >= length][:PROMPTS]


class ArmRun:
    """One strategy with one seed: trains, evaluates, and leaves its records."""

    def __init__(self, prepared: Prepared, plan: Plan, model: Any, accelerator: Any, shared: BaseResults, listener: Listener, folder: Path) -> None:
        self.prepared, self.plan, self.model, self.accelerator = prepared, plan, model, accelerator
        self.shared, self.listener, self.folder = shared, listener, folder

    def train(self, strategy: str, seed: int) -> None:
        """Train the arm from its start to its end."""
        config, accelerator = self.prepared.config, self.accelerator
        self.label = f"{strategy}/seed{seed}"
        if accelerator.is_main_process and self.folder.exists():
            shutil.rmtree(self.folder)  # an arm that was cut off starts anew
        reset_peak_memory()
        reset_adapter(self.model, seed)
        self.model.train()
        optimizer = make_optimizer(self.model, config.lr, config.training.weight_decay)
        self.placed, optimizer = accelerator.prepare(self.model, optimizer)
        self.ledger, self.allowance = Ledger(), self._allowance()
        flops = flop_model(self.model, config.model.gradient_checkpointing)
        settings = StepSettings(config.lr, config.training.warmup, config.training.clip_norm)
        step = TrainingStep(self.placed, optimizer, accelerator, flops, self.ledger, self.allowance, settings)
        stream = _stream(self.prepared, seed, accelerator.process_index, accelerator.num_processes)
        self.listener.arm_started(strategy, seed)
        self._open_records()
        try:
            arm = make_strategy(strategy, config.strategy, seed)
            stopped = fit(arm, stream, step, self.ledger, self.allowance, self, config.training.evals)
            self._finish(strategy, seed, stopped)
        finally:
            self._close_records()
            accelerator.unwrap_model(self.placed, keep_fp32_wrapper=False)
            accelerator.free_memory()

    def _allowance(self) -> Allowance:
        unit, passes = self.prepared.config.training.match, self.plan.batches
        return Allowance(unit, {"epochs": float(passes), "flops": self.plan.flops}[unit], passes)

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
        result = self.shared.validation if fraction == 0 else self.shared.score(self.placed, "validation")
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
        validation, test = self.shared.score(self.placed, "validation"), self.shared.score(self.placed, "test")
        self._keep_score(test, "test", 1.0)
        if not self.accelerator.is_main_process:
            return
        self.model.save_pretrained(self.folder / "adapter")
        samples = self.shared.sample(self.model)
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
            "skipped_updates": ledger.skipped_updates,
            "text": {name: {key: value for key, value in metrics.items() if key != "texts"} for name, metrics in samples.items()},
            "stopped": stopped,
        }
        write_json(self.folder / "result.json", result)
        self.listener.arm_done(result)


def load_trained(run_dir: Path, strategy: str | None = None, seed: int | None = None) -> tuple[Any, Any, str]:
    """Load a run's base with one of its adapters.

    Args:
        run_dir: A run's folder.
        strategy: Whose adapter; without it the one with the lowest validation perplexity.
        seed: Of which seed.

    Returns:
        The PEFT model in eval mode, its tokenizer, and ``strategy/seedK``.

    Raises:
        RunError: where there is no such run or arm.
    """
    import yaml
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from iterbatch.config import make_config

    if not (run_dir / "config.yaml").exists():
        raise RunError(f"{run_dir} is not the folder of a run (it has no config.yaml); give the folder that a run printed at its end")
    rows = [row for row in report.read_results(run_dir) if strategy in (None, row["strategy"]) and seed in (None, row["seed"])]
    if not rows:
        raise RunError(f"{run_dir} has no finished arm{f' of strategy {strategy!r}' if strategy else ''}{f' with seed {seed}' if seed is not None else ''}")
    best = min(rows, key=lambda row: row["val_ppl"])
    config = make_config(**yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")))
    base = load_base(config)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=getattr(torch, base.dtype), weights_only=True)
    name = f"{best['strategy']}/seed{best['seed']}"
    return PeftModel.from_pretrained(model, str(run_dir / name / "adapter")).eval(), base.tokenizer, name


def continue_text(run_dir: Path, prompt: str, sampling: Sampling, *, strategy: str | None = None, seed: int | None = None, greedy: bool = False) -> str:
    """Continue a prompt with a trained adapter; what ``iterbatch generate`` prints.

    Raises:
        RunError: see :func:`load_trained`.
        DataError: where the prompt is empty, or too long for the model's context.
    """
    model, tokenizer, _ = load_trained(run_dir, strategy, seed)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    room = model.config.max_position_embeddings - sampling.new_tokens
    if not ids or len(ids) > room:
        raise DataError(f"the prompt has {len(ids)} tokens; with {sampling.new_tokens} new ones it must have 1 to {max(room, 0)} for this model")
    accelerator = make_accelerator(PRECISION[str(model.base_model.model.dtype).removeprefix("torch.")])
    with accelerator.autocast():
        new = generate(model.to(accelerator.device), [ids], tokenizer, sampling, greedy=greedy)[0]
    return tokenizer.decode(ids + new)

