"""Compressed shards are read whole or refused, whatever compressed them, in bounded memory."""

from __future__ import annotations

import gzip
import io
import itertools
import random
import resource
import subprocess
import tarfile
import time
import zlib
from pathlib import Path
from shutil import which
from typing import Any

import pyarrow as pa
import pytest

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.compressed import GunzippedStream
from streaming_balance.stream.passing import FileStream
from streaming_balance.stream.tarstream import read_samples
from tests.stream.tars import COHORT, Trickle, contents, header, put, read_all, tar_of, zipped

NOISE = random.Random(3).randbytes(300_000)
CONTENT = tar_of({**COHORT, "P4.image": NOISE})


def zstd(content: bytes) -> bytes:
    """One frame of zstd."""
    frame: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return frame


def several(pack: Any, content: bytes) -> bytes:
    """The content in several members or frames, cut anywhere."""
    cuts = [0, 1, 700, 70_000, len(content)]
    return b"".join(pack(content[a:b]) for a, b in itertools.pairwise(cuts))


FORMS = {
    "gzip": zipped(CONTENT),
    "gzip in members": several(zipped, CONTENT),
    "gzip with zeros behind": zipped(CONTENT) + bytes(1000),
    "gzip with a name": b"\x1f\x8b\x08\x08" + bytes(6) + b"a.tar\0" + zipped(CONTENT)[10:],
    "gzip stored": gzip.compress(CONTENT, 0, mtime=0),
    "zstd": zstd(CONTENT),
    "zstd in frames": several(zstd, CONTENT),
    "zstd after a frame to pass over": b"\x50\x2a\x4d\x18\x04\0\0\0note" + zstd(CONTENT),
}


@pytest.mark.parametrize("packed", FORMS.values(), ids=FORMS)
def test_compressed_shards_are_read_as_files_and_as_streams(tmp_path: Path, packed: bytes) -> None:
    for urls in (put(tmp_path, packed, "shard"), io.BytesIO(packed)):
        samples, counts = read_all(urls)
        assert contents(samples) == {**COHORT, "P4.image": NOISE}
        assert counts.bytes_read == len(CONTENT)
        assert samples[0].place is None


@pytest.mark.parametrize("command", ["gzip", "pigz", "zstd"])
def test_what_command_line_tools_write_is_read(tmp_path: Path, command: str) -> None:
    if which(command) is None:
        pytest.skip(f"{command} is not installed")
    put(tmp_path, CONTENT)
    subprocess.run([command, "-q", "-k", "shard.tar"], cwd=tmp_path, check=True)
    (packed,) = tmp_path.glob("shard.tar.*")
    assert len(read_all(str(packed))[0]) == 4


@pytest.mark.parametrize("pack", [zipped, zstd])
def test_compressed_shards_cut_anywhere_are_an_error(tmp_path: Path, pack: Any) -> None:
    packed = pack(tar_of(COHORT))
    for cut in range(len(packed)):
        with pytest.raises(ShardError):
            read_all(io.BytesIO(packed[:cut]))
    for cut in range(0, len(packed), 29):
        with pytest.raises(ShardError):
            read_all(put(tmp_path, packed[:cut]))


@pytest.mark.parametrize("pack", [zipped, zstd])
def test_a_cut_between_two_members_or_frames_is_found_by_the_end_the_tar_lacks(pack: Any) -> None:
    content = tar_of(COHORT)
    blocks = [pack(content[start : start + 512]) for start in range(0, len(content), 512)]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        last = archive.getmembers()[-1]
    needed = last.offset_data // 512 + 1 + 2
    for count in range(len(blocks) + 1):
        packed = b"".join(blocks[:count])
        if count >= needed:
            assert contents(read_all(io.BytesIO(packed))[0]) == COHORT
        else:
            with pytest.raises(ShardError, match=r"was cut|is empty"):
                read_all(io.BytesIO(packed))


