"""`streaming-balance demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streaming_balance.cli.options import AsJson


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to work in.")] = Path(
        "demo_output"
    ),
    as_json: AsJson = False,
) -> None:
    """Make a small cohort, pack it, train natural and balanced, stop, resume, audit."""
