"""Write a volume as NIfTI, the same bytes every time."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

# Level 1 is within a few percent of level 9 on noisy volumes and several times as fast.
COMPRESSION_LEVEL = 1


def write_nifti(path: Path, volume: NDArray[np.int16], *, spacing_mm: float = 1.0) -> None:
    """Write one volume to `path`, compressed where the name ends in `.gz`.

    Args:
        path: where to write; the folder exists.
        volume: `(D, H, W)` voxels, kept as they are: no scaling is stored.
        spacing_mm: edge of a voxel in millimetres; axes point right, anterior, superior.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "t1.nii.gz"
        >>> write_nifti(path, np.arange(8, dtype=np.int16).reshape(2, 2, 2))
        >>> int(np.asarray(nibabel.load(path).dataobj)[1, 1, 1])
        7
    """
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    image: Any = nibabel.Nifti1Image  # nibabel leaves its constructors unannotated
    content: bytes = image(volume, affine).to_bytes()
    if path.suffix != ".gz":
        path.write_bytes(content)
        return
    # Neither the time nor the name goes into the gzip header: equal volumes are equal files.
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", COMPRESSION_LEVEL, file, mtime=0) as compressed,
    ):
        compressed.write(content)
