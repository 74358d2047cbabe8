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
from rich.console import Console
from rich.text import Text

from iterbatch.config import BenchConfig, DataConfig, ModelConfig, TrainingConfig, check
from iterbatch.errors import ConfigError, UserError, did_you_mean
from iterbatch.flags import Group, TrainFlags, cli, parse_config

COMMANDS = {
    "train": "train LLaMA + LoRA with every strategy and compare perplexity and cost",
    "compare": "train arms by seeds at the same budget, score them, and write a report",
    "tune": "find the learning rate of every arm of a study, and write it into the study file",
    "report": "write the report of a run or a comparison anew, from its records alone",
    "power": "how many seeds it takes to find an effect, from the spread of a comparison",
    "generate": "continue a text with a trained adapter",
    "price": "measure what fresh passes and repeats cost on this machine, for several placements of the adapters",
    "cache": "show and free the activations that --reuse epoch keeps",
}
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


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
class _CompareFlags(TrainFlags):
    """Train arms by seeds at the same budget, score them, and write a report; the same command goes on with a comparison that was stopped.

    Arms come from a study file, or from --strategies. Flags override the file's settings.
    """

    study: tyro.conf.Positional[Path | None] = None
    """Study file (YAML): settings, arms, cells."""
    workers: int = 1
    """Processes, each training one arm with one seed at a time; >= 1. The cores are shared out among them."""


@dataclass(frozen=True)
class _ReportFlags:
    """Write report.html, report.md, metrics.csv and the figures of a run or a comparison anew, from its records alone."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of a run or a comparison."""
    mauve: Path | None = None
    """Local folder of a language model (Hugging Face format) to embed texts with, for MAUVE (pip install "iterbatch[mauve]")."""


@dataclass(frozen=True)
class _PowerFlags:
    """How many seeds a paired comparison needs to find an effect, from the spread over the seeds of a comparison that was made."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of a comparison with at least two seeds."""
    effect: float = 0.01
    """Difference of log perplexity to be found, nats a token; > 0. 0.01 is about 1% of perplexity."""
    power: float = 0.8
    """Chance to find it; 0 < p < 1."""


@dataclass(frozen=True)
class _TuneFlags:
    """Find the learning rate of every arm of a study: the same number of trials for each, from the same range; goes on where it stopped.

    Needs pip install "iterbatch[tune]". The values found are written into the study file, which then says them for every arm.
    """

    study: tyro.conf.Positional[Path]
    """Study file (YAML); its section tune says trials, low, high and seed."""
    save_dir: Path = Path("results")
    """Folder for the trials."""
    workers: int = 1
    """Processes, each training one trial at a time; >= 1."""


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
    from iterbatch.report.summary import plain  # a message may quote a file

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
    if command == "worker":  # what iterbatch compare starts
        return _work(rest)
    if command not in COMMANDS:
        raise ConfigError(f"unknown command '{command}'; choose from {', '.join(COMMANDS)}{did_you_mean(command, COMMANDS)}")
    commands = {"train": _train, "compare": _compare, "tune": _tune, "report": _report, "power": _power}
    return (commands | {"generate": _generate, "price": _price, "cache": _cache})[command](rest, console)


# --------------------------------------------------------------------------------------------------------------------------------------
# Commands


def _train(arguments: list[str], console: Console) -> int:
    config = parse_config(arguments)
    _quiet_libraries()
    from iterbatch.bench import run as bench
    from iterbatch.bench import prepare
    from iterbatch.cli import progress
    from iterbatch.report import summary as report
    from iterbatch.runtime.processes import is_main

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


def _compare(arguments: list[str], console: Console) -> int:
    flags: _CompareFlags = cli("compare", _CompareFlags, arguments)
    if flags.workers < 1:
        raise ConfigError(f"--workers is {flags.workers}; it must be at least 1")
    _quiet_libraries()
    from iterbatch.study import compare
    from iterbatch.report import page
    from iterbatch.bench import prepare
    from iterbatch.cli import progress
    from iterbatch.report import summary as report
    from iterbatch.study.study_file import load_study, study_of_flags

    words = _without(arguments, flags)
    study = study_of_flags(words) if flags.study is None else load_study(flags.study, words)
    run_dir = flags.run.save_dir / (flags.run.run_name or study.name)
    if flags.run.dry_run:
        for cell in study.cells:
            _, plan = prepare.plan(cell.config)
            console.print(Text(f"{cell.name or study.name}: {len(cell.arms)} arms x {len(cell.config.training.seeds)} seeds"))
            console.print(progress.plan_table(plan, cell.config))
        return 0
    try:
        compare.compare(study, run_dir, flags.workers, flags.run, lambda text: console.print(Text(report.plain(text)), soft_wrap=True))
    except KeyboardInterrupt as stopped:
        console.print(Text("Stopped; pairs in training have made a checkpoint. The same command goes on."))
        return getattr(stopped, "exit_code", EXIT_INTERRUPTED)
    _print_answers(console, page.write(run_dir), run_dir)
    return 0


