"""How an array becomes the bytes of a member, and back into memory the caller owns.

`npy`: a .npy header, then the raw values. `blosc` (.npb): the same header, then a table of chunk
lengths, then the values as Blosc LZ4 + byte-shuffle chunks of 1 MiB. Nothing here runs code from
bytes: only plain bool, integer and float arrays exist, and every claim is checked against the
member's size before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.blosc import (
    BLOSC_HEADER,
    blosc_on_this_thread,
    compress,
    zero_ends,
)
from streaming_balance.storage.layout import CODEC_EXTENSIONS, codec_extension
from streaming_balance.storage.npy import ArrayHeader, array_header, parse_header

AnyArray: TypeAlias = NDArray[Any]
Stored: TypeAlias = bytes | bytearray | memoryview

CHUNK_RAW_BYTES = 1 << 20  # fits a core's second-level cache, a multiple of every item size
_CHUNK_TABLE = struct.Struct("<II")  # raw bytes per chunk, number of chunks
_BLOSC_FORMAT = 2
_BLOSC_COMPRESSOR_SHIFT = 5  # the upper three bits of the flags name the compressor
_BLOSC_LZ4 = 1
# LZ4 makes at most 255 bytes of one: a member that claims more is lying about its shape.
_MAX_EXPANSION = 255


def encode(array: AnyArray, codec: str) -> bytes:
    """Store an array: the same array gives the same bytes, whatever threads are about.

    Args:
        array: any shape; bool, integers or floats of up to 8 bytes, any byte order or strides.
        codec: `blosc` or `npy`.

    Returns:
        The member's bytes, values little-endian in C order.

    Raises:
        ConfigError: no such codec, or a dtype that is not stored.

    Examples:
        >>> stored = encode(np.arange(6, dtype=np.int16).reshape(2, 3), "blosc")
        >>> decode(stored, "blosc")
        array([[0, 1, 2], [3, 4, 5]], dtype=int16)
    """
    codec_extension(codec)
    values = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    header = array_header(values.dtype, values.shape)
    if codec == "npy":
        return header + values.tobytes()
    chunks = _compressed_chunks(values.reshape(-1))
    table = _CHUNK_TABLE.pack(CHUNK_RAW_BYTES, len(chunks))
    lengths = struct.pack(f"<{len(chunks)}I", *map(len, chunks))
    return b"".join([header, table, lengths, *chunks])


def decode(stored: Stored, codec: str) -> AnyArray:
    """Give a member's array in new memory, with the dtype it was stored in.

    Args:
        stored: the member's bytes, whole.
        codec: `blosc` or `npy`.

    Returns:
        A writable array of the stored shape and dtype.

    Raises:
        ConfigError: no such codec.
        ShardError: the bytes are not what the codec writes.
    """
    header = checked_header(stored, codec)
    array = np.empty(header.shape, dtype=header.dtype)
    decode_into(stored, codec, array)
    return array


def decode_into(
    stored: Stored, codec: str, out: AnyArray, scratch: bytearray | AnyArray | None = None
) -> None:
    """Fill `out` with a member's array, casting on the way where the dtypes differ.

    `out` and `scratch` stay the caller's: they are written during this call only. Several threads
    may call at once with different `out` and `scratch`; the GIL is released while values are
    decompressed and cast.

    Args:
        stored: the member's bytes, whole.
        codec: `blosc` or `npy`.
        out: array of the stored shape. Same dtype and contiguous: decoded straight into it.
            Another dtype: cast chunk by chunk, so the raw values never leave the cache.
        scratch: memory to decompress into before a cast, used if it is large enough
            (`CHUNK_RAW_BYTES`, or the whole raw array where `out` is not contiguous).

    Raises:
        ConfigError: no such codec, `out` has another shape, or the cast would lose the kind of
            value (float to integer, say).
        ShardError: the bytes are not what the codec writes.

    Examples:
        >>> out = np.empty((2, 2), dtype=np.float32)
        >>> decode_into(encode(np.eye(2, dtype=np.uint8), "blosc"), "blosc", out)
        >>> out
        array([[1., 0.], [0., 1.]], dtype=float32)
    """
    header = checked_header(stored, codec)
    _check_target(header, out)
    if codec == "npy":
        raw = np.frombuffer(stored, header.dtype, header.items, header.header_bytes)
        np.copyto(out, raw.reshape(header.shape), casting="same_kind")
    elif not out.flags.c_contiguous:
        raw = _scratch(scratch, header.raw_bytes).view(header.dtype)
        _decompress(stored, header, raw)
        np.copyto(out, raw.reshape(header.shape), casting="same_kind")
    elif out.dtype == header.dtype:
        _decompress(stored, header, out.reshape(-1))
    else:
        _decompress_and_cast(stored, header, out.reshape(-1), scratch)


def decode_member(key: str, payload: bytes) -> AnyArray | None:
    """Decode our arrays for `webdataset.WebDataset(...).decode(decode_member)`.

    Args:
        key: the member's name after the sample's key, such as `.image.npb`.
        payload: the member's bytes.

    Returns:
        The array for names ending in npb or npy; None for others, so that webdataset's own
        decoders go on with them.

    Raises:
        ShardError: the bytes are not what the codec writes.

    Examples:
        >>> decode_member(".image.npy", encode(np.zeros(2, dtype=np.uint8), "npy"))
        array([0, 0], dtype=uint8)
        >>> decode_member(".cls", b"1") is None
        True
    """
    extension = key.rpartition(".")[2]
    for codec, known in CODEC_EXTENSIONS.items():
        if extension == known:
            return decode(payload, codec)
    return None


def checked_header(stored: Stored, codec: str) -> ArrayHeader:
    """Read a member's header and check what it claims against the member's size.

    Args:
        stored: the member's bytes, whole.
        codec: `blosc` or `npy`.

    Returns:
        The header, whose claims the member's size can bear.

    Raises:
        ConfigError: no such codec.
        ShardError: not a .npy header, or it claims more (npy: or less) than the member holds.
    """
    codec_extension(codec)
    header = parse_header(stored)
    payload_bytes = len(stored) - header.header_bytes
    if codec == "npy":
        fits = payload_bytes == header.raw_bytes
    else:
        fits = header.raw_bytes <= payload_bytes * _MAX_EXPANSION
    if not fits:
        raise ShardError(
            f"the .npy header claims shape {header.shape} of {header.dtype} = "
            f"{header.raw_bytes:,} bytes, but the {codec} member holds {payload_bytes:,} bytes "
            "after its header"
        )
    return header


def voxel_digest(array: AnyArray, axes: str) -> str:
    """Digest an array's content, whatever codec stores it.

    Args:
        array: the values, any byte order or strides.
        axes: `CDHW`, `DHW`, `CHW` or `HW`.

    Returns:
        32 hex digits: BLAKE2b-128 of axes, dtype, shape and the raw little-endian values.

    Examples:
        >>> voxel_digest(np.zeros((2, 2), dtype=np.int16), "HW")
        '...'
        >>> big_endian = np.ones((2, 2), dtype=">i2")
        >>> voxel_digest(big_endian, "HW") == voxel_digest(big_endian.astype("<i2"), "HW")
        True
    """
    values = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    described = json.dumps([axes, values.dtype.name, list(values.shape)], separators=(",", ":"))
    digest = hashlib.blake2b(described.encode() + b"\n", digest_size=16)
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check_target(header: ArrayHeader, out: AnyArray) -> None:
    """Refuse an `out` the stored array does not fit into."""
    if out.shape != header.shape:
        raise ConfigError(f"out has shape {out.shape}, the stored array has {header.shape}")
    if not np.can_cast(header.dtype, out.dtype, casting="same_kind"):
        raise ConfigError(
            f"the stored array is {header.dtype}; filling {out.dtype} would lose what it means. "
            "Ask for a dtype of the same or a wider kind (integer to float is fine)"
        )


def _compressed_chunks(values: AnyArray) -> list[bytes]:
    """Compress flat little-endian values chunk by chunk, on this thread alone."""
    items = CHUNK_RAW_BYTES // values.dtype.itemsize
    return [compress(values[start : start + items]) for start in range(0, len(values), items)]


def _chunks(stored: Stored, header: ArrayHeader) -> Iterator[tuple[memoryview, int, int]]:
    """Give every chunk with the range of raw bytes it holds, all lengths checked beforehand."""
    frame = memoryview(stored)
    table_end = header.header_bytes + _CHUNK_TABLE.size
    if len(frame) < table_end:
        raise ShardError(f"the member ends at {len(frame)} bytes, inside its chunk table")
    chunk_bytes, count = _CHUNK_TABLE.unpack_from(frame, header.header_bytes)
    if chunk_bytes == 0 or chunk_bytes % header.dtype.itemsize:
        raise ShardError(f"chunks of {chunk_bytes} raw bytes cannot hold whole {header.dtype}")
    expected = -(-header.raw_bytes // chunk_bytes)
    if count != expected:
        raise ShardError(f"the chunk table counts {count:,} chunks, the shape needs {expected:,}")
    position = table_end + 4 * count
    if position > len(frame):
        raise ShardError(f"the member ends at {len(frame)} bytes, inside its chunk table")
    lengths = struct.unpack_from(f"<{count}I", frame, table_end)
    if position + sum(lengths) != len(frame):
        raise ShardError(
            f"the chunks end at byte {position + sum(lengths):,}, the member at {len(frame):,}"
        )
    for raw_start, length in zip(range(0, header.raw_bytes, chunk_bytes), lengths, strict=True):
        raw_stop = min(raw_start + chunk_bytes, header.raw_bytes)
        chunk = frame[position : position + length]
        _check_chunk(chunk, raw_stop - raw_start, header.dtype.itemsize, position)
        yield chunk, raw_start, raw_stop
        position += length


def _check_chunk(chunk: memoryview, raw_bytes: int, item_bytes: int, position: int) -> None:
    """Refuse a Blosc chunk whose own header disagrees with what the table and shape say."""
    if len(chunk) < BLOSC_HEADER.size:
        raise ShardError(f"the chunk at byte {position:,} holds {len(chunk)} bytes: no header")
    version, _, flags, own_item, own_raw, block, own_stored = BLOSC_HEADER.unpack_from(chunk)
    if version != _BLOSC_FORMAT or flags >> _BLOSC_COMPRESSOR_SHIFT != _BLOSC_LZ4:
        raise ShardError(f"the chunk at byte {position:,} is not Blosc LZ4")
    if (own_raw, own_stored, own_item) != (raw_bytes, len(chunk), item_bytes):
        raise ShardError(
            f"the chunk at byte {position:,} says {own_raw} raw and {own_stored} stored bytes of "
            f"{own_item}-byte items, expected {raw_bytes}, {len(chunk)} and {item_bytes}"
        )
    if not 0 < block <= max(raw_bytes, item_bytes):
        raise ShardError(f"the chunk at byte {position:,} says blocks of {block} bytes")


def _decompress(stored: Stored, header: ArrayHeader, flat: AnyArray) -> None:
    """Decompress every chunk straight into contiguous `flat`, of the stored dtype."""
    raw = flat.view(np.uint8).data
    with blosc_on_this_thread() as decompress:
        for chunk, start, stop in _parts_to_decode(stored, header, flat):
            decompress(chunk, raw[start:stop])


def _decompress_and_cast(
    stored: Stored, header: ArrayHeader, flat: AnyArray, scratch: bytearray | AnyArray | None
) -> None:
    """Decompress each chunk into a small scratch, then cast it into its place in `flat`."""
    item_bytes = header.dtype.itemsize
    raw: AnyArray = np.empty(0, dtype=np.uint8)
    with blosc_on_this_thread() as decompress:
        for chunk, start, stop in _parts_to_decode(stored, header, flat):
            if len(raw) < stop - start:
                raw = _scratch(scratch, stop - start)
            decoded = raw[: stop - start]
            decompress(chunk, decoded)
            items = slice(start // item_bytes, stop // item_bytes)
            np.copyto(flat[items], decoded.view(header.dtype), casting="same_kind")


def _parts_to_decode(
    stored: Stored, header: ArrayHeader, flat: AnyArray
) -> Iterator[tuple[memoryview, int, int]]:
    """Write the zeros at the ends of every chunk, and give what lies between, as `_chunks` does."""
    item_bytes = header.dtype.itemsize
    for chunk, start, stop in _chunks(stored, header):
        ends = zero_ends(chunk)
        first, last = start + ends.before, stop - ends.after
        for begin, end in ((start, first), (last, stop)):
            if begin < end:
                # Zero is zero bytes in every dtype, and bytes are set without being fetched.
                flat[begin // item_bytes : end // item_bytes].view(np.uint8)[:] = 0
        if first < last:
            yield ends.chunk, first, last


def _scratch(scratch: bytearray | AnyArray | None, num_bytes: int) -> AnyArray:
    """Give `num_bytes` bytes of the caller's scratch, or of new memory where it is too small."""
    if scratch is not None:
        given = np.frombuffer(scratch, dtype=np.uint8)
        if len(given) >= num_bytes:
            return given[:num_bytes]
    return np.empty(num_bytes, dtype=np.uint8)
