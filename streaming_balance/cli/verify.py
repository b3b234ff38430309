"""`streaming-balance verify`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from streaming_balance.cli.answers import print_json, print_table, with_unit
from streaming_balance.cli.options import AsJson, DataSet


def verify(folder: DataSet, as_json: AsJson = False) -> None:
    """Check every byte of a data set.

    Reads every shard once: SHA-256 of every file, the structure of every tar, every member against
    its row of the sample table, the content of every array, patients or voxels in two splits. Goes
    on after a problem and lists them all. Exits with 1 if there is any.

    \b
    Examples:
      streaming-balance verify cohort
      streaming-balance verify cohort --json
    """
    from streaming_balance.storage.verify import verify_shards

    report = verify_shards(folder)
    if as_json:
        print_json(asdict(report))
    elif report.ok:
        print(f"{folder} is sound: {report.samples:,} samples, {with_unit(report.bytes)} checked.")
    else:
        print_table(
            f"{folder}: {len(report.problems)} problem(s)",
            ("shard", "sample", "offset", "problem"),
            (
                (
                    problem.shard,
                    problem.key or "-",
                    "-" if problem.offset is None else problem.offset,
                    problem.problem,
                )
                for problem in report.problems
            ),
        )
    if not report.ok:
        raise typer.Exit(1)
