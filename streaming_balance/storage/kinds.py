"""How arrays are stored, numbered: a batch compares numbers instead of shapes and dtypes.

Most data sets know a handful of kinds, however many samples they have. A column of numbers says
which sample is of which kind, so that what a batch needs is told without a loop over its samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.storage.index import Formats

ABSENT = -1
"""The kind of an array that a sample does not have."""

# Finding a dtype by its name takes numpy longer than reading a small image takes the system.
_DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayKind:
    """What arrays have in common that are stored alike."""

    codec: str
    """`blosc` or `npy`."""
    dtype: np.dtype[Any]
    """Type of the elements."""
    shape: tuple[int, ...]
    """Shape as packed, with or without a channel axis."""
    row_shape: tuple[int, ...]
    """Shape with its channel axis: (C, D, H, W) or (C, H, W)."""


class ArrayKinds:
    """Numbers kinds of arrays, from 0, in the order they are met."""

    def __init__(self) -> None:
        self._kinds: list[ArrayKind] = []
        self._numbers: dict[ArrayKind, int] = {}

    def __getitem__(self, number: int) -> ArrayKind:
        return self._kinds[number]

    def numbers(self, formats: Formats, present: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Number the kinds of samples, one caller at a time.

        Args:
            formats: what the table says of `n` samples.
            present: `(n,)`, whether a sample has this array.

        Returns:
            `(n,)` numbers, `ABSENT` where there is no array.
        """
        numbers = np.full(len(present), ABSENT, dtype=np.int32)
        rows = np.flatnonzero(present)
        if len(rows):
            first, place = _groups([column[rows] for column in _columns(formats)])
            known = [self._number(_kind(formats, row)) for row in rows[first].tolist()]
            numbers[rows] = np.array(known, dtype=np.int32)[place]
        return numbers

    def _number(self, kind: ArrayKind) -> int:
        """Give the number of a kind, its next one where it is new."""
        if kind not in self._numbers:
            self._numbers[kind] = len(self._kinds)
            self._kinds.append(kind)
        return self._numbers[kind]


def _columns(formats: Formats) -> list[NDArray[Any]]:
    """List the columns in which two kinds can differ."""
    return [formats.codec, formats.dtype, formats.axes, *formats.shape.T]


def _groups(columns: list[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group equal rows: give the first row of each group, and the group of each row."""
    # Sorting is for columns that vary: in most data sets none does.
    varying = [column for column in columns if (column != column[0]).any()]
    codes = [np.unique(column, return_inverse=True)[1].reshape(-1) for column in varying]
    together = np.zeros(len(columns[0]), dtype=np.int64)
    first, place = np.zeros(1, dtype=np.int64), together
    for code in codes:
        # Numbered anew after each column, so that the product never outgrows 64 bits.
        together = place * (int(code.max()) + 1) + code
        _, first, place = np.unique(together, return_index=True, return_inverse=True)
        place = place.reshape(-1)
    return first, place


def _kind(formats: Formats, row: int) -> ArrayKind:
    """Read the kind of one sample."""
    axes = str(formats.axes[row])
    shape = tuple(formats.shape[row, : len(axes)].tolist())
    return ArrayKind(
        codec=str(formats.codec[row]),
        dtype=_DTYPES[str(formats.dtype[row])],
        shape=shape,
        row_shape=shape if axes.startswith("C") else (1, *shape),
    )
