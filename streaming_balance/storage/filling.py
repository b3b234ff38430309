"""Placing a stored array in a row of a batch: cast, centre cropped or zero padded, plane by plane.

A row asks for a space by having it. Where the stored array is longer along an axis, its centre is
taken; where it is shorter, it stands in the centre of zeros. Planes are cut along the first axis of
space, a few at a time, so that what is cast or cropped is still in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Half of a common second-level cache: the slab just read is cast before it is pushed out.
SLAB_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Slab:
    """Consecutive planes of one channel of a stored array."""

    channel: int
    """Number of the channel."""
    first: int
    """First plane along the first axis of space."""
    stop: int
    """One past the last plane."""
    offset: int
    """Bytes of the array before the slab."""
    bytes: int
    """Length of the slab."""


class RowFiller:
    """Takes the planes of one stored array and keeps what belongs in the row.

    Args:
        row: `(C, *space)` array to fill; written during the calls only.
        stored_shape: `(C, *space)` shape of the stored array, as many channels as the row.
        dtype: element type of the stored array.

    Examples:
        A stored line of five in a row of three, then in a row of eight:

        >>> row = np.zeros((1, 3), np.float32)
        >>> filler = RowFiller(row, (1, 5), np.dtype(np.int16))
        >>> for slab in filler.slabs():
        ...     filler.put(slab, np.arange(slab.first, slab.stop, dtype=np.int16))
        >>> row
        array([[1., 2., 3.]], dtype=float32)
        >>> row = np.ones((1, 8), np.float32)
        >>> filler = RowFiller(row, (1, 5), np.dtype(np.int16))
        >>> filler.put(next(filler.slabs()), np.arange(5, dtype=np.int16))
        >>> row
        array([[0., 0., 1., 2., 3., 4., 0., 0.]], dtype=float32)
    """

    def __init__(
        self, row: NDArray[np.generic], stored_shape: tuple[int, ...], dtype: np.dtype[np.generic]
    ) -> None:
        self._channels, *space = stored_shape
        self._row = row
        self._space = tuple(space)
        self._plane_shape = self._space[1:]
        self._plane_bytes = math.prod(self._plane_shape) * dtype.itemsize
        self._source, self._target = centre_overlap(self._space, row.shape[1:])
        _zero_the_border(row, self._target)

    @property
    def largest_slab_bytes(self) -> int:
        """Bytes of the largest slab: what a scratch must hold."""
        return min(self._planes_per_slab, self._space[0]) * self._plane_bytes

    def slabs(self) -> Iterator[Slab]:
        """Cut the array into slabs of at most `SLAB_BYTES`, at least a plane each, in C order."""
        for channel in range(self._channels):
            for first in range(0, self._space[0], self._planes_per_slab):
                stop = min(first + self._planes_per_slab, self._space[0])
                yield Slab(
                    channel=channel,
                    first=first,
                    stop=stop,
                    offset=(channel * self._space[0] + first) * self._plane_bytes,
                    bytes=(stop - first) * self._plane_bytes,
                )

    def keeps(self, slab: Slab) -> bool:
        """Say whether any of the slab lands in the row."""
        kept = self._source[0]
        return bool(slab.first < kept.stop and kept.start < slab.stop)

    def put(self, slab: Slab, elements: NDArray[np.generic]) -> None:
        """Copy what the row keeps of a slab into it, casting on the way.

        Args:
            slab: which planes these are.
            elements: their elements in C order, of the stored dtype.
        """
        if not self.keeps(slab):
            return
        planes = elements.reshape(slab.stop - slab.first, *self._plane_shape)
        kept = self._source[0]
        first, stop = max(slab.first, kept.start), min(slab.stop, kept.stop)
        # From a plane's number in the stored array to its number in the row.
        shift = self._target[0].start - kept.start
        there: tuple[slice, ...] = (slice(first + shift, stop + shift), *self._target[1:])
        here: tuple[slice, ...] = (slice(first - slab.first, stop - slab.first), *self._source[1:])
        np.copyto(self._row[slab.channel][there], planes[here], casting="same_kind")

    @property
    def _planes_per_slab(self) -> int:
        """Planes that fit `SLAB_BYTES`, at least one."""
        return max(1, SLAB_BYTES // self._plane_bytes)


def centre_overlap(
    stored: tuple[int, ...], wanted: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Say which part of a stored space lands where in the wanted one, centre on centre.

    Args:
        stored: lengths along the axes of the stored array.
        wanted: lengths along the same axes of the row.

    Returns:
        Slices of the stored array, and slices of the row that they fill.

    Examples:
        >>> centre_overlap((240, 155), (128, 160))
        ((slice(56, 184, None), slice(0, 155, None)), (slice(0, 128, None), slice(2, 157, None)))
    """
    source, target = [], []
    for length, asked in zip(stored, wanted, strict=True):
        kept = min(length, asked)
        crop, pad = (length - kept) // 2, (asked - kept) // 2
        source.append(slice(crop, crop + kept))
        target.append(slice(pad, pad + kept))
    return tuple(source), tuple(target)


def _zero_the_border(row: NDArray[np.generic], target: tuple[slice, ...]) -> None:
    """Set to zero what the stored array does not reach."""
    for axis, part in enumerate(target, start=1):
        along = np.moveaxis(row, axis, 0)
        along[: part.start] = 0
        along[part.stop :] = 0
