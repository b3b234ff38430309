from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.descriptors import DescriptorPool, ExpectedFile, read_fully
from tests.building import open_files


def write_files(folder: Path, count: int) -> list[ExpectedFile]:
    """Write files whose byte b holds their number plus b."""
    files = []
    for number in range(count):
        path = folder / f"train-{number:06d}.tar"
        path.write_bytes(bytes((number + place) % 256 for place in range(100)))
        files.append(ExpectedFile(path=path, bytes=100))
    return files


def read_bytes(pool: DescriptorPool, shard: int, offset: int, length: int) -> list[int]:
    buffer = bytearray(length)
    pool.read(shard, [memoryview(buffer)], offset, "a test")
    return list(buffer)


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """Let this process open 64 files at most, as many shells on shared machines do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    yield 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class CountingSystem:
    """Counts the system calls that pass through `os`, and makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.reads = 0
        real_open, real_preadv = os.open, os.preadv

        def counted_open(path: str, flags: int) -> int:
            self.opened.append(Path(path).name)
            return real_open(path, flags)

        def counted_preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            self.reads += 1
            return real_preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "open", counted_open)
        monkeypatch.setattr(os, "preadv", counted_preadv)


def test_bytes_come_from_the_asked_shard_and_offset(tmp_path: Path) -> None:
    with DescriptorPool(write_files(tmp_path, 3)) as pool:
        assert read_bytes(pool, 2, 10, 4) == [12, 13, 14, 15]
        assert read_bytes(pool, 0, 98, 2) == [98, 99]


def test_several_buffers_are_filled_by_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path, 1)
    system = CountingSystem(monkeypatch)
    head, tail = bytearray(3), bytearray(5)
    with DescriptorPool(files) as pool:
        pool.read(0, [memoryview(head), memoryview(tail)], 50, "a test")
    assert list(head) == [50, 51, 52]
    assert list(tail) == [53, 54, 55, 56, 57]
    assert system.reads == 1


def test_a_shard_is_opened_once_however_often_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path, 3)
    system = CountingSystem(monkeypatch)
    with DescriptorPool(files, max_open_files=3) as pool:
        for turn in range(30):
            read_bytes(pool, turn % 3, 0, 1)
    assert sorted(system.opened) == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]


def test_the_pool_never_holds_more_files_than_its_bound(tmp_path: Path) -> None:
    with DescriptorPool(write_files(tmp_path, 10), max_open_files=3) as pool:
        for shard in range(10):
            assert read_bytes(pool, shard, 0, 1) == [shard]
            assert pool.num_open <= 3
        ours = {place for place in open_files() if place.startswith(str(tmp_path))}
        assert len(ours) == 3


def test_the_least_recently_used_file_is_closed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path, 3)
    system = CountingSystem(monkeypatch)
    with DescriptorPool(files, max_open_files=2) as pool:
        for shard in (0, 1, 0, 2, 0):
            read_bytes(pool, shard, 0, 1)
        assert system.opened == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
        read_bytes(pool, 1, 0, 1)
    assert system.opened[-1] == "train-000001.tar"


def test_a_file_in_use_stays_open_while_others_come_and_go(tmp_path: Path) -> None:
    with DescriptorPool(write_files(tmp_path, 6), max_open_files=2) as pool, pool.lease(0) as held:
        for shard in (1, 2, 3, 4, 5):
            # Another thread, since one thread holds one lease at a time.
            thread = threading.Thread(target=read_bytes, args=(pool, shard, 0, 1))
            thread.start()
            thread.join()
        assert os.pread(held, 3, 40) == bytes([40, 41, 42])


def test_a_thread_waits_for_a_descriptor_instead_of_breaking_the_bound(tmp_path: Path) -> None:
    files = write_files(tmp_path, 2)
    with DescriptorPool(files, max_open_files=1) as pool:
        found: list[list[int]] = []
        thread = threading.Thread(target=lambda: found.append(read_bytes(pool, 1, 0, 1)))
        with pool.lease(0):
            thread.start()
            assert pool.num_open == 1
            assert found == []
        thread.join()
        assert found == [[1]]


def test_closing_leaves_files_in_use_open_until_their_lease_ends(tmp_path: Path) -> None:
    pool = DescriptorPool(write_files(tmp_path, 2))
    read_bytes(pool, 1, 0, 1)
    with pool.lease(0) as held:
        pool.close()
        assert os.pread(held, 1, 7) == bytes([7])
    assert not {place for place in open_files() if place.startswith(str(tmp_path))}
    pool.close()