def _print_answers(console: Console, cells: list[Any], run_dir: Path) -> None:
    from iterbatch.report import page
    from iterbatch.report import summary as report

    for cell in cells:
        if cell.name:
            console.print(Text(f"\n{report.plain(cell.name)}", style="bold"))
        for answer in page.answers(cell):
            console.print(Text(f"- {report.plain(answer)}"), soft_wrap=True)
    console.print(Text(f"\nReport: {run_dir / 'report.html'}"), soft_wrap=True)


def _report(arguments: list[str], console: Console) -> int:
    flags: _ReportFlags = cli("report", _ReportFlags, arguments)
    from iterbatch.report import page

    _print_answers(console, page.write(flags.run_dir, flags.mauve), flags.run_dir)
    return 0


def _power(arguments: list[str], console: Console) -> int:
    flags: _PowerFlags = cli("power", _PowerFlags, arguments)
    problems = [] if flags.effect > 0 else [f"--effect is {flags.effect}; it must be above 0"]
    problems += [] if 0 < flags.power < 1 else [f"--power is {flags.power}; it must be above 0 and below 1"]
    if problems:
        raise ConfigError("\n".join(problems))
    from iterbatch.cli import progress
    from iterbatch.report.comparison import read_cells

    progress.print_power(console, read_cells(flags.run_dir), flags.effect, flags.power)
    return 0


def _tune(arguments: list[str], console: Console) -> int:
    flags: _TuneFlags = cli("tune", _TuneFlags, arguments)
    if flags.workers < 1:
        raise ConfigError(f"--workers is {flags.workers}; it must be at least 1")
    _quiet_libraries()
    from iterbatch.report import summary as report
    from iterbatch.study import tune

    try:
        tune.tune(flags.study, flags.save_dir, flags.workers, lambda text: console.print(Text(report.plain(text)), soft_wrap=True))
    except KeyboardInterrupt as stopped:
        console.print(Text("Stopped. The same command goes on."))
        return getattr(stopped, "exit_code", EXIT_INTERRUPTED)
    return 0


def _without(arguments: list[str], flags: "_CompareFlags") -> list[str]:
    """The words of a comparison that are flags of training."""
    words = list(arguments)
    if flags.study is not None:
        words.remove(next(word for word in words if Path(word) == flags.study))
    if "--workers" in words:
        place = words.index("--workers")
        del words[place : place + 2]
    return [word for word in words if not word.startswith("--workers=")]


def _work(arguments: list[str]) -> int:
    _quiet_libraries()
    from iterbatch.study import compare

    try:
        compare.work(Path(arguments[0]))
    except KeyboardInterrupt as stopped:
        return getattr(stopped, "exit_code", EXIT_INTERRUPTED)
    return 0


def _say_how_to_go_on(console: Console, run_dir: Path | None) -> None:
    if run_dir is None:
        console.print("Interrupted before the run began.")
        return
    console.print(Text(f"Interrupted. To go on where it stopped:\n  iterbatch train --resume {run_dir}"), soft_wrap=True)


def _generate(arguments: list[str], console: Console) -> int:
    flags: GenerateFlags = cli("generate", GenerateFlags, arguments)
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
    from iterbatch.report import summary as report
    from iterbatch.evaluation.generate import Sampling, continue_text

    sampling = Sampling(flags.new_tokens, flags.temperature, flags.top_p, flags.sampling_seed)
    chosen = {"strategy": flags.strategy, "seed": flags.seed, "greedy": flags.greedy}
    text = continue_text(flags.run_dir, flags.prompt, sampling, **chosen, trust_remote_code=flags.trust_remote_code)
    console.print(Text(report.plain(text)), soft_wrap=True)
    return 0


def _price(arguments: list[str], console: Console) -> int:
    flags: _PriceFlags = cli("price", _PriceFlags, arguments)
    training = TrainingConfig(batch_size=flags.batch_size, grad_accum=flags.grad_accum)
    config = BenchConfig(model=flags.model, data=DataConfig(max_length=flags.max_length), training=training)
    check(config)
    if not flags.seconds > 0:
        raise ConfigError(f"--seconds is {flags.seconds}; it must be above 0")
    _quiet_libraries()
    from iterbatch.bench import price
    from iterbatch.cli import progress

    if flags.json:
        sys.stdout.write(json.dumps(price.as_json(price.measure(config, flags.seconds), config), indent=2) + "\n")  # plain, for another program
        return 0
    with console.status("loading the model") as status:
        measured = price.measure(config, flags.seconds, status.update)
    progress.print_prices(console, measured, config)
    return 0


def _cache(arguments: list[str], console: Console) -> int:
    flags: _CacheFlags = cli("cache", _CacheFlags, arguments)
    from iterbatch.cli import progress
    from iterbatch.reuse import store

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
