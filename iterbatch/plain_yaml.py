"""YAML in and out, plain values only: nothing in a file can make an object or run code."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node

from iterbatch.language import _

CHARACTERS = 1 << 20  # of a file; reading more takes seconds
VALUES = 100_000  # of a document, with what its aliases repeat written out
BAD_YAML = (YAMLError, ValueError, TypeError, RecursionError, AttributeError)  # what a bad document may raise


def read_yaml(path: Path) -> Any:
    """The content of a file.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is not UTF-8 or not valid YAML, with the reason in one line.
    """
    return parse_yaml(read_text(path))


def read_text(path: Path) -> str:
    """The text of a file that holds YAML; :func:`read_yaml` says what it raises."""
    if path.exists() and not path.is_file():  # a pipe would keep its reader waiting, a device never end
        raise ValueError(_("it is not a regular file"))
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(CHARACTERS + 1)
    if len(text) > CHARACTERS:
        raise ValueError(
            _("it has more than {characters:,} characters; no settings are that long").format(
                characters=CHARACTERS
            )
        )
    return text


def parse_yaml(text: str, *, duplicates: bool = False) -> Any:
    """The content of a text; :func:`read_yaml` says what it raises.

    ``duplicates``: the last of equal keys counts.
    """
    reader = YAML(typ="safe", pure=True)
    reader.allow_duplicate_keys = duplicates
    try:
        content = reader.load(text)
        _weigh(content, {})
        return content
    except BAD_YAML as problem:
        raise ValueError(" ".join(str(problem).split())[:300]) from problem


def _weigh(value: Any, known: dict[int, int]) -> int:
    """How many values one is, with what is repeated by aliases written out.

    Raises:
        ValueError: where those are too many.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = VALUES  # until it is known: within itself it has no end
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_weigh(part, known) for part in parts)
    if known[id(value)] > VALUES:
        raise ValueError(
            _("it has more than {values:,} values, with its aliases written out").format(values=VALUES)
        )
    return known[id(value)]


def dump_yaml(content: dict[str, Any]) -> str:
    """Plain values as YAML, in their own order, one a line."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    writer.width = 1000
    buffer = io.StringIO()
    writer.dump(content, buffer)
    return buffer.getvalue()


def key_lines(text: str) -> list[tuple[tuple[str, ...], int]]:
    """The path and line of every key of a valid document, in order; a key that is there twice comes twice."""
    found: list[tuple[tuple[str, ...], int]] = []

    def walk(node: Node | None, place: tuple[str, ...]) -> None:
        if not isinstance(node, MappingNode):
            return
        for key, value in node.value:
            here = (*place, str(key.value))
            found.append((here, key.start_mark.line + 1))
            walk(value, here)

    walk(YAML(typ="safe", pure=True).compose(text), ())
    return found


def editor() -> YAML:
    """A reader and writer that keeps a file's comments and order."""
    keeper = YAML(typ="rt")
    keeper.width = 1000
    return keeper
