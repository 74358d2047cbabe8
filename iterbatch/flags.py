"""Words of a command line, or of a YAML file, to a checked configuration."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from iterbatch.checks import check, check_placement, settings, strategy_config, with_probe_text
from iterbatch.config import (
    COMPILE,
    ENGINES,
    BenchConfig,
    DataConfig,
    Knob,
    ModelConfig,
    RunConfig,
    SpeedConfig,
    StrategyConfig,
    TrainingConfig,
)
from iterbatch.errors import ConfigError, did_you_mean, first_line, typed
from iterbatch.language import N_, _
from iterbatch.plain_yaml import read_yaml
from iterbatch.records.layout import CONFIG
from iterbatch.records.read import read_config
from iterbatch.runtime.run_folder import resume_folder
from iterbatch.strategy import STRATEGIES, knobs, needs_source, register
from iterbatch.strategy.own import is_named

Group = tyro.conf.OmitArgPrefixes
Engine = Annotated[
    str,
    Knob("What trains: processes of this machine, or workers of a Ray cluster.", choices=ENGINES),
]
Address = Annotated[
    str | None,
    Knob("Ray cluster, HOST:PORT. Default: one is started on this machine for as long as it takes."),
]
Flags = TypeVar("Flags", bound="TrainFlags")


def _strategy_flags() -> type:
    """The strategy group: which strategies, the knobs they say they have, what controls are made from."""
    defaults, controls = StrategyConfig(), [name for name in STRATEGIES if needs_source(name)]
    strategies = Knob(lambda: _("Strategies to compare: {names}.").format(names=", ".join(STRATEGIES)))
    source = Knob(
        lambda: _(
            "Arm that {names} are made from; it must come before them. Default: abr; frozen: learnable"
        ).format(names=", ".join(controls))
    )
    set_ = Knob(
        "Knobs of strategies of your own, which are named as FILE.py:CLASS: NAME=VALUE, one or several."
    )
    own = [
        (
            each.name,
            Annotated[each.kind if each.default is not None else each.kind | None, each.knob],
            each.default,
        )
        for each in knobs().values()
    ]
    rows: list[tuple[str, Any, Any]] = [
        ("strategies", Annotated[tuple[str, ...], strategies], defaults.strategies),
        *own,
        ("source", Annotated[str | None, source], defaults.source),
        ("set", Annotated[tuple[str, ...], set_], ()),
    ]
    typed = [(name, kind, field(default=default)) for name, kind, default in rows]
    return make_dataclass("StrategyFlags", typed, frozen=True)


if TYPE_CHECKING:
    from types import SimpleNamespace as StrategyFlags
else:
    StrategyFlags = _strategy_flags()
    StrategyFlags.__doc__ = N_("The strategies and their knobs.")


@dataclass(frozen=True)
class TrainFlags:
    """Train LLaMA + LoRA with every strategy and compare perplexity and cost.

    Without any flag: four strategies on the bundled model and text, offline, in a few minutes on a laptop.
    """

    model: Group[ModelConfig] = field(default_factory=ModelConfig)
    data: Group[DataConfig] = field(default_factory=DataConfig)
    training: Group[TrainingConfig] = field(default_factory=TrainingConfig)
    speed: Group[SpeedConfig] = field(default_factory=SpeedConfig)
    strategy: Group[StrategyFlags] = field(default_factory=StrategyFlags)
    run: Group[RunConfig] = field(default_factory=RunConfig)

    def config(self) -> BenchConfig:
        """As a checked configuration.

        Raises:
            ConfigError: with all its problems.
        """
        values = dict(vars(self.strategy))
        strategy = strategy_config(values | values_set(values.pop("set")))
        config = BenchConfig(self.model, self.data, self.training, self.speed, strategy, self.run)
        check(config)
        return with_probe_text(config, strategy.strategies)


@dataclass(frozen=True)
class CompareFlags(TrainFlags):
    """Train arms by seeds at the same budget, score them, and write a report.

    The same command resumes a comparison that was stopped. Arms come from a study file, or from
    --strategies. Flags override the file's settings.
    """

    study: Annotated[tyro.conf.Positional[Path | None], Knob("Study file (YAML): settings, arms, cells.")] = (
        None
    )
    workers: Annotated[
        int,
        Knob(
            "Workers, each training one arm with one seed at a time; the cores are shared out among them. "
            "With 0 the comparison is only begun, for `iterbatch worker` on any machine",
            at_least=0,
        ),
    ] = 1
    engine: Engine = "processes"
    address: Address = None


def parse(kind: type[Flags], words: Sequence[str], *, command: str, default: Flags | None = None) -> Flags:
    """Words as flags.

    Args:
        kind: Of the flags.
        words: Of a command line, without the command.
        command: As usage and error messages name it.
        default: What holds where the words say nothing.

    Raises:
        SystemExit: with code 2 for a flag that does not exist or a value of another type, 0 for ``--help``.
    """
    given: Any = {} if default is None else {"default": default}
    flags = tyro.cli(
        kind, args=with_values(words), prog=f"iterbatch {command}", use_underscores=True, **given
    )
    before: Any = () if default is None else default.strategy.set
    if before and flags.strategy.set != before:  # each of these is a setting of its own
        both: Any = (*before, *flags.strategy.set)
        return dataclasses.replace(flags, strategy=dataclasses.replace(flags.strategy, set=both))
    return flags


def with_values(words: Sequence[str]) -> list[str]:
    """Words in which ``--compile`` has a value: alone it means on, as it did when it was a switch."""
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        plain = word.replace("-", "_")
        if plain == "__no_compile":
            found += ["--compile", "off"]
        else:
            found += [word, "on"] if plain == "__compile" and following not in COMPILE else [word]
    return found


def named(words: Sequence[str]) -> list[str]:
    """Words in which strategies of one's own have their names, after they were read.

    Raises:
        ConfigError: where one cannot be.
    """
    return [register(word) if is_named(word) else word for word in words]


def values_set(pairs: Sequence[str]) -> dict[str, Any]:
    """The knobs that ``--set`` names, as what they are.

    Raises:
        ConfigError: for an unknown one, or a value of another kind.
    """
    known, found = knobs(), {}
    for pair in pairs:
        name, is_pair, value = pair.partition("=")
        if not is_pair or name not in known:
            if not is_pair:
                raise ConfigError(_("--set {pair}: write NAME=VALUE").format(pair=pair))
            raise ConfigError(
                _("--set {pair}: no strategy has a knob '{name}'{near}").format(
                    pair=pair, name=name, near=did_you_mean(name, known)
                )
            )
        kind: Any = known[name].kind
        try:
            found[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError, TypeError) as problem:
            wanted = _("true or false") if kind is bool else getattr(kind, "__name__", str(kind))
            raise ConfigError(
                _("--set {pair}: {name} is a {wanted}").format(pair=pair, name=name, wanted=wanted)
            ) from problem
    return found


def parse_config(words: Sequence[str]) -> BenchConfig:
    """The words of ``iterbatch train``, and the YAML file they may name, to a checked configuration.

    Flags override the file. A run that is resumed has its own settings.

    Raises:
        ConfigError: with all problems of the configuration.
        SystemExit: see :func:`parse`.
    """
    words = named(words)
    flags = parse(TrainFlags, words, command="train")
    file, run_dir = flags.run.config, None
    if flags.run.resume is not None:
        run_dir = resume_folder(flags.run.resume, flags.run.save_dir, flags.run.run_name)
    saved = file_words(file) if file is not None else []
    if file is None and run_dir is not None:
        content = read_config(run_dir)
        _check_known(content, run_dir)
        saved = settings_words(content, run_dir / CONFIG)
    if saved:
        default = parse(TrainFlags, saved, command="train")
        flags = parse(TrainFlags, words, command="train", default=default)
    if run_dir is not None:
        where = {"save_dir": run_dir.parent, "run_name": run_dir.name, "resume": run_dir}
        flags = dataclasses.replace(flags, run=dataclasses.replace(flags.run, **where))
    config = flags.config()
    check_placement(config)
    return config


def _check_known(content: Mapping[str, Any], run_dir: Path) -> None:
    """See that strategies of one's own have been named: their code is not looked for in a run's folder.

    Raises:
        ConfigError: with the command that names them.
    """
    named = content.get("strategies")
    names = [str(each) for each in named] if isinstance(named, list) else []
    if missing := [name for name in names if name not in STRATEGIES]:
        again = [name if name in STRATEGIES else f"FILE.py:{name}" for name in names]
        command = typed("iterbatch", "train", "--resume", run_dir, "--strategies", *again)
        raise ConfigError(
            _("{folder} has strategies of your own, {names}; name their files again: {command}").format(
                folder=run_dir, names=", ".join(missing), command=command
            )
        )


def file_words(path: Path) -> list[str]:
    """A YAML file as the flags it stands for, so that both are parsed and checked by the same code.

    Raises:
        ConfigError: where it cannot be read, or sets what it may not.
    """
    try:
        content = read_yaml(path)
    except OSError as problem:
        raise ConfigError(
            _("--config {path} cannot be read: {problem}").format(path=path, problem=problem.strerror)
        ) from problem
    except ValueError as problem:
        raise ConfigError(
            _("--config {path} is not valid YAML: {problem}").format(path=path, problem=first_line(problem))
        ) from problem
    if not isinstance(content, dict):
        raise ConfigError(
            _("--config {path} holds a {name}; write one 'flag: value' a line").format(
                path=path, name=type(content).__name__
            )
        )
    return settings_words(content, path)


def settings_words(content: Mapping[str, Any], path: Path) -> list[str]:
    """What a YAML file holds as flags.

    Raises:
        ConfigError: where it sets what it may not.
    """
    known = settings()
    if "trust_remote_code" in content:
        raise ConfigError(
            _(
                "--config {path} sets trust_remote_code; whether code of others may run is said on the "
                "command line only"
            ).format(path=path)
        )
    unknown = [
        _(
            "--config {path}: unknown setting '{key}'{near}; a knob of a strategy of your own is known "
            "when that is named: --strategies ... FILE.py:CLASS"
        ).format(path=path, key=key, near=did_you_mean(str(key), known))
        for key in content
        if key not in known or key == "config"
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    return words_of(content)


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the flags they stand for; knobs that have none of their own by ``--set``."""
    flags = StrategyFlags.__annotations__
    own = {key: value for key, value in settings.items() if key in knobs() and key not in flags}
    pairs = [f"{key}={value}" for key, value in own.items() if value is not None]
    words = [word for key, value in settings.items() if key not in own for word in flag_words(key, value)]
    return [*words, *(["--set", *pairs] if pairs else [])]


def flag_words(key: str, value: Any) -> list[str]:
    """A setting as the flag it stands for."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no_{key}"]
    return [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}", str(value)]
