"""Strategies of one's own: classes from a file that the command line names, or from installed packages.

``mine.py:TwiceWhenHard`` is such a class, in the file ``mine.py``. Its code runs here; nothing that lies in a
run's folder can name one.
"""

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from iterbatch.errors import ConfigError, did_you_mean, first_line
from iterbatch.language import _
from iterbatch.strategy.base import BaseTrainingStrategy

GROUP = "iterbatch.strategies"  # entry points of packages


@dataclass(frozen=True)
class Source:
    """Where a class comes from."""

    file: Path  # absolute
    name: str  # of the class
    digest: str  # SHA-256 of the file

    @property
    def words(self) -> str:
        """As it is typed."""
        return f"{self.file}:{self.name}"


SOURCES: dict[str, Source] = {}  # of the classes that were taken among the strategies, by name
# Names that packages offer in vain: what the package says, and the problem; None where the name is taken.
BROKEN: dict[str, tuple[str, str | None]] = {}


def named_again(strategies: Iterable[str]) -> list[str]:
    """The flag that names strategies as they were typed, where one is of one's own; nothing of a run does."""
    names = list(strategies)
    if not any(name in SOURCES for name in names):
        return []
    return ["--strategies", *(SOURCES[name].words if name in SOURCES else name for name in names)]


def blame(problem: BaseException) -> str:
    """Where a strategy of one's own went wrong, in a line; empty where none did."""
    files, found = {str(source.file) for source in SOURCES.values()}, ""
    for frame in traceback.extract_tb(problem.__traceback__):
        if frame.filename in files:
            found = _("{file}, line {line}, in {name}: {kind}: {problem}").format(
                file=frame.filename,
                line=frame.lineno,
                name=frame.name,
                kind=type(problem).__name__,
                problem=first_line(problem),
            )
    return found


def is_named(word: str) -> bool:
    """Whether a word names a class in a file."""
    return re.fullmatch(r".+\.py:\w+", word) is not None


def read(word: str, folder: Path = Path()) -> tuple[Source, type[BaseTrainingStrategy]]:
    """The class that a word names.

    Args:
        word: ``FILE.py:CLASS``.
        folder: Where its file is looked for first.

    Returns:
        Where it comes from, and itself.

    Raises:
        ConfigError: where there is no such file or class, it cannot be imported, or is no strategy.
    """
    place, name = word.rsplit(":", 1)
    file = next((each for each in (folder / place, Path(place)) if each.is_file()), None)
    if file is None:
        raise ConfigError(_("the strategy {word}: there is no file {place}").format(word=word, place=place))
    file = file.resolve()
    source = Source(file, name, hashlib.sha256(file.read_bytes()).hexdigest())
    kind: Any = getattr(_module(source), name, None)
    if not inspect.isclass(kind):
        classes = [each for each, value in vars(_module(source)).items() if inspect.isclass(value)]
        raise ConfigError(
            _("{file} has no class {name}{near}").format(
                file=file, name=name, near=did_you_mean(name, classes)
            )
        )
    return source, checked(word, kind)


def checked(word: str, kind: type) -> type[BaseTrainingStrategy]:
    """A class, if it is a strategy that can be made.

    Raises:
        ConfigError: where it is none, or lacks what every strategy must write.
    """
    if not issubclass(kind, BaseTrainingStrategy):
        raise ConfigError(_("{word} does not derive from iterbatch.BaseTrainingStrategy").format(word=word))
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ConfigError(_("{word} must write {names}").format(word=word, names=", ".join(missing)))
    return kind


def _module(source: Source) -> ModuleType:
    """A file, imported under a name of its own; the same file again is the same module."""
    name = f"iterbatch_own_{source.digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, source.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as problem:  # whatever its author's code raises
        del sys.modules[name]
        what = f"{type(problem).__name__}: {first_line(problem)}"
        raise ConfigError(
            _("{file} cannot be imported: {what}").format(file=source.file, what=what)
        ) from problem
    return module


def from_packages(known: Iterable[str]) -> dict[str, type[BaseTrainingStrategy]]:
    """The strategies of installed packages, by the names of their entry points.

    One that cannot be used is noted in ``BROKEN``; a name that is known already stays what it is.
    """
    found: dict[str, type[BaseTrainingStrategy]] = {}
    for entry in metadata.entry_points(group=GROUP):
        if entry.name in known:
            BROKEN[entry.name] = (entry.value, None)
            continue
        try:
            found[entry.name] = checked(entry.value, entry.load())
        except Exception as problem:  # whatever a package raises
            BROKEN[entry.name] = (entry.value, first_line(problem))
    return found


def why_broken(name: str) -> str:
    """Why the strategy that a package offers under this name cannot be used."""
    value, problem = BROKEN[name]
    if problem is None:
        return _("the package's '{value}' has the name of another strategy").format(value=value)
    return _("'{value}' cannot be used: {problem}").format(value=value, problem=problem)
