"""Checks of a configuration that need the registry of strategies; every problem is reported together."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type
from typing_extensions import Unpack

from iterbatch.config import INITS, BenchConfig, Every, StrategyConfig, range_problems
from iterbatch.errors import ConfigError, UserError, did_you_mean
from iterbatch.language import _
from iterbatch.records.scheduler import read_schedulers
from iterbatch.settings import Settings
from iterbatch.strategy import REFERENCE, STRATEGIES, knobs, needs_source, register, source_of
from iterbatch.strategy.base import AT_ONCE, OTHER_PASSES, PROBE_TEXT
from iterbatch.strategy.own import BROKEN, is_named, why_broken
from iterbatch.strategy.scheduler import probes_of

GROUPS: dict[str, Any] = {each.name: each.default_factory for each in dataclasses.fields(BenchConfig)}
PATHS = ("data_dir", "save_dir", "resume", "config", "scheduler_from")
PROBE_SHARE = 0.01  # of the training blocks, where a strategy measures on probe text
LAYERS = r"all|top:[1-9]\d*|\d+-\d+"  # forms of --lora_layers


def settings() -> dict[str, str]:
    """Every flag's name to the name of its group."""
    found = {each.name: group for group, kind in GROUPS.items() for each in dataclasses.fields(kind)}
    del found["knobs"]
    return found | dict.fromkeys(knobs(), "strategy")


def types() -> dict[str, Any]:
    """Every setting's type, by its name."""
    found = {name: hint for kind in GROUPS.values() for name, hint in get_type_hints(kind).items()}
    return found | {
        name: knob.kind if knob.default is not None else knob.kind | None for name, knob in knobs().items()
    }


def type_problems(name: str, value: Any, kind: Any) -> list[str]:
    """What is wrong with the type of a value: nothing, or a line that says what was given and is allowed."""
    try:
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise TypeCheckError("a bool is no number")
        check_type(value, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return [
            _("'{name}' is {value!r}, a {name2}; it must be {kind_words}").format(
                name=name, value=value, name2=type(value).__name__, kind_words=_kind_words(kind)
            )
        ]
    return []


def _kind_words(kind: Any) -> str:
    """A type as one says it."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return _("a list, each {kind_words}").format(kind_words=_kind_words(get_args(kind)[0]))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_kind_words, get_args(kind)))
    words = {
        int: _("a whole number"),
        float: "a number",
        str: "a text",
        bool: _("True or False"),
        Path: "a path",
    }
    return words.get(kind, "None")


def strategy_config(values: Mapping[str, Any]) -> StrategyConfig:
    """The strategy group from flags; knobs that are not named have their defaults."""
    own = {name: value for name, value in values.items() if name in ("strategies", "source")}
    given = {name: values.get(name, shared.default) for name, shared in knobs().items()}
    return StrategyConfig(**own, knobs=given)


def make_config(**values: Unpack[Settings]) -> BenchConfig:
    """Build and check a configuration from flag names, for use from Python.

    Raises:
        ConfigError: for an unknown knob, and a value of another type or out of range.
    """
    given: dict[str, Any] = {**values}
    if isinstance(given.get("strategies"), list | tuple):  # those of one's own bring knobs
        given["strategies"] = [_registered(each) for each in given["strategies"]]
    return config_of(given)


def config_of(given: Mapping[str, Any]) -> BenchConfig:
    """As :func:`make_config`, of settings that were read: they name known strategies, and never code."""
    known, kinds = settings(), types()
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    problems = []
    for name, value in given.items():
        if name not in known:
            raise ConfigError(
                _("unknown setting '{name}'{near}").format(name=name, near=did_you_mean(name, known))
            )
        value = tuple(value) if isinstance(value, list) else value
        value = Path(value) if name in PATHS and isinstance(value, str) else value
        if name == "compile" and isinstance(value, bool):  # as earlier versions wrote it
            value = "on" if value else "off"
        problems += type_problems(name, value, kinds[name])
        groups[known[name]][name] = value
    if problems:
        raise ConfigError("\n".join(problems))
    strategy = strategy_config(groups.pop("strategy"))
    config = BenchConfig(
        strategy=strategy, **{group: GROUPS[group](**given) for group, given in groups.items()}
    )
    check(config)
    return with_probe_text(config, config.strategy.strategies)


def config_of_run(values: Mapping[str, Any], **more: Any) -> BenchConfig:
    """What a run was made with, to use its adapters: a strategy of one's own need not be there again.

    Raises:
        ConfigError: as :func:`make_config`.
    """
    if twice := values.keys() & more.keys():
        names = ", ".join(sorted(twice))
        raise ConfigError(
            _("the run's config.yaml sets {names}; that is said on the command line only").format(names=names)
        )
    named = values.get("strategies")
    if isinstance(named, list) and any(str(each) not in STRATEGIES for each in named):
        values = {name: value for name, value in values.items() if name in settings()}
        values["strategies"] = [each for each in named if str(each) in STRATEGIES] or [REFERENCE]
    return config_of({**values, **more})


def _registered(strategy: Any) -> str:
    """The name of a strategy, which may be a class of one's own, or name one."""
    own = isinstance(strategy, type) or is_named(str(strategy))
    return register(strategy) if own else str(strategy)


def with_probe_text(config: BenchConfig, strategies: Iterable[str]) -> BenchConfig:
    """The configuration with a share of the text set aside, where a strategy needs it and none is given."""
    needed = any(STRATEGIES[name].needs == PROBE_TEXT for name in strategies)
    if config.data.probe_text is not None or not needed:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, probe_text=PROBE_SHARE))


