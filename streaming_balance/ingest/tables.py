"""Reading CSV and Parquet tables as rows of text."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streaming_balance.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a table."""

    values: Mapping[str, str]
    """Column name -> text; an empty cell is the empty text."""
    place: str
    """Where it stands, for messages: "line 3"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with every value as text, exactly as written."""

    path: Path
    """The file it came from."""
    columns: tuple[str, ...]
    """Column names in file order."""
    rows: tuple[Row, ...]
    """Rows in file order."""

    def require(self, *names: str) -> None:
        """Make sure that columns exist.

        Raises:
            ConfigError: naming the first that is missing and the columns there are.
        """
        for name in names:
            if name not in self.columns:
                raise ConfigError(
                    f"{self.path}: no column {name!r}; columns there: "
                    f"{', '.join(map(repr, self.columns))}.{did_you_mean(name, self.columns)}"
                )


def read_table(path: Path) -> Table:
    """Read a table.

    Args:
        path: `.csv` (UTF-8, comma separated, first line names the columns) or `.parquet`.

    Returns:
        The table. Nothing is stripped or guessed: blanks around an id belong to it.

    Raises:
        ConfigError: the file cannot be read, a name comes twice, or a line has another number of
            cells than the first.
    """
    table = _read_csv(path) if path.name.lower().endswith(".csv") else _read_parquet(path)
    doubled = {name for name in table.columns if table.columns.count(name) > 1}
    if doubled:
        raise ConfigError(f"{path}: the columns {sorted(doubled)} come twice; name each one once.")
    if "" in table.columns:
        raise ConfigError(f"{path}: column {table.columns.index('') + 1} has no name; give it one.")
    return table


def _read_csv(path: Path) -> Table:
    """Read a CSV file."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            columns = tuple(next(reader, ()))
            for cells in reader:
                if not cells:
                    continue
                place = f"line {reader.line_num}"
                if len(cells) != len(columns):
                    raise ConfigError(
                        f"{path}: {place} has {len(cells)} cells, the first line {len(columns)}; "
                        "put text that holds commas between double quotes."
                    )
                rows.append(Row(values=dict(zip(columns, cells, strict=True)), place=place))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 at byte {error.start}; save the table as UTF-8."
        ) from error
    except csv.Error as error:
        raise ConfigError(f"{path}: line {reader.line_num} is not CSV: {error}.") from error
    return Table(path=path, columns=columns, rows=tuple(rows))


def _read_parquet(path: Path) -> Table:
    """Read a Parquet file."""
    # Imported late: a CSV needs none of it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        arrow = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet ({type(error).__name__}).") from error
    columns = tuple(arrow.column_names)
    texts = [[_text(value) for value in column.to_pylist()] for column in arrow.columns]
    rows = tuple(
        Row(values=dict(zip(columns, cells, strict=True)), place=f"row {number}")
        for number, cells in enumerate(zip(*texts, strict=True), start=1)
    )
    return Table(path=path, columns=columns, rows=rows)


def _text(value: object) -> str:
    """Write a cell as text: nothing for a null, 1 rather than 1.0 for whole numbers."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    # A column of whole numbers with a gap comes as floats from data frames.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
