"""A file is whole under its final name, or it is not there."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming_balance.errors import ShardError
from streaming_balance.storage.durable import DurableFile, durable_file, sync_folder


@pytest.fixture
def two_kilobyte_limit() -> Iterator[None]:
    """Let no file of this process grow beyond 2,000 bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_has_its_final_name_only_when_it_is_whole(tmp_path: Path) -> None:
    with durable_file(tmp_path / "a.tar") as file:
        assert file.write(b"abc") == 3
        assert [path.name for path in tmp_path.iterdir()] == [".a.tar.tmp"]
        file.write(memoryview(b"de"))
        assert file.size == 5
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == b"abcde"


def write_and_fail(final: Path) -> None:
    """Fail in the middle of a file."""
    with durable_file(final) as file:
        file.write(b"new")
        raise KeyError


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"old")
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / "a.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == b"old"


def test_what_an_earlier_run_left_unfinished_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / ".a.tar.tmp").write_bytes(b"left over and longer")
    with durable_file(tmp_path / "a.tar") as file:
        file.write(b"new")
    assert (tmp_path / "a.tar").read_bytes() == b"new"


@pytest.mark.usefixtures("two_kilobyte_limit")
def test_a_write_that_does_not_fit_says_how_much_was_needed(tmp_path: Path) -> None:
    file = DurableFile(tmp_path / "a.tar")
    file.write(bytes(1500))
    expected = (
        r"a\.tar cannot be written: File too large; 1,000 more bytes were needed; [0-9,]+ are"
    )
    with pytest.raises(ShardError, match=expected):
        file.write(bytes(1000))
    file.discard()
    file.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(ShardError, match="Is a directory"), durable_file(tmp_path / "a.tar"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"absent/b/a\.tar cannot be written: No such file"):
        DurableFile(tmp_path / "absent" / "b" / "a.tar")
    with pytest.raises(ShardError, match="absent cannot be written: No such file"):
        sync_folder(tmp_path / "absent")
