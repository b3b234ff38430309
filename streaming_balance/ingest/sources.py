"""Reading source files with every size checked before memory is taken for it."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ShardError

GZIP_MAGIC = b"\x1f\x8b"
# Deflate cannot shrink by more than 1032 (RFC 1951: a match of 258 bytes takes at least 2 bits).
GZIP_MAX_RATIO = 1032
# Some writers pad the voxels to a full block; more than this after them is not padding.
TRAILING_SLACK_BYTES = 65_536
SKIP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStamp:
    """What a source file looked like when it was found."""

    path: Path
    """Where the file is."""
    size_bytes: int
    """Its length."""
    mtime_ns: int
    """When it was last written, in nanoseconds since 1970."""

    @classmethod
    def of(cls, path: Path) -> Self:
        """Take the stamp of an existing file.

        Raises:
            OSError: the file is not there.
        """
        status = path.stat()
        return cls(path=path, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Make sure that the file is still the one that was found.

        Raises:
            ShardError: it is gone, or its length or time of writing differ.
        """
        try:
            now = SourceStamp.of(self.path)
        except OSError as error:
            raise ShardError(f"{self.path}: the file went away while packing.") from error
        if now != self:
            raise ShardError(
                f"{self.path}: the file changed while packing; expected {self.size_bytes} bytes, "
                f"written at {self.mtime_ns} ns, found {now.size_bytes} bytes, written at "
                f"{now.mtime_ns} ns. Wait until nothing writes there, then run the same command."
            )


class SourceReader:
    """Reads a plain or gzip-compressed file front to back, never more than asked for.

    Args:
        path: the file. Whether it is compressed follows from its first bytes, not from its name.

    Raises:
        ShardError: the file is missing, empty or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        with contextlib.ExitStack() as stack:
            try:
                self._file = stack.enter_context(path.open("rb"))
            except OSError as error:
                raise ShardError(f"{path}: cannot be opened ({error.strerror}).") from error
            self.stored_bytes = self._file.seek(0, os.SEEK_END)
            if self.stored_bytes == 0:
                raise ShardError(f"{path}: empty file, 0 bytes; expected a header and voxels.")
            self._file.seek(0)
            self.is_compressed = self._file.read(2) == GZIP_MAGIC
            self._file.seek(0)
            self._stream: io.BufferedIOBase = (
                _open_gzip(self._file) if self.is_compressed else self._file
            )
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        """Read inside `with`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._open.close()

    @property
    def most_bytes(self) -> int:
        """The most bytes this file can hold, decompressed."""
        return self.stored_bytes * (GZIP_MAX_RATIO if self.is_compressed else 1)

    def digest(self) -> str:
        """Compute SHA-256 of the stored bytes, then go back to where reading stood: the front."""
        assert self.position == 0
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._file.seek(0)
        return digest

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes; fewer only at the end of the file."""
        pieces = bytearray(min(count, self.most_bytes))
        return bytes(memoryview(pieces)[: self._fill(memoryview(pieces))])

    def skip_to(self, position: int) -> None:
        """Go forward to an offset of the decompressed file.

        Raises:
            ShardError: the file ends before it.
        """
        scratch = memoryview(bytearray(min(SKIP_BYTES, position - self.position)))
        while self.position < position:
            wanted = min(SKIP_BYTES, position - self.position)
            if self._fill(scratch[:wanted]) < wanted:
                raise ShardError(
                    f"{self.path}: voxels should begin at byte {position}, but the file ends at "
                    f"byte {self.position}. Fetch the file again."
                )

    def read_array(self, dtype: np.dtype[np.generic], count: int) -> NDArray[np.generic]:
        """Read `count` numbers into new memory.

        Args:
            dtype: type and byte order in the file.
            count: how many numbers.

        Returns:
            `(count,)` numbers in the file's byte order.

        Raises:
            ShardError: the file is shorter than that; nothing is allocated where its stored
                length already shows it.
        """
        wanted = count * dtype.itemsize
        if self.position + wanted > self.most_bytes:
            self._too_short(wanted, f"at most {self.most_bytes}")
        raw = np.empty(wanted, dtype=np.uint8)
        found = self._fill(raw.data)
        if found < wanted:
            self._too_short(wanted, str(found), start=self.position - found)
        return np.asarray(raw.view(dtype))

    def check_ends_here(self) -> None:
        """Make sure that little follows, and that a compressed file's checksum is right.

        Raises:
            ShardError: a compressed file goes on beyond what its header announced.
        """
        if not self.is_compressed:
            return
        end = self.position
        if len(self.read(TRAILING_SLACK_BYTES + 1)) > TRAILING_SLACK_BYTES:
            raise ShardError(
                f"{self.path}: expected {end} bytes after decompression as the header says, found "
                f"more than {TRAILING_SLACK_BYTES} beyond them; not decompressed any further."
            )

    def _too_short(self, wanted: int, found: str, *, start: int | None = None) -> None:
        """Say what is missing."""
        raise ShardError(
            f"{self.path}: expected {wanted} bytes of voxels from byte "
            f"{self.position if start is None else start} on as the header says, found {found}. "
            "Fetch the file again."
        )

    def _fill(self, target: memoryview) -> int:
        """Fill `target` as far as the file goes and count the bytes."""
        filled = 0
        try:
            while filled < len(target):
                got = self._stream.readinto(target[filled:])
                if not got:
                    break
                filled += got
        except _read_errors() as error:
            raise ShardError(
                f"{self.path}: cannot be read beyond byte {self.position + filled}: cut short or "
                f"damaged ({type(error).__name__}). Fetch the file again."
            ) from error
        self.position += filled
        return filled


@functools.cache
def _read_errors() -> tuple[type[Exception], ...]:
    """List what a failing disk and damaged compressed bytes raise."""
    try:
        from isal import isal_zlib
    except ImportError:
        return (OSError, EOFError, zlib.error)
    return (OSError, EOFError, zlib.error, cast(type[Exception], isal_zlib.error))


def _open_gzip(file: io.BufferedReader) -> io.BufferedIOBase:
    """Decompress with isal where it is installed (three times faster), else with zlib."""
    try:
        from isal import igzip
    except ImportError:
        return gzip.GzipFile(fileobj=file, mode="rb")
    return cast(io.BufferedIOBase, igzip.IGzipFile(fileobj=file, mode="rb"))  # type: ignore[no-untyped-call]
