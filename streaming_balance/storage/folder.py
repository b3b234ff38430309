"""The folder a pack writes to: one packer at a time, and nothing of anyone else's touched."""

from __future__ import annotations

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path

from streaming_balance.errors import BalanceError, ConfigError, ShardError
from streaming_balance.storage.durable import sync_folder
from streaming_balance.storage.layout import (
    BLOCK,
    LOCK_NAME,
    MANIFEST_NAME,
    TABLE_NAME,
    is_shard_name,
    is_temporary_name,
)
from streaming_balance.storage.tar import OWNER

_OWNER_FIELD = slice(265, 265 + 32)  # where a tar header names the file's owner


# A forked worker inherits the descriptor and would keep the lock after this process was killed.
_held_here: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """The right to pack into a folder, held by one process; the system frees it when that dies."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            ConfigError: another process holds it; the message says which.
            ShardError: the file system has no locks, or the folder is not writable.
        """
        self._path = folder / LOCK_NAME
        self._descriptor = -1
        try:
            self._descriptor = self._locked()
            _held_here.add(self)
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        except OSError as error:
            raise ShardError(
                f"{self._path} cannot be locked: {error.strerror}. Pack into a folder that is "
                "writable, on a file system with locks"
            ) from error

    def release(self) -> None:
        """Give the lock back; safe to call twice."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def forget(self) -> None:
        """Close the descriptor without giving the lock back: a forked process does not own it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _locked(self) -> int:
        """Give a descriptor of the locked file, which must still be the one in the folder."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder removes the file: a lock on a removed one would lock nothing.
                if os.path.samestat(os.fstat(descriptor), self._path.stat()):
                    return descriptor
            except BlockingIOError as error:
                holder = os.pread(descriptor, 256, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                raise ConfigError(
                    f"{self._path.parent} is being packed by process {holder or 'unknown'}; wait "
                    "for it, stop it, or pack into another folder"
                ) from error
            except FileNotFoundError:
                pass
            os.close(descriptor)


def _forget_in_child() -> None:
    """Leave the locks to the process that took them."""
    for lock in list(_held_here):
        lock.forget()


os.register_at_fork(after_in_child=_forget_in_child)


def make_folder(folder: Path) -> None:
    """Make the folder a pack goes to, where it is absent.

    Raises:
        ConfigError: something else stands there, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made a folder: {error.strerror}; pack into another place"
        ) from error


def remove_stale_lock(folder: Path) -> None:
    """Remove the lock of a packer that died after its last write; a living one keeps its own."""
    if (folder / LOCK_NAME).exists():
        with suppress(BalanceError):
            FolderLock(folder).release()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of an interrupted pack."""
    for path in folder.iterdir():
        if is_temporary_name(path.name):
            path.unlink()


def refuse_foreign_shards(folder: Path) -> None:
    """Refuse to pack over tars that look like shards and were made by someone else.

    Raises:
        ConfigError: there is one.
    """
    for path in _shards(folder):
        if not _is_ours(path):
            raise ConfigError(
                f"{path} was not written by this packer and would be overwritten; move it away "
                "or pack into an empty folder"
            )


def holds_packed_files(folder: Path) -> bool:
    """Say whether shards or a table lie in a folder, under their final names."""
    return bool(_shards(folder)) or (folder / TABLE_NAME).exists()


def remove_stale_files(folder: Path, kept: set[str]) -> None:
    """Remove the table and the shards that this pack will write, or has no use for.

    Their journals must outlive them: shards without a journal are anybody's, and refused.

    Raises:
        ShardError: the disk is failing.
    """
    if holds_packed_files(folder):
        (folder / TABLE_NAME).unlink(missing_ok=True)
        remove_stale_shards(folder, kept)
        sync_folder(folder)


def remove_stale_shards(folder: Path, kept: set[str]) -> None:
    """Remove shards of an earlier pack that the new one has no use for."""
    for path in _shards(folder):
        if path.name not in kept and _is_ours(path):
            path.unlink()


def remove_manifest(folder: Path) -> None:
    """Turn a data set into an unfinished pack, before anything else in it changes.

    Raises:
        ShardError: the disk is failing.
    """
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    sync_folder(folder)


def _shards(folder: Path) -> list[Path]:
    """Give the files named like our shards."""
    return sorted(path for path in folder.iterdir() if is_shard_name(path.name))


def _is_ours(path: Path) -> bool:
    """Say whether a tar's first header carries our owner's name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(BLOCK)[_OWNER_FIELD].rstrip(b"\0") == OWNER
