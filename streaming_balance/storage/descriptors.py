"""Open files of a data set: few, opened once, and never a different file behind the same name.

    with pool.lease(shard) as descriptor:      an open file, kept open until the lease ends
    pool.read(shard, buffers, offset, what)    the bytes at an offset, whole, or a `ShardError`

Bytes are always copied into memory the caller owns. A memory map would be shorter, but a shard that
loses its end while it is mapped kills the process with SIGBUS; a short read is an ordinary error.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from streaming_balance.errors import ConfigError, ShardError

# A read of a regular file never blocks, so EAGAIN comes from a network file system in trouble; one
# that repeats it this often is not going to recover within the patience of a training step.
_EAGAIN_ATTEMPTS = 3
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What the errors about a shard tell their reader to do; `{folder}` is the shard's folder."""

    unreadable: str = "Check the kernel log, then run `streaming-balance verify {folder}`."
    """Where the system cannot read it."""
    cut: str = (
        "restore it, or run the same pack command again, then `streaming-balance verify {folder}`."
    )
    """Where it lost its end while it was in use."""
    closed: str = "Make a new one with `shards.reader(split)`."
    """Where its reader was closed."""
    replaced: str = "Run `streaming-balance verify {folder}`, then open the data set again."
    """Where another file took its name."""
    damaged: str = (
        "Copy the shard again from its source, or run the same pack command with --overwrite; "
        "`streaming-balance verify {folder}` lists every damaged shard."
    )
    """Where it is no regular file of the expected length."""
    length_is_from: str = "index says"
    """How the expected length is known."""


