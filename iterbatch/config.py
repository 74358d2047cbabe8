"""Every knob of a run, with its meaning, unit, range and default.

The groups below are the groups of ``iterbatch train --help``; a field is a flag of the same name.
Help and range checks are made from what a knob says of itself. What does not live here: what needs
the registry of strategies (:mod:`iterbatch.checks`) and parsing (:mod:`iterbatch.flags`).
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro
from typing_extensions import Doc

from iterbatch.errors import did_you_mean
from iterbatch.language import N_, _

BUNDLED = "bundled"
DEFAULT_LENGTH = 512  # tokens a block
PYDOCS = "pydocs"  # the bundled text
DEFAULT_TOKENS = 65_536  # of the bundled text, with the bundled model: two cores need minutes
LONGEST_JSON = 1 << 22  # bytes of a model's config.json
ASSETS = Path(__file__).parent / "assets" / "base"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INITS: dict[str, Any] = {"default": True, "gaussian": "gaussian"}  # of adapters, as PEFT names them
COMPILE = ("auto", "on", "off")
AUTO, NONE = "auto", "none"  # of the trackers: tensorboard where it is installed; none at all
TRACKERS = (
    AUTO,
    "tensorboard",
    "wandb",
    "mlflow",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "swanlab",
    "trackio",
    NONE,
)
ENGINES = ("processes", "ray")  # of a comparison
LAST = Path("last")  # what --resume without a folder stands for
# These belong to one invocation, not to the experiment.
NOT_SAVED = ("config", "run_name", "resume", "overwrite", "dry_run", "quiet", "trust_remote_code")

Match = Literal["epochs", "flops", "updates", "tokens", "seconds"]
LossOn = Literal["all", "assistant", "completion"]
UNITS: tuple[str, ...] = get_args(Match)  # that a budget is counted in


# ------------------------------------------------------------------------------------------------------------
# What a knob says of itself


ENDS = {"at_least": N_("at least"), "above": N_("above"), "at_most": N_("at most"), "below": N_("below")}


@dataclass(frozen=True)
class Range:
    """The finite numbers that a knob may be."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = ENDS
        known = {end: getattr(self, end) for end in ends if getattr(self, end) is not None}
        return _(" and ").join(f"{_(ENDS[end])} {value:g}" for end, value in known.items())


@dataclass(frozen=True)
class Also:
    """Words that a knob may be besides its numbers."""

    allowed: Callable[[str], bool]
    meaning: str  # which these are


class Knob(Doc):
    """The meaning of a knob, and what it may be; its documentation is the help of its flag.

    Args:
        meaning: With its unit; or a function that tells it in the language in use.
        at_least: Least value; of a list, of each entry. So are the others.
        above: Value that it must exceed.
        at_most: Largest value.
        below: Value that it must not reach.
        choices: Words that it may be.
        also: Words that it may be instead of a number.
    """

    def __init__(
        self,
        meaning: str | Callable[[], str],
        *,
        at_least: float | None = None,
        above: float | None = None,
        at_most: float | None = None,
        below: float | None = None,
        choices: Sequence[str] = (),
        also: Also | None = None,
    ) -> None:
        self.meaning, self.choices, self.also = meaning, tuple(choices), also
        self.range = Range(at_least, above, at_most, below)

    @property
    def documentation(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] - in the language in use
        """Meaning and range."""
        also = _(self.also.meaning) if self.also else ""
        words = _(", or ").join(each for each in (str(self.range), also) if each)
        return f"{self.told} ({words})" if words else self.told

    @property
    def told(self) -> str:
        """The meaning alone, in the language in use."""
        return self.meaning() if callable(self.meaning) else _(self.meaning)

    def problems(self, name: str, value: Any) -> list[str]:
        """What is wrong with a value: a line for each thing, with what was given and what is allowed."""
        if value is None:
            return []
        if isinstance(value, tuple):
            return _list_problems(name, value) + [
                problem for each in dict.fromkeys(value) for problem in self.problems(name, each)
            ]
        if self.choices and value not in self.choices:
            allowed = ", ".join(self.choices)
            return [
                _("unknown --{name} '{value}'; choose from {allowed}{near}").format(
                    name=name, value=value, allowed=allowed, near=did_you_mean(value, self.choices)
                )
            ]
        if self.also is not None and isinstance(value, str):
            allowed = _("a number {range}, or {meaning}").format(range=self.range, meaning=self.also.meaning)
            return (
                []
                if self.also.allowed(value)
                else [
                    _("--{name} is '{value}'; it must be {allowed}").format(
                        name=name, value=value, allowed=allowed
                    )
                ]
            )
        if isinstance(value, int | float) and value not in self.range:
            return [
                _("--{name} is {value}; it must be {range}").format(
                    name=name, value=value, range=str(self.range) or "a finite number"
                )
            ]
        return []


