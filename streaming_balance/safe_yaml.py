"""YAML that cannot surprise: data only, nothing said twice, and a label stays the text it is.

PyYAML's own safe loader reads `NO` as False, `1e-4` as text and `12:30` as 750; it lets the last of
two equal keys win and expands aliases without bound. This reader does none of that.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from streaming_balance.errors import ConfigError

# A training configuration is a few kilobytes; a megabyte of YAML is a mistake or an attack.
MAX_BYTES = 2**20
# Deep enough for any configuration, shallow enough for Python's recursion limit.
MAX_DEPTH = 64

_TAG = "tag:yaml.org,2002:"
# The scalars of YAML 1.2's core schema, less octal and leading zeros: `007` may be a patient.
# 40 digits hold any integer a setting can have and keep int() cheap.
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,39})", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


def read_yaml_file(path: Path) -> object:
    """Read a YAML file as plain Python values.

    Args:
        path: a file of at most 1 MiB holding one YAML document.

    Returns:
        Dicts, lists, text, integers, floats, booleans and None. An empty file gives None.

    Raises:
        ConfigError: the file cannot be read, is too large, is no YAML, or uses anchors, aliases,
            tags, or a key twice. The message names file and line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}.") from error
    return read_yaml(content, place=str(path))


def read_yaml(content: str | bytes, *, place: str) -> object:
    r"""Read YAML text as plain Python values.

    Args:
        content: one YAML document, at most 1 MiB.
        place: what to call it in messages, such as a file name.

    Returns:
        Dicts, lists, text, integers, floats, booleans and None.

    Raises:
        ConfigError: as `read_yaml_file`.

    Examples:
        >>> read_yaml("label: NO\nrate: 1e-4", place="example")
        {'label': 'NO', 'rate': 0.0001}
    """
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"{place} is larger than {MAX_BYTES} bytes; a configuration must be smaller than that. "
            f"Is this the file you meant?"
        )
    try:
        # A subclass of SafeLoader that refuses every tag: nothing in the text can name a class.
        return yaml.load(content, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        what = ", ".join(text for text in (error.context, error.problem) if text)
        raise ConfigError(f"{place}{line}: {what}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} is not YAML text in UTF-8: {error}.") from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases, anchors, tags, repeated keys and YAML 1.1's odd scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse what is not plain data before anything is built from it."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(f"alias *{event.anchor} is refused; write the value out", event)
        if event.anchor is not None:
            raise _refusal(f"anchor &{event.anchor} is refused; write values out", event)
        if event.tag is not None:
            raise _refusal(f"tag {event.tag!r} is refused; a configuration holds plain data", event)
        if self._depth >= MAX_DEPTH:
            raise _refusal(f"nested deeper than {MAX_DEPTH} levels", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that stands twice: PyYAML would let the last one win."""
        first_lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal("a key must be plain text or a number", key_node)
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in first_lines:
                raise _refusal(
                    f"key {key!r} stands twice, first on line {first_lines[key]}; keep one",
                    key_node,
                )
            first_lines[key] = line
        return super().construct_mapping(node, deep=deep)


def _refusal(problem: str, where: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    """Give an error at the place of an event or node."""
    mark: Any = where.start_mark
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


for _kind, _pattern, _first in _SCALARS:
    _StrictLoader.add_implicit_resolver(
        _TAG + _kind,
        re.compile(rf"^(?:{_pattern})$"),
        ["" if character == "\0" else character for character in _first],
    )
