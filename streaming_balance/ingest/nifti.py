"""NIfTI-1 and NIfTI-2: voxels exactly as nibabel gives them, nothing else from the file.

The header's fields are checked before anything is allocated. Free text (description, database
name, intent name, file names) and extensions are never looked at: they hold names of patients,
and one kind of extension is a pickle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from streaming_balance.errors import ShardError
from streaming_balance.ingest.sources import SourceReader, SourceStamp
from streaming_balance.ingest.volume import (
    AXES_OF_DIMENSIONS,
    DEFAULT_MAX_VOLUME_BYTES,
    Volume,
    spacing_of,
)

HEADER_BYTES = {1: 348, 2: 540}
MAGIC = {
    (1, "single"): b"n+1\x00",
    (1, "pair"): b"ni1\x00",
    (2, "single"): b"n+2\x00\r\n\x1a\n",
    (2, "pair"): b"ni2\x00\r\n\x1a\n",
}
# nibabel's header classes, chosen by NIfTI version and by where the voxels are.
HEADER_CLASSES: dict[tuple[int, str], Any] = {
    (1, "single"): Nifti1Header,
    (1, "pair"): Nifti1PairHeader,
    (2, "single"): Nifti2Header,
    (2, "pair"): Nifti2PairHeader,
}
# NIfTI's numbers of the types we keep. Complex numbers, RGB and long doubles are not images.
DTYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
# Extensions stand between header and voxels; real ones are a few kB.
MAX_VOXEL_OFFSET = 64 << 20
PAIR_SUFFIXES = {".hdr": ".img", ".hdr.gz": ".img.gz", ".img": ".hdr", ".img.gz": ".hdr.gz"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """The checked fields of one header."""

    shape: tuple[int, ...]
    """Length of every axis, without trailing axes of length 1."""
    dtype: np.dtype[np.generic]
    """Type and byte order of the stored numbers."""
    voxel_offset: int
    """Byte at which the voxels begin in their file."""
    slope: float
    """Factor of the stored numbers."""
    intercept: float
    """Added after the factor."""
    affine: NDArray[np.float64]
    """`(4, 4)` from voxel index to millimetres."""

    @property
    def is_scaled(self) -> bool:
        """Whether the stored numbers are not yet the voxels."""
        return (self.slope, self.intercept) != (1.0, 0.0)


def read_nifti(path: Path, *, max_bytes: int = DEFAULT_MAX_VOLUME_BYTES) -> Volume:
    """Read one NIfTI file, or one pair of header and voxels.

    Args:
        path: a `.nii` file, or one half of a `.hdr`/`.img` pair, each also with `.gz`. NIfTI-1 or
            NIfTI-2, in either byte order.
        max_bytes: the most memory the voxels may take, in bytes.

    Returns:
        The volume with nibabel's axes i, j, k as D, H, W, not transposed; a fourth axis comes
        first, as channels. Slope and intercept are applied in float64; the stored type is kept
        where it holds every voxel exactly, else float32, else float64.

    Raises:
        ShardError: naming the file and the header's field that is wrong, or where the file ends.
    """
    header_path, voxel_path = _halves(path)
    kind = "single" if header_path == voxel_path else "pair"
    with SourceReader(header_path) as source:
        digest = source.digest()
        header = _read_header(source, kind)
        _check_size(header, header_path, max_bytes)
        if kind == "single":
            stored = _read_voxels(source, header)
    if kind == "pair":
        with SourceReader(voxel_path) as source:
            digest = f"{digest}+{source.digest()}"
            stored = _read_voxels(source, header)
    shaped = stored.reshape(header.shape, order="F")
    array = np.ascontiguousarray(np.moveaxis(shaped, 3, 0) if shaped.ndim == 4 else shaped)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if header.is_scaled:
        array = scale_exactly(array, slope=header.slope, intercept=header.intercept)
    return Volume(
        array=array,
        axes=AXES_OF_DIMENSIONS[array.ndim],
        affine=header.affine,
        spacing=spacing_of(header.affine, min(array.ndim, 3)),
        source_digest=digest,
    )


def stamps_of_nifti(path: Path) -> tuple[SourceStamp, ...]:
    """Take the stamps of the file, or of both halves of a pair.

    Raises:
        ShardError: the other half of a pair is missing.
        OSError: the file is not there.
    """
    return tuple(SourceStamp.of(half) for half in dict.fromkeys(_halves(path)))


def scale_exactly(
    stored: NDArray[np.generic], *, slope: float, intercept: float
) -> NDArray[np.generic]:
    """Apply slope and intercept and keep the narrowest type that loses nothing.

    Args:
        stored: numbers as they stand in the file, native byte order.
        slope: factor, not 0.
        intercept: added after the factor.

    Returns:
        `stored * slope + intercept`, computed in float64: in the stored type if it holds every
        value exactly, else in float32 if that does, else in float64.

    Examples:
        >>> scale_exactly(np.array([1, 2], dtype=np.int16), slope=2.0, intercept=-1.0)
        array([1, 3], dtype=int16)
        >>> scale_exactly(np.array([1, 2], dtype=np.int16), slope=0.5, intercept=0.0).dtype
        dtype('float32')
    """
    scaled = stored.astype(np.float64)
    # Multiplying by 1 and adding 0 are left out as nibabel does: -0.0 + 0.0 would become 0.0.
    if slope != 1.0:
        scaled *= slope
    if intercept != 0.0:
        scaled += intercept
    for dtype in (stored.dtype, np.dtype(np.float32)):
        narrowed = _narrow(scaled, dtype)
        if narrowed is not None:
            return narrowed
    return scaled


def _narrow(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.generic] | None:
    """Convert to `dtype`, or give None where a value would change."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        # 2**63 as float64 is one more than int64 holds, so the upper limit is exclusive.
        if not (values.min() >= limits.min and values.max() < limits.max + 1):
            return None
    with np.errstate(over="ignore", invalid="ignore"):
        narrowed = values.astype(dtype)
    return narrowed if np.array_equal(narrowed, values, equal_nan=True) else None