def _list_problems(name: str, values: tuple[Any, ...]) -> list[str]:
    if not values:
        return [_("--{name} is empty; give at least one").format(name=name)]
    twice = len(set(values)) < len(values)
    return (
        [_("--{name} names one twice: {names}").format(name=name, names=" ".join(map(str, values)))]
        if twice
        else []
    )


def knobs_of(kind: Any) -> dict[str, Knob]:
    """The knobs of a dataclass, by field."""
    hints = get_type_hints(kind, include_extras=True)
    found = {
        each.name: [note for note in getattr(hints[each.name], "__metadata__", ()) if isinstance(note, Knob)]
        for each in dataclasses.fields(kind)
    }
    return {name: notes[0] for name, notes in found.items() if notes}


def range_problems(group: Any) -> list[str]:
    """What is out of range in an instance of a dataclass with knobs."""
    values = [(name, knob, getattr(group, name)) for name, knob in knobs_of(type(group)).items()]
    return [problem for name, knob, value in values for problem in knob.problems(name, value)]


class Every:
    """``--checkpoint_every``: a number of seconds (``60`` or ``60s``) or of updates (``500u``).

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, spec: str) -> None:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(s|u)?", spec, flags=re.ASCII)
        if match is None or not float(match[1]) > 0:
            raise ValueError(
                _("'{spec}'; write seconds or updates above 0, for example 60s or 500u").format(spec=spec)
            )
        self.amount, self.in_updates = float(match[1]), match[2] == "u"
        self._from = 0.0

    def restart(self, updates: int) -> None:
        """Count from here."""
        self._from = self._now(updates)

    def due(self, updates: int) -> bool:
        """Whether the amount has passed since the last restart."""
        return self._now(updates) - self._from >= self.amount

    def _now(self, updates: int) -> float:
        return updates if self.in_updates else time.monotonic()  # a clock that is never set back


# ------------------------------------------------------------------------------------------------------------
# The groups


@dataclass(frozen=True)
class ModelConfig:
    """The base model and the adapter that is trained on it."""

    model: Annotated[
        Literal["llama"],
        Knob("Architecture family: llama means the LLaMA layer layout (llama, mistral, qwen2, qwen3)."),
    ] = "llama"
    model_name: Annotated[
        str,
        Knob(
            "Hub name, local folder in Hugging Face format, GGUF file, or 'bundled' for the small LLaMA that "
            "comes with the package."
        ),
    ] = BUNDLED
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Knob(
            "Arithmetic, and storage of the frozen weights. auto: bfloat16 where the machine computes it "
            "well, "
            "else float32."
        ),
    ] = "auto"
    load_in: Annotated[
        Literal["8bit", "4bit"] | None,
        Knob('Quantise the frozen weights through bitsandbytes (pip install "iterbatch[quant]").'),
    ] = None
    quant_type: Annotated[
        Literal["nf4", "fp4"],
        Knob("Of --load_in 4bit, whose scales are quantised too (double quantisation)."),
    ] = "nf4"
    gradient_checkpointing: Annotated[
        bool,
        Knob(
            "Recompute activations in the backward pass: less memory, about one more forward of the adapted "
            "layers a pass."
        ),
    ] = False
    trust_remote_code: Annotated[
        bool,
        Knob("Allow a model folder or hub name to run its own Python code. Never taken from a file."),
    ] = False
    lora_rank: Annotated[int, Knob("Rank of the adapter matrices", at_least=1)] = 8
    lora_alpha: Annotated[float, Knob("Adapter scale is alpha / rank", above=0)] = 16.0
    rslora: Annotated[bool, Knob("Scale by alpha / sqrt(rank) instead, as rank-stabilised LoRA does.")] = (
        False
    )
    init_lora: Annotated[
        str, Knob("How the adapters begin, default or gaussian; both add nothing at first.")
    ] = "default"
    dora: Annotated[bool, Knob("Refused: what DoRA costs is not in the FLOP model.")] = False
    lora_dropout: Annotated[float, Knob("Dropout in front of the adapters", at_least=0, below=1)] = 0.0
    lora_layers: Annotated[
        str,
        Knob(
            "Layers with adapters: 'all', 'top:N' (the N nearest the output), or 'I-J' (from 0, both "
            "included)."
        ),
    ] = "all"
    lora_targets: Annotated[
        tuple[str, ...],
        Knob("Linear projections with adapters, by the end of their names.", choices=LORA_TARGETS),
    ] = LORA_TARGETS


@dataclass(frozen=True)
class DataConfig:
    """The text."""

    dataset: Annotated[
        str,
        Knob(
            "pydocs (the Python reference manual inside CPython), wikitext, dialogue, or any hub name "
            "'owner/name'."
        ),
    ] = PYDOCS
    dataset_config: Annotated[
        str | None, Knob("The hub data set's configuration; wikitext: wikitext-103-raw-v1.")
    ] = None
    data_dir: Annotated[
        Path | None,
        Knob(
            "Read a local file or folder instead of the hub: .txt, .md, .tokens/.raw (WikiText form), "
            ".jsonl, .json, .csv, .tsv, .parquet, each also as .gz or .zst."
        ),
    ] = None
    text_field: Annotated[
        str | None,
        Knob(
            "The field of a row that holds its text. Default: the first form that a row has (text, turns, "
            "dialogue, messages, conversations, instruction, prompt)"
        ),
    ] = None
    encoding: Annotated[str, Knob("Of local text files, for example gbk or utf-16.")] = "utf-8"
    loss_on: Annotated[
        LossOn | None,
        Knob(
            "Which tokens are trained and scored: all, what the assistant says, or what completes a prompt. "
            "Default: all of texts and dialogue, assistant for chat, completion for prompts and instructions"
        ),
    ] = None
    special_tokens_in_text: Annotated[
        Literal["literal", "keep"],
        Knob("What the words of a special token in a text are, such as </s>: only text, or that token."),
    ] = "literal"
    max_length: Annotated[
        int | None,
        Knob(
            "Tokens a block, up to the model's context. Default: 512, or the context of a local model where "
            "that is shorter; bundled: 256",
            at_least=2,
        ),
    ] = None
    max_train_tokens: Annotated[
        int | None,
        Knob(
            "Use only the first tokens of the training text, at least a block. Default: all; of the bundled "
            "text, with the bundled model, 65,536",
            at_least=1,
        ),
    ] = None
    probe_text: Annotated[
        float | None,
        Knob(
            "Share of the training blocks set aside for all arms, on which learnable measures what passes "
            "gain. Default: 0.01 where learnable is among the arms, else none",
            above=0,
            at_most=0.1,
        ),
    ] = None
    max_eval_tokens: Annotated[
        int | None,
        Knob("Score whole documents of validation and test until this many tokens. Default: all", at_least=1),
    ] = None


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how each arm is trained."""

    epochs: Annotated[
        int, Knob("Passes through the training text that the budget is counted in", at_least=1)
    ] = 1
    batch_size: Annotated[int, Knob("Blocks a micro-batch and process", at_least=1)] = 4
    grad_accum: Annotated[
        int,
        Knob("Micro-batches a batch (one optimizer update, the unit of repetition)", at_least=1),
    ] = 1
    lr: Annotated[
        float | None,
        Knob("Peak learning rate of AdamW. Default: 2e-4, with the bundled model 5e-3", above=0),
    ] = None
    warmup: Annotated[
        float,
        Knob(
            "Share of the budget over which the learning rate rises; it then falls along a cosine to 0",
            at_least=0,
            below=1,
        ),
    ] = 0.03
    weight_decay: Annotated[float, Knob("AdamW's decoupled weight decay on the adapters", at_least=0)] = 0.0
    clip_norm: Annotated[float, Knob("Largest gradient norm of an update", above=0)] = 1.0
    match: Annotated[
        Match,
        Knob(
            "What every arm may spend: the same epochs (cost differs), or what the baseline needs for "
            "--epochs "
            "in one of the other units."
        ),
    ] = "epochs"
    budget: Annotated[
        float | None,
        Knob(
            "Amount of --match's unit (FLOPs, updates, trained tokens or seconds) for every arm instead. Not "
            "with --match epochs",
            above=0,
        ),
    ] = None
    budget_share: Annotated[
        float,
        Knob("Every arm's budget, times what --match gives it; an arm of a study may have its own", above=0),
    ] = 1.0
    seeds: Annotated[
        tuple[int, ...],
        Knob("Seeds of adapter weights and data order, one run of every strategy each", at_least=0),
    ] = (0,)
    evals: Annotated[
        int,
        Knob("Validations during training, at equal fractions of the budget, off the clock", at_least=1),
    ] = 4
    on_divergence: Annotated[
        Literal["stop", "rollback"],
        Knob(
            "An arm that diverges: stop it, or return to its last checkpoint with half the learning rate, "
            "three times at most."
        ),
    ] = "stop"
    explosion: Annotated[
        float,
        Knob(
            "Ten batches in a row with a loss this many nats above the first batches' mean count as "
            "diverged, "
            "as do ten not finite",
            above=0,
        ),
    ] = 2.0
    prompts: Annotated[
        int,
        Knob(
            "Prompts from validation that every arm continues at its end, greedy and sampled. iterbatch "
            "compare: 200",
            at_least=1,
        ),
    ] = 5
    eval_batch_size: Annotated[int, Knob("Windows scored together. Does not change results", at_least=1)] = 8


