"""NumPy files: `.npy`, and `.npz` with one array in it. Never a pickle."""

from __future__ import annotations

import ast
import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ShardError
from streaming_balance.ingest.sources import GZIP_MAX_RATIO, SourceReader
from streaming_balance.ingest.volume import AXES_OF_DIMENSIONS, DEFAULT_MAX_VOLUME_BYTES, Volume

MAGIC = b"\x93NUMPY"
# Format version -> bytes before the header's text: magic, version and the text's length.
HEADER_PREFIX_BYTES = {b"\x01\x00": 10, b"\x02\x00": 12}
DTYPE_TEXT = re.compile(r"\|b1|[<>|=]?(?:[iu][1248]|f[248])")
MAX_DIMENSIONS = 32
# An .npy header is 128 bytes for any image; numpy's own limit is 10,000 characters.
MAX_HEADER_BYTES = 10_000
READ_BYTES = 1 << 20
# What zipfile raises for damage; the last four for offsets that lead nowhere, for encryption and
# for features of later zip versions.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    OSError,
    RuntimeError,
    NotImplementedError,
)


def read_array_file(
    path: Path, *, axes: str | None = None, max_bytes: int = DEFAULT_MAX_VOLUME_BYTES
) -> Volume:
    """Read one array file.

    Args:
        path: an `.npy` file of format 1 or 2, or an `.npz` file that holds one array.
        axes: "HW", "CHW", "DHW" or "CDHW"; None takes two axes as HW, three as DHW, four as CDHW.
        max_bytes: the most memory the array may take, in bytes.

    Returns:
        The volume, without affine and spacing.

    Raises:
        ShardError: naming the file and what is wrong with it: objects, complex numbers, a shape
            that is not the file's length, a number of axes that is not an image's.
    """
    with SourceReader(path) as source:
        digest = source.digest()
        if path.name.lower().endswith(".npz"):
            array = _read_npz(source, max_bytes)
        else:
            array = _read_npy(source, max_bytes)
    found_axes = axes or AXES_OF_DIMENSIONS.get(array.ndim, "")
    if not found_axes or len(found_axes) != array.ndim or not array.size:
        raise ShardError(
            f"{path}: array of shape {array.shape}; expected {axes or 'HW, DHW or CDHW'} with at "
            "least 1 voxel along every axis."
        )
    return Volume(
        array=np.ascontiguousarray(array).astype(array.dtype.newbyteorder("="), copy=False),
        axes=found_axes,
        affine=None,
        spacing=None,
        source_digest=digest,
    )


def _read_npy(source: SourceReader, max_bytes: int) -> NDArray[np.generic]:
    """Read an `.npy` file."""
    start = source.read(MAX_HEADER_BYTES)
    dtype, shape, is_fortran, header_bytes = _header(start, source.path)
    count = _checked_count(dtype, shape, source.path, max_bytes, source.most_bytes)
    # What the header's read took of the values goes in front of the rest.
    begun = start[header_bytes : header_bytes + count * dtype.itemsize]
    raw = np.empty(count * dtype.itemsize, dtype=np.uint8)
    raw[: len(begun)] = np.frombuffer(begun, dtype=np.uint8)
    rest = len(raw) - len(begun)
    raw[len(begun) :] = source.read_array(np.dtype(np.uint8), rest)
    source.check_ends_here()
    return _shaped(raw, dtype, shape, is_fortran)


def _read_npz(source: SourceReader, max_bytes: int) -> NDArray[np.generic]:
    """Read the one array of an `.npz` file."""
    path = source.path
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            kinds = {member.compress_type for member in members}
            if len(members) != 1 or not kinds <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise ShardError(
                    f"{path}: holds {len(members)} members; expected exactly one array, stored or "
                    "deflated. Save it alone: np.savez_compressed(path, image=array)."
                )
            with archive.open(members[0]) as file:
                most = members[0].compress_size * GZIP_MAX_RATIO + MAX_HEADER_BYTES
                return _read_member(cast(BinaryIO, file), path, max_bytes, most)
    except ShardError:
        raise
    except ZIP_ERRORS as error:
        raise ShardError(
            f"{path}: damaged or unsupported zip ({type(error).__name__}). Fetch the file again."
        ) from error


def _read_member(
    file: BinaryIO, path: Path, max_bytes: int, most_bytes: int
) -> NDArray[np.generic]:
    """Read one compressed `.npy` member, no further than its header says."""
    start = file.read(MAX_HEADER_BYTES)
    dtype, shape, is_fortran, header_bytes = _header(start, path)
    count = _checked_count(dtype, shape, path, max_bytes, most_bytes)
    raw = np.empty(count * dtype.itemsize, dtype=np.uint8)
    piece, filled = start[header_bytes:], 0
    while piece and filled < len(raw):
        piece = piece[: len(raw) - filled]
        raw[filled : filled + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        filled += len(piece)
        piece = file.read(READ_BYTES)
    # Reaching the end makes zipfile compare its checksum.
    if filled < len(raw) or piece or file.read(1):
        found = filled if filled < len(raw) else "more"
        raise ShardError(f"{path}: expected {len(raw)} bytes of values, found {found}.")
    return _shaped(raw, dtype, shape, is_fortran)


def _header(start: bytes, path: Path) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Read dtype, shape, order and length of an `.npy` header."""
    prefix = HEADER_PREFIX_BYTES.get(start[6:8], 0)
    if not start.startswith(MAGIC) or not prefix:
        raise ShardError(f"{path}: not an .npy header of format 1 or 2; save it with np.save.")
    end = prefix + int.from_bytes(start[8:prefix], "little")
    try:
        header = ast.literal_eval(start[prefix:end].decode("latin-1").strip())
        dtype, shape, is_fortran = header["descr"], header["shape"], header["fortran_order"]
    except (SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError) as error:
        # Nested brackets exhaust Python's parser, hence the last two. The header itself may hold
        # anything, so it is not repeated here.
        raise ShardError(f"{path}: not a readable .npy header; save it with np.save.") from error
    if not isinstance(dtype, str) or not DTYPE_TEXT.fullmatch(dtype):
        raise ShardError(
            f"{path}: its dtype is none that is read; expected bool, integer or float of at most 8 "
            "bytes. Arrays of objects are pickles and are never read."
        )
    is_shape = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not is_shape or len(shape) > MAX_DIMENSIONS or type(is_fortran) is not bool:
        raise ShardError(f"{path}: the .npy header has no usable shape; save it with np.save.")
    return np.dtype(dtype), shape, is_fortran, end


def _checked_count(
    dtype: np.dtype[Any], shape: tuple[int, ...], path: Path, max_bytes: int, most_bytes: int
) -> int:
    """Count the numbers of an array and refuse what cannot be true before allocating."""
    count = math.prod(shape)
    wanted = count * dtype.itemsize
    if wanted > max_bytes or wanted > most_bytes:
        raise ShardError(
            f"{path}: header announces shape {shape}, {wanted} bytes of values; the file holds at "
            f"most {most_bytes}, and at most {max_bytes} are allowed."
        )
    return count


def _shaped(
    raw: NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...], is_fortran: bool
) -> NDArray[np.generic]:
    """See bytes as the array they are."""
    return np.asarray(raw.view(dtype).reshape(shape, order="F" if is_fortran else "C"))
