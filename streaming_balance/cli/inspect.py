"""`streaming-balance inspect`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from streaming_balance.cli.answers import print_json, print_table, with_unit
from streaming_balance.cli.options import AsJson, DataSet

if TYPE_CHECKING:
    from streaming_balance.storage.shards import ShardSet

# A cohort of unequal volumes has as many shapes as patients; people want the common ones.
SHAPES_SHOWN = 5


def inspect(folder: DataSet, as_json: AsJson = False) -> None:
    """Say what a data set holds, without reading a volume.

    Per split: samples, patients, bytes, classes, shapes; for the data set: codecs, modalities'
    arrays, columns, content digest, and what was found but not packed.

    \b
    Examples:
      streaming-balance inspect cohort
      streaming-balance inspect cohort --json
    """
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
