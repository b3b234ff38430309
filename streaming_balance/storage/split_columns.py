"""What the sample table says about the members of one split, and whether a member's bytes agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ShardError
from streaming_balance.storage.codecs import decode, voxel_digest
from streaming_balance.storage.index import Formats, Members, SampleTable
from streaming_balance.storage.layout import member_name
from streaming_balance.storage.manifest import Manifest
from streaming_balance.storage.rows import table_members


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedMember:
    """One member of a shard, as the table describes it."""

    name: str
    """Its name in the tar."""
    field: str
    """`image`, `seg`, `cls`, `json`, or a field of foreign shards."""
    sample: int
    """Sample number within the split."""
    key: str
    """Key of the sample."""
    offset: int
    """Byte offset of its payload."""
    bytes: int
    """Bytes of its payload."""
    checksum: int
    """xxh3-64 of its payload."""


class SplitColumns:
    """All columns of one split's rows.

    Args:
        table: an open sample table.
        manifest: the manifest of the same pack.
        split: name of the split.
    """

    def __init__(self, table: SampleTable, manifest: Manifest, split: str) -> None:
        arrays = manifest.arrays
        self.split = split
        """Name of the split."""
        self.keys: NDArray[np.str_] = table.keys(split)
        """Key of every sample."""
        self.patients: NDArray[np.str_] = table.patients(split)
        """Patient of every sample."""
        self.places: Mapping[str, Members] = {
            field: table.members(split, field)
            for field in table_members(arrays, manifest.kept_members)
        }
        """Where the members of every field lie."""
        self.formats: Mapping[str, Formats] = {
            field: table.formats(split, field) for field in arrays
        }
        """What the arrays of every field hold."""
        self._is_foreign = manifest.foreign is not None
        self._names = {
            field: table.member_names(split, field)
            for field in (self.places if self._is_foreign else arrays)
        }
        self._arrays = arrays
        self._labels = table.label_words(split)
        self._labelling = manifest.labelling

    def members_of(self, shard: int) -> list[ExpectedMember]:
        """Give the members of one shard by ascending offset."""
        members = []
        for field, places in self.places.items():
            here = np.flatnonzero((places.shard == shard) & places.present)
            members += [self._member(field, sample) for sample in here.tolist()]
        return sorted(members, key=lambda member: member.offset)

    def content_problem(self, member: ExpectedMember, payload: bytearray) -> str | None:
        """Say in what a member whose checksum is right differs from its row, or None."""
        if member.field in self._arrays:
            return self._array_problem(member, payload)
        if self._is_foreign:
            return None  # its bytes are as they were indexed, and say nothing else
        if member.field == "cls":
            return self._class_problem(member, payload)
        return self._details_problem(member, payload)

    def _member(self, field: str, sample: int) -> ExpectedMember:
        """Describe one member."""
        places, key = self.places[field], str(self.keys[sample])
        if field in self._names:
            name = str(self._names[field][sample])
        else:
            name = self._labelling.member_name(key) if field == "cls" else member_name(key, field)
        return ExpectedMember(
            name=name,
            field=field,
            sample=sample,
            key=key,
            offset=int(places.offset[sample]),
            bytes=int(places.stored_bytes[sample]),
            checksum=int(places.xxh3[sample]),
        )

    def _class_problem(self, member: ExpectedMember, payload: bytearray) -> str | None:
        """Compare the member that holds a sample's class with its row."""
        label = str(self._labels[member.sample])
        expected = self._labelling.payload(label)
        if bytes(payload) == expected:
            return None
        if self._labelling.multi_label:
            return f"is not the array of the findings {label!r} that the table says"
        return f"holds {bytes(payload[:20])!r}, the table says class {expected!r}"

    def _array_problem(self, member: ExpectedMember, payload: bytearray) -> str | None:
        """Decode an array and compare dtype, shape and content with its row."""
        formats, sample = self.formats[member.field], member.sample
        try:
            array = decode(payload, str(formats.codec[sample]))
        except ShardError as error:
            return f"cannot be decoded: {error}"
        axes, dtype = str(formats.axes[sample]), str(formats.dtype[sample])
        shape = tuple(formats.shape[sample, : len(axes)].tolist())
        if (array.dtype.name, array.shape) != (dtype, shape):
            return f"holds {array.dtype.name} {array.shape}, the table says {dtype} {shape}"
        found, expected = voxel_digest(array, axes), str(formats.voxels[sample])
        if found != expected:
            return f"its voxels have digest {found}, the table says {expected}"
        return None

    def _details_problem(self, member: ExpectedMember, payload: bytearray) -> str | None:
        """Compare patient and label in a sample's JSON with its row."""
        try:
            details: Any = json.loads(payload.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return f"is not JSON: {error}"
        if not isinstance(details, dict):
            return "is no JSON object"
        expected = {
            "patient": str(self.patients[member.sample]),
            "label": self._labelling.in_json(str(self._labels[member.sample])),
        }
        for name, value in expected.items():
            if details.get(name) != value:
                return f"says {name} {details.get(name)!r}, the table says {value!r}"
        return None
