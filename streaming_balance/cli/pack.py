"""`streaming-balance pack`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streaming_balance.cli.answers import print_json, print_table, print_warning
from streaming_balance.cli.options import AsJson, read_names, read_sides

if TYPE_CHECKING:
    from streaming_balance.ingest.pack import PackReport

# Without a terminal there is no bar; a line per so many samples shows that work goes on.
SAMPLES_PER_LINE = 100
# As in `write_shards`; repeated so that showing the help loads no packer. A test compares them.
DEFAULT_SHARD_BYTES = 268_435_456
DEFAULT_MAX_VOLUME_BYTES = 8_589_934_592


def pack(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder CLASS/CASE/CASE_MODALITY.nii.gz, or a CSV or Parquet table of paths.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the shards.", show_default=False)
    ],
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="brats|manifest",
            help="How SOURCE is laid out. [brats for a folder, manifest for a table]",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Table of patient and label (split, columns) beside it."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=SHARE,...",
            help="Shares of patients, such as train=0.7,val=0.15,test=0.15. [the table's own, "
            "else all train]",
        ),
    ] = None,
    train_splits: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Splits that may be balanced. [those named train...]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of split and order.")] = 0,
    codec: Annotated[str, typer.Option(metavar="blosc|npy", help="How voxels are stored.")] = (
        "blosc"
    ),
    shard_bytes: Annotated[
        int, typer.Option(metavar="N", help="Bytes at which the next shard begins.")
    ] = DEFAULT_SHARD_BYTES,
    size: Annotated[
        str | None, typer.Option(metavar="D,H,W", help="Resample every volume to this shape.")
    ] = None,
    crop_or_pad: Annotated[
        str | None,
        typer.Option(metavar="D,H,W", help="Cut or pad every volume, around its centre."),
    ] = None,
    orient: Annotated[
        str | None, typer.Option(metavar="ras", help="Turn volumes to these axes. [as they are]")
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(metavar="AXES", help="Axes of .npy files, such as CHW. [HW, DHW or CDHW]"),
    ] = None,
    max_volume_bytes: Annotated[
        int, typer.Option(metavar="N", help="Most memory the voxels of one file may take.")
    ] = DEFAULT_MAX_VOLUME_BYTES,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B", help="Every label, in class order. [those found]")
    ] = None,
    multi_label: Annotated[
        bool,
        typer.Option("--multi-label", help="Labels are findings joined by |, each one a class."),
    ] = False,
    jobs: Annotated[
        int, typer.Option(metavar="N", help="Processes; the bytes are the same for any number.")
    ] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a data set packed with other settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pack volumes into shards, once.

    Writes WebDataset tar shards, a sample table and a manifest. Patients are never divided between
    splits. Everything found is packed or listed with the reason why not. An interrupted pack is
    finished by running the same command again; the bytes are the same.

    \b
    Examples:
      streaming-balance pack BraTS2018 --out cohort --split train=0.7,val=0.15,test=0.15
      streaming-balance pack scans.csv --out cohort --crop-or-pad 128,128,128 --jobs 8
      streaming-balance pack chest.csv --out chest --multi-label --split train=0.8,val=0.2

    \b
    A table has the columns patient, label and image (or image.t1, image.flair, ... for channels),
    and may have sample, seg, split and further columns such as site. Paths are relative to it.
    """
    from streaming_balance.ingest.pack import write_shards

    with _progress(is_quiet=as_json) as progress:
        report = write_shards(
            source,
            out,
            layout=layout,
            labels=labels,
            split=split,
            train_splits=read_names(train_splits),
            seed=seed,
            codec=codec,
            shard_bytes=shard_bytes,
            size=read_sides("--size", size),
            crop_or_pad=read_sides("--crop-or-pad", crop_or_pad),
            orient=orient,
            axes=axes,
            max_volume_bytes=max_volume_bytes,
            classes=read_names(classes),
            multi_label=multi_label,
            jobs=jobs,
            overwrite=overwrite,
            progress=progress,
        )
    for warning in report.warnings:
        print_warning(warning)
    if as_json:
        print_json(_document(report))
    else:
        _print_tables(report, out)


@contextmanager
def _progress(*, is_quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Show progress on stderr: a bar on a terminal, a line now and then otherwise."""
    if is_quiet:
        yield None
    elif not sys.stderr.isatty():
        yield _print_line
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("packing", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("packing", total=None)
            yield lambda done, total, _: bar.update(task, completed=done, total=total)


def _print_line(done: int, total: int, _: str) -> None:
    """Say how far the packer is, every now and then and at the end."""
    if done == total or done % SAMPLES_PER_LINE == 0:
        print(f"packed {done:,} of {total:,}", file=sys.stderr)


def _document(report: PackReport) -> dict[str, object]:
    """Say a report as JSON."""
    return {
        "found": report.found,
        "packed": report.packed,
        "rejected": [
            {"patient": case.patient, "path": case.path, "reason": case.reason}
            for case in report.rejected
        ],
        "digest": report.digest,
        "new": report.is_new,
        "warnings": list(report.warnings),
    }


def _print_tables(report: PackReport, out: Path) -> None:
    """Print a report for people."""
    what = "packed" if report.is_new else "was packed before by the same command, left alone"
    print_table(
        f"{out}: {what}",
        ("split", "samples", "patients"),
        ((split.name, split.samples, split.patients) for split in report.manifest.splits),
    )
    if report.rejected:
        print_table(
            f"{len(report.rejected)} found and not packed",
            ("patient", "path", "reason"),
            ((case.patient, case.path, case.reason) for case in report.rejected),
        )
    print(f"found {report.found:,} = packed {report.packed:,} + rejected {len(report.rejected):,}")
    print(f"digest: {report.digest}")