@pytest.mark.parametrize("behind", [b"x", b"trailing garbage", b"\x1f", bytes(9) + b"x"])
def test_what_follows_a_compressed_shard_is_an_error(behind: bytes) -> None:
    for pack in (zipped, zstd):
        with pytest.raises(ShardError, match=r"no gzip follow|zstd stream is damaged"):
            read_all(io.BytesIO(pack(CONTENT) + behind))


def test_another_member_behind_the_end_of_the_tar_is_an_error() -> None:
    for pack in (zipped, zstd):
        with pytest.raises(ShardError, match="bytes follow after the end of the tar"):
            read_all(io.BytesIO(pack(CONTENT) + pack(b"more".ljust(512))))


def test_every_flipped_bit_of_a_gzip_file_is_found_or_changes_nothing() -> None:
    packed = bytearray(zipped(tar_of(COHORT)))
    for bit in range(8 * len(packed)):
        packed[bit // 8] ^= 1 << bit % 8
        try:
            found = contents(read_all(io.BytesIO(packed))[0])
        except ShardError:
            pass
        else:
            # Such as a bit of the time in its header, which says nothing about the content.
            assert found == COHORT
        packed[bit // 8] ^= 1 << bit % 8


def test_a_tar_compressed_twice_is_called_so() -> None:
    with pytest.raises(ShardError, match="no tar but gzip within what was already decompressed"):
        read_all(io.BytesIO(zipped(zipped(CONTENT))))


@pytest.mark.parametrize("pack", [zipped, zstd])
def test_bombs_take_no_memory(pack: Any) -> None:
    bombs = {
        "endless zeros": (bytes(1 << 20) * 100, "holds no member|zeros"),
        "zeros behind the end": (tar_of(COHORT) + bytes(1 << 20) * 100, "over 67,108,864 zeros"),
        "a name of 100 MiB": (
            header(b"L", 100 << 20, b"L") + bytes(100 << 20),
            "at most 1,048,576",
        ),
    }
    for content, problem in bombs.values():
        packed = pack(content)
        content = b""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        with pytest.raises(ShardError, match=problem):
            read_all(io.BytesIO(packed))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 48 << 10  # KiB
        assert time.process_time() - started < 5


def test_decompressing_gives_what_zlib_gives_in_pieces_of_any_size() -> None:
    packed = several(zipped, NOISE + bytes(100_000))
    for step in (1, 13, 4096, 1 << 20):
        stream = GunzippedStream(FileStream(io.BytesIO(packed), "shard", owned=False), "shard")
        found = bytearray()
        while part := stream.read(max(step, 997)):
            found += part
        assert zlib.crc32(found) == zlib.crc32(NOISE + bytes(100_000))


def test_members_may_arrive_byte_by_byte() -> None:
    small = tar_of(COHORT)
    packed = b"".join(zipped(small[start : start + 999]) for start in range(0, len(small), 999))
    for step in (1, 2, 3):
        file = io.BufferedReader(Trickle(packed, step), buffer_size=1)
        assert contents(read_all(file)[0]) == COHORT


def test_another_member_behind_zeros_is_an_error() -> None:
    packed = zipped(CONTENT[:1000]) + bytes(10) + zipped(CONTENT[1000:])
    with pytest.raises(ShardError, match="no gzip follow"):
        read_all(io.BytesIO(packed))


def test_errors_of_the_source_are_not_taken_for_damage() -> None:
    class Failing(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            if self.tell() > 1000:
                raise OSError(5, "Input/output error")
            return super().read(count)

        read1 = read

    for pack in (zipped, zstd):
        with pytest.raises(ShardError, match=r"cannot be read: .*Input/output error"):
            read_all(Failing(pack(CONTENT)))


def test_a_build_without_zstd_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class CodecsOfASmallBuild:
        @staticmethod
        def is_available(name: str) -> bool:
            return name != "zstd"

    packed = zstd(CONTENT)
    monkeypatch.setattr(pa, "Codec", CodecsOfASmallBuild)
    with pytest.raises(ConfigError, match="is zstd, which the pyarrow installed here"):
        list(read_samples(io.BytesIO(packed)))
