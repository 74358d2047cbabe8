"""``iterbatch COMMAND …``: which commands there are, and how what goes wrong is said."""

import dataclasses
import inspect
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro
from rich.console import Console
from rich.text import Text

from iterbatch import __version__
from iterbatch.cli import (
    cache,
    compare,
    export,
    generate,
    list_runs,
    new_strategy,
    power,
    price,
    report,
    train,
    tune,
    worker,
)
from iterbatch.cli.command import EXIT_BAD_INPUT, Command, Words, exit_code
from iterbatch.config import BenchConfig, StrategyConfig
from iterbatch.errors import ConfigError, UserError, did_you_mean
from iterbatch.flags import StrategyFlags, with_values
from iterbatch.language import LANGUAGES, N_, _, of_the_system, use
from iterbatch.report.wording import plain
from iterbatch.strategy.own import blame

COMMANDS: dict[str, tuple[type[Command], str]] = {
    "train": (train.Train, N_("Train LLaMA + LoRA with every strategy and compare perplexity and cost.")),
    "compare": (
        compare.Compare,
        N_("Train arms by seeds at the same budget, score them, and write a report."),
    ),
    "tune": (
        tune.Tune,
        N_("Find the learning rate of every arm of a study, and write it into the study file."),
    ),
    "worker": (
        worker.Worker,
        N_("Join a comparison from any machine that sees its folder: train its pairs until none is left."),
    ),
    "report": (report.Report, N_("Write the report of a run or a comparison anew, from its records alone.")),
    "list": (list_runs.ListRuns, N_("Show the runs and comparisons of a folder.")),
    "power": (power.Power, N_("How many seeds it takes to find an effect, from the spread of a comparison.")),
    "generate": (generate.Generate, N_("Continue a text with a trained adapter.")),
    "export": (
        export.Export,
        N_("Write a trained adapter with its card to a folder, or merged into its base."),
    ),
    "price": (
        price.Price,
        N_("Measure what fresh passes and repeats cost on this machine, by placement of the adapters."),
    ),
    "new-strategy": (new_strategy.NewStrategy, N_("Write a strategy of your own to begin with.")),
    "cache": (cache.Cache, N_("Show and free the activations that --reuse epoch keeps.")),
}
EXAMPLES = {  # of the help of a command
    "train": (
        "iterbatch train",
        "iterbatch train --data_dir notes.jsonl --strategies baseline abr --match flops --seeds 0 1 2",
        "iterbatch train --strategies baseline mine.py:TwiceWhenHard --set cut=2.5",
        "iterbatch train --resume",
    ),
    "compare": (
        "iterbatch compare --strategies baseline abr permuted --seeds 0 1 2 --workers 2",
        "iterbatch compare study.yaml --workers 2 --dry_run",
        "iterbatch compare study.yaml --workers 8 --engine ray --address 192.0.2.1:6379",
    ),
    "tune": ("iterbatch tune study.yaml --workers 2",),
    "worker": (
        "iterbatch worker results/first-study",
        "iterbatch worker results/first-study --strategies mine.py:TwiceWhenHard",
    ),
    "report": ("iterbatch report results/first-study", "iterbatch report results/one results/two --out both"),
    "list": ("iterbatch list", "iterbatch list /elsewhere/results"),
    "power": ("iterbatch power results/first-study",),
    "generate": ('iterbatch generate results/RUN --prompt "The import system" --strategy abr',),
    "export": ("iterbatch export results/RUN --strategy abr --to my-adapter",),
    "price": ("iterbatch price --seconds 30",),
    "new-strategy": ("iterbatch new-strategy TwiceWhenHard",),
    "cache": ("iterbatch cache list", "iterbatch cache clear --yes"),
}
DESCRIPTION = N_(
    "How many times should each batch be trained, and did it pay? iterbatch train without flags runs offline."
)


