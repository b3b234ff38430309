"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streaming_balance.errors import ShardError
from streaming_balance.storage.layout import temporary_name


class DurableFile:
    """A file being written under its temporary name; `publish` makes it final."""

    def __init__(self, final: Path) -> None:
        self.final = final
        """The name it will have."""
        self.size = 0
        """Bytes written so far."""
        self._is_published = False
        self._temporary = final.with_name(temporary_name(final.name))
        self._temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with _named(final):
            self._descriptor = os.open(self._temporary, flags, 0o644)

    def write(self, content: bytes | memoryview) -> int:
        """Append all of `content`, however many calls the system needs for it.

        Raises:
            ShardError: the disk is full or failing; nothing is retried.
        """
        rest = memoryview(content).cast("B")
        needed = len(rest)
        with _named(self.final, needed_bytes=needed):
            while len(rest):
                rest = rest[os.write(self._descriptor, rest) :]
        self.size += needed
        return needed

    def publish(self) -> None:
        """Sync the content, give the file its final name, and sync the folder.

        Raises:
            ShardError: the disk is failing; a sync that failed once is never trusted again.
        """
        with _named(self.final):
            os.fsync(self._descriptor)
            self._temporary.replace(self.final)
            self._is_published = True
        self.discard()
        sync_folder(self.final.parent)

    def discard(self) -> None:
        """Close the file, and remove it unless it is published; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if not self._is_published:
                self._temporary.unlink(missing_ok=True)


@contextmanager
def durable_file(final: Path) -> Iterator[DurableFile]:
    """Publish a file when the block ends well, and leave nothing behind when it does not."""
    file = DurableFile(final)
    try:
        yield file
        file.publish()
    finally:
        file.discard()


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power failure.

    Raises:
        ShardError: the disk is failing.
    """
    with _named(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _named(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn a failing system call into an error that says where, and how much room was needed."""
    try:
        yield
    except OSError as error:
        needed = f" {needed_bytes:,} more bytes were needed;" if needed_bytes else ""
        raise ShardError(
            f"{path} cannot be written: {error.strerror};{needed} {_free_bytes(path):,} are free "
            "there. The source is untouched. Make room or mend the disk, then run the same "
            "command again."
        ) from error


def _free_bytes(path: Path) -> int:
    """Give the bytes an ordinary user may still write beside `path`."""
    try:
        room = os.statvfs(path.parent)
    except OSError:
        return 0
    return room.f_bavail * room.f_frsize
