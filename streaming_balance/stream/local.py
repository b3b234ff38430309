"""Tars on local disk: headers come in small windows, payloads when somebody asks for them.

    files = ShardFiles()
    tar = LocalTar(files.add(path))      every payload of it can be read while `files` is open

Passing over a volume costs no read. Few files are open at a time, however many shards there are;
one that is opened again must be the very file it was.
"""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path
from types import TracebackType

from streaming_balance.errors import ShardError
from streaming_balance.storage.descriptors import Advice, DescriptorPool, ExpectedFile
from streaming_balance.storage.layout import BLOCK
from streaming_balance.stream.samples import Payload

# With volumes, a window holds a header and the small members that commonly stand beside a volume;
# with small members, as many of them as make the call's own cost vanish.
_VOLUME_WINDOW_BYTES = 4 << 10
_SMALL_WINDOW_BYTES = 256 << 10
_SMALL_MEAN_BYTES = 16 << 10

_ADVICE = Advice(
    unreadable="Check the kernel log, then read the shard again.",
    cut="restore it, then read the stream again.",
    closed="Keep the stream open while its samples are in use.",
    replaced="Read the stream again, and let nobody write to {folder} meanwhile.",
    damaged="It was changed while the stream was read: read the stream again.",
    length_is_from="it had",
)


class ShardFiles:
    """Local shards that can be read at any place, at most `max_open_files` of them open at once.

    Closes its files when it is closed, or when neither it nor any payload is in use any more.

    Args:
        max_open_files: most files open at once, at least 1.

    Raises:
        ConfigError: `max_open_files` is below 1.
    """

    def __init__(self, *, max_open_files: int = 64) -> None:
        self._files: list[ExpectedFile] = []
        self._numbers: dict[Path, int] = {}
        self._pool = DescriptorPool(self._files, max_open_files=max_open_files, advice=_ADVICE)
        self._finalizer = weakref.finalize(self, self._pool.close)

    def add(self, path: Path) -> LocalFile:
        """Take in a regular file; a path taken in before gives the same file again.

        Raises:
            ShardError: there is no such file, or it is not a regular one.
        """
        number = self._numbers.get(path)
        if number is None:
            size = _size_of(path)
            number = self._numbers[path] = len(self._files)
            self._files.append(ExpectedFile(path=path, bytes=size))
        return LocalFile(self, number)

    def file(self, number: int) -> ExpectedFile:
        """Give path and length of a file."""
        return self._files[number]

    def read(self, number: int, offset: int, length: int, what: str) -> bytes:
        """Give bytes of file `number`, whole, or raise `ShardError`."""
        try:
            with self._pool.lease(number) as descriptor:
                found = os.pread(descriptor, length, offset)
        except ShardError:
            raise
        except OSError:
            found = b""
        if len(found) == length:
            return found
        # Reads over 2 GiB, signals, a file server that restarted, and files that lost their end:
        # the pool reads on, or says which of them it is.
        out = bytearray(length)
        self.read_into(number, memoryview(out), offset, what)
        return bytes(out)

    def read_into(self, number: int, out: memoryview, offset: int, what: str) -> None:
        """Fill `out` with bytes of file `number`, or raise `ShardError`."""
        self._pool.read(number, [out], offset, repr(what))

    @property
    def num_open(self) -> int:
        """How many files are open now."""
        return self._pool.num_open

    def close(self) -> None:
        """Close every file; payloads not read yet cannot be read any more. May be called twice."""
        self._finalizer()

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class LocalFile:
    """One file of `ShardFiles`.

    Args:
        files: who opens and closes it.
        number: its number there.
    """

    __slots__ = ("_files", "_number", "path", "size")

    def __init__(self, files: ShardFiles, number: int) -> None:
        self._files = files
        self._number = number
        self.path = files.file(number).path
        self.size = files.file(number).bytes

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Give `length` bytes from `offset` on; `what` they are goes into an error."""
        return self._files.read(self._number, offset, length, what)

    def read_into(self, out: memoryview, offset: int, what: str) -> None:
        """Fill `out` with the bytes from `offset` on."""
        self._files.read_into(self._number, out, offset, what)


class LocalTar:
    """The bytes of a tar on local disk, for `walk_tar`.

    Args:
        file: the tar.
    """

    can_seek = True

    def __init__(self, file: LocalFile) -> None:
        self._file = file
        self.size: int | None = file.size
        self._window = b""
        self._start = 0
        self._members = 0
        self._payload_bytes = 0

    def block(self, offset: int) -> bytes:
        """Give the 512 bytes from `offset` on; fewer where the file ends."""
        at = offset - self._start
        if 0 <= at <= len(self._window) - BLOCK:
            return self._window[at : at + BLOCK]
        ahead = _VOLUME_WINDOW_BYTES
        if self._payload_bytes < self._members * _SMALL_MEAN_BYTES:
            ahead = _SMALL_WINDOW_BYTES
        length = min(ahead, max(0, self._file.size - offset))
        self._window = self._file.read(offset, length, "headers") if length else b""
        self._start = offset
        return self._window[:BLOCK]

    def take(self, offset: int, size: int) -> bytes:
        """Give `size` bytes from `offset` on; fewer where the file ends."""
        length = min(size, max(0, self._file.size - offset))
        return self._file.read(offset, length, "an extended header") if length else b""

    def payload(self, name: str, offset: int, size: int) -> Payload:
        """Give the payload of a member, which lies within the file."""
        self._members += 1
        self._payload_bytes += size
        at = offset - self._start
        if at >= 0 and at + size <= len(self._window):
            return Payload(name, size, self._window[at : at + size])
        return Payload(name, size, None, self._file, offset)

    def close(self) -> None:
        """Nothing is held here: the files belong to `ShardFiles`."""


def _size_of(path: Path) -> int:
    """Give the length of a regular file."""
    try:
        status = path.stat()
    except OSError as error:
        raise ShardError(
            f"{path} cannot be opened: {error.strerror}. Is the path right, and mounted here?"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ShardError(f"{path} is not a regular file.")
    return status.st_size