def check(config: BenchConfig) -> None:
    """Check all of a configuration.

    Raises:
        ConfigError: with one line a problem: what was given, what is allowed.
    """
    groups = (config.model, config.data, config.training, config.speed, config.run)
    problems = [problem for group in groups for problem in range_problems(group)]
    problems += [*_strategy_problems(config), *_budget_problems(config)]
    problems += [*_adapter_problems(config), *_text_problems(config), *_run_problems(config)]
    problems += _sharding_problems(config)
    if not re.fullmatch(LAYERS, config.model.lora_layers):
        given = config.model.lora_layers
        problems.append(
            _("--lora_layers is '{given}'; write 'all', 'top:N' or 'I-J', for example top:2 or 4-7").format(
                given=given
            )
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _strategy_problems(config: BenchConfig) -> list[str]:
    names, problems, shared = config.strategy.strategies, [], knobs()
    for name, value in config.strategy.knobs.items():
        if name not in shared:
            problems.append(
                _("unknown setting '{name}'{near}").format(name=name, near=did_you_mean(name, shared))
            )
        else:
            problems += shared[name].knob.problems(name, value)
    if not names:
        problems.append(_("--strategies is empty; give at least one"))
    if len(set(names)) < len(names):
        problems.append(_("--strategies names one twice: {names}").format(names=" ".join(names)))
    problems += [unknown_strategy(name) for name in names if name not in STRATEGIES]
    return problems + _source_problems(config) + _scheduler_problems(config)


def check_placement(config: BenchConfig) -> None:
    """Check that one of the strategies has repeats to place.

    Raises:
        ConfigError: where none has, and they are to be placed.
    """
    names, placement = config.strategy.strategies, config.strategy.knobs["placement"]
    if placement != AT_ONCE and not any(STRATEGIES[name].gives_k for name in names):
        raise ConfigError(
            _("--placement is {placement}, and {names} repeats no batch; leave it out").format(
                placement=placement, names=", ".join(names)
            )
        )


def _scheduler_problems(config: BenchConfig) -> list[str]:
    """What earlier schedulers are wrong with."""
    given, frozen = (config.strategy.knobs.get(f"scheduler_{part}") for part in ("from", "frozen"))
    if given is None:
        return [_("--scheduler_frozen needs --scheduler_from: a policy to keep as it is")] if frozen else []
    try:
        for kept in read_schedulers(Path(given)):
            probes_of(kept)
    except UserError as problem:
        return [_("--scheduler_from: {problem}").format(problem=problem)]
    return []


def unknown_strategy(name: str, where: str = "") -> str:
    """What to say of a strategy that the registry has not."""
    near = did_you_mean(name, STRATEGIES)
    broken = _("; of a package, {broken}").format(broken=why_broken(name)) if name in BROKEN else ""
    choice = _("choose from {names}, or name a class of your own as FILE.py:CLASS").format(
        names=", ".join(STRATEGIES)
    )
    return _("unknown strategy '{name}'{where}{broken}; {choice}{near}").format(
        name=name, where=where, broken=broken, choice=choice, near=near
    )


def _source_problems(config: BenchConfig) -> list[str]:
    """Arms that come before those they are made from."""
    problems: list[str] = []
    before: set[str] = set()
    for name in config.strategy.strategies:
        if (
            name in STRATEGIES
            and STRATEGIES[name].made_from == OTHER_PASSES
            and len(config.training.seeds) < 2
        ):
            problems.append(
                _("'{name}' takes the passes of another seed, and there is one; give --seeds more").format(
                    name=name
                )
            )
        if name in STRATEGIES and needs_source(name):
            source = source_of(name, config.strategy.source)
            if source not in before:
                problems.append(
                    _(
                        "'{name}' is made from '{source}', which does not come before it; add '{source}' "
                        "in front, or give another --source"
                    ).format(name=name, source=source)
                )
        before.add(name)
    return problems


def _budget_problems(config: BenchConfig) -> list[str]:
    training, data, problems = config.training, config.data, []
    if training.budget is not None and training.match == "epochs":
        problems.append(
            _(
                "--budget needs a unit: give --match flops, updates, tokens or seconds with it, or "
                "--epochs without it"
            )
        )
    if (
        training.match == "seconds"
        and training.budget is None
        and config.strategy.strategies[:1] != (REFERENCE,)
    ):
        problems.append(
            _(
                "--match seconds gives every arm what the baseline took: let '{reference}' come first, "
                "or give --budget in seconds"
            ).format(reference=REFERENCE)
        )
    tokens = data.max_train_tokens
    if tokens is not None and 0 < tokens < config.max_length:
        problems.append(
            _(
                "--max_train_tokens is {tokens}; it must be at least one block of --max_length {max_length}"
            ).format(tokens=tokens, max_length=config.max_length)
        )
    return problems


def _adapter_problems(config: BenchConfig) -> list[str]:
    """Kinds of adapters with which the numbers of this experiment would not hold."""
    problems, given = [], config.model.init_lora
    if given not in INITS:
        problems.append(
            _(
                "--init_lora is '{given}'; choose default or gaussian. PiSSA, OLoRA, EVA, CorDA and "
                "LoftQ change the frozen weights, which all arms share, and whose activations are kept"
            ).format(given=given)
        )
    if config.model.dora:
        problems.append(
            _(
                "--dora cannot be used: DoRA computes the norms of all adapted weights anew in every "
                "pass, which the FLOP model does not count, so arms would not get the same budget; leave "
                "it out, or try --rslora"
            )
        )
    return problems


def _sharding_problems(config: BenchConfig) -> list[str]:
    """What torch cannot shard: quantised weights, and layers that are compiled for their whole weights."""
    if config.speed.sharding == "none":
        return []
    given = {"--load_in": config.model.load_in is not None, "--compile on": config.speed.compile == "on"}
    return [
        _("--sharding fsdp cannot be used with {flag}; leave one of them out").format(flag=flag)
        for flag, is_given in given.items()
        if is_given
    ]


def _text_problems(config: BenchConfig) -> list[str]:
    data = config.data
    try:
        "".encode(data.encoding)
    except (LookupError, ValueError):
        known = ("utf-8", "utf-16", "gbk", "gb18030", "big5", "shift_jis", "euc-kr", "latin-1", "cp1252")
        near = did_you_mean(data.encoding, known)
        return [
            _("--encoding is '{encoding}', which is none; such as {names}{near}").format(
                encoding=data.encoding, names=", ".join(known), near=near
            )
        ]
    return []


def _run_problems(config: BenchConfig) -> list[str]:
    run, problems = config.run, []
    name = run.run_name
    if name is not None and (name in ("", ".", "..") or re.search(r'[\\/:*?"<>|\x00-\x1f]', name)):
        problems.append(
            _(
                "--run_name is '{name}'; it must be a plain folder name without any of \\ / : * ? \" < > |"
            ).format(name=name)
        )
    if run.resume and run.overwrite:
        problems.append(_("--resume and --overwrite exclude each other; give one of them"))
    try:
        Every(run.checkpoint_every)
    except ValueError as problem:
        problems.append(_("--checkpoint_every is {problem}").format(problem=problem))
    return problems
