"""What the tour tells people while it goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

INDENT = 3


class Narration:
    """Numbered stages, each with lines and tables.

    Args:
        console: where to print; a quiet one tells nothing.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages = 0

    def stage(self, title: str) -> None:
        """Begin the next stage."""
        self._stages += 1
        self._console.print()
        self._console.print(Text(f"{self._stages}. {title}", style="bold"))

    def say(self, line: str, *, style: str = "") -> None:
        """Tell something; labels and brackets are printed as they are."""
        text = Text(line, style=style)
        self._console.print(Padding(text, (0, 0, 0, INDENT), expand=False))

    def show(self, line: str) -> None:
        """Show a path or a command, whole: a line broken by us could not be copied."""
        self._console.print(Text(" " * INDENT + line), soft_wrap=True)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show a table: names on the left, numbers to the right."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for place, header in enumerate(headers):
            table.add_column(Text(header), justify="right" if place else "left")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        self._console.print(Padding(table, (0, 0, 0, INDENT), expand=False))


def percent(share: float) -> str:
    """Write a share of one for people.

    Examples:
        >>> percent(0.954), percent(float("nan"))
        ('95%', '-')
    """
    return f"{share:.0%}" if share == share else "-"


def _cell(value: object) -> str:
    """Write one value of a table."""
    return f"{value:,}" if isinstance(value, int) else str(value)
