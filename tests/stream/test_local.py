"""Local shards: payloads are read when asked for, from few open files, never from another file."""

from __future__ import annotations

import gc
import os
import resource
import threading
from pathlib import Path

import pytest

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.samples import StreamSample
from streaming_balance.stream.sources import expand
from streaming_balance.stream.tarstream import SampleReader, read_samples
from tests.stream.tars import contents, put, read_all, tar_of

VOLUME = bytes(range(256)) * 512
COHORT = {"P1.image": VOLUME, "P1.cls": b"1", "P2.image": VOLUME[::-1], "P2.cls": b"0"}


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the listing itself opens one more


def test_volumes_are_read_when_asked_for_and_small_members_come_along(tmp_path: Path) -> None:
    samples, _ = read_all(put(tmp_path, tar_of(COHORT)))
    held = {payload.name: payload.is_held for s in samples for payload in s.members.values()}
    assert held == {"P1.image": False, "P1.cls": True, "P2.image": False, "P2.cls": True}
    assert contents(samples) == COHORT
    out = bytearray(len(VOLUME))
    samples[1].members["image"].read_into(memoryview(out))
    assert out == VOLUME[::-1]
    small = bytearray(1)
    samples[1].members["cls"].read_into(memoryview(small))
    assert small == b"0"


@pytest.mark.parametrize("damage", ["cut", "replaced", "rewritten", "gone"])
def test_a_shard_changed_before_its_volumes_were_read_is_an_error(
    tmp_path: Path, damage: str
) -> None:
    urls = [put(tmp_path, tar_of({f"{name}.image": VOLUME}), f"{name}.tar") for name in "abc"]
    reader = SampleReader(expand(urls), files=ShardFiles(max_open_files=1))
    samples = list(reader)  # the first shard was closed meanwhile
    path = Path(urls[0])
    if damage == "cut":
        os.truncate(path, 5000)
    elif damage == "replaced":
        copy = tmp_path / "copy"
        copy.write_bytes(tar_of({"x.image": VOLUME}))
        copy.replace(path)
    elif damage == "rewritten":
        path.write_bytes(tar_of({"y.image": VOLUME}))
    else:
        path.unlink()
    with pytest.raises(ShardError, match=r"a\.tar"):
        samples[0].members["image"].read()
    assert samples[1].members["image"].read() == VOLUME


def test_a_shard_replaced_between_two_passes_is_an_error(tmp_path: Path) -> None:
    url = put(tmp_path, tar_of(COHORT))
    with ShardFiles() as files:
        assert contents(list(SampleReader(expand(url), files=files))) == COHORT
        assert contents(list(SampleReader(expand(url), files=files))) == COHORT
    with ShardFiles(max_open_files=1) as files:
        other = put(tmp_path, tar_of(COHORT), "other.tar")
        list(SampleReader(expand(url), files=files))
        list(SampleReader(expand(other), files=files))
        (tmp_path / "copy").write_bytes(tar_of({"P9.image": VOLUME, **COHORT}))
        (tmp_path / "copy").replace(url)
        with pytest.raises(ShardError, match=r"shard\.tar"):
            list(SampleReader(expand(url), files=files))


def test_a_shard_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = Path(put(tmp_path, tar_of(COHORT)))
    samples = read_samples(str(path))
    first = next(samples)
    os.truncate(path, 5000)
    with pytest.raises(ShardError, match=r"short read of 'P1.image'.*cut while in use"):
        first.members["image"].read()
    with pytest.raises(ShardError):
        list(samples)


def test_few_files_are_open_however_many_shards_there_are(tmp_path: Path) -> None:
    urls = [put(tmp_path, tar_of({f"{n}.image": VOLUME}), f"{n:03d}.tar") for n in range(100)]
    before = open_files()
    files = ShardFiles(max_open_files=8)
    samples = list(SampleReader(expand(urls), files=files))
    assert files.num_open <= 8
    assert [sample.members["image"].read() for sample in samples] == [VOLUME] * 100
    assert open_files() - before == files.num_open == 8
    files.close()
    assert open_files() == before
    with pytest.raises(ShardError, match="Keep the stream open while its samples are in use"):
        samples[0].members["image"].read()
    files.close()


def test_files_close_when_nobody_needs_them_any_more(tmp_path: Path) -> None:
    url = put(tmp_path, tar_of(COHORT))
    before = open_files()
    samples = list(read_samples(url))
    gc.collect()
    assert open_files() == before + 1
    assert samples[0].members["image"].read() == VOLUME
    del samples
    gc.collect()
    assert open_files() == before


def test_a_pass_stopped_anywhere_leaves_no_file_open(tmp_path: Path) -> None:
    import gzip

    urls = [
        put(tmp_path, tar_of(COHORT), "a.tar"),
        put(tmp_path, gzip.compress(tar_of({"P3.cls": b"1", "P4.cls": b"1"})), "b.tar.gz"),
    ]
    before = open_files()
    for taken in range(5):
        samples = read_samples(urls)
        for _ in range(taken):
            next(samples)
        samples.close()  # type: ignore[attr-defined]
        del samples
        gc.collect()
        assert open_files() == before


def test_payloads_are_read_from_many_threads(tmp_path: Path) -> None:
    urls = [
        put(tmp_path, tar_of({f"{n}.image": bytes([n]) * 100_000}), f"{n}.tar") for n in range(12)
    ]
    samples = list(SampleReader(expand(urls), files=ShardFiles(max_open_files=3)))
    wrong: list[StreamSample] = []

    def read() -> None:
        for _ in range(20):
            for sample in samples:
                if sample.members["image"].read() != bytes([sample.shard]) * 100_000:
                    wrong.append(sample)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reading_works_at_the_limit_of_open_files(tmp_path: Path) -> None:
    urls = [put(tmp_path, tar_of({f"{n}.image": VOLUME}), f"{n}.tar") for n in range(60)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 10, hard))
    try:
        samples = list(SampleReader(expand(urls), files=ShardFiles(max_open_files=1000)))
        assert all(sample.members["image"].read() == VOLUME for sample in samples)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_open_files_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_open_files is 0"):
        ShardFiles(max_open_files=0)
