"""`streaming-balance demo`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from streaming_balance.cli.answers import print_json
from streaming_balance.cli.options import AsJson


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to work in.")] = Path(
        "demo_output"
    ),
    patients: Annotated[int, typer.Option(help="Patients to generate.")] = 190,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the whole way on a generated cohort, on a CPU, in a minute or two.

    Makes brains with tumours of two grades, 2.8 high for each low one; packs them; trains a small
    3-D network in natural order and balanced, and shows recall per class on untouched validation
    patients; stops in mid-epoch and resumes on another number of ranks; audits who was seen; draws
    the class counts of batches before and after.

    \b
    Examples:
      streaming-balance demo
      streaming-balance demo --out /tmp/tour --seed 7
    """
    from streaming_balance.demo.tour import take_tour

    def say(line: str) -> None:
        """Tell people as it goes; machines get the document at the end."""
        if not as_json:
            print(line, flush=True)

    tour = take_tour(out, patients=patients, seed=seed, say=say)
    if as_json:
        print_json(asdict(tour) | {"cohort": str(tour.cohort), "picture": str(tour.picture)})
