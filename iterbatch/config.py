"""Every knob of a run, with its unit, range and default; all validation, with all problems reported together.

The groups below are the groups of ``iterbatch train --help``; a field is a flag of the same name. What does not live here: parsing, which
is in :mod:`iterbatch.cli.main`.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from iterbatch.errors import ConfigError, did_you_mean

BUNDLED = "bundled"
DEFAULT_LENGTH = 512  # tokens a block
ASSETS = Path(__file__).parent / "assets" / "base"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio", "none")
PATHS = ("data_dir", "save_dir")
LAST = Path("last")  # what --resume without a folder stands for
NOT_SAVED = ("config", "run_name", "resume", "overwrite", "dry_run", "trust_remote_code")  # they belong to one invocation, not to the experiment


@dataclass(frozen=True)
class ModelConfig:
    """The base model and the adapter that is trained on it."""

    model: Literal["llama"] = "llama"
    """Architecture family: llama means the LLaMA layer layout (llama, mistral, qwen2, qwen3)."""
    model_name: str = BUNDLED
    """Hub name, local folder in Hugging Face format, or 'bundled' for the small LLaMA that comes with the package."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic, and storage of the frozen weights. auto: bfloat16 where the machine computes it well, else float32."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantise the frozen weights through bitsandbytes (pip install "iterbatch[quant]")."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about one more forward of the adapted layers a pass."""
    trust_remote_code: bool = False
    """Allow a model folder or hub name to run its own Python code. Never taken from a file."""
    lora_rank: int = 8
    """Rank of the adapter matrices; >= 1."""
    lora_alpha: float = 16.0
    """Adapter scale is alpha / rank; > 0."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters; 0 <= p < 1."""
    lora_layers: str = "all"
    """Layers with adapters: 'all', 'top:N' (the N nearest the output), or 'I-J' (from 0, both included)."""
    lora_targets: tuple[str, ...] = LORA_TARGETS
    """Linear projections with adapters, by the end of their names."""


@dataclass(frozen=True)
class DataConfig:
    """The text."""

    dataset: str = "pydocs"
    """pydocs (the Python reference manual inside CPython), wikitext, dialogue, or any hub name 'owner/name'."""
    dataset_config: str | None = None
    """The hub data set's configuration; wikitext: wikitext-103-raw-v1."""
    data_dir: Path | None = None
    """Read a local file or folder instead of the hub: .txt, .tokens/.raw (WikiText form), .jsonl, .csv, .parquet."""
    max_length: int | None = None
    """Tokens a block; 2 up to the model's context. Default: 512, or the context of a local model where that is shorter (bundled: 256)."""
    max_train_tokens: int | None = None
    """Use only the first tokens of the training text; >= max_length. Default: all."""
    max_eval_tokens: int | None = None
    """Score whole documents of validation and test until this many tokens; >= 1. Default: all."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how each arm is trained."""

    epochs: int = 1
    """Passes through the training text that the budget is counted in; >= 1."""
    batch_size: int = 4
    """Blocks a micro-batch and process; >= 1."""
    grad_accum: int = 1
    """Micro-batches a batch (one optimizer update, the unit of repetition); >= 1."""
    lr: float | None = None
    """Peak learning rate of AdamW; > 0. Default: 2e-4, with the bundled model 5e-3."""
    warmup: float = 0.03
    """Share of the budget over which the learning rate rises; 0 <= w < 1. It then falls along a cosine to 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay on the adapters; >= 0."""
    clip_norm: float = 1.0
    """Largest gradient norm of an update; > 0."""
    match: Literal["epochs", "flops", "updates", "tokens", "seconds"] = "epochs"
    """What every arm may spend: the same epochs (cost differs), or what the baseline needs for --epochs in one of the other units."""
    budget: float | None = None
    """Amount of --match's unit (FLOPs, updates, trained tokens or seconds) for every arm instead; > 0. Not with --match epochs."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of adapter weights and data order, one run of every strategy each; >= 0."""
    evals: int = 4
    """Validations during training, at equal fractions of the budget, off the clock; >= 1."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """An arm that diverges: stop it, or return to its last checkpoint with half the learning rate, three times at most."""
    explosion: float = 2.0
    """Ten batches in a row with a loss this many nats above the first batches' mean count as diverged, as do ten not finite; > 0."""
    prompts: int = 5
    """Prompts from validation that every arm continues at its end, greedy and sampled; >= 1. iterbatch compare: 200."""
    eval_batch_size: int = 8
    """Windows scored together; >= 1. Does not change results."""


