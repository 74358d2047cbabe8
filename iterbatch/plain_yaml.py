"""YAML in and out, plain values only: nothing in a file can make an object or run code."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node

BAD_YAML = (YAMLError, ValueError, TypeError, RecursionError, AttributeError)  # what a bad document may raise


def read_yaml(path: Path) -> Any:
    """The content of a file.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is not UTF-8 or not valid YAML, with the reason in one line.
    """
    return parse_yaml(path.read_text(encoding="utf-8-sig"))


def parse_yaml(text: str, *, duplicates: bool = False) -> Any:
    """The content of a text; :func:`read_yaml` says what it raises.

    ``duplicates``: the last of equal keys counts.
    """
    reader = YAML(typ="safe", pure=True)
    reader.allow_duplicate_keys = duplicates
    try:
        return reader.load(text)
    except BAD_YAML as problem:
        raise ValueError(" ".join(str(problem).split())[:300]) from problem


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