def _halves(path: Path) -> tuple[Path, Path]:
    """Find the file with the header and the file with the voxels."""
    lower = path.name.lower()
    for suffix in (".hdr.gz", ".img.gz", ".hdr", ".img"):
        if lower.endswith(suffix):
            other = _other_half(path, path.name[: -len(suffix)], suffix)
            return (path, other) if suffix.startswith(".hdr") else (other, path)
    return path, path


def _other_half(path: Path, stem: str, suffix: str) -> Path:
    """Find the file that belongs to one half of a pair."""
    same = PAIR_SUFFIXES[suffix]
    mixed = same.removesuffix(".gz") if same.endswith(".gz") else f"{same}.gz"
    candidates = [path.with_name(stem + ending) for ending in (same, same.upper(), mixed)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    missing = "voxels" if suffix.startswith(".hdr") else "header"
    raise ShardError(
        f"{path}: the file with its {missing} is missing; expected {candidates[0].name} beside it."
    )


def _read_header(source: SourceReader, kind: str) -> _Header:
    """Read and check a header; `kind` says whether the voxels follow in the same file."""
    raw = source.read(HEADER_BYTES[1])
    version, order = _version(source.path, raw)
    raw += source.read(HEADER_BYTES[version] - HEADER_BYTES[1])
    if len(raw) < HEADER_BYTES[version]:
        raise _wrong(
            source.path, "sizeof_hdr", len(raw), f"a header of {HEADER_BYTES[version]} bytes"
        )
    fields = HEADER_CLASSES[version, kind](raw, endianness=order, check=False)
    _check_magic(source.path, raw, version, kind)
    dtype = _dtype(source.path, fields, order)
    slope, intercept = _scaling(source.path, fields)
    return _Header(
        shape=_shape(source.path, fields),
        dtype=dtype,
        voxel_offset=_voxel_offset(source.path, fields, version, kind),
        slope=slope,
        intercept=intercept,
        affine=_affine(source.path, fields),
    )


def _wrong(path: Path, field: str, found: object, expected: str) -> ShardError:
    """Make the error about one field of a header."""
    return ShardError(
        f"{path}: NIfTI header field {field} is {found}; expected {expected}. "
        "Repair the file or leave the case out."
    )


def _version(path: Path, raw: bytes) -> tuple[int, str]:
    """Tell NIfTI-1 from NIfTI-2, and the byte order, from the header's own length."""
    for order in ("<", ">"):
        length = int(np.frombuffer(raw[:4].ljust(4, b"\0"), dtype=f"{order}i4")[0])
        for version, expected in HEADER_BYTES.items():
            if length == expected:
                return version, order
    raise ShardError(
        f"{path}: not a NIfTI file: sizeof_hdr is neither 348 (NIfTI-1) nor 540 (NIfTI-2) in "
        "either byte order. Convert the file to NIfTI."
    )


def _check_magic(path: Path, raw: bytes, version: int, kind: str) -> None:
    """Make sure that the magic says NIfTI, and says where the voxels are."""
    found = raw[344:348] if version == 1 else raw[4:12]
    if found == MAGIC[version, kind]:
        return
    others = {magic: where for (number, where), magic in MAGIC.items() if number == version}
    # The bytes themselves are not shown: in a file that is something else they may be anything.
    described = f"that of a {others[found]}" if found in others else "that of no NIfTI file"
    place = "in the same file" if kind == "single" else "in a file beside it"
    raise _wrong(path, "magic", described, f"that of a {kind} (voxels {place})")


def _shape(path: Path, fields: Any) -> tuple[int, ...]:  # noqa: ANN401 - nibabel is untyped
    """Read the length of every axis; at most one axis beyond the third may be longer than 1."""
    lengths = [int(length) for length in fields["dim"]]
    count = lengths[0]
    if not 1 <= count <= 7:
        raise _wrong(path, "dim[0]", count, "1 to 7 axes")
    for axis, length in enumerate(lengths[1 : count + 1], start=1):
        if length < 1:
            raise _wrong(path, f"dim[{axis}]", length, "at least 1 voxel along every axis")
    if count == 1:
        raise _wrong(path, "dim[0]", count, "at least 2 axes: a row of numbers is not an image")
    beyond = [length for length in lengths[4 : count + 1] if length > 1]
    if len(beyond) > 1:
        raise _wrong(
            path,
            "dim",
            tuple(lengths[1 : count + 1]),
            "at most one axis beyond the third with more than 1 entry, which becomes the channels",
        )
    return (*lengths[1 : min(count, 3) + 1], *beyond)


def _dtype(path: Path, fields: Any, order: str) -> np.dtype[np.generic]:  # noqa: ANN401
    """Read the type of the stored numbers."""
    code, bits = int(fields["datatype"]), int(fields["bitpix"])
    if code not in DTYPES:
        raise _wrong(path, "datatype", code, f"one of {sorted(DTYPES)} (integers and floats)")
    dtype: np.dtype[np.generic] = np.dtype(f"{order}{DTYPES[code]}")
    if bits != dtype.itemsize * 8:
        raise _wrong(path, "bitpix", bits, f"{dtype.itemsize * 8}, the bits of datatype {code}")
    return dtype


def _voxel_offset(path: Path, fields: Any, version: int, kind: str) -> int:  # noqa: ANN401
    """Read where the voxels begin."""
    offset = float(fields["vox_offset"])
    # Four bytes after a single file's header say whether extensions follow.
    least = HEADER_BYTES[version] + 4 if kind == "single" else 0
    if not (math.isfinite(offset) and offset.is_integer() and least <= offset <= MAX_VOXEL_OFFSET):
        raise _wrong(
            path, "vox_offset", offset, f"a whole number from {least} to {MAX_VOXEL_OFFSET}"
        )
    return int(offset)


def _scaling(path: Path, fields: Any) -> tuple[float, float]:  # noqa: ANN401
    """Read slope and intercept; a slope of 0 or NaN means that there is none."""
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0.0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise _wrong(path, "scl_inter", intercept, "a finite number beside a finite scl_slope")
    return slope, intercept


def _affine(path: Path, fields: Any) -> NDArray[np.float64]:  # noqa: ANN401
    """Read the affine as nibabel chooses it, after checking every field that is declared valid."""
    has_qform, has_sform = int(fields["qform_code"]) > 0, int(fields["sform_code"]) > 0
    checked = ["pixdim"] if has_qform or not has_sform else []
    if has_qform:
        checked += ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
    if has_sform:
        checked += ["srow_x", "srow_y", "srow_z"]
    for field in checked:
        # Only the first four of pixdim concern space.
        values = np.atleast_1d(np.asarray(fields[field], dtype=np.float64))[:4]
        if not np.isfinite(values).all():
            raise _wrong(path, field, values.tolist(), "finite numbers")
    chosen = _chosen_form(fields)
    try:
        affine = np.asarray(fields.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise _wrong(path, chosen, "not a rotation", "a usable orientation") from error
    space_axes = min(max(int(fields["dim"][0]), 2), 3)
    if np.linalg.matrix_rank(affine[:3, :space_axes]) < space_axes:
        raise _wrong(path, chosen, "without volume", "axes that span a space")
    return affine


def _chosen_form(fields: Any) -> str:  # noqa: ANN401
    """Name the fields the affine comes from."""
    if int(fields["sform_code"]) > 0:
        return "srow_x, srow_y, srow_z"
    return "quatern_b, quatern_c, quatern_d" if int(fields["qform_code"]) > 0 else "pixdim"


def _check_size(header: _Header, path: Path, max_bytes: int) -> None:
    """Refuse what would not fit before memory is taken for it."""
    # Scaling passes through float64.
    item_bytes = 8 if header.is_scaled else header.dtype.itemsize
    implied = math.prod(header.shape) * item_bytes
    if implied > max_bytes:
        raise _wrong(
            path,
            "dim",
            f"{header.shape}, which means {implied} bytes of voxels",
            f"at most {max_bytes} bytes",
        )


def _read_voxels(source: SourceReader, header: _Header) -> NDArray[np.generic]:
    """Read the stored numbers."""
    source.skip_to(header.voxel_offset)
    stored = source.read_array(header.dtype, math.prod(header.shape))
    source.check_ends_here()
    return stored
