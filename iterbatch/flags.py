"""Words of a command line, or of a YAML file, to a checked configuration."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from iterbatch.config import LAST, BenchConfig, DataConfig, ModelConfig, RunConfig, SpeedConfig, StrategyConfig, TrainingConfig, check, knobs
from iterbatch.errors import ConfigError, did_you_mean

Group = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class TrainFlags:
    """Train LLaMA + LoRA with every strategy and compare perplexity and cost.

    Without any flag: four strategies on the bundled model and text, offline, in a few minutes on a laptop.
    """

    model: Group[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    data: Group[DataConfig] = dataclasses.field(default_factory=DataConfig)
    training: Group[TrainingConfig] = dataclasses.field(default_factory=TrainingConfig)
    speed: Group[SpeedConfig] = dataclasses.field(default_factory=SpeedConfig)
    strategy: Group[StrategyConfig] = dataclasses.field(default_factory=StrategyConfig)
    run: Group[RunConfig] = dataclasses.field(default_factory=RunConfig)


def parse_config(arguments: Sequence[str]) -> BenchConfig:
    """Flags, and the YAML file they may name, to a checked configuration. Flags override the file.

    Raises:
        ConfigError: with all problems of the configuration.
        SystemExit: with code 2 for a flag that does not exist or a value of another type, 0 for ``--help``.
    """
    arguments = _resume_argument(arguments)
    parsed = cli("train", TrainFlags, arguments)
    file = parsed.run.config
    if parsed.run.resume is not None:
        from iterbatch.runtime import run_folder as folder

        run_dir = folder.resume_folder(parsed.run.resume, parsed.run.save_dir, parsed.run.run_name)
        arguments = [*arguments, "--save_dir", str(run_dir.parent), "--run_name", run_dir.name, "--resume", str(run_dir)]
        folder.read_config(run_dir)
        file = file or run_dir / folder.CONFIG
    if file is not None:
        parsed = cli("train", TrainFlags, [*file_words(file), *arguments])
    return from_flags(parsed)


def from_flags(flags: TrainFlags) -> BenchConfig:
    """Parsed flags as a checked configuration.

    Raises:
        ConfigError: with all its problems.
    """
    config = BenchConfig(flags.model, flags.data, flags.training, flags.speed, flags.strategy, flags.run)
    check(config)
    return config


def _resume_argument(arguments: Sequence[str]) -> list[str]:
    """``--resume`` may stand alone."""
    words = list(arguments)
    for place, word in enumerate(words):
        if word == "--resume" and (place + 1 == len(words) or words[place + 1].startswith("--")):
            return [*words[: place + 1], str(LAST), *words[place + 1 :]]
    return words


def cli(command: str, kind: Any, arguments: Sequence[str]) -> Any:
    """Words as an instance of ``kind``.

    Raises:
        SystemExit: with code 2 for a flag that does not exist or a value of another type, 0 for ``--help``.
    """
    return tyro.cli(kind, args=list(arguments), prog=f"iterbatch {command}", use_underscores=True)


def file_words(path: Path) -> list[str]:
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
    return [word for key, value in content.items() for word in flag_words(key, value)]


def flag_words(key: str, value: Any) -> list[str]:
    """A setting as the flag it stands for."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no_{key}"]
    return [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}", str(value)]
