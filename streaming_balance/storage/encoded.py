"""Samples ready to be packed: encoded arrays, and the members they become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.storage.codecs import encode, voxel_digest
from streaming_balance.storage.labelling import Labelling
from streaming_balance.storage.layout import ARRAY_FIELDS, AXES, member_name
from streaming_balance.storage.manifest import JSON
from streaming_balance.storage.rows import ArrayRow, MemberRow


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedArray:
    """One array of a sample, as it will stand in the shard."""

    field: str
    """`image` or `seg`."""
    codec: str
    """`blosc` or `npy`."""
    dtype: str
    """numpy name of the dtype, such as `int16`."""
    shape: tuple[int, ...]
    """Its sides, each at least 1, as many as `axes` has letters."""
    axes: str
    """`CDHW`, `DHW`, `CHW` or `HW`."""
    voxels: str
    """Digest of its content (`codecs.voxel_digest`)."""
    payload: bytes
    """The member's bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSample:
    """One sample, ready to be packed."""

    key: str
    """Its key (`layout.sample_key`)."""
    patient: str
    """The patient who owns it."""
    label: str
    """Name of its class; in a multi-label data set its findings in class order joined by `|`."""
    split: str
    """Its split."""
    columns: Mapping[str, str]
    """Its strata, by column name."""
    arrays: tuple[EncodedArray, ...]
    """`image`, then `seg` where there is one."""
    details: Mapping[str, JSON]
    """What `KEY.json` says beside patient and label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMember:
    """One member of a sample, as it will stand in the shard."""

    field: str
    """`image`, `seg`, `cls` or `json`."""
    name: str
    """Its name in the tar."""
    payload: bytes
    """Its bytes."""
    xxh3: int
    """xxh3-64 of its bytes."""
    array: EncodedArray | None
    """What it holds, for `image` and `seg`."""

    def row(self, offset: int) -> MemberRow:
        """Say in the table that it lies at `offset`."""
        place: dict[str, Any] = {
            "offset": offset,
            "bytes": len(self.payload),
            "xxh3": self.xxh3,
        }
        if self.array is None:
            return MemberRow(**place)
        return ArrayRow(
            **place,
            member=self.name,
            codec=self.array.codec,
            dtype=self.array.dtype,
            shape=self.array.shape,
            axes=self.array.axes,
            voxels=self.array.voxels,
        )


def encode_array(field: str, array: NDArray[Any], *, axes: str, codec: str) -> EncodedArray:
    """Encode one array of a sample.

    Args:
        field: `image` or `seg`.
        array: its values; every side at least 1; bool, integers or floats of up to 8 bytes.
        axes: what its dimensions are: `CDHW`, `DHW`, `CHW` or `HW`.
        codec: `blosc` or `npy`.

    Returns:
        The array with its bytes and content digest.

    Raises:
        ConfigError: an unknown field, axes or codec, a dtype that is not stored, or a shape that
            does not go with `axes`.

    Examples:
        >>> import numpy as np
        >>> encode_array("image", np.zeros((2, 3), dtype=np.int16), axes="HW", codec="npy").shape
        (2, 3)
    """
    if field not in ARRAY_FIELDS or axes not in AXES:
        raise ConfigError(
            f"{field!r} with axes {axes!r} cannot be packed; fields: {', '.join(ARRAY_FIELDS)}; "
            f"axes: {', '.join(AXES)}"
        )
    if array.ndim != len(axes) or 0 in array.shape:
        raise ConfigError(
            f"{field} has shape {array.shape}; axes {axes} need {len(axes)} sides >= 1"
        )
    return EncodedArray(
        field=field,
        codec=codec,
        dtype=array.dtype.name,
        shape=tuple(map(int, array.shape)),
        axes=axes,
        voxels=voxel_digest(array, axes),
        payload=encode(array, codec),
    )


def packed_members(sample: EncodedSample, labelling: Labelling) -> tuple[PackedMember, ...]:
    """Turn a sample into its members, in the order they stand in the shard.

    Raises:
        ConfigError: its label is no class, or its details are not plain JSON.
    """
    members = [
        _member(
            array.field, member_name(sample.key, array.field, array.codec), array.payload, array
        )
        for array in sample.arrays
    ]
    cls = labelling.payload(sample.label)
    members.append(_member("cls", labelling.member_name(sample.key), cls))
    details = _details(sample, labelling)
    members.append(_member("json", member_name(sample.key, "json"), details))
    return tuple(members)


def _member(
    field: str, name: str, payload: bytes, array: EncodedArray | None = None
) -> PackedMember:
    """Hash one member's bytes."""
    return PackedMember(
        field=field, name=name, payload=payload, xxh3=xxhash.xxh3_64_intdigest(payload), array=array
    )


def _details(sample: EncodedSample, labelling: Labelling) -> bytes:
    """Write `KEY.json`: sorted names, no spaces, so the same sample gives the same bytes."""
    taken = {"patient", "label"} & sample.details.keys()
    if taken:
        raise ConfigError(f"sample {sample.key!r}: details may not set {sorted(taken)} themselves")
    label = labelling.in_json(sample.label)
    document = {**sample.details, "patient": sample.patient, "label": label}
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sample {sample.key!r}: details are no plain JSON: {error}") from error
    return text.encode("ascii")