@dataclass(frozen=True)
class SpeedConfig:
    """How passes are made cheaper. Prices change, the mathematics does not."""

    reuse: Literal["off", "batch", "epoch"] = "batch"
    """Activations below the lowest adapter: computed in every pass, once a batch, or once and kept on disk for later epochs, arms and runs."""
    reuse_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What --reuse epoch keeps them in. float32 takes twice the space, and is exact where the model computes in float32."""
    reuse_limit_gb: float = 10.0
    """Most disk space for this run's activations, in GB; at least one block. A full store keeps serving what it has."""
    compile: bool = False
    """Compile each decoder layer for the shape of a batch: faster passes after a cold start of some ten seconds to minutes."""


@dataclass(frozen=True)
class StrategyConfig:
    """The strategies and their knobs."""

    strategies: tuple[str, ...] = ("baseline", "abr", "learnable", "window")
    """Strategies to compare: baseline, abr, learnable, window; controls: fixed, permuted, random, inverse, excess, scaled_lr, higher_lr, weighted,
    spaced, small_batches, selective."""
    loss_threshold: float = 2.0
    """Initial loss, in nats a token, above which abr repeats and window calls the level high; > 0."""
    max_repeats: int | None = None
    """Most passes a batch, the first included; window: most extra passes; fixed: all its passes; >= 1. Default: 5, window 1, fixed 2."""
    window_size: int = 5
    """Initial losses that window looks back on; >= 2."""
    probe_rate: float = 0.1
    """Share of batches whose last pass learnable measures on the next fresh batch; 0 <= p <= 1."""
    source: str = "abr"
    """Arm whose passes permuted, random, higher_lr and small_batches are made from; it must come before them."""


@dataclass(frozen=True)
class RunConfig:
    """Where the run is kept, and what to do about an earlier one."""

    save_dir: Path = Path("results")
    """Folder of all runs."""
    run_name: str | None = None
    """Name of this run's folder. Default: data set, date and time."""
    resume: Path | None = None
    """Go on with the run in this folder, from its last checkpoint, with its own settings. Without a folder: the run of --run_name, or the newest."""
    checkpoint_every: str = "60s"
    """Seconds (60 or 60s) or updates (500u) between two checkpoints of an arm; the last two are kept."""
    overwrite: bool = False
    """Delete an earlier run of this name."""
    log_with: tuple[str, ...] = ("tensorboard",)
    """Trackers through Accelerate: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio, or none."""
    dry_run: bool = False
    """Resolve everything, print it with the planned cost, and train nothing."""
    config: Path | None = None
    """YAML file of flags; flags on the command line override it."""


