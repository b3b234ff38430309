"""Rows of the sample table: what a packer knows of each sample, sorted, digested and written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from streaming_balance.storage.labelling import Labelling
from streaming_balance.storage.layout import (
    ARRAY_FIELDS,
    AXES,
    CODEC_EXTENSIONS,
    FORMAT_NAME,
    FORMAT_VERSION,
    MEMBER_FIELDS,
)
from streaming_balance.storage.npy import DTYPE_NAMES


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRow:
    """Where one member of a sample lies."""

    offset: int
    """Byte offset of its payload in the shard, a multiple of 512."""
    bytes: int
    """Bytes of its payload."""
    xxh3: int
    """xxh3-64 of its payload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRow(MemberRow):
    """Where a member of a foreign shard lies, and what it is called there."""

    member: str
    """Its name in the tar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRow(NamedRow):
    """Where an array member lies and what it holds."""

    codec: str
    """`blosc` or `npy`."""
    dtype: str
    """numpy name of the dtype, such as `int16`."""
    shape: tuple[int, ...]
    """Its sides, as many as `axes` has letters."""
    axes: str
    """`CDHW`, `DHW`, `CHW` or `HW`."""
    voxels: str
    """Digest of its content (`codecs.voxel_digest`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One sample's row."""

    key: str
    """Its key, different for every sample of the data set."""
    patient: str
    """The patient who owns it."""
    label: str
    """Name of its class; in a multi-label data set its findings in class order joined by `|`."""
    split: str
    """Its split."""
    shard: int
    """Number of its shard in the manifest's list."""
    members: Mapping[str, MemberRow]
    """Its members by field: `ArrayRow` for `image` and `seg`, in foreign shards `NamedRow` else."""
    columns: Mapping[str, str]
    """Its strata, by column name."""


def sorted_rows(
    rows: Sequence[SampleRow], *, splits: Sequence[str], labels: Sequence[str]
) -> list[SampleRow]:
    """Sort rows as the table holds them: by split, place among the labels, patient, key."""
    split_places = {split: place for place, split in enumerate(splits)}
    label_places = {label: place for place, label in enumerate(labels)}
    return sorted(
        rows,
        key=lambda row: (split_places[row.split], label_places[row.label], row.patient, row.key),
    )


def content_digest(
    rows: Sequence[SampleRow], *, labelling: Labelling, columns: Sequence[str]
) -> str:
    """Digest what a data set holds, not how it is stored.

    Args:
        rows: the rows, sorted.
        labelling: label names in class order, and whether samples have sets of them.
        columns: names of the strata columns.

    Returns:
        64 hex digits: the same whatever codec, shard size or offsets. Members of foreign shards
        that are kept as bytes count by their size and xxh3-64; `cls` and `json` do not count.
    """
    head: list[object] = [FORMAT_NAME, list(labelling.classes), list(columns)]
    if labelling.multi_label:
        head.append("multi_label")
    digest = hashlib.blake2b(_line(head), digest_size=32)
    for row in rows:
        arrays: list[list[object]] = [
            [field, array.axes, array.dtype, list(array.shape), array.voxels]
            for field in ARRAY_FIELDS
            if isinstance(array := row.members.get(field), ArrayRow)
        ]
        arrays += [
            [field, kept.bytes, f"{kept.xxh3:016x}"]
            for field, kept in sorted(row.members.items())
            if isinstance(kept, NamedRow) and field not in MEMBER_FIELDS
        ]
        strata = [row.columns[name] for name in columns]
        digest.update(_line([row.split, row.key, row.patient, row.label, strata, arrays]))
    return digest.hexdigest()


def table_schema(
    *,
    columns: Sequence[str],
    arrays: Sequence[str],
    pack_id: str,
    kept: Sequence[str] | None = None,
) -> pa.Schema:
    """Give the Arrow schema of a sample table.

    Args:
        columns: names of the strata columns.
        arrays: array members: `image`, or `image` and `seg`; over foreign shards perhaps none.
        pack_id: the pack the table belongs to.
        kept: members of foreign shards that are kept as bytes; None: the shards are our own.
    """
    fields = [
        pa.field("key", pa.utf8(), nullable=False),
        pa.field("patient", _codes(pa.int32()), nullable=False),
        pa.field("label", _codes(pa.int32()), nullable=False),
        pa.field("split", _codes(pa.int8()), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
    ]
    for member in table_members(arrays, kept):
        fields += _member_fields(member, arrays, is_foreign=kept is not None)
    fields += [pa.field(name, pa.utf8(), nullable=False) for name in columns]
    return pa.schema(
        fields,
        metadata={
            "format": FORMAT_NAME,
            "version": str(FORMAT_VERSION),
            "pack_id": pack_id,
            "columns": json.dumps(list(columns)),
        },
    )


def table_members(arrays: Sequence[str], kept: Sequence[str] | None = None) -> tuple[str, ...]:
    """Give the members a table has columns for, in their order.

    Examples:
        >>> table_members(["image"])
        ('image', 'cls', 'json')
        >>> table_members(["image"], ["cls", "txt"])
        ('image', 'cls', 'txt')
    """
    if kept is not None:
        return (*arrays, *kept)
    return tuple(field for field in MEMBER_FIELDS if field in arrays or field not in ARRAY_FIELDS)


def arrow_table(
    rows: Sequence[SampleRow],
    *,
    splits: Sequence[str],
    labels: Sequence[str],
    schema: pa.Schema,
    arrays: Sequence[str],
    columns: Sequence[str],
    kept: Sequence[str] | None = None,
) -> pa.Table:
    """Build the Arrow table of sorted rows, every dictionary whole and in its order."""
    dictionaries = {
        "patient": sorted({row.patient for row in rows}),
        "label": list(labels),
        "split": list(splits),
    }
    values: dict[str, pa.Array] = {
        name: _encoded([getattr(row, name) for row in rows], words, schema.field(name).type)
        for name, words in dictionaries.items()
    }
    values["key"] = pa.array([row.key for row in rows], pa.utf8())
    values["shard"] = pa.array([row.shard for row in rows], pa.int32())
    for member in table_members(arrays, kept):
        fields = _member_fields(member, arrays, is_foreign=kept is not None)
        values |= _member_columns(fields, [row.members.get(member) for row in rows])
    for name in columns:
        values[name] = pa.array([row.columns[name] for row in rows], pa.utf8())
    return pa.table([values[name] for name in schema.names], schema=schema)


def _codes(numbers: pa.DataType) -> pa.DataType:
    """Give the type of text stored as numbers into a dictionary."""
    return pa.dictionary(numbers, pa.utf8())


def _member_fields(member: str, arrays: Sequence[str], *, is_foreign: bool) -> list[pa.Field]:
    """Give the columns of one member; only `seg` and what foreign shards keep may be absent."""
    types: dict[str, pa.DataType] = {
        "offset": pa.int64(),
        "bytes": pa.int64(),
        "xxh3": pa.uint64(),
    }
    if is_foreign or member in arrays:
        types["member"] = pa.utf8()
    if member in arrays:
        types |= {
            "codec": _codes(pa.int8()),
            "dtype": _codes(pa.int8()),
            "shape": pa.list_(pa.field("item", pa.int32(), nullable=False)),
            "axes": _codes(pa.int8()),
            "voxels": pa.utf8(),
        }
    nullable = member == "seg" or (is_foreign and member not in arrays)
    return [pa.field(f"{member}.{name}", kind, nullable=nullable) for name, kind in types.items()]


def _member_columns(
    fields: Sequence[pa.Field], stored: Sequence[MemberRow | None]
) -> dict[str, pa.Array]:
    """Give one member's columns, null where a sample has no such member."""
    words = {"codec": tuple(CODEC_EXTENSIONS), "dtype": DTYPE_NAMES, "axes": AXES}
    columns: dict[str, pa.Array] = {}
    for field in fields:
        name = field.name.rpartition(".")[2]
        values: list[Any] = [None if row is None else getattr(row, name) for row in stored]
        if name in words:
            columns[field.name] = _encoded(values, words[name], field.type)
        else:
            columns[field.name] = pa.array(values, field.type)
    return columns


def _encoded(
    values: Sequence[str | None], words: Sequence[str], kind: pa.DictionaryType
) -> pa.Array:
    """Store texts as their places in `words`."""
    places = {word: place for place, word in enumerate(words)}
    numbers = [None if value is None else places[value] for value in values]
    return pa.DictionaryArray.from_arrays(
        pa.array(numbers, kind.index_type), pa.array(list(words), pa.utf8())
    )


def _line(values: Sequence[object]) -> bytes:
    """Write values as one line of JSON that no other values give."""
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"