PACKED = Advice()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedFile:
    """Where a shard is and how long it must be."""

    path: Path
    """The tar file."""
    bytes: int
    """Its length in bytes according to the manifest."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """What tells one file from another that took its name."""

    device: int
    """Number of the file system."""
    inode: int
    """Number of the file on it."""
    modified_ns: int
    """Time of the last change of content, in nanoseconds."""
    bytes: int
    """Length of the file."""


@dataclass(slots=True)
class _OpenFile:
    """An open shard and how many threads are reading it."""

    descriptor: int
    """What the system calls the open file."""
    users: int = 0
    """Leases that have not ended."""
    retired: bool = False
    """Whether the pool has forgotten it: its last user closes it."""


class DescriptorPool:
    """Keeps at most `max_open_files` shards open and reads from them; safe for many threads.

    A file in use is never closed: when all are in use, the next thread waits for one. A shard
    that is opened again must be the very file it was the first time.

    Args:
        files: place and length of each shard; a shard is called by its number in this sequence.
            It may grow while the pool is in use.
        max_open_files: most files open at once, at least 1.
        advice: what errors tell their reader to do; by default, for shards of a packed data set.

    Raises:
        ConfigError: `max_open_files` is below 1.
    """

    def __init__(
        self,
        files: Sequence[ExpectedFile],
        *,
        max_open_files: int = 64,
        advice: Advice = PACKED,
    ) -> None:
        if max_open_files < 1:
            raise ConfigError(
                f"max_open_files is {max_open_files}, but reading needs at least 1 open file."
            )
        self._files = files
        self._max_open_files = max_open_files
        self._advice = advice
        self._identities: dict[int, _Identity] = {}
        # Least recently used first.
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def lease(self, shard: int) -> Iterator[int]:
        """Lend an open descriptor of shard number `shard` until the `with` block ends.

        A thread holds one lease at a time; with two it could wait for itself.

        Raises:
            ShardError: the shard is missing, of another length, replaced, or cannot be opened.
        """
        opened = self._acquire(shard)
        try:
            yield opened.descriptor
        finally:
            self._release(opened)

    def read(self, shard: int, buffers: Sequence[memoryview], offset: int, what: object) -> None:
        """Fill `buffers`, one after the other, with the bytes of a shard from `offset` on.

        Args:
            shard: number of the shard.
            buffers: one-dimensional views of bytes, filled whole.
            offset: byte position of the first byte in the shard.
            what: what is being read; its text goes into the error message.

        Raises:
            ShardError: the file ends too early, was replaced, or the system cannot read it.
        """
        try:
            self._read_once(shard, buffers, offset, what)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            # A file server has forgotten the handle, as after its restart. The name may lead to the
            # same file still; opening checks that it does.
            self._forget(shard)
            self._read_once(shard, buffers, offset, what)

    def will_need(self, shard: int, offset: int, length: int) -> None:
        """Tell the system that these bytes are read soon; does nothing where it takes no hints."""
        if not hasattr(os, "posix_fadvise"):  # pragma: no cover - macOS
            return
        with self.lease(shard) as descriptor:
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    @property
    def num_open(self) -> int:
        """How many files the pool holds open now."""
        with self._changed:
            return len(self._open)

    def close(self) -> None:
        """Close every file; those in use close when their lease ends. May be called twice."""
        with self._changed:
            self._closed = True
            for shard in list(self._open):
                self._retire(shard)
            self._changed.notify_all()

    def __enter__(self) -> DescriptorPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read_once(
        self, shard: int, buffers: Sequence[memoryview], offset: int, what: object
    ) -> None:
        """Read under one lease; a system error becomes a `ShardError` that keeps its number."""
        with self.lease(shard) as descriptor:
            try:
                found = read_fully(descriptor, buffers, offset)
            except OSError as error:
                path = self._files[shard].path
                raise ShardError(
                    error.errno,
                    f"reading {what} at byte {offset} failed: {error.strerror}. Is the file system "
                    f"healthy? {self._advice.unreadable.format(folder=path.parent)}",
                    str(path),
                ) from error
        wanted = sum(len(buffer) for buffer in buffers)
        if found != wanted:
            path = self._files[shard].path
            raise ShardError(
                f"{path}: short read of {what}: bytes {offset} to {offset + wanted} are wanted, "
                f"but the shard ends at byte {offset + found}. It was cut while in use: "
                + self._advice.cut.format(folder=path.parent)
            )

    def _acquire(self, shard: int) -> _OpenFile:
        """Give the open file of `shard` with one more user, opening it where needed."""
        with self._changed:
            while True:
                if self._closed:
                    raise ShardError(
                        f"{self._files[shard].path}: its reader was closed. {self._advice.closed}"
                    )
                opened = self._open.get(shard)
                if opened is None:
                    opened = self._try_to_open(shard)
                if opened is not None:
                    opened.users += 1
                    self._open.move_to_end(shard)
                    return opened
                self._changed.wait()

    def _release(self, opened: _OpenFile) -> None:
        """End one use; the last user of a retired file closes it."""
        with self._changed:
            opened.users -= 1
            if opened.users == 0:
                if opened.retired:
                    os.close(opened.descriptor)
                self._changed.notify()

    def _try_to_open(self, shard: int) -> _OpenFile | None:
        """Open `shard`, or give None when that must wait for another file to fall idle."""
        if len(self._open) >= self._max_open_files and not self._retire_idle():
            return None
        while True:
            try:
                descriptor = os.open(self._files[shard].path, os.O_RDONLY)
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS and self._retire_idle():
                    continue
                if error.errno in _OUT_OF_DESCRIPTORS and self._open:
                    return None
                raise _opening_failed(self._files[shard].path, error) from error
            break
        try:
            self._check_identity(shard, os.fstat(descriptor))
        except ShardError:
            os.close(descriptor)
            raise
        self._open[shard] = _OpenFile(descriptor)
        return self._open[shard]

    def _check_identity(self, shard: int, status: os.stat_result) -> None:
        """Raise unless the file just opened has its length and is the one opened before."""
        path = self._files[shard].path
        check_shard_size(path, status, self._files[shard].bytes, self._advice)
        found = _Identity(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        first = self._identities.setdefault(shard, found)
        if found != first:
            raise ShardError(
                f"{path}: the shard was replaced while in use: first opened as inode {first.inode} "
                f"changed at {first.modified_ns} ns, now inode {found.inode} changed at "
                f"{found.modified_ns} ns. {self._advice.replaced.format(folder=path.parent)}"
            )

    def _retire_idle(self) -> bool:
        """Close the least recently used file nobody reads; say whether there was one."""
        for shard, opened in self._open.items():
            if opened.users == 0:
                self._retire(shard)
                return True
        return False

    def _retire(self, shard: int) -> None:
        """Drop a file from the pool, closing it at once or when its last lease ends."""
        opened = self._open.pop(shard)
        opened.retired = True
        if opened.users == 0:
            os.close(opened.descriptor)

    def _forget(self, shard: int) -> None:
        """Make the next lease of `shard` open it anew."""
        with self._changed:
            if shard in self._open:
                self._retire(shard)


def read_fully(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Read until `buffers` are full or the file ends.

    Args:
        descriptor: an open regular file.
        buffers: one-dimensional views of bytes.
        offset: byte position in the file of the first byte.

    Returns:
        Bytes read: the size of all buffers, or fewer where the file ends.

    Raises:
        OSError: the system cannot read.

    Examples:
        >>> import tempfile
        >>> head, tail = bytearray(2), bytearray(b".....")
        >>> with tempfile.TemporaryFile() as file:
        ...     written = file.write(b"0123456789")
        ...     file.flush()
        ...     read_fully(file.fileno(), [memoryview(head), memoryview(tail)], 6)
        4
        >>> head, tail
        (bytearray(b'67'), bytearray(b'89...'))
    """
    wanted = sum(len(buffer) for buffer in buffers)
    found = 0
    # One call is enough but for reads above 2 GiB, signals and files that end early.
    while found < wanted:
        rest = _after(buffers, found) if found else buffers
        more = _read_some(descriptor, rest, offset + found)
        if more == 0:
            break
        found += more
    return found


