"""A volume as it comes out of a file, and the checks every volume passes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ShardError

# A 4-D perfusion series of 512 x 512 x 400 x 20 int16 is 4 GB; beyond 8 GiB a header lies more
# often than it describes a volume.
DEFAULT_MAX_VOLUME_BYTES = 8 << 30
AXES_OF_DIMENSIONS = {2: "HW", 3: "DHW", 4: "CDHW"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """One image or mask with its place in space."""

    array: NDArray[np.generic]
    """Voxels, C order, native byte order; never written to."""
    axes: str
    """Meaning of the array's axes: "HW", "DHW", "CHW" or "CDHW"."""
    affine: NDArray[np.float64] | None
    """`(4, 4)` from voxel index to millimetres; None where the file has no such thing."""
    spacing: tuple[float, ...] | None
    """Millimetres between neighbours along each space axis; None without an affine."""
    source_digest: str
    """SHA-256 of the source file's bytes, in hex."""

    @property
    def space(self) -> tuple[int, ...]:
        """Voxels along each space axis, without the channels."""
        return self.array.shape[1:] if self.axes[0] == "C" else self.array.shape


def check_values(array: NDArray[np.generic], *, path: Path, is_mask: bool) -> None:
    """Make sure that an array holds something a network can learn from.

    Args:
        array: voxels of one file, any shape.
        path: named in the message.
        is_mask: masks may be constant (nothing to segment), images may not.

    Raises:
        ShardError: NaN or infinite values, or an image in which every voxel is the same.
    """
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ShardError(
                f"{path}: {bad} of {array.size} voxels are NaN or infinite; expected finite "
                "values. Repair the file or leave the case out."
            )
    if not is_mask and array.size and bool((array == array.flat[0]).all()):
        raise ShardError(
            f"{path}: constant volume, every voxel is {array.flat[0]}; expected an image. "
            "Repair the file or leave the case out."
        )


def spacing_of(affine: NDArray[np.float64], space_axes: int) -> tuple[float, ...]:
    """Measure the distance in millimetres between neighbouring voxels along each space axis.

    Args:
        affine: `(4, 4)` from voxel index to millimetres.
        space_axes: 2 or 3.

    Examples:
        >>> spacing_of(np.diag([-2.0, 2.0, 3.0, 1.0]), 3)
        (2.0, 2.0, 3.0)
    """
    lengths = np.sqrt((affine[:3, :space_axes] ** 2).sum(axis=0))
    return tuple(float(length) for length in lengths)
