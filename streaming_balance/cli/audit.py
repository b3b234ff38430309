"""`streaming-balance audit`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from streaming_balance.cli.answers import print_json, print_table
from streaming_balance.cli.options import AsJson, DataSet


def audit(
    folder: DataSet,
    state: Annotated[
        Path,
        typer.Option(metavar="FILE", help="A loader's state, saved as JSON.", show_default=False),
    ],
    patients: Annotated[
        bool, typer.Option("--patients", help="List every patient, not only the classes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which patients a run has seen, and how often.

    Needs the data set and one saved state, nothing else: no log, no volume, not the machine that
    trained. Under --json every patient is listed.

    \b
    Save the state in the training loop:
      json.dump(train.state_dict(), open("state.json", "w"))

    \b
    Examples:
      streaming-balance audit cohort --state state.json
      streaming-balance audit cohort --state state.json --json
    """
    from streaming_balance.report.audit import audit_run, read_state
    from streaming_balance.storage.shards import open_shards

    found = audit_run(open_shards(folder), read_state(state))
    if as_json:
        print_json(asdict(found))
        return
    print_table(
        f"{folder}, {found.split}: delivered before epoch {found.epoch}, step {found.step}",
        ("class", "patients", "seen", "delivered", "share", "least", "most"),
        (
            (
                label,
                entry.patients,
                entry.seen,
                entry.delivered,
                entry.share,
                entry.exposure_min,
                entry.exposure_max,
            )
            for label, entry in found.classes.items()
        ),
    )
    if found.mixing is not None:
        partners = sum(found.as_partner.values())
        settings = ", ".join(f"{name} {value}" for name, value in found.mixing.items())
        print(f"mixing: {settings}")
        print(f"mixed into others: {partners:,} samples, which seen, least and most count, too")
    if found.not_audited:
        print(
            f"not audited: {', '.join(found.not_audited)}; what that function did to batches is "
            f"recorded nowhere"
        )
    if found.excluded:
        print(f"excluded from the plan: {found.excluded:,} samples")
    if patients:
        print_table("by patient", ("patient", "times"), found.exposure.items())
    print(f"plan digest: {found.plan_digest}")
    print(f"data digest: {found.shards_digest}")
