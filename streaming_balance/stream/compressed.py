"""Compressed tars, found by their first bytes: gzip by zlib, zstd by pyarrow, which is here anyway.

Both give bytes as they are asked for, so that a few kilobytes that unpack to terabytes cost no
memory. A compressed file that ends too early, or goes on with something else, is an error.
"""

from __future__ import annotations

import zlib
from typing import Any

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.passing import ByteStream

MAGIC_BYTES = 4  # enough to tell the formats apart

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = (b"\x2a\x4d\x18", range(0x50, 0x60))
_INPUT_BYTES = 128 << 10
_GZIP_WRAPPED = 31  # zlib's number for: a gzip header and trailer, the largest window


def is_compressed(beginning: bytes) -> bool:
    r"""Say whether a file with these first bytes is gzip or zstd.

    Examples:
        >>> is_compressed(b"\x1f\x8b\x08\x00"), is_compressed(b"P1.c")
        (True, False)
    """
    return beginning.startswith(_GZIP) or _is_zstd(beginning)


def decompressed(stream: ByteStream, name: str) -> ByteStream:
    """Give the bytes a stream holds, whether it is gzip, zstd or plain.

    Args:
        stream: the bytes as stored; the result takes it over and closes it.
        name: what to call it in errors.

    Returns:
        A stream of plain bytes.

    Raises:
        ConfigError: it is zstd, and pyarrow was built without it.
        ShardError: its first bytes cannot be read.
    """
    beginning = stream.read(MAGIC_BYTES)
    whole = _PutBack(stream, beginning)
    if beginning.startswith(_GZIP):
        return GunzippedStream(whole, name)
    if _is_zstd(beginning):
        return ZstdStream(whole, name)
    return whole


class _PutBack:
    """A stream whose first bytes were looked at.

    Args:
        stream: the rest.
        beginning: what was read of it.
    """

    def __init__(self, stream: ByteStream, beginning: bytes) -> None:
        self.size = stream.size
        self._stream = stream
        self._beginning = beginning

    def read(self, count: int) -> bytes:
        """Give exactly `count` bytes; fewer only where the stream ends."""
        if not self._beginning:
            return self._stream.read(count)
        head, self._beginning = self._beginning[:count], self._beginning[count:]
        return head + self._stream.read(count - len(head)) if len(head) < count else head

    def read_some(self, count: int) -> bytes:
        """Give 1 to `count` bytes; none only where the stream ends."""
        if not self._beginning:
            return self._stream.read_some(count)
        head, self._beginning = self._beginning[:count], self._beginning[count:]
        return head

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()


class GunzippedStream:
    """What a gzip stream of one or several members holds.

    Args:
        stream: the compressed bytes.
        name: what to call it in errors.
    """

    size: int | None = None

    def __init__(self, stream: ByteStream, name: str) -> None:
        self._stream = stream
        self._name = name
        self._engine: Any = None  # zlib's decompressor has no public type
        self._pending = b""
        self._is_padding = False

    def read(self, count: int) -> bytes:
        """Give exactly `count` bytes; fewer only where the stream ends."""
        return _read_whole(self, count)

    def read_some(self, count: int) -> bytes:
        """Give 1 to `count` bytes; none only where the stream ends.

        Raises:
            ShardError: it is cut, damaged, or followed by something that is no gzip.
        """
        while True:
            if not self._pending:
                self._pending = self._stream.read_some(_INPUT_BYTES)
                if not self._pending:
                    self._check_end()
                    return b""
            if self._engine is None and not self._begin_member():
                continue
            found = self._inflate(count)
            if found:
                return found

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()

    def _inflate(self, count: int) -> bytes:
        """Decompress up to `count` bytes of what is pending."""
        try:
            found: bytes = self._engine.decompress(self._pending, count)
        except zlib.error as error:
            raise ShardError(
                f"{self._name}: the gzip stream is damaged: {error}. Fetch it again."
            ) from error
        if self._engine.eof:
            self._pending = self._engine.unused_data
            self._engine = None
        else:
            self._pending = self._engine.unconsumed_tail
        return found

    def _begin_member(self) -> bool:
        """Start a member at the pending bytes; say whether there is one yet."""
        # Tools pad the end of a gzip file with zeros, and all readers pass over them.
        rest = self._pending.lstrip(b"\0")
        self._is_padding = self._is_padding or len(rest) < len(self._pending)
        self._pending = rest
        if not rest:
            return False
        if len(rest) < len(_GZIP):
            self._pending += self._stream.read(len(_GZIP) - len(rest))
        if self._is_padding or not self._pending.startswith(_GZIP):
            raise ShardError(
                f"{self._name}: bytes that are no gzip follow the end of the gzip stream: "
                f"{self._pending[:8]!r}. Fetch it again."
            )
        self._engine = zlib.decompressobj(_GZIP_WRAPPED)
        return True

    def _check_end(self) -> None:
        """Raise if the stream ends within a member."""
        if self._engine is not None:
            raise ShardError(
                f"{self._name}: the gzip stream ends too early: it was cut. Fetch it again."
            )


class ZstdStream:
    """What a zstd stream of one or several frames holds.

    Args:
        stream: the compressed bytes.
        name: what to call it in errors.

    Raises:
        ConfigError: pyarrow was built without zstd.
    """

    size: int | None = None

    def __init__(self, stream: ByteStream, name: str) -> None:
        import pyarrow as pa

        if not pa.Codec.is_available("zstd"):
            raise ConfigError(
                f"{name} is zstd, which the pyarrow installed here was built without. Install "
                "pyarrow from PyPI, or write the shard anew as .tar or .tar.gz."
            )
        self._stream = stream
        self._name = name
        self._output = pa.CompressedInputStream(pa.PythonFile(_Readable(stream), mode="r"), "zstd")

    def read(self, count: int) -> bytes:
        """Give exactly `count` bytes; fewer only where the stream ends."""
        return _read_whole(self, count)

    def read_some(self, count: int) -> bytes:
        """Give 1 to `count` bytes; none only where the stream ends.

        Raises:
            ShardError: it is cut, damaged, or followed by something that is no zstd.
        """
        try:
            found: bytes = self._output.read(count)
        except ShardError:
            raise
        except OSError as error:
            raise ShardError(
                f"{self._name}: the zstd stream is damaged or cut: {error}. Fetch it again."
            ) from error
        return found

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()


class _Readable:
    """A `ByteStream` as the file object pyarrow asks for.

    Args:
        stream: where the bytes come from.
    """

    closed = False

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    def read(self, count: int) -> bytes:
        """Give 1 to `count` bytes; none only where the stream ends."""
        return self._stream.read_some(count)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def close(self) -> None:
        """Leave the stream to whoever opened it."""


def _is_zstd(beginning: bytes) -> bool:
    """Say whether a zstd stream begins like this, with a frame or one to pass over."""
    tail, numbers = _ZSTD_SKIPPABLE
    skippable = len(beginning) >= 4 and beginning[0] in numbers and beginning[1:4] == tail
    return beginning.startswith(_ZSTD) or skippable


def _read_whole(stream: ByteStream, count: int) -> bytes:
    """Read `count` bytes in as many calls as it takes; fewer where the stream ends."""
    found = stream.read_some(count)
    if len(found) == count or not found:
        return found
    parts = [found]
    missing = count - len(found)
    while missing and (found := stream.read_some(missing)):
        parts.append(found)
        missing -= len(found)
    return b"".join(parts)
