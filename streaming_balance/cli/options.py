"""Options that commands share, and how their text is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from streaming_balance.errors import ConfigError
from streaming_balance.safe_yaml import read_yaml

DataSet = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of a packed data set.", show_default=False)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")
]


def read_sides(option: str, text: str | None) -> tuple[int, ...] | None:
    """Read voxels per axis.

    Raises:
        ConfigError: not a comma-separated list of positive integers.

    Examples:
        >>> read_sides("--size", "128,128,96")
        (128, 128, 96)
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"{option} is {text!r}; give voxels along each axis, such as 128,128,128."
        )
    return tuple(int(part) for part in parts)


def read_names(text: str | None) -> tuple[str, ...] | None:
    """Read a comma-separated list of names.

    Examples:
        >>> read_names("LGG, HGG")
        ('LGG', 'HGG')
    """
    return None if text is None else tuple(part.strip() for part in text.split(","))


def read_balance(
    balance: str | None, settings: Sequence[str], config: Path | None
) -> str | dict[str, Any] | Path | None:
    """Put the balance options together.

    Args:
        balance: name of a strategy, from `--balance`.
        settings: `OPTION=VALUE` of the strategy, from `--set`; values are read as in YAML.
        config: a YAML file, from `--config`.

    Returns:
        What `resolve_balance` takes; None for natural order.

    Raises:
        ConfigError: both ways at once, or options without a strategy.

    Examples:
        >>> read_balance("power", ["alpha=0.25"], None)
        {'name': 'power', 'alpha': 0.25}
    """
    if balance is not None and config is not None:
        raise ConfigError("--balance and --config both say how to balance; give one of them.")
    if settings and balance is None:
        raise ConfigError("--set gives options of a strategy; name the strategy with --balance.")
    if balance is None:
        return config
    options: dict[str, Any] = {"name": balance}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set is {setting!r}; write OPTION=VALUE, such as alpha=0.5.")
        if name in options:
            raise ConfigError(f"--set gives {name!r} twice; give it once.")
        options[name] = read_yaml(value, place=f"--set {name}")
    return options
