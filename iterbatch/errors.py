"""The errors a user can cause and repair. Nothing else lives here.

Every message says what was given, what is allowed and what to do. The command line prints the
message alone and exits with code 2; a library caller catches :class:`UserError`.
"""

import difflib
import os
import shlex
import subprocess
from collections.abc import Iterable

from iterbatch.language import _


class UserError(Exception):
    """Something the user gave cannot be used; the message says what to do about it."""


class ConfigError(UserError, ValueError):
    """One or more knobs are out of their range; all problems of a configuration are in one message."""


class DataError(UserError, ValueError):
    """A text, file or data set cannot be read or is too small."""


class ModelError(UserError, ValueError):
    """A model folder or hub name cannot be loaded, or is of an architecture this project cannot adapt."""


class RunError(UserError):
    """A run folder cannot be written, or exists already."""


def first_line(problem: BaseException, limit: int = 240) -> str:
    """The first line of what an error says, or its class where it says nothing."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0][:limit].rstrip(".")


def typed(*words: object) -> str:
    """Words of a command as the user's shell takes them, paths with spaces quoted."""
    given = list(map(str, words))
    return subprocess.list2cmdline(given) if os.name == "nt" else shlex.join(given)


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`` (did you mean 'abr'?)`` for the nearest allowed word, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return _(" (did you mean '{near}'?)").format(near=near[0]) if near else ""
