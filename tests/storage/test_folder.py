"""One packer at a time, and a lock that is never left locking nothing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.folder import FolderLock, remove_leftovers, remove_stale_lock
from streaming_balance.storage.layout import LOCK_NAME


def test_a_lock_says_its_process_and_is_gone_when_released(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert (tmp_path / LOCK_NAME).read_text().startswith(f"{os.getpid()} on ")
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_lock_leaves_the_file_to_its_owner(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.forget()
    lock.forget()
    lock.release()
    assert (tmp_path / LOCK_NAME).exists()
    FolderLock(tmp_path).release()


def test_a_place_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(ShardError, match=r"\.pack\.lock cannot be locked: Is a directory"):
        FolderLock(tmp_path)


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_name("moved")) and path.touch(),
    ],
    ids=["removed", "replaced"],
)
def test_a_lock_file_that_its_last_holder_removes_meanwhile_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Path], object]
) -> None:
    flock = fcntl.flock
    locked: list[int] = []

    def flock_too_late(descriptor: int, operation: int) -> None:
        if not locked:
            meanwhile(tmp_path / LOCK_NAME)
        locked.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_too_late)
    lock = FolderLock(tmp_path)
    assert len(locked) == 2
    with pytest.raises(ConfigError, match="is being packed"):
        FolderLock(tmp_path)
    lock.release()


def test_the_lock_of_a_packer_that_died_at_the_end_is_removed(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("1 on elsewhere")
    remove_stale_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_stale_lock(tmp_path)


def test_the_lock_of_a_living_packer_is_kept(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    remove_stale_lock(tmp_path)
    with pytest.raises(ConfigError, match="is being packed"):
        FolderLock(tmp_path)
    lock.release()


def test_only_temporary_files_of_a_pack_are_leftovers(tmp_path: Path) -> None:
    ours = [".train-000003.tar.tmp", ".samples.arrow.tmp", "..journal-train-000001.json.tmp"]
    theirs = [".mine.tmp", "train-000003.tar", "notes.tmp", ".journal-train-000001.json"]
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(theirs)
