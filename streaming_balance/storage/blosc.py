"""Blosc from numcodecs, imported late, and kept to the calling thread.

A medical volume is mostly air, which is stored as zeros. Blosc takes as long to decode them as
anything else; here the blocks of zeros at both ends of a chunk are recognised by their compressed
bytes, which are the same wherever they occur, and never decoded.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from streaming_balance.errors import ShardError

COMPRESSION_LEVEL = 5
# Format version, LZ4 version, flags, item size, raw bytes, block bytes, stored bytes.
BLOSC_HEADER = struct.Struct("<BBBBIII")
_STORED_AS_IT_IS = 0x02  # flag: no blocks, the raw bytes follow the header
_LARGEST_ZERO_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class ZeroEnds:
    """A chunk, and the zeros around what it still has to be decoded for."""

    before: int
    """Raw bytes of zeros at the start."""
    chunk: memoryview
    """A Blosc chunk of what lies between; empty where all is zero."""
    after: int
    """Raw bytes of zeros at the end."""


@cache
def blosc_module() -> Any:  # noqa: ANN401 - numcodecs carries no types
    """Import Blosc on first use.

    Only this module of numcodecs is used: its registry also offers a codec that unpickles.
    """
    from numcodecs import blosc

    return blosc


@contextmanager
def blosc_on_this_thread() -> Iterator[Callable[..., Any]]:
    """Give Blosc's `decompress`, and keep Blosc's own thread pool out of it meanwhile.

    On the main thread numcodecs would use one process-wide pool, hold the GIL while it works, and
    place compressed blocks in whatever order threads finish. Elsewhere it works in the calling
    thread already. Only the main thread changes the switch, so two threads cannot restore it in
    the wrong order, and what other libraries set is back after the call.
    """
    blosc = blosc_module()
    if threading.get_ident() != threading.main_thread().ident:
        yield _decompress
        return
    before = blosc.use_threads
    blosc.use_threads = False
    try:
        yield _decompress
    finally:
        blosc.use_threads = before


def _decompress(chunk: memoryview, out: Any) -> None:  # noqa: ANN401 - any writable buffer
    """Decompress one chunk into `out`, which has its exact size."""
    try:
        blosc_module().decompress(chunk, out)
    except RuntimeError as error:
        raise ShardError(f"a Blosc chunk of {len(chunk):,} bytes is damaged: {error}") from error


def zero_ends(chunk: memoryview) -> ZeroEnds:
    """Take the blocks of zeros off both ends of a Blosc chunk, without decoding anything.

    Only bytes that Blosc itself makes of a block of zeros count as such. Whatever else a chunk
    holds, damage included, is left to Blosc to judge.

    Args:
        chunk: a Blosc chunk whose header agrees with its length.

    Returns:
        The zeros, and a chunk of the blocks between them: the given one where there are none.

    Examples:
        >>> zeros = compress(np.zeros(1 << 19, np.int16))
        >>> ends = zero_ends(memoryview(zeros))
        >>> ends.before, len(ends.chunk), ends.after
        (1048576, 0, 0)
    """
    version, inner, flags, item, raw, block, stored = BLOSC_HEADER.unpack_from(chunk)
    count = raw // block
    blocks_at = BLOSC_HEADER.size + 4 * count
    if flags & _STORED_AS_IT_IS or raw % block or blocks_at > stored or block > _LARGEST_ZERO_BLOCK:
        return ZeroEnds(0, chunk, 0)
    starts = (*struct.unpack_from(f"<{count}I", chunk, BLOSC_HEADER.size), stored)
    kind, zeros = _zero_block(block, item)
    if (
        kind != bytes(chunk[: len(kind)])
        or starts[0] != blocks_at
        or list(starts) != sorted(starts)
    ):
        return ZeroEnds(0, chunk, 0)

    def is_zero(number: int) -> bool:
        start, stop = starts[number], starts[number + 1]
        return stop - start == len(zeros) and chunk[start:stop] == zeros

    first, last = 0, count
    while first < last and is_zero(first):
        first += 1
    while last > first and is_zero(last - 1):
        last -= 1
    if last - first == count:
        return ZeroEnds(0, chunk, 0)
    kept = b""
    if first < last:
        payload = chunk[starts[first] : starts[last]]
        # What stands before the blocks is shorter: all of them start earlier, by as much.
        shift = starts[first] - blocks_at + 4 * (count - (last - first))
        moved = [start - shift for start in starts[first:last]]
        fields = (version, inner, flags, item, (last - first) * block, block, starts[last] - shift)
        kept = b"".join(
            [BLOSC_HEADER.pack(*fields), struct.pack(f"<{len(moved)}I", *moved), payload]
        )
    return ZeroEnds(first * block, memoryview(kept), (count - last) * block)


def compress(values: Any) -> bytes:  # noqa: ANN401 - any readable buffer
    """Compress one chunk as shards store it, its blocks in order: the same bytes every time."""
    blosc = blosc_module()
    with blosc_on_this_thread():
        stored: bytes = blosc.compress(values, b"lz4", COMPRESSION_LEVEL, blosc.SHUFFLE, 0)
    return stored


@lru_cache(maxsize=64)
def _zero_block(block_bytes: int, item_bytes: int) -> tuple[bytes, bytes]:
    """Give one block of zeros: the versions and flags of its chunk, and its compressed bytes."""
    blosc = blosc_module()
    zeros = np.zeros(block_bytes // item_bytes, np.dtype(f"V{item_bytes}"))
    with blosc_on_this_thread():
        chunk: bytes = blosc.compress(zeros, b"lz4", COMPRESSION_LEVEL, blosc.SHUFFLE, block_bytes)
    return chunk[:3], chunk[BLOSC_HEADER.size + 4 :]