@dataclass(frozen=True)
class BenchConfig:
    """One run: strategies by seeds on one model and one text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def bundled(self) -> bool:
        """Whether the base is the one inside the package."""
        return self.model.model_name == BUNDLED

    @property
    def model_path(self) -> str:
        """What Transformers is given: a folder or a hub name."""
        return str(ASSETS) if self.bundled else self.model.model_name

    @property
    def max_length(self) -> int:
        """Tokens a block, resolved."""
        return self.data.max_length or min(DEFAULT_LENGTH, _context(Path(self.model_path)))

    @property
    def lr(self) -> float:
        """Peak learning rate, resolved."""
        return self.training.lr or (5e-3 if self.bundled else 2e-4)

    def flat(self) -> dict[str, Any]:
        """Flag names to plain values, defaults resolved, as ``config.yaml`` holds them."""
        values: dict[str, Any] = {}
        for group in dataclasses.fields(self):
            for knob in dataclasses.fields(getattr(self, group.name)):
                values[knob.name] = _plain(getattr(getattr(self, group.name), knob.name))
        values |= {"max_length": self.max_length, "lr": self.lr}
        return {name: value for name, value in values.items() if name not in NOT_SAVED}

    def to_yaml(self) -> str:
        """The resolved configuration; ``--config`` reads it back."""
        return yaml.safe_dump(self.flat(), sort_keys=False, allow_unicode=True)


def _context(folder: Path) -> int:
    """The context of a local model folder, so that the default block length fits it; a hub's is not asked for here."""
    try:
        return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_LENGTH  # whatever is wrong with the folder is said where the model is loaded


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def knobs() -> dict[str, str]:
    """Every flag's name to the name of its group."""
    return {
        knob.name: group.name
        for group in dataclasses.fields(BenchConfig)
        for knob in dataclasses.fields(group.default_factory)  # pyright: ignore[reportArgumentType]
    }


def make_config(**values: Any) -> BenchConfig:
    """Build and check a configuration from flag names, for use from Python.

    Raises:
        ConfigError: for an unknown knob or a value out of range.
    """
    groups: dict[str, dict[str, Any]] = {}
    known = knobs()
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown setting '{name}'{did_you_mean(name, known)}")
        value = tuple(value) if isinstance(value, list) else value
        groups.setdefault(known[name], {})[name] = Path(value) if name in PATHS and isinstance(value, str) else value
    parts = {group.name: group.default_factory(**groups.get(group.name, {})) for group in dataclasses.fields(BenchConfig)}  # pyright: ignore
    config = BenchConfig(**parts)
    check(config)
    return config


