"""`streaming-balance index`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from streaming_balance.cli.answers import print_json, print_table, print_warning
from streaming_balance.cli.options import AsJson, read_names

if TYPE_CHECKING:
    from streaming_balance.ingest.index_builder import IndexReport
    from streaming_balance.stream.names import KeyRule
    from streaming_balance.stream.rules import UniqueKeys


def index(
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="URL...",
            help="Plain tars on local disk; {000..012}, {a,b}, * and ** are expanded.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the index.", show_default=False)
    ],
    label: Annotated[
        str,
        typer.Option(
            metavar="cls|json:FIELD|csv:FILE",
            help="Where labels are; a table has the columns key and label.",
        ),
    ] = "cls",
    patient: Annotated[
        str | None,
        typer.Option(
            metavar="json:FIELD",
            help="Where patients are. [the table's column patient, else every key is one]",
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="The split of all, where no table says it.")
    ] = "train",
    train_splits: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Splits that may be balanced. [those named train...]"),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B", help="Every label, in class order. [those found]")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD", help="The image, or none. [image.npb or .npy, else the only array]"
        ),
    ] = None,
    seg: Annotated[
        str | None, typer.Option(metavar="FIELD", help="The mask. [seg.npb or seg.npy]")
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(metavar="AXES", help="Axes of arrays, such as CHW. [HW, DHW or CDHW]"),
    ] = None,
    keys: Annotated[
        str,
        typer.Option(
            metavar="webdataset|last_dot", help="Cut names at the first dot, or at the last."
        ),
    ] = "webdataset",
    unique_keys: Annotated[
        str,
        typer.Option(
            metavar="stream|shard",
            help="shard: keys start anew in each shard and get its name in front.",
        ),
    ] = "stream",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index of other shards or settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Index WebDataset tars that others wrote, where they are.

    Writes a sample table and a manifest that point at the tars, which are neither copied nor
    changed. Planning, loading, auditing and verifying then work as on packed shards. Members
    without a decoder (all but .npy and .npb) are kept as bytes, for a transform to decode.

    \b
    Examples:
      streaming-balance index 'tars/train-*.tar' --out cohort
      streaming-balance index 'tars/{000..012}.tar' --out cohort --label json:grade \\
        --patient json:patient
      streaming-balance index tars/*.tar --out cohort --label csv:labels.csv --image npy
    """
    from streaming_balance.ingest.index import index_shards

    report = index_shards(
        urls,
        out=out,
        label=label,
        patient=patient,
        split=split,
        classes=read_names(classes),
        image=image,
        seg=seg,
        axes=axes,
        keys=cast("KeyRule", keys),
        unique_keys=cast("UniqueKeys", unique_keys),
        train_splits=read_names(train_splits),
        overwrite=overwrite,
        progress=None if as_json else _print_line,
    )
    for warning in report.warnings:
        print_warning(warning)
    if as_json:
        print_json(_document(report))
    else:
        _print_tables(report, out)


def _print_line(done: int, total: int, shard: str) -> None:
    """Say how far the index is."""
    print(f"indexed {done:,} of {total:,} shards: {shard}", file=sys.stderr)


def _document(report: IndexReport) -> dict[str, object]:
    """Say a report as JSON."""
    foreign = report.manifest.foreign
    assert foreign is not None
    return {
        "found": report.found,
        "indexed": report.indexed,
        "rejected": [
            {"patient": case.patient, "path": case.path, "reason": case.reason}
            for case in report.rejected
        ],
        "digest": report.digest,
        "new": report.is_new,
        "patients": foreign.patient,
        "warnings": list(report.warnings),
    }


def _print_tables(report: IndexReport, out: Path) -> None:
    """Print a report for people."""
    what = "indexed" if report.is_new else "was indexed before by the same command, left alone"
    manifest = report.manifest
    print_table(
        f"{out}: {what}",
        ("split", "samples", "patients"),
        ((split.name, split.samples, split.patients) for split in manifest.splits),
    )
    if report.rejected:
        print_table(
            f"{len(report.rejected)} found and not indexed",
            ("patient", "path", "reason"),
            ((case.patient, case.path, case.reason) for case in report.rejected),
        )
    print(f"arrays: {', '.join(manifest.arrays) or 'none'}; classes: {', '.join(manifest.classes)}")
    print(
        f"found {report.found:,} = indexed {report.indexed:,} + rejected {len(report.rejected):,}"
    )
    print(f"digest: {report.digest}")
