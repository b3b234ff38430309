"""`streaming-balance audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streaming_balance.cli.options import AsJson, DataSet


def audit(
    folder: DataSet,
    state: Annotated[
        Path,
        typer.Option(metavar="FILE", help="A loader's state, saved as JSON.", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Say which patients a run has seen, and how often."""