def check(config: BenchConfig) -> None:
    """Raise one ConfigError with every problem of a configuration.

    Raises:
        ConfigError: with one line a problem: what was given, what is allowed.
    """
    problems = [*_range_problems(config), *_choice_problems(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def _range_problems(config: BenchConfig) -> list[str]:
    model, data, training, strategy = config.model, config.data, config.training, config.strategy
    at_least = [
        ("lora_rank", model.lora_rank, 1),
        ("max_length", data.max_length, 2),
        ("max_train_tokens", data.max_train_tokens, 1),
        ("max_eval_tokens", data.max_eval_tokens, 1),
        ("epochs", training.epochs, 1),
        ("batch_size", training.batch_size, 1),
        ("grad_accum", training.grad_accum, 1),
        ("weight_decay", training.weight_decay, 0),
        ("evals", training.evals, 1),
        ("prompts", training.prompts, 1),
        ("eval_batch_size", training.eval_batch_size, 1),
        ("max_repeats", strategy.max_repeats, 1),
        ("window_size", strategy.window_size, 2),
    ]
    above_zero = [
        ("lora_alpha", model.lora_alpha),
        ("lr", training.lr),
        ("clip_norm", training.clip_norm),
        ("loss_threshold", strategy.loss_threshold),
        ("reuse_limit_gb", config.speed.reuse_limit_gb),
        ("explosion", training.explosion),
        ("budget", training.budget),
    ]
    problems = [f"--{name} is {value}; it must be at least {low}" for name, value, low in at_least if value is not None and not value >= low]
    problems += [
        f"--{name} is {value}; it must be a finite number above 0"
        for name, value in above_zero
        if value is not None and not (math.isfinite(value) and value > 0)
    ]
    shares = [("lora_dropout", model.lora_dropout), ("warmup", training.warmup)]
    problems += [f"--{name} is {value}; it must be at least 0 and below 1" for name, value in shares if not 0 <= value < 1]
    if not 0 <= strategy.probe_rate <= 1:
        problems.append(f"--probe_rate is {strategy.probe_rate}; it must be from 0 to 1")
    if training.budget is not None and training.match == "epochs":
        problems.append("--budget needs a unit: give --match flops, updates, tokens or seconds with it, or --epochs without it")
    if data.max_train_tokens is not None and 0 < data.max_train_tokens < config.max_length:
        problems.append(f"--max_train_tokens is {data.max_train_tokens}; it must be at least one block of --max_length {config.max_length}")
    return problems


def _choice_problems(config: BenchConfig) -> list[str]:
    from iterbatch.runtime.checkpoint import Every
    from iterbatch.strategy import STRATEGIES

    names, seeds, problems = config.strategy.strategies, config.training.seeds, []
    problems += [
        f"unknown strategy '{name}'; choose from {', '.join(STRATEGIES)}{did_you_mean(name, STRATEGIES)}" for name in names if name not in STRATEGIES
    ]
    problems += _source_problems(config, list(names))
    for label, values in (("strategies", names), ("seeds", seeds), ("lora_targets", config.model.lora_targets)):
        if not values:
            problems.append(f"--{label} is empty; give at least one")
        if len(set(values)) < len(values):
            problems.append(f"--{label} names one twice: {' '.join(map(str, values))}")
    problems += [f"--seeds holds {seed}; a seed must be at least 0" for seed in seeds if seed < 0]
    for target in config.model.lora_targets:
        if target not in LORA_TARGETS:
            problems.append(f"unknown --lora_targets '{target}'; choose from {', '.join(LORA_TARGETS)}{did_you_mean(target, LORA_TARGETS)}")
    for tracker in config.run.log_with:
        if tracker not in TRACKERS:
            problems.append(f"unknown tracker '{tracker}'; choose from {', '.join(TRACKERS)}{did_you_mean(tracker, TRACKERS)}")
    if not re.fullmatch(r"all|top:[1-9]\d*|\d+-\d+", config.model.lora_layers):
        problems.append(f"--lora_layers is '{config.model.lora_layers}'; write 'all', 'top:N' or 'I-J', for example top:2 or 4-7")
    name = config.run.run_name
    if name is not None and (name in ("", ".", "..") or re.search(r'[\\/:*?"<>|\x00-\x1f]', name)):
        problems.append(f"--run_name is '{name}'; it must be a plain folder name without any of \\ / : * ? \" < > |")
    if config.run.resume and config.run.overwrite:
        problems.append("--resume and --overwrite exclude each other; give one of them")
    try:
        Every(config.run.checkpoint_every)
    except ValueError as problem:
        problems.append(f"--checkpoint_every is {problem}")
    return problems


def _source_problems(config: BenchConfig, names: list[str]) -> list[str]:
    """Arms that come before those they are made from."""
    from iterbatch.strategy import STRATEGIES

    source, problems = config.strategy.source, []
    before: set[str] = set()
    for name in names:
        if name in STRATEGIES and STRATEGIES[name].needs_source and source not in before:
            problems.append(f"'{name}' is made from the passes of --source '{source}', which does not come before it; add '{source}' in front")
        before.add(name)
    training = config.training
    if training.match == "seconds" and training.budget is None and names[:1] != ["baseline"]:
        problems.append("--match seconds gives every arm what the baseline took: let 'baseline' come first, or give --budget in seconds")
    return problems


def adapted_layers(spec: str, layers: int) -> list[int]:
    """Layer numbers of a ``--lora_layers`` value, for a model of ``layers`` layers.

    Raises:
        ConfigError: where the range lies outside the model.
    """
    if spec == "all":
        return list(range(layers))
    if spec.startswith("top:"):
        first, last = layers - int(spec[4:]), layers - 1
    else:
        first, last = (int(part) for part in spec.split("-"))
    if not 0 <= first <= last < layers:
        allowed = f"all, top:1 to top:{layers}, and I-J within 0-{layers - 1}"
        raise ConfigError(f"--lora_layers is '{spec}'; the model has {layers} layers: allowed are {allowed}")
    return list(range(first, last + 1))
