"""The command line: flags to a configuration to a run. ``train.py`` in the root is ``iterbatch train``."""

import contextlib
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml
from rich.console import Console
from rich.text import Text

from iterbatch.config import (
    LAST,
    BenchConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    SpeedConfig,
    StrategyConfig,
    TrainingConfig,
    check,
    knobs,
)
from iterbatch.errors import ConfigError, UserError, did_you_mean

COMMANDS = {
    "train": "train LLaMA + LoRA with every strategy and compare perplexity and cost",
    "generate": "continue a text with a trained adapter",
    "price": "measure what fresh passes and repeats cost on this machine, for several placements of the adapters",
    "cache": "show and free the activations that --reuse epoch keeps",
}
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
Group = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class _TrainFlags:
    """Train LLaMA + LoRA with every strategy and compare perplexity and cost.

    Without any flag: four strategies on the bundled model and text, offline, in a few minutes on a laptop.
    """

    model: Group[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    data: Group[DataConfig] = dataclasses.field(default_factory=DataConfig)
    training: Group[TrainingConfig] = dataclasses.field(default_factory=TrainingConfig)
    speed: Group[SpeedConfig] = dataclasses.field(default_factory=SpeedConfig)
    strategy: Group[StrategyConfig] = dataclasses.field(default_factory=StrategyConfig)
    run: Group[RunConfig] = dataclasses.field(default_factory=RunConfig)


@dataclass(frozen=True)
class GenerateFlags:
    """Continue a text with a trained adapter."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of a run, as printed at its end."""
    prompt: str
    """Text to continue."""
    strategy: str | None = None
    """Whose adapter; without it the one with the lowest validation perplexity."""
    seed: int | None = None
    """Adapter of this seed."""
    new_tokens: int = 60
    """Tokens to write; >= 1."""
    greedy: bool = False
    """Take the likeliest token each time instead of drawing."""
    temperature: float = 0.8
    """Sampling temperature; > 0."""
    top_p: float = 0.95
    """Sample from the likeliest tokens of this total probability; 0 < p <= 1."""
    sampling_seed: int = 0
    """Seed of the draws; >= 0."""
    trust_remote_code: bool = False
    """Allow the base model to run its own Python code."""


@dataclass(frozen=True)
class _PriceFlags:
    """Measure fresh pass, repeat, prefix and evaluation for adapters on all, half, a quarter and two of the layers, and recommend a placement."""

    model: Group[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    max_length: int | None = None
    """Tokens a block; 2 up to the model's context. Default: 512, or the context of a local model where that is shorter (bundled: 256)."""
    batch_size: int = 4
    """Blocks a micro-batch; >= 1."""
    grad_accum: int = 1
    """Micro-batches a batch; >= 1."""
    seconds: float = 60.0
    """Time for the measurements; > 0. At least three rounds are made."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class _CacheFlags:
    """Show or free the activations that --reuse epoch keeps on disk."""

    action: tyro.conf.Positional[Literal["list", "clear"]]
    """list: what is there; clear: delete it, except what a run is using."""
    keys: tyro.conf.Positional[tuple[str, ...]] = ()
    """clear only these, as list shows them; a beginning is enough."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for bad input or trouble that the user can mend, 130 after Ctrl-C, 143 after SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a Windows console may not be UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    console, errors = Console(width=_width()), Console(stderr=True, width=_width())
    try:
        return _dispatch(arguments, console)
    except UserError as problem:
        _complain(errors, str(problem))
    except OSError as problem:
        _complain(errors, f"{problem.filename or 'a file'}: {problem.strerror or problem}")
    return EXIT_BAD_INPUT


def _complain(errors: Console, problem: str) -> None:
    from iterbatch.report import plain  # a message may quote a file

    errors.print(Text("error: ", style="bold red"), Text(plain(problem)), sep="")


def _width() -> int | None:
    """The terminal's own width; a pipe gets lines wide enough for the table."""
    return None if sys.stdout.isatty() else 120


def _dispatch(arguments: list[str], console: Console) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--version", "-V"):
        from iterbatch import __version__

        console.print(f"iterbatch {__version__}")
        return 0
    if command in ("--help", "-h"):
        console.print(f"usage: iterbatch {{{','.join(COMMANDS)}}} [flags]\n", markup=False)
        for name, purpose in COMMANDS.items():
            console.print(f"  {name:9} {purpose}")
        console.print("\niterbatch train --help lists the flags; iterbatch train without flags runs offline in a few minutes.")
        return 0
    if command not in COMMANDS:
        raise ConfigError(f"unknown command '{command}'; choose from {', '.join(COMMANDS)}{did_you_mean(command, COMMANDS)}")
    return {"train": _train, "generate": _generate, "price": _price, "cache": _cache}[command](rest, console)


# --------------------------------------------------------------------------------------------------------------------------------------
# Flags


def parse_config(arguments: Sequence[str]) -> BenchConfig:
    """Flags, and the YAML file they may name, to a checked configuration. Flags override the file.

    Raises:
        ConfigError: with all problems of the configuration.
        SystemExit: with code 2 for a flag that does not exist or a value of another type, 0 for ``--help``.
    """
    arguments = _resume_argument(arguments)
    parsed = _cli("train", _TrainFlags, arguments)
    file = parsed.run.config
    if parsed.run.resume is not None:
        from iterbatch import folder

        run_dir = folder.resume_folder(parsed.run.resume, parsed.run.save_dir, parsed.run.run_name)
        arguments = [*arguments, "--save_dir", str(run_dir.parent), "--run_name", run_dir.name, "--resume", str(run_dir)]
        folder.read_config(run_dir)
        file = file or run_dir / folder.CONFIG
    if file is not None:
        parsed = _cli("train", _TrainFlags, [*_file_arguments(file), *arguments])
    config = BenchConfig(parsed.model, parsed.data, parsed.training, parsed.speed, parsed.strategy, parsed.run)
    check(config)
    return config


def _resume_argument(arguments: Sequence[str]) -> list[str]:
    """``--resume`` may stand alone."""
    words = list(arguments)
    for place, word in enumerate(words):
        if word == "--resume" and (place + 1 == len(words) or words[place + 1].startswith("--")):
            return [*words[: place + 1], str(LAST), *words[place + 1 :]]
    return words


def _cli(command: str, kind: Any, arguments: Sequence[str]) -> Any:
    return tyro.cli(kind, args=list(arguments), prog=f"iterbatch {command}", use_underscores=True)


def _file_arguments(path: Path) -> list[str]:
    """A YAML file as the flags it stands for, so that both are parsed and checked by the same code."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"--config {path} cannot be read: {problem.strerror}") from problem
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as problem:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(problem).split())}") from problem
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds a {type(content).__name__}; write one 'flag: value' a line")
    known = knobs()
    if "trust_remote_code" in content:
        raise ConfigError(f"--config {path} sets trust_remote_code; whether code of others may run is said on the command line only")
    unknown = [f"--config {path}: unknown setting '{key}'{did_you_mean(str(key), known)}" for key in content if key not in known or key == "config"]
    if unknown:
        raise ConfigError("\n".join(unknown))
    return [word for key, value in content.items() for word in _flag_words(key, value)]


def _flag_words(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no_{key}"]
    return [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}", str(value)]


# --------------------------------------------------------------------------------------------------------------------------------------
# Commands


def _train(arguments: list[str], console: Console) -> int:
    config = parse_config(arguments)
    _quiet_libraries()
    from iterbatch import bench, prepare, progress, report
    from iterbatch.processes import is_main

    if config.run.dry_run:
        prepared, plan = prepare.plan(config)
        console.print(Text(config.to_yaml()))
        for note in prepared.corpus.notes:
            console.print(Text(f"note: {report.plain(note)}"))
        console.print(progress.plan_table(plan, config))
        return 0
    talking = is_main()  # of several processes one
    listener = progress.RichListener(console, config) if talking else None
    try:
        with listener or contextlib.nullcontext():
            run_dir = bench.run(config, listener)
    except KeyboardInterrupt as stopped:
        if talking:
            _say_how_to_go_on(console, getattr(listener, "run_dir", None))
        return getattr(stopped, "exit_code", EXIT_INTERRUPTED)
    if talking:
        progress.print_result(console, report.summarise(report.read_results(run_dir)), run_dir)
    return 0


def _say_how_to_go_on(console: Console, run_dir: Path | None) -> None:
    if run_dir is None:
        console.print("Interrupted before the run began.")
        return
    console.print(Text(f"Interrupted. To go on where it stopped:\n  iterbatch train --resume {run_dir}"), soft_wrap=True)


def _generate(arguments: list[str], console: Console) -> int:
    flags: GenerateFlags = _cli("generate", GenerateFlags, arguments)
    problems = []
    if flags.new_tokens < 1:
        problems.append(f"--new_tokens is {flags.new_tokens}; it must be at least 1")
    if not flags.temperature > 0:
        problems.append(f"--temperature is {flags.temperature}; it must be above 0")
    if not 0 < flags.top_p <= 1:
        problems.append(f"--top_p is {flags.top_p}; it must be above 0 and at most 1")
    if problems:
        raise ConfigError("\n".join(problems))
    _quiet_libraries()
    from iterbatch import report
    from iterbatch.generate import Sampling, continue_text

    sampling = Sampling(flags.new_tokens, flags.temperature, flags.top_p, flags.sampling_seed)
    chosen = {"strategy": flags.strategy, "seed": flags.seed, "greedy": flags.greedy}
    text = continue_text(flags.run_dir, flags.prompt, sampling, **chosen, trust_remote_code=flags.trust_remote_code)
    console.print(Text(report.plain(text)), soft_wrap=True)
    return 0


def _price(arguments: list[str], console: Console) -> int:
    flags: _PriceFlags = _cli("price", _PriceFlags, arguments)
    training = TrainingConfig(batch_size=flags.batch_size, grad_accum=flags.grad_accum)
    config = BenchConfig(model=flags.model, data=DataConfig(max_length=flags.max_length), training=training)
    check(config)
    if not flags.seconds > 0:
        raise ConfigError(f"--seconds is {flags.seconds}; it must be above 0")
    _quiet_libraries()
    from iterbatch import price, progress

    if flags.json:
        sys.stdout.write(json.dumps(price.as_json(price.measure(config, flags.seconds), config), indent=2) + "\n")  # plain, for another program
        return 0
    with console.status("loading the model") as status:
        measured = price.measure(config, flags.seconds, status.update)
    progress.print_prices(console, measured, config)
    return 0


def _cache(arguments: list[str], console: Console) -> int:
    flags: _CacheFlags = _cli("cache", _CacheFlags, arguments)
    from iterbatch import progress, store

    if flags.action == "list":
        progress.print_stores(console, store.list_stores())
        return 0
    deleted, left = store.clear_stores(flags.keys)
    console.print(Text(f"{len(deleted)} store(s) deleted, {sum(each.gigabytes for each in deleted):.3f} GB freed"))
    for each in left:
        console.print(Text(f"{each.key} is in use, left alone"))
    return 0


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice off the screen; their errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(peft|accelerate|transformers|torch|huggingface_hub)\b.*")
    import logging

    for name in ("huggingface_hub", "datasets", "transformers", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def entry_point() -> None:
    """The console script ``iterbatch``."""
    raise SystemExit(main())