@dataclass(frozen=True)
class SpeedConfig:
    """How passes are made cheaper. Prices change, the mathematics does not."""

    reuse: Annotated[
        Literal["off", "batch", "epoch"],
        Knob(
            "Activations below the lowest adapter: computed in every pass, once a batch, or once and kept on "
            "disk for later epochs, arms and runs."
        ),
    ] = "batch"
    reuse_dtype: Annotated[
        Literal["bfloat16", "float32"],
        Knob(
            "What --reuse epoch keeps them in. float32 takes twice the space, and is exact where the model "
            "computes in float32."
        ),
    ] = "bfloat16"
    reuse_limit_gb: Annotated[
        float,
        Knob(
            "Most disk space for this run's activations, in GB; at least one block. A full store keeps "
            "serving "
            "what it has",
            above=0,
        ),
    ] = 10.0
    compile: Annotated[
        Literal["auto", "on", "off"],
        Knob(
            "Compile each decoder layer for the shape of a batch: faster passes after a cold start of some "
            "ten seconds to minutes. auto: where the planned passes are worth it and there is a compiler. "
            "Alone, the flag means on."
        ),
    ] = "auto"
    sharding: Annotated[
        Literal["none", "fsdp"],
        Knob(
            "Of several processes: each holds the whole model, or, by FSDP, a share of every layer and of "
            "the optimizer. Does not change results."
        ),
    ] = "none"


