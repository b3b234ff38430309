"""`streaming-balance inspect`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streaming_balance.cli.answers import print_json, print_table, with_unit
from streaming_balance.cli.inspect_stream import inspect_stream, names_tars
from streaming_balance.cli.options import AsJson

if TYPE_CHECKING:
    from streaming_balance.storage.shards import ShardSet

# A cohort of unequal volumes has as many shapes as patients; people want the common ones.
SHAPES_SHOWN = 5


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR|TAR|-",
            help="Folder of a data set; or anybody's tars: a path, a pattern, an address, or - for "
            "standard input.",
            show_default=False,
        ),
    ],
    label: Annotated[
        str, typer.Option(metavar="cls|json:FIELD", help="Of tars: where labels are.")
    ] = "cls",
    allow_pipe: Annotated[
        bool, typer.Option("--allow-pipe", help="Of tars: let pipe: start programs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a data set, or any tar, holds, without reading a volume.

    Of a data set, per split: samples, patients, bytes, classes, shapes; for all of it: codecs,
    modalities' arrays, columns, content digest, and what was found but not packed. Of tars:
    samples, members, bytes, classes, shapes, and where they are damaged. Exits with 1 if they are.

    \b
    Examples:
      streaming-balance inspect cohort
      streaming-balance inspect cohort --json
      cat x.tar | streaming-balance inspect -
    """
    # What names neither a folder nor tars is most likely a folder that is not there.
    if Path(source).is_dir() or not names_tars(source):
        _inspect_data_set(Path(source), as_json=as_json)
    else:
        inspect_stream(source, label=label, allow_pipe=allow_pipe, as_json=as_json)


def _inspect_data_set(folder: Path, *, as_json: bool) -> None:
    """Say what the manifest and the sample table of a folder say."""
    from streaming_balance.storage.shards import open_shards

    shards = open_shards(folder)
    document = _describe(shards)
    if as_json:
        print_json(document)
        return
    classes = document["classes"]
    print_table(
        f"{folder}: {len(shards):,} samples, arrays {_listed(document['arrays'])}",
        ("split", "samples", "patients", "stored", *classes),
        (
            (
                name,
                split["samples"],
                split["patients"],
                with_unit(split["bytes"]),
                *split["classes"].values(),
            )
            for name, split in document["splits"].items()
        ),
    )
    for name, split in document["splits"].items():
        shapes = Counter(split["shapes"]).most_common(SHAPES_SHOWN)
        shown = ", ".join(f"{shape} ({count})" for shape, count in shapes)
        rest = len(split["shapes"]) - len(shapes)
        print(f"{name} shapes: {shown or 'none'}" + (f", and {rest} more" if rest else ""))
    if document["foreign"] is not None:
        print(_said_of_foreign(shards, document["foreign"]))
    if document["multi_label"]:
        print("a sample may have several findings and counts for each of them")
    print(f"codecs: {_listed(document['codecs'])}; columns: {_listed(document['columns'])}")
    print(f"found {document['found']:,}, not packed {len(document['rejected']):,}")
    print(f"digest: {document['digest']}")


def _describe(shards: ShardSet) -> dict[str, Any]:
    """Collect what the manifest and the sample table say."""
    from streaming_balance.report.plan_summary import class_counts

    manifest = shards.manifest
    has_image = "image" in shards.arrays
    formats = {split: shards.table.formats(split, "image") for split in shards.splits if has_image}
    stored = {
        split: sum(shard.bytes for shard in manifest.shards if shard.split == split)
        for split in shards.splits
    }
    return {
        "digest": shards.digest,
        "classes": shards.classes,
        "multi_label": shards.multi_label,
        "splits": {
            entry.name: {
                "samples": entry.samples,
                "patients": entry.patients,
                "bytes": stored[entry.name],
                "classes": class_counts(shards, entry.name),
                "shapes": _shapes(formats[entry.name].shape.tolist()) if has_image else {},
            }
            for entry in manifest.splits
        },
        "train_splits": list(shards.train_splits),
        "codecs": sorted({str(codec) for entry in formats.values() for codec in set(entry.codec)}),
        "dtypes": sorted({str(dtype) for entry in formats.values() for dtype in set(entry.dtype)}),
        "arrays": list(shards.arrays),
        "foreign": None if manifest.foreign is None else asdict(manifest.foreign),
        "columns": list(shards.columns),
        "found": manifest.found,
        "rejected": [
            {"patient": case.patient, "path": case.path, "reason": case.reason}
            for case in manifest.rejected
        ],
    }


def _said_of_foreign(shards: ShardSet, foreign: dict[str, Any]) -> str:
    """Say where the shards of an index are, and what nobody here decodes."""
    files = {shard.name for shard in shards.manifest.shards}
    patients = foreign["patient"] or "none: every key counts as a patient of its own"
    return (
        f"indexed in place: {len(files)} shard(s) such as {min(files)}; labels from "
        f"{foreign['label']}; patients from {patients}; kept as bytes: "
        f"{_listed(list(shards.bytes_fields))}"
    )


def _shapes(sides: list[list[int]]) -> dict[str, int]:
    """Count samples by shape, written as `4x24x24x24`; unused sides are 0."""
    counts = Counter("x".join(str(side) for side in row if side) for row in sides)
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _listed(names: list[str]) -> str:
    """Write names, or that there are none."""
    return ", ".join(names) or "none"
