"""`streaming-balance audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streaming_balance.cli.options import AsJson, DataSet

if TYPE_CHECKING:
    from streaming_balance.report.tallies import Tallies


def audit(
    folder: DataSet,
    state: Annotated[
        Path,
        typer.Option(metavar="FILE", help="A loader's state, saved as JSON.", show_default=False),
    ],
    patient: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Answer for this patient alone.", show_default=False),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An earlier state of the same run: say what was seen before it, and since.",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a row per patient.", show_default=False),
    ] = None,
    table: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Another data set the run was trained on: its manifest.json and samples.arrow "
            "are enough. May be given several times.",
            show_default=False,
        ),
    ] = None,
    patients: Annotated[
        bool, typer.Option("--patients", help="List every patient, not only the classes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which patients a run has seen, how often and when, with the digests that prove it.

    Needs the sample table and one saved state, nothing else: no log, no volume, not the machine
    that trained. Under --json every patient is listed.

    \b
    Save the state in the training loop:
      json.dump(train.state_dict(), open("state.json", "w"))

    \b
    Examples:
      streaming-balance audit cohort --state state.json
      streaming-balance audit cohort --state state.json --patient P017
      streaming-balance audit cohort --state state.json --before epoch5.json --patient P017
      streaming-balance audit cohort --state state.json --csv audit.csv --json
      streaming-balance audit repacked --state state.json --table cohort
    """
    from streaming_balance.cli.audit_answers import answer_about_all, answer_about_one
    from streaming_balance.report.audit_files import check_table_path

    if csv is not None:
        check_table_path(csv)
    earlier, later = _tallied(folder, state, before=before, tables=table or [])
    if patient is None:
        answer_about_all(earlier, later, listing=patients, table=csv, as_json=as_json)
    else:
        answer_about_one(patient, earlier, later, table=csv, as_json=as_json)


def _tallied(
    folder: Path, state: Path, *, before: Path | None, tables: list[Path]
) -> tuple[Tallies, Tallies | None]:
    """Count what is asked about; with an earlier state, also all there was by the later one."""
    from streaming_balance.report.history import run_until
    from streaming_balance.report.runs import rebuild_run
    from streaming_balance.report.saved_states import read_saved_state
    from streaming_balance.report.tallies import tally_run
    from streaming_balance.storage.shards import open_table

    # No voxel is read, so nobody has to keep the volumes to be able to answer.
    shards = open_table(folder)
    run = rebuild_run(shards, read_saved_state(state), tables=[open_table(one) for one in tables])
    if before is None:
        return tally_run(run), None
    return tally_run(run_until(run, read_saved_state(before))), tally_run(run)
