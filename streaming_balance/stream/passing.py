"""Tars that pass by once: pipes, HTTP bodies, compressed files. Payloads are held in memory."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Protocol

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.layout import BLOCK
from streaming_balance.stream.headers import TarDamageError
from streaming_balance.stream.samples import Payload

# How much is taken at once where members are small; with volumes, nothing is taken ahead of a
# header, so that a payload comes in one piece and is never copied.
_AHEAD_BYTES = 64 << 10
_SMALL_MEAN_BYTES = 16 << 10
_DISCARD_BYTES = 1 << 20
# A payload is asked for in pieces of this size, so that memory follows what really arrives.
_PIECE_BYTES = 64 << 20

# What file objects of the standard library raise where they fail, or decompress what is damaged.
_DAMAGED: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    zipfile.BadZipFile,
)
try:
    from lzma import LZMAError
except ImportError:  # Python can be built without lzma
    pass
else:
    _DAMAGED += (LZMAError,)


class ByteStream(Protocol):
    """Bytes that come in order, once."""

    size: int | None
    """How many there are in all; None where nobody said."""

    def read(self, count: int) -> bytes:
        """Give exactly `count` bytes; fewer only where the stream ends."""
        ...

    def read_some(self, count: int) -> bytes:
        """Give 1 to `count` bytes, those that are there; none only where the stream ends."""
        ...

    def close(self) -> None:
        """Let go of whatever brings the bytes. May be called twice."""
        ...


class FileStream:
    """A binary file object, standard input or a fifo as a `ByteStream`.

    Args:
        file: where the bytes come from, read from where it stands.
        name: what to call it in errors.
        owned: whether `close` closes it; what callers opened stays open.
    """

    def __init__(self, file: IO[bytes], name: str, *, owned: bool) -> None:
        self.size: int | None = None
        self._file = file
        self._name = name
        self._owned = owned
        self._read_one = getattr(file, "read1", None)

    def read(self, count: int) -> bytes:
        """Give exactly `count` bytes; fewer only where the file ends."""
        found = self._call(self._file.read, count)
        if len(found) == count or not found:
            return found
        parts = [found]
        missing = count - len(found)
        while missing and (found := self._call(self._file.read, missing)):
            parts.append(found)
            missing -= len(found)
        return b"".join(parts)

    def read_some(self, count: int) -> bytes:
        """Give 1 to `count` bytes; none only where the file ends."""
        if self._read_one is None:
            return self.read(min(count, BLOCK))
        return self._call(self._read_one, count)

    def close(self) -> None:
        """Close the file if it was opened for this stream."""
        if self._owned:
            self._file.close()

    def _call(self, read: Callable[[int], object], count: int) -> bytes:
        """Read once, and refuse what is no bytes."""
        try:
            found = read(count)
        except ShardError:
            raise
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self._name} is opened as text: open it in binary mode, and blocking."
            ) from error
        except _DAMAGED as error:
            raise ShardError(f"{self._name} cannot be read: {error}") from error
        if not isinstance(found, bytes):
            raise ConfigError(
                f"{self._name} gives {type(found).__name__}, not bytes: open it in binary mode, "
                "and blocking."
            )
        return found


class PassingTar:
    """The bytes of a tar that passes by once, for `walk_tar`.

    What lies before an offset asked for is gone afterwards; offsets only grow.

    Args:
        stream: the bytes of the tar, already decompressed.
    """

    can_seek = False

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.size = stream.size
        self._buffer = b""
        self._start = 0
        self._members = 0
        self._payload_bytes = 0

    def block(self, offset: int) -> bytes:
        """Give the 512 bytes from `offset` on; fewer where the stream ends."""
        at = offset - self._start
        if 0 <= at <= len(self._buffer) - BLOCK:
            return self._buffer[at : at + BLOCK]
        ahead = self._payload_bytes < self._members * _SMALL_MEAN_BYTES
        self._move_to(offset)
        self._fill(BLOCK, _AHEAD_BYTES if ahead else BLOCK)
        return self._buffer[:BLOCK]

    def take(self, offset: int, size: int) -> bytes:
        """Give `size` bytes from `offset` on; fewer where the stream ends."""
        self._move_to(offset)
        self._fill(size, size)
        return self._buffer[:size]

    def payload(self, name: str, offset: int, size: int) -> Payload:
        """Read the payload of a member.

        Raises:
            TarDamageError: the stream ends before it does.
        """
        self._members += 1
        self._payload_bytes += size
        at = offset - self._start
        if at >= 0 and at + size <= len(self._buffer):
            return Payload(name, size, self._buffer[at : at + size])
        self._move_to(offset)
        parts = [self._buffer] if self._buffer else []
        missing = size - len(self._buffer)
        while missing and (found := self._stream.read(min(missing, _PIECE_BYTES))):
            parts.append(found)
            missing -= len(found)
        if missing:
            self._end_at(offset + size - missing)
            raise TarDamageError(
                f"member {name!r} needs bytes up to {offset + size}, the stream ends at "
                f"{self.size}: it was cut"
            )
        self._start, self._buffer = offset + size, b""
        return Payload(name, size, parts[0] if len(parts) == 1 else b"".join(parts))

    def close(self) -> None:
        """Let go of the stream."""
        self._stream.close()

    def _move_to(self, offset: int) -> None:
        """Make the buffer start at `offset`, or be empty where the stream ends before."""
        at = offset - self._start
        if at <= len(self._buffer):
            self._buffer = self._buffer[at:]
        else:
            gone = at - len(self._buffer)
            self._buffer = b""
            while gone and (found := self._stream.read(min(gone, _DISCARD_BYTES))):
                gone -= len(found)
            if gone:
                self._end_at(offset - gone)
        self._start = offset

    def _end_at(self, offset: int) -> None:
        """Know how long the tar is, now that the stream has ended."""
        if self.size is None:
            self.size = offset

    def _fill(self, needed: int, welcome: int) -> None:
        """Read until the buffer holds `needed` bytes, taking up to `welcome` that are there."""
        parts = [self._buffer]
        held = len(self._buffer)
        while held < needed:
            if welcome > needed:
                found = self._stream.read_some(welcome - held)
            else:
                found = self._stream.read(needed - held)
            if not found:
                self._end_at(self._start + held)
                break
            parts.append(found)
            held += len(found)
        self._buffer = b"".join(parts)