# What is said of commands and of groups of flags, as it stands in their docstrings.
DOCS = {
    kind: inspect.getdoc(kind) or ""
    for kind in (
        *(command for command, _purpose in COMMANDS.values()),
        *(each.default_factory for each in dataclasses.fields(BenchConfig)),
        StrategyFlags,
    )
    if isinstance(kind, type) and kind is not StrategyConfig
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Its exit code: 0, 2 for bad input or trouble that the user can mend, 130 after Ctrl-C, 143
        after SIGTERM.
    """
    given = list(sys.argv[1:] if words is None else words)
    for stream in (sys.stdout, sys.stderr):  # a Windows console may not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    console, errors = _Console(width=_width()), _Console(stderr=True, width=_width())
    try:
        return _run(speak(given), console)
    except KeyboardInterrupt as stopped:  # before or after what a command does about it itself
        _complain(errors, _("interrupted"))
        return exit_code(stopped)
    except UserError as problem:
        _complain(errors, str(problem))
    except BrokenPipeError:  # of the help: whoever reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as problem:
        _complain(errors, f"{problem.filename or 'a file'}: {problem.strerror or problem}")
    except Exception as problem:
        where = blame(problem)
        if not where:
            raise
        _complain(errors, where)
        _complain(errors, _("What was trained before is kept. A strategy that is mended is another one."))
    return EXIT_BAD_INPUT


def speak(words: list[str]) -> list[str]:
    """Use the language that ``--lang`` names, or the system's; returns the other words.

    Processes that are started from here speak it, too.
    """
    left, asked, coming = [], "", iter(words)
    for word in coming:
        if word == "--lang":
            asked = next(coming, "")
        elif word.startswith("--lang="):
            asked = word.removeprefix("--lang=")
        else:
            left.append(word)
    if asked and asked not in LANGUAGES:
        raise ConfigError(f"--lang is '{asked}'; choose from {', '.join(LANGUAGES)}")
    os.environ["ITERBATCH_LANG"] = asked or of_the_system()
    use(os.environ["ITERBATCH_LANG"])
    return left


class _Console(Console):
    """Whose reader may go away: what was asked for is done all the same, unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def _run(given: list[str], console: Console) -> int:
    if given and given[0] in ("--version", "-V"):
        console.print(f"iterbatch {__version__}")
        return 0
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        allowed = ", ".join(COMMANDS)
        raise ConfigError(
            _("unknown command '{given}'; choose from {allowed}{near}").format(
                given=given[0], allowed=allowed, near=did_you_mean(given[0], COMMANDS)
            )
        )
    if given and given[0] in COMMANDS and given[0] != "train" and _several():
        raise ConfigError(
            _(
                "only iterbatch train shares its work over processes; start iterbatch {command} without them"
            ).format(command=given[0])
        )
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, description=_described(name, given), prefix_name=False)]
        for name, (kind, _) in COMMANDS.items()
    ]
    for kind, told in DOCS.items():
        kind.__doc__ = _(told)
    union: Any = Union[tuple(kinds)]  # noqa: UP007
    command = tyro.cli(
        union,
        args=with_values(given) or ["--help"],
        prog="iterbatch",
        description=_(DESCRIPTION),
        use_underscores=True,
    )
    return command.execute(Words(given[0], given[1:]), console)


def _several() -> bool:
    """Whether torchrun, or accelerate launch, has started this as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


def _described(name: str, given: list[str]) -> str:
    """What a command is for; with examples in its own help."""
    kind, purpose = COMMANDS[name]
    if given[:1] != [name]:
        return _(purpose)
    examples = "\n".join(f"  {each}" for each in EXAMPLES[name])
    heading = _("Examples:")
    return "\n\n".join([_(DOCS[kind]), f"{heading}\n{examples}"])


def _complain(errors: Console, problem: str) -> None:
    errors.print(
        Text(_("error: "), style="bold red"), Text(plain(problem)), sep=""
    )  # a message may quote a file


def _width() -> int | None:
    """The terminal's own width; a pipe gets lines wide enough for the table."""
    return None if sys.stdout.isatty() else 120


def entry_point() -> None:
    """The console script ``iterbatch``."""
    raise SystemExit(main())