def test_reading_from_a_closed_pool_says_how_to_go_on(tmp_path: Path) -> None:
    pool = DescriptorPool(write_files(tmp_path, 1))
    pool.close()
    with pytest.raises(ShardError, match=r"train-000000.tar: its reader was closed"):
        read_bytes(pool, 0, 0, 1)


def test_many_threads_read_the_right_bytes_through_a_small_pool(tmp_path: Path) -> None:
    wrong: list[tuple[int, int]] = []
    with DescriptorPool(write_files(tmp_path, 16), max_open_files=3) as pool:

        def read_many(seed: int) -> None:
            generator = np.random.default_rng(seed)
            for shard in generator.integers(0, 16, 300):
                if read_bytes(pool, int(shard), 5, 2) != [shard + 5, shard + 6]:
                    wrong.append((seed, int(shard)))

        threads = [threading.Thread(target=read_many, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pool.num_open <= 3
    assert wrong == []


def test_a_read_past_the_end_names_the_offset_where_the_file_ends(tmp_path: Path) -> None:
    with (
        DescriptorPool(write_files(tmp_path, 1)) as pool,
        pytest.raises(
            ShardError, match=r"bytes 90 to 110 are wanted, but the shard ends at byte 100"
        ),
    ):
        read_bytes(pool, 0, 90, 20)


def test_a_read_in_pieces_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The system may return fewer bytes than asked for at any time, and does so above 2 GiB.
    real_preadv = os.preadv
    monkeypatch.setattr(
        os,
        "preadv",
        lambda descriptor, buffers, offset: real_preadv(descriptor, [buffers[0][:3]], offset),
    )
    head, tail = bytearray(4), bytearray(10)
    with DescriptorPool(write_files(tmp_path, 1)) as pool:
        pool.read(0, [memoryview(head), memoryview(tail)], 20, "a test")
    assert [*head, *tail] == list(range(20, 34))


def test_a_shard_of_another_length_is_refused_with_both_lengths(tmp_path: Path) -> None:
    files = [ExpectedFile(path=file.path, bytes=120) for file in write_files(tmp_path, 1)]
    with (
        DescriptorPool(files) as pool,
        pytest.raises(ShardError, match=r"size 100, index says 120"),
    ):
        read_bytes(pool, 0, 0, 1)
    assert not {place for place in open_files() if place.startswith(str(tmp_path))}


def test_an_empty_shard_is_called_an_empty_file(tmp_path: Path) -> None:
    files = write_files(tmp_path, 1)
    files[0].path.write_bytes(b"")
    with DescriptorPool(files) as pool, pytest.raises(ShardError, match="empty file"):
        read_bytes(pool, 0, 0, 1)


def test_a_folder_in_the_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    files = write_files(tmp_path, 1)
    files[0].path.unlink()
    files[0].path.mkdir()
    with DescriptorPool(files) as pool, pytest.raises(ShardError, match="not a regular file"):
        read_bytes(pool, 0, 0, 1)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    files = write_files(tmp_path, 1)
    files[0].path.unlink()
    with (
        DescriptorPool(files) as pool,
        pytest.raises(ShardError, match=r"shard train-000000.tar is missing"),
    ):
        read_bytes(pool, 0, 0, 1)


def test_a_shard_behind_a_loop_of_links_names_the_cause(tmp_path: Path) -> None:
    files = write_files(tmp_path, 1)
    files[0].path.unlink()
    files[0].path.symlink_to(files[0].path)
    with DescriptorPool(files) as pool, pytest.raises(ShardError, match="Too many levels"):
        read_bytes(pool, 0, 0, 1)


def test_a_shard_replaced_while_open_goes_on_from_the_old_file(tmp_path: Path) -> None:
    files = write_files(tmp_path, 1)
    with DescriptorPool(files) as pool:
        read_bytes(pool, 0, 0, 1)
        (tmp_path / "new").write_bytes(bytes(100))
        (tmp_path / "new").rename(files[0].path)
        assert read_bytes(pool, 0, 10, 2) == [10, 11]


def test_a_shard_replaced_between_two_openings_is_an_error(tmp_path: Path) -> None:
    files = write_files(tmp_path, 2)
    with DescriptorPool(files, max_open_files=1) as pool:
        read_bytes(pool, 0, 0, 1)
        read_bytes(pool, 1, 0, 1)
        (tmp_path / "new").write_bytes(bytes(100))
        (tmp_path / "new").rename(files[0].path)
        with pytest.raises(ShardError, match="replaced while in use"):
            read_bytes(pool, 0, 0, 1)


def test_a_pool_larger_than_the_limit_of_the_process_makes_do_with_what_it_gets(
    tmp_path: Path, few_descriptors: int
) -> None:
    with DescriptorPool(write_files(tmp_path, 100), max_open_files=1000) as pool:
        for shard in range(100):
            assert read_bytes(pool, shard, 0, 1) == [shard]
        assert pool.num_open < few_descriptors


def test_a_process_without_a_free_descriptor_is_told_its_limit(
    tmp_path: Path, few_descriptors: int
) -> None:
    files = write_files(tmp_path, 1)
    others = []
    try:
        while True:
            others.append(os.open(files[0].path, os.O_RDONLY))
    except OSError:
        pass
    try:
        with (
            DescriptorPool(files) as pool,
            pytest.raises(ShardError, match=rf"may have {few_descriptors} files open"),
        ):
            read_bytes(pool, 0, 0, 1)
    finally:
        for descriptor in others:
            os.close(descriptor)


def test_without_a_free_descriptor_a_thread_waits_for_one_of_the_pool(
    tmp_path: Path, few_descriptors: int
) -> None:
    files = write_files(tmp_path, 2)
    others: list[int] = []
    found: list[list[int]] = []
    with DescriptorPool(files) as pool:
        thread = threading.Thread(target=lambda: found.append(read_bytes(pool, 1, 0, 1)))
        try:
            with pool.lease(0):
                try:
                    while True:
                        others.append(os.open(files[0].path, os.O_RDONLY))
                except OSError:
                    assert len(others) < few_descriptors
                thread.start()
            thread.join()
        finally:
            for descriptor in others:
                os.close(descriptor)
    assert found == [[1]]


def test_a_pool_of_no_files_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_open_files is 0"):
        DescriptorPool([], max_open_files=0)


def test_the_hint_about_coming_reads_changes_no_bytes(tmp_path: Path) -> None:
    with DescriptorPool(write_files(tmp_path, 1)) as pool:
        pool.will_need(0, 0, 100)
        assert read_bytes(pool, 0, 0, 3) == [0, 1, 2]


def test_reading_at_the_very_end_reads_nothing(tmp_path: Path) -> None:
    files = write_files(tmp_path, 1)
    with files[0].path.open("rb") as file:
        assert read_fully(file.fileno(), [memoryview(bytearray(4))], 100) == 0


class FailingReads:
    """Makes `os.preadv` fail with a system error a number of times, then lets it work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError, times: int) -> None:
        self.left = times
        real_preadv = os.preadv

        def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if self.left:
                self.left -= 1
                raise error
            return real_preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", failing)


def test_a_disk_error_keeps_its_number_and_names_file_and_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path, 1)
    FailingReads(monkeypatch, OSError(errno.EIO, "Input/output error"), 1)
    with DescriptorPool(files) as pool, pytest.raises(ShardError) as caught:
        read_bytes(pool, 0, 30, 4)
    assert caught.value.errno == errno.EIO
    assert "reading a test at byte 30 failed: Input/output error" in str(caught.value)
    assert str(files[0].path) in str(caught.value)


def test_a_stale_handle_is_opened_again_once_and_must_lead_to_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path, 1)
    stale = OSError(errno.ESTALE, "Stale file handle")
    with DescriptorPool(files) as pool:
        FailingReads(monkeypatch, stale, 1)
        assert read_bytes(pool, 0, 30, 2) == [30, 31]
        FailingReads(monkeypatch, stale, 2)
        with pytest.raises(ShardError, match="Stale file handle"):
            read_bytes(pool, 0, 30, 2)
        FailingReads(monkeypatch, stale, 1)
        (tmp_path / "new").write_bytes(bytes(100))
        (tmp_path / "new").rename(files[0].path)
        with pytest.raises(ShardError, match="replaced while in use"):
            read_bytes(pool, 0, 30, 2)


def test_a_stale_handle_of_a_closed_pool_is_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = DescriptorPool(write_files(tmp_path, 1))

    def close_and_fail(_descriptor: int, _buffers: list[memoryview], _offset: int) -> int:
        pool.close()
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", close_and_fail)
    with pytest.raises(ShardError, match="its reader was closed"):
        read_bytes(pool, 0, 0, 1)


@pytest.mark.parametrize(("times", "works"), [(2, True), (3, False)])
def test_a_read_that_asks_to_be_repeated_is_tried_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, works: bool
) -> None:
    again = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    with DescriptorPool(write_files(tmp_path, 1)) as pool:
        FailingReads(monkeypatch, again, times)
        if works:
            assert read_bytes(pool, 0, 30, 2) == [30, 31]
        else:
            with pytest.raises(ShardError, match="temporarily unavailable"):
                read_bytes(pool, 0, 30, 2)