def check_shard_size(
    path: Path, status: os.stat_result, expected_bytes: int, advice: Advice = PACKED
) -> None:
    """Raise `ShardError` unless `status` is of a regular file of `expected_bytes`."""
    way_out = advice.damaged.format(folder=path.parent)
    said = f"{advice.length_is_from} {expected_bytes}"
    if not stat.S_ISREG(status.st_mode):
        raise ShardError(f"{path}: shard {path.name} is not a regular file. {way_out}")
    if status.st_size == 0 and expected_bytes > 0:
        raise ShardError(f"{path}: shard {path.name} is an empty file, {said} bytes. {way_out}")
    if status.st_size != expected_bytes:
        raise ShardError(f"{path}: shard {path.name}: size {status.st_size}, {said}. {way_out}")


def _read_some(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Make one read call, again after EAGAIN."""
    for _ in range(_EAGAIN_ATTEMPTS - 1):
        try:
            return os.preadv(descriptor, buffers, offset)
        except BlockingIOError:
            continue
    return os.preadv(descriptor, buffers, offset)


def _after(buffers: Sequence[memoryview], filled: int) -> list[memoryview]:
    """Give what is left of `buffers` once their first `filled` bytes are taken."""
    rest = []
    for buffer in buffers:
        taken = min(filled, len(buffer))
        filled -= taken
        if taken < len(buffer):
            rest.append(buffer[taken:])
    return rest


def _opening_failed(path: Path, error: OSError) -> ShardError:
    """Say why a shard cannot be opened and what to do about it."""
    if error.errno in _OUT_OF_DESCRIPTORS:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return ShardError(
            error.errno,
            f"no file can be opened: this process may have {limit} files open and has as many. "
            "Raise the limit (`ulimit -n 4096`) or close files",
            str(path),
        )
    if error.errno == errno.ENOENT:
        return ShardError(
            error.errno,
            f"shard {path.name} is missing. Copy it again from its source, or run the same pack "
            "command with --overwrite",
            str(path),
        )
    return ShardError(
        error.errno, f"shard {path.name} cannot be opened: {error.strerror}", str(path)
    )
