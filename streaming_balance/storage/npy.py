"""The .npy header, written and read strictly: no `eval`, no objects, no Fortran order."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from streaming_balance.errors import ConfigError, ShardError

_MAGIC = b"\x93NUMPY"
_PREFIX_BYTES = {1: 10, 2: 12}  # magic, version and the header's length
_LENGTH = {1: struct.Struct("<H"), 2: struct.Struct("<I")}
_ALIGNMENT = 64  # the values start on a multiple of it, as numpy does
_MAX_HEADER_BYTES = 10_000  # numpy's own cap
_MAX_DIMENSIONS = 32  # what every supported numpy can hold
_MAX_DIGITS = 18  # a longer side does not fit 64 bits

_DTYPES = {
    np.dtype(name).newbyteorder("<").str: np.dtype(name).newbyteorder("<")
    for name in (
        *("bool", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"),
    )
}
DTYPE_NAMES = tuple(dtype.name for dtype in _DTYPES.values())

_ENTRY = (
    r"(?:'descr'\s*:\s*'(?P<descr{n}>[^']*)'"
    r"|'fortran_order'\s*:\s*(?P<order{n}>True|False)"
    r"|'shape'\s*:\s*\((?P<shape{n}>[0-9, ]*)\))"
)
_HEADER = re.compile(
    r"\{\s*" + r"\s*,\s*".join(_ENTRY.replace("{n}", n) for n in "012") + r"\s*,?\s*\}\s*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayHeader:
    """What the start of a stored array says about it."""

    dtype: np.dtype[Any]
    """Little-endian dtype of the values."""
    shape: tuple[int, ...]
    """Sides of the array, C order."""
    header_bytes: int
    """Where the values (npy) or the chunk table (blosc) start."""
    items: int
    """Number of values."""
    raw_bytes: int
    """Bytes of the values once decoded."""


def array_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Write the .npy header of an array, the same for every numpy release.

    Args:
        dtype: bool, integer or float of up to 8 bytes.
        shape: sides of the array.

    Returns:
        The header, padded with spaces to a multiple of 64 bytes.

    Raises:
        ConfigError: the dtype is not stored, or there are more than 32 dimensions.

    Examples:
        >>> array_header(np.dtype("int16"), (4, 5))[10:-1].strip()
        b"{'descr': '<i2', 'fortran_order': False, 'shape': (4, 5), }"
    """
    described = np.dtype(dtype).newbyteorder("<").str
    if described not in _DTYPES:
        raise ConfigError(
            f"arrays of {dtype} are not stored; convert to one of {', '.join(DTYPE_NAMES)}"
        )
    if len(shape) > _MAX_DIMENSIONS:
        raise ConfigError(f"an array has {len(shape)} dimensions; at most {_MAX_DIMENSIONS} fit")
    sides = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    text = f"{{'descr': '{described}', 'fortran_order': False, 'shape': ({sides}), }}"
    unpadded = _PREFIX_BYTES[1] + len(text) + 1
    padding = -unpadded % _ALIGNMENT
    body = text.encode("ascii") + b" " * padding + b"\n"
    return _MAGIC + b"\x01\x00" + _LENGTH[1].pack(len(body)) + body


def parse_header(buffer: bytes | bytearray | memoryview) -> ArrayHeader:
    """Read the .npy header at the start of `buffer` without evaluating anything.

    Whether the member really holds what the header claims is for the caller to check: it knows
    the member's size (`codecs.checked_header`).

    Args:
        buffer: at least the header's bytes; more may follow.

    Returns:
        The header.

    Raises:
        ShardError: no .npy header of version 1 or 2, cut short, or not a plain array in C order.

    Examples:
        >>> parse_header(array_header(np.dtype("uint8"), (2, 3))).shape
        (2, 3)
    """
    start = bytes(buffer[:12])
    version = start[6] if len(start) == 12 and start[7] == 0 else 0
    if not start.startswith(_MAGIC) or version not in _PREFIX_BYTES:
        raise ShardError(f"no .npy header of version 1 or 2: the bytes start with {start!r}")
    prefix = _PREFIX_BYTES[version]
    (length,) = _LENGTH[version].unpack_from(start, 8)
    if length > _MAX_HEADER_BYTES:
        raise ShardError(f"the .npy header claims {length:,} bytes; at most {_MAX_HEADER_BYTES:,}")
    if len(buffer) < prefix + length:
        raise ShardError(
            f"the .npy header ends at byte {prefix + length}, the bytes end at {len(buffer)}"
        )
    return _parsed_text(bytes(buffer[prefix : prefix + length]), prefix + length)


@lru_cache(maxsize=1024)  # the volumes of a cohort share a few headers; parsing costs 10 µs
def _parsed_text(text: bytes, header_bytes: int) -> ArrayHeader:
    """Turn the header's text into its values."""
    match = _HEADER.fullmatch(text.decode("latin-1"))
    entries = (
        {name[:-1]: value for name, value in match.groupdict().items() if value is not None}
        if match
        else {}
    )
    if entries.keys() != {"descr", "order", "shape"}:
        raise ShardError(f"not the .npy header of a plain array: {text[:80]!r}")
    dtype = _DTYPES.get(entries["descr"])
    if dtype is None:
        raise ShardError(
            f"the .npy header claims dtype {entries['descr']!r}; only little-endian "
            f"{', '.join(DTYPE_NAMES)} are read, never objects"
        )
    if entries["order"] == "True":
        raise ShardError("the .npy header claims Fortran order; only C order is read")
    shape = _parsed_shape(entries["shape"])
    items = math.prod(shape)
    return ArrayHeader(
        dtype=dtype,
        shape=shape,
        header_bytes=header_bytes,
        items=items,
        raw_bytes=items * dtype.itemsize,
    )


def _parsed_shape(text: str) -> tuple[int, ...]:
    """Turn `4, 5` or `4,` into sides; a single side needs its comma, as in Python."""
    sides = [side.strip() for side in text.split(",")]
    if sides[-1] == "":
        sides.pop()
    elif len(sides) == 1:
        raise ShardError(f"the .npy header's shape ({text}) is not a tuple")
    if len(sides) > _MAX_DIMENSIONS:
        raise ShardError(f"the .npy header claims {len(sides)} dimensions")
    if not all(side.isdigit() and len(side) <= _MAX_DIGITS for side in sides):
        raise ShardError(f"the .npy header's shape ({text[:80]}) is no list of sides")
    return tuple(map(int, sides))