@dataclass(frozen=True)
class StrategyConfig:
    """The strategies. Their knobs are their own: :func:`iterbatch.strategy.knobs` collects them."""

    strategies: tuple[str, ...] = ("baseline", "abr", "learnable", "window")
    source: str | None = None  # the arm that controls are made from; None: the one each examines
    knobs: Mapping[str, Any] = field(default_factory=dict)  # by name; None is a strategy's own default


def _resumed(words: list[str]) -> Path:
    if len(words) > 1:
        raise ValueError(
            _("it takes one folder of a run, or none; {count} were given").format(count=len(words))
        )
    return Path(words[0]) if words else LAST


Resume = Annotated[  # the words after --resume: a folder, or none
    Path | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[RUN]",
        instance_from_str=_resumed,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(frozen=True)
class RunConfig:
    """Where the run is kept, and what to do about an earlier one."""

    save_dir: Annotated[Path, Knob("Folder of all runs.")] = Path("results")
    run_name: Annotated[str | None, Knob("Name of this run's folder. Default: data set, date and time.")] = (
        None
    )
    resume: Annotated[
        Resume,
        Knob(
            "Resume the run in this folder, from its last checkpoint, with its own settings. Without a "
            "folder: "
            "the run of --run_name, or the newest."
        ),
    ] = None
    checkpoint_every: Annotated[
        str,
        Knob(
            "Seconds (60 or 60s) or updates (500u) between two checkpoints of an arm; the last two are kept."
        ),
    ] = "60s"
    overwrite: Annotated[bool, Knob("Delete an earlier run of this name.")] = False
    log_with: Annotated[
        tuple[str, ...],
        Knob(
            lambda: _(
                "Trackers through Accelerate: {names}. auto: tensorboard where it is installed."
            ).format(names=", ".join(TRACKERS)),
            choices=TRACKERS,
        ),
    ] = (AUTO,)
    dry_run: Annotated[
        bool, Knob("Resolve everything, print it with the planned cost, and train nothing.")
    ] = False
    quiet: Annotated[bool, Knob("Print the result and what went wrong, nothing else.")] = False
    config: Annotated[Path | None, Knob("YAML file of flags; flags on the command line override it.")] = None


@dataclass(frozen=True)
class BenchConfig:
    """One cell: strategies by seeds on one model, one text and one budget."""

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
    def max_train_tokens(self) -> int | None:
        """Tokens of training text, resolved; None is all of it."""
        small = self.bundled and self.data.dataset == PYDOCS and self.data.data_dir is None
        return self.data.max_train_tokens or (DEFAULT_TOKENS if small else None)

    @property
    def lr(self) -> float:
        """Peak learning rate, resolved."""
        return self.training.lr or (5e-3 if self.bundled else 2e-4)

    def flat(self) -> dict[str, Any]:
        """Flag names to plain values, defaults resolved, as ``config.yaml`` holds them."""
        values: dict[str, Any] = {}
        for group in (self.model, self.data, self.training, self.speed, self.strategy, self.run):
            values |= {each.name: getattr(group, each.name) for each in dataclasses.fields(group)}
        resolved = {name: getattr(self, name) for name in ("max_train_tokens", "max_length", "lr")}
        values |= {**values.pop("knobs"), **resolved}
        return {name: _plain(value) for name, value in values.items() if name not in NOT_SAVED}


def _context(folder: Path) -> int:
    """The context of a local model folder, so that the default block length fits it.

    A hub's is not asked for.
    """
    file = folder / "config.json"
    try:
        if not file.is_file() or file.stat().st_size > LONGEST_JSON:
            return DEFAULT_LENGTH
        return int(json.loads(file.read_text(encoding="utf-8"))["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return DEFAULT_LENGTH  # whatever is wrong with the folder is said where the model is loaded


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
