"""Orientation, resampling and cropping of arrays together with their affines."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError

Mode = Literal["linear", "nearest"]


def to_ras(
    array: NDArray[np.generic], affine: NDArray[np.float64]
) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """Turn a volume so that its axes run to the patient's right, front and top.

    Voxels are only moved, never interpolated: axes are swapped and reversed to the nearest
    right-anterior-superior order, and the affine says so.

    Args:
        array: `(D, H, W)` or `(C, D, H, W)` voxels.
        affine: `(4, 4)` from voxel index to millimetres.

    Returns:
        The array, C order, and its `(4, 4)` affine.

    Examples:
        >>> array, affine = to_ras(np.arange(2).reshape(2, 1, 1), np.diag([-1.0, 1.0, 1.0, 1.0]))
        >>> array.ravel().tolist(), affine[0].tolist()
        ([1, 0], [1.0, 0.0, 0.0, -1.0])
    """
    channels = array.ndim - 3
    orientation = np.asarray(io_orientation(affine), dtype=np.float64)  # type: ignore[no-untyped-call]
    goes_to = orientation[:, 0].astype(int)
    turned = array
    moved = np.eye(4)
    for axis in range(3):
        if orientation[axis, 1] < 0:
            turned = np.flip(turned, axis + channels)
            # New index i is old index n - 1 - i.
            moved[axis, axis] = -1.0
            moved[axis, 3] = array.shape[axis + channels] - 1
    comes_from = np.argsort(goes_to)
    turned = np.transpose(turned, (*range(channels), *(comes_from + channels)))
    new_affine = affine @ moved
    new_affine[:3, :3] = new_affine[:3, comes_from]
    return np.ascontiguousarray(turned), np.asarray(new_affine, dtype=np.float64)


def resample(
    array: NDArray[np.generic], size: tuple[int, ...], *, mode: Mode
) -> NDArray[np.generic]:
    """Resample the space axes of an array to a given number of voxels.

    The grid keeps the volume's outer borders (voxel centres at half positions, as
    `align_corners=False` elsewhere); outside the outermost centres the nearest value holds. There
    is no smoothing before shrinking.

    Args:
        array: `(*space)` or `(C, *space)` voxels.
        size: voxels wanted along each space axis, each at least 1.
        mode: "linear" for images, "nearest" for masks.

    Returns:
        `(*size)` or `(C, *size)` voxels of the same dtype; integers are rounded to the nearest,
        halves to even.

    Raises:
        ConfigError: `size` does not fit the array.

    Examples:
        >>> resample(np.array([[0, 8]], dtype=np.int16), (1, 4), mode="linear")
        array([[0, 2, 6, 8]], dtype=int16)
        >>> resample(np.array([[0, 8]], dtype=np.int16), (1, 4), mode="nearest")
        array([[0, 0, 8, 8]], dtype=int16)
    """
    first = _first_space_axis(array, size)
    if array.shape[first:] == tuple(size):
        return array
    if mode == "nearest":
        for axis, wanted in enumerate(size, start=first):
            array = np.take(array, _nearest_places(array.shape[axis], wanted), axis=axis)
        return np.ascontiguousarray(array)
    # Channel by channel: float64 copies of a whole 4-D series would not fit beside it.
    channels = array.reshape(-1, *array.shape[first:])
    shape = (*array.shape[:first], *size)
    resampled = np.empty((len(channels), *size), dtype=array.dtype)
    for channel, target in zip(channels, resampled, strict=True):
        values = channel.astype(np.float64)
        for axis, wanted in enumerate(size):
            values = _linear_along(values, axis, wanted)
        target[...] = _back_to(values, array.dtype)
    return resampled.reshape(shape)


def crop_or_pad(array: NDArray[np.generic], size: tuple[int, ...]) -> NDArray[np.generic]:
    """Cut or pad the space axes around the centre.

    Where one voxel is left over it is cut at the end, or added at the end.

    Args:
        array: `(*space)` or `(C, *space)` voxels.
        size: voxels wanted along each space axis, each at least 1.

    Returns:
        `(*size)` or `(C, *size)` voxels of the same dtype; new voxels are 0.

    Raises:
        ConfigError: `size` does not fit the array.

    Examples:
        >>> crop_or_pad(np.array([[1, 2, 3, 4]]), (2, 3))
        array([[1, 2, 3],
               [0, 0, 0]])
    """
    first = _first_space_axis(array, size)
    target = np.zeros((*array.shape[:first], *size), dtype=array.dtype)
    source_part, target_part = [slice(None)] * first, [slice(None)] * first
    for stored, wanted in zip(array.shape[first:], size, strict=True):
        kept = min(stored, wanted)
        start, before = max(stored - wanted, 0) // 2, max(wanted - stored, 0) // 2
        source_part.append(slice(start, start + kept))
        target_part.append(slice(before, before + kept))
    target[tuple(target_part)] = array[tuple(source_part)]
    return target


def affine_after_resample(
    affine: NDArray[np.float64], space: tuple[int, ...], size: tuple[int, ...]
) -> NDArray[np.float64]:
    """Give the affine of a volume after `resample` from `space` to `size` voxels.

    Examples:
        >>> affine_after_resample(np.eye(4), (4, 4, 4), (2, 4, 4))[0].tolist()
        [2.0, 0.0, 0.0, 0.5]
    """
    to_old = np.eye(4)
    for axis, (stored, wanted) in enumerate(zip(space, size, strict=True)):
        step = stored / wanted
        to_old[axis, axis] = step
        to_old[axis, 3] = 0.5 * step - 0.5
    return np.asarray(affine @ to_old, dtype=np.float64)


def affine_after_crop_or_pad(
    affine: NDArray[np.float64], space: tuple[int, ...], size: tuple[int, ...]
) -> NDArray[np.float64]:
    """Give the affine of a volume after `crop_or_pad` from `space` to `size` voxels.

    Examples:
        >>> affine_after_crop_or_pad(np.eye(4), (4, 4, 4), (2, 7, 4))[:3, 3].tolist()
        [1.0, -1.0, 0.0]
    """
    to_old = np.eye(4)
    for axis, (stored, wanted) in enumerate(zip(space, size, strict=True)):
        to_old[axis, 3] = max(stored - wanted, 0) // 2 - max(wanted - stored, 0) // 2
    return np.asarray(affine @ to_old, dtype=np.float64)


def _first_space_axis(array: NDArray[np.generic], size: tuple[int, ...]) -> int:
    """Count the axes before the space axes, 0 or 1."""
    first = array.ndim - len(size)
    if first not in {0, 1} or min(size, default=0) < 1:
        raise ConfigError(
            f"size {tuple(size)} does not fit an array of shape {array.shape}; give one number of "
            "voxels, at least 1, for each space axis."
        )
    return first


def _nearest_places(stored: int, wanted: int) -> NDArray[np.int64]:
    """Find the stored voxel that holds each wanted centre, in whole numbers."""
    return np.asarray((2 * np.arange(wanted) + 1) * stored // (2 * wanted), dtype=np.int64)


def _linear_along(values: NDArray[np.float64], axis: int, wanted: int) -> NDArray[np.float64]:
    """Interpolate along one axis."""
    stored = values.shape[axis]
    if stored == wanted:
        return values
    centres = np.clip((np.arange(wanted) + 0.5) * (stored / wanted) - 0.5, 0, stored - 1)
    lower = np.floor(centres).astype(np.int64)
    upper = np.minimum(lower + 1, stored - 1)
    shape = [1] * values.ndim
    shape[axis] = wanted
    weight = (centres - lower).reshape(shape)
    below, above = np.take(values, lower, axis=axis), np.take(values, upper, axis=axis)
    # In this form equal neighbours give exactly their value.
    return np.asarray(below + (above - below) * weight, dtype=np.float64)


def _back_to(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.generic]:
    """Convert interpolated values to the dtype they came from."""
    if dtype.kind == "f":
        return values.astype(dtype)
    rounded = np.rint(values)
    if dtype.kind in "iu":
        # Values lie between stored ones; only 64-bit limits, which float64 rounds up, can pass.
        limits = np.iinfo(dtype)
        highest = float(limits.max)
        if int(highest) > limits.max:
            highest = float(np.nextafter(highest, 0.0))
        rounded = np.clip(rounded, float(limits.min), highest)
    return rounded.astype(dtype)
