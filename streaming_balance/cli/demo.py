"""`streaming-balance demo`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streaming_balance.cli.answers import print_json
from streaming_balance.cli.options import AsJson

if TYPE_CHECKING:
    from streaming_balance.demo.tour import Tour


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to work in.")] = Path(
        "demo_output"
    ),
    patients: Annotated[int, typer.Option(help="Patients to generate.")] = 285,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the whole way on a generated cohort, in about a minute on two cores.

    Makes brains with tumours of two grades, 2.8 high for each low one; packs them; trains a small
    3-D network in natural order and balanced, and shows recall per class on untouched validation
    patients; stops in mid-epoch and resumes on another number of ranks; audits who was seen; draws
    the class counts of batches before and after. Every number is measured while you wait. Exit
    status 1 if the resumed batches are not those of the uninterrupted run.

    \b
    Examples:
      streaming-balance demo
      streaming-balance demo --out /tmp/tour --seed 7
    """
    from rich.console import Console

    from streaming_balance.demo.narration import Narration
    from streaming_balance.demo.tour import take_tour

    # Machines get the document at the end and nothing before it.
    narration = Narration(Console(quiet=as_json))
    tour = take_tour(out, patients=patients, seed=seed, narration=narration)
    if as_json:
        print_json(_document(tour))
    if not tour.resumption.is_equal:
        raise typer.Exit(1)


def _document(tour: Tour) -> dict[str, Any]:
    """Say what was measured as JSON."""
    audit = asdict(tour.audit)
    del audit["exposure"]  # hundreds of patients; `audit --json` lists them
    return {
        "patients": tour.patients,
        "splits": tour.splits,
        "rare_class": tour.rare,
        "rare_per_batch": tour.rare_per_batch,
        "steps": tour.steps,
        "recall": tour.recall,
        "resumed_batches_equal": tour.resumption.is_equal,
        "resumption": asdict(tour.resumption),
        "audit": audit,
        "paths": {
            "cohort": str(tour.places.cohort),
            "checkpoint": str(tour.places.checkpoint),
            "state": str(tour.places.state),
            "picture": str(tour.places.picture),
        },
    }
