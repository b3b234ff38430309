"""How commands answer: one JSON document for machines, tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; columns of numbers are aligned to the right."""
    # Imported late: drawing tables takes longer to load than most commands take to run.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    lines = [tuple(row) for row in rows]
    for place, header in enumerate(headers):
        is_number = all(isinstance(line[place], int | float) for line in lines)
        table.add_column(Text(header), justify="right" if is_number else "left", overflow="fold")
    for line in lines:
        # Text, not str: a label such as "[red]" is a label, not a colour.
        table.add_row(*(Text(_cell(value)) for value in line))
    Console().print(table)


def print_error(message: str) -> None:
    """Print one readable message on stderr."""
    print(f"error: {message}", file=sys.stderr)


def print_warning(message: str) -> None:
    """Print a message on stderr that stops nothing."""
    print(f"warning: {message}", file=sys.stderr)


def with_unit(count: int) -> str:
    """Write a number of bytes for people.

    Examples:
        >>> with_unit(512), with_unit(3_800_000)
        ('512 B', '3.8 MB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("every size has a unit")


def _cell(value: object) -> str:
    """Write one value of a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
