from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage import members as members_module
from streaming_balance.storage.filling import SLAB_BYTES, centre_overlap
from streaming_balance.storage.reader import Reader, Verify
from streaming_balance.storage.shards import ShardSet, open_shards
from tests.building import Sample, by_key, pack, random_samples

CODECS = ("npy", "blosc")


def packed(folder: Path, samples: list[Sample], *, codec: str = "npy", **kwargs: Any) -> ShardSet:
    pack(folder, samples, codec=codec, **kwargs)
    return open_shards(folder)


def images(shards: ShardSet, samples: list[Sample], split: str = "train") -> list[NDArray[Any]]:
    """Give the packed images in sample-number order."""
    known = by_key(samples)
    return [known[str(key)].image for key in shards.keys(split)]


def cropped_or_padded(image: NDArray[Any], space: tuple[int, ...]) -> NDArray[Any]:
    """Crop or pad (C, *space) voxel by voxel, by the rule alone."""
    out = np.zeros((image.shape[0], *space), image.dtype)
    for place in np.ndindex(*out.shape):
        source = []
        for at, wanted, stored in zip(place[1:], space, image.shape[1:], strict=True):
            source.append(
                at + (stored - wanted) // 2 if stored >= wanted else at - (wanted - stored) // 2
            )
        if all(0 <= at < side for at, side in zip(source, image.shape[1:], strict=True)):
            out[place] = image[(place[0], *source)]
    return out


class CountedReads:
    """Counts the reads that pass through `os.preadv`, and makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        real = os.preadv

        def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            self.sizes.append(sum(len(buffer) for buffer in buffers))
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", counted)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["int16", "float32", "uint8", "bool", "float64"])
def test_rows_hold_the_packed_voxels_in_the_asked_order(
    tmp_path: Path, codec: str, dtype: str
) -> None:
    samples = random_samples(7, dtype=dtype)
    shards = packed(tmp_path, samples, codec=codec)
    out = np.full((4, 2, 6, 5, 4), 1, dtype)
    with shards.reader("train") as reader:
        reader.read_into([5, 0, 6, 0], out)
    expected = images(shards, samples)
    for row, sample in zip(out, (5, 0, 6, 0), strict=True):
        np.testing.assert_array_equal(row, expected[sample])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5), (4, 6, 5), (2, 4, 6, 5)])
def test_a_row_always_has_a_channel_axis(
    tmp_path: Path, codec: str, shape: tuple[int, ...]
) -> None:
    # Three sides are channels and a plane when packed as CHW, a volume when packed as DHW.
    axes = "CHW" if shape[0] == 3 else None
    sample = Sample(key="P1", image=np.arange(np.prod(shape)).reshape(shape), axes=axes)
    shards = packed(tmp_path, [sample], codec=codec)
    has_channels = axes == "CHW" or len(shape) == 4
    expected = sample.image if has_channels else sample.image[np.newaxis]
    with shards.reader("train") as reader:
        assert reader.shape(0) == expected.shape
        assert reader.dtype(0) == np.dtype("int64")
        out = np.zeros((1, *expected.shape), np.int64)
        reader.read_into([0], out)
        np.testing.assert_array_equal(out[0], expected)
        np.testing.assert_array_equal(reader.read(0), sample.image)
        assert reader.read(0).shape == shape


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 40, 128, 129)])
@pytest.mark.parametrize("target", ["float32", "float64", "int64", "float16"])
def test_a_cast_gives_what_numpy_gives(
    tmp_path: Path, codec: str, shape: tuple[int, ...], target: str
) -> None:
    samples = random_samples(2, shape=shape)
    shards = packed(tmp_path, samples, codec=codec, shard_bytes=1 << 26)
    out = np.ones((2, *shape), target)
    with shards.reader("train") as reader:
        reader.read_into([0, 1], out)
    for row, image in zip(out, images(shards, samples), strict=True):
        np.testing.assert_array_equal(row, image.astype(target))


def test_a_volume_larger_than_the_scratch_is_cast_slab_by_slab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = random_samples(1, shape=(2, 40, 128, 129))
    shards = packed(tmp_path, samples, shard_bytes=1 << 26)
    out = np.ones((1, 2, 40, 128, 129), np.float32)
    with shards.reader("train") as reader:
        reads = CountedReads(monkeypatch)
        reader.read_into([0], out)
    assert max(reads.sizes) <= SLAB_BYTES
    assert sum(reads.sizes) == reader.stored_bytes(0)
    np.testing.assert_array_equal(out[0], samples[0].image.astype(np.float32))


@pytest.mark.parametrize("codec", CODECS)
@given(
    stored=st.tuples(*[st.integers(1, 7)] * 3),
    wanted=st.tuples(*[st.integers(1, 9)] * 3),
    target=st.sampled_from(["int16", "float32"]),
)
def test_another_space_is_centre_cropped_or_zero_padded(
    tmp_path_factory: pytest.TempPathFactory,
    codec: str,
    stored: tuple[int, ...],
    wanted: tuple[int, ...],
    target: str,
) -> None:
    samples = random_samples(1, shape=(2, *stored))
    shards = packed(tmp_path_factory.mktemp("crop"), samples, codec=codec)
    out = np.full((1, 2, *wanted), 9, target)
    with shards.reader("train") as reader:
        reader.read_into([0], out)
    np.testing.assert_array_equal(out[0], cropped_or_padded(samples[0].image, wanted))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("verify", ["always", "never"])
def test_a_large_volume_is_cropped_and_padded_by_the_same_rule(
    tmp_path: Path, codec: str, verify: Verify
) -> None:
    samples = random_samples(1, shape=(2, 41, 128, 129))
    shards = packed(tmp_path, samples, codec=codec, shard_bytes=1 << 26)
    out = np.full((1, 2, 10, 11, 131), 9, np.float32)
    with shards.reader("train", verify=verify) as reader:
        reader.read_into([0], out)
    # 41 to 10 starts at 15, 128 to 11 at 58, and 129 stands 1 from the left of 131.
    expected = np.zeros((2, 10, 11, 131), np.float32)
    expected[..., 1:130] = samples[0].image[:, 15:25, 58:69]
    np.testing.assert_array_equal(out[0], expected)


def test_planes_outside_the_crop_are_not_read_when_nothing_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = random_samples(1, shape=(1, 64, 256, 256))
    shards = packed(tmp_path, samples, shard_bytes=1 << 26)
    with shards.reader("train", verify="never") as reader:
        reads = CountedReads(monkeypatch)
        reader.read_into([0], np.empty((1, 1, 16, 256, 256), np.float32))
        # 8 planes of 128 KiB make a slab; planes 24 to 40 are two slabs of eight.
        assert sum(reads.sizes) == 128 + 2 * SLAB_BYTES


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("at_once", [1, 3])
def test_strided_rows_are_filled_like_any_other(tmp_path: Path, codec: str, at_once: int) -> None:
    samples = random_samples(3)
    shards = packed(tmp_path, samples, codec=codec)
    buffer = np.full((3, 2, 6, 5, 8), 7, np.int16)
    with shards.reader("train") as reader:
        for first in range(0, 3, at_once):
            rows = slice(first, first + at_once)
            reader.read_into([2, 1, 0][rows], buffer[rows, ..., ::2])
    for row, image in zip(buffer[::-1], images(shards, samples), strict=True):
        np.testing.assert_array_equal(row[..., ::2], image)
        assert (row[..., 1::2] == 7).all()


def test_segmentations_are_read_in_their_own_dtype(tmp_path: Path) -> None:
    seg = np.arange(120, dtype=np.uint8).reshape(6, 5, 4)
    samples = [
        Sample(key="P1", image=np.zeros((2, 6, 5, 4), np.int16), seg=seg),
        Sample(key="P2", image=np.zeros((2, 6, 5, 4), np.int16)),
    ]
    shards = packed(tmp_path, samples, codec="blosc")
    assert shards.arrays == ("image", "seg")
    with shards.reader("train") as reader:
        assert reader.dtype(0, "seg") == np.dtype("uint8")
        out = np.zeros((1, 1, 6, 5, 4), np.uint8)
        reader.read_into([0], out, field="seg")
        np.testing.assert_array_equal(out[0, 0], seg)
        assert reader.has(0, "seg")
        assert not reader.has(1, "seg")
        with pytest.raises(ConfigError, match=r"sample 'P2' of split 'train' has no seg"):
            reader.read(1, "seg")
    assert set(shards.read("train", 0)) == {"image", "seg"}
    assert set(shards.read("train", 1)) == {"image"}


def test_a_raw_sample_takes_one_read_and_its_shard_one_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 126 KiB each: too large to share a read with a neighbour.
    samples = random_samples(6, shape=(2, 20, 40, 40))
    shards = packed(tmp_path, samples, shard_bytes=300_000)
    assert len(shards.manifest.shards) == 3
    out = np.empty((6, 2, 20, 40, 40), np.int16)
    with shards.reader("train") as reader:
        reads = CountedReads(monkeypatch)
        for _ in range(3):
            reader.read_into(range(6), out)
    assert reads.sizes == [128 + out[0].nbytes] * 18


def test_a_large_raw_sample_takes_one_read_once_it_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = random_samples(1, shape=(2, 40, 128, 129))
    shards = packed(tmp_path, samples, shard_bytes=1 << 26)
    out = np.empty((1, 2, 40, 128, 129), np.int16)
    with shards.reader("train") as reader:
        reader.read_into([0], out)
        np.testing.assert_array_equal(out[0], samples[0].image)
        out[:] = 0
        reads = CountedReads(monkeypatch)
        reader.read_into([0], out)
    assert reads.sizes == [reader.stored_bytes(0)]
    np.testing.assert_array_equal(out[0], samples[0].image)


SYSTEM_CALLS_SCRIPT = """
import sys
import numpy as np
from streaming_balance.storage.shards import open_shards
shards = open_shards(sys.argv[1])
reader = shards.reader("train")
out = np.empty((6, 2, 20, 40, 40), np.int16)
for _ in range(3):
    reader.read_into(range(6), out)
"""


def test_the_system_sees_one_read_per_raw_sample_and_one_opening_per_shard(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    samples = random_samples(6, shape=(2, 20, 40, 40))
    shards = packed(tmp_path / "pack", samples, shard_bytes=300_000)
    trace = tmp_path / "trace.txt"
    command = ["strace", "-f", "-e", "trace=openat,preadv,preadv2,mmap", "-o", str(trace)]
    script = [sys.executable, "-c", SYSTEM_CALLS_SCRIPT, str(tmp_path / "pack")]
    finished = subprocess.run([*command, *script], capture_output=True, text=True, check=False)
    if "PTRACE" in finished.stderr or "ptrace" in finished.stderr:
        pytest.skip("strace may not trace here")
    assert finished.returncode == 0, finished.stderr
    calls = trace.read_text().splitlines()
    assert sum(" preadv" in call for call in calls) == 18
    for shard in shards.manifest.shards:
        assert sum(f"/{shard.name}" in call for call in calls if " openat(" in call) == 1


def test_small_neighbours_share_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = small_images(20)
    shards = packed(tmp_path, samples)
    order = np.random.default_rng(1).permutation(20)
    out = np.empty((20, 1, 8, 8), np.float32)
    with shards.reader("train") as reader:
        reads = CountedReads(monkeypatch)
        reader.read_into(order, out)
    assert len(reads.sizes) == 1
    expected = images(shards, samples)
    for row, sample in zip(out, order, strict=True):
        np.testing.assert_array_equal(row, expected[sample])


def small_images(count: int) -> list[Sample]:
    return [
        Sample(key=sample.key, image=sample.image, axes="CHW", label=sample.label)
        for sample in random_samples(count, shape=(1, 8, 8))
    ]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_verified_small_neighbours_that_are_alike_come_by_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, dtype: str
) -> None:
    samples = small_images(20)
    shards = packed(tmp_path, samples, codec=codec)
    expected = images(shards, samples)
    buffer = np.empty((22, 1, 8, 16), dtype)
    out = buffer[..., ::2]  # strided, and two samples are asked for twice
    with shards.reader("train") as reader:
        reader.read_into(range(20), out[:20])
        out[:] = 0
        reads = CountedReads(monkeypatch)
        order = np.random.default_rng(2).permutation([*range(20), 3, 4])
        reader.read_into(order, out)
        assert len(reads.sizes) == 1
    for row, sample in zip(out, order, strict=True):
        np.testing.assert_array_equal(row, expected[sample])


UNLIKE = {
    # All take 128 bytes after a header of 128.
    "dtype": [np.full((8, 8), 50_000, "uint16"), np.full((8, 8), -3, "int16")],
    "shape": [np.arange(64, dtype="int16").reshape(8, 8), np.arange(64, dtype="int16")[None]],
    "all": [np.full((8, 8), 50_000, "uint16"), np.arange(128, dtype="uint8").reshape(16, 8)],
}


@pytest.mark.parametrize("name", UNLIKE)
def test_small_neighbours_of_one_size_but_unlike_are_told_apart(tmp_path: Path, name: str) -> None:
    samples = [Sample(key=f"{number}", image=image) for number, image in enumerate(UNLIKE[name])]
    shards = packed(tmp_path, samples)
    out = np.zeros((2, 1, 8, 8), np.int32)
    with shards.reader("train", verify="never") as reader:
        assert reader.stored_bytes(0) == reader.stored_bytes(1)
        reader.read_into(range(2), out)
    for row, sample in zip(out, samples, strict=True):
        image = sample.image[np.newaxis].astype(np.int32)
        np.testing.assert_array_equal(row, cropped_or_padded(image, (8, 8)))


@pytest.mark.parametrize("victim", [0, 3])
def test_a_damaged_header_among_neighbours_is_found_without_checksums(
    tmp_path: Path, victim: int
) -> None:
    shards = packed(tmp_path, small_images(6))
    path = shards.path / shards.manifest.shards[0].name
    sample = int(shards.packed_order("train")[victim])
    flip_a_bit(shards, sample, byte=22)
    out = np.zeros((6, 1, 8, 8), np.int16)
    with (
        shards.reader("train", verify="never") as reader,
        pytest.raises(ShardError, match=f"sample '{shards.keys('train')[sample]}'") as caught,
    ):
        reader.read_into(range(6), out)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_flipped_bit_among_neighbours_is_found(tmp_path: Path, verify: Verify) -> None:
    shards = packed(tmp_path, small_images(6))
    out = np.zeros((6, 1, 8, 8), np.int16)
    with shards.reader("train", verify=verify) as reader:
        if verify == "always":
            reader.read_into(range(6), out)
        else:
            reader.read_into([0, 1, 2, 3, 5], out[:5])
        flip_a_bit(shards, 4)
        with pytest.raises(ShardError, match=r"sample 'train-00\d'.*xxh3-64"):
            reader.read_into(range(6), out)


def test_small_neighbours_across_two_pages_are_read_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members_module, "TABLE_BLOCK_ROWS", 4)
    samples = small_images(11)
    shards = packed(tmp_path, samples)
    out = np.zeros((11, 1, 8, 8), np.int16)
    with shards.reader("train", verify="never") as reader:
        reader.read_into(range(11), out)
    for row, image in zip(out, images(shards, samples), strict=True):
        np.testing.assert_array_equal(row, image)


def test_small_samples_far_apart_are_read_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = random_samples(200, shape=(8, 8))
    shards = packed(tmp_path, samples)
    packed_order = shards.packed_order("train")
    chosen = packed_order[[0, 199]]
    with shards.reader("train") as reader:
        reads = CountedReads(monkeypatch)
        reader.read_into(chosen, np.empty((2, 1, 8, 8), np.int16))
    assert len(reads.sizes) == 2


@pytest.mark.parametrize("codec", CODECS)
def test_eight_threads_read_what_one_thread_reads(tmp_path: Path, codec: str) -> None:
    samples = random_samples(24, shape=(2, 9, 8, 7))
    shards = packed(tmp_path, samples, codec=codec, shard_bytes=20_000)
    assert len(shards.manifest.shards) > 3
    order = np.random.default_rng(3).integers(0, 24, 400)
    out = np.zeros((400, 2, 9, 8, 7), np.float32)
    failures: list[BaseException] = []
    with shards.reader("train", verify="always", max_open_files=3) as reader:

        def read_every_eighth(thread: int) -> None:
            try:
                for place in range(thread, 400, 8):
                    reader.read_into(order[place : place + 1], out[place : place + 1])
            except (ShardError, ConfigError) as error:
                failures.append(error)

        threads = [threading.Thread(target=read_every_eighth, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    expected = images(shards, samples)
    for row, sample in zip(out, order, strict=True):
        np.testing.assert_array_equal(row, expected[sample])


def flip_a_bit(shards: ShardSet, sample: int, byte: int = -1) -> None:
    """Flip one bit of the image of a sample, in place, as a failing disk does."""
    places = shards.table.members("train", "image", [sample])
    path = shards.path / shards.manifest.shards[int(places.shard[0])].name
    at = int(places.offset[0]) + (byte if byte >= 0 else int(places.stored_bytes[0]) + byte)
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 4]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


READS = {
    "raw": ("npy", (2, 6, 5, 4), "int16"),
    "raw in pieces": ("npy", (2, 40, 128, 129), "int16"),
    "cast": ("npy", (2, 6, 5, 4), "float32"),
    "cast in slabs": ("npy", (2, 40, 128, 129), "float32"),
    "blosc": ("blosc", (2, 6, 5, 4), "int16"),
    "blosc cast": ("blosc", (2, 40, 128, 129), "float32"),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_flipped_bit_is_found_on_every_way_into_a_row(
    tmp_path: Path, name: str, verify: Verify
) -> None:
    codec, shape, dtype = READS[name]
    shards = packed(tmp_path, random_samples(2, shape=shape), codec=codec, shard_bytes=1 << 26)
    flip_a_bit(shards, 1)
    out = np.zeros((1, *shape), dtype)
    with shards.reader("train", verify=verify) as reader:
        reader.read_into([0], out)
        with pytest.raises(ShardError, match=r"xxh3-64 is [0-9a-f]{16}") as caught:
            reader.read_into([1], out)
    offset = int(shards.table.members("train", "image", [1]).offset[0])
    for part in (str(tmp_path), "train-000000.tar", str(shards.keys("train")[1]), str(offset)):
        assert part in str(caught.value)
    assert "streaming-balance verify" in str(caught.value)


def test_verify_first_compares_each_sample_once(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(2))
    out = np.zeros((1, 2, 6, 5, 4), np.int16)
    with shards.reader("train") as first, shards.reader("train", verify="always") as always:
        first.read_into([1], out)
        always.read_into([1], out)
        flip_a_bit(shards, 1)
        first.read_into([1], out)
        with pytest.raises(ShardError, match="xxh3-64"):
            always.read_into([1], out)


def test_a_failed_comparison_does_not_count_as_verified(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(2))
    flip_a_bit(shards, 1)
    out = np.zeros((1, 2, 6, 5, 4), np.int16)
    with shards.reader("train") as reader:
        for _ in range(2):
            with pytest.raises(ShardError, match="xxh3-64"):
                reader.read_into([1], out)


def test_verify_never_still_compares_shape_and_dtype(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(2))
    flip_a_bit(shards, 1)
    # In "{'descr': '<i2'" the letter i stands at byte 10 + 12: flipped, 'i' is 'm', no number.
    flip_a_bit(shards, 0, byte=22)
    out = np.zeros((1, 2, 6, 5, 4), np.int16)
    with shards.reader("train", verify="never") as reader:
        reader.read_into([1], out)
        with pytest.raises(ShardError, match="damaged"):
            reader.read_into([0], out)


def test_a_header_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(1, shape=(2, 6, 5, 4)))
    path = shards.path / shards.manifest.shards[0].name
    path.write_bytes(path.read_bytes().replace(b"(2, 6, 5, 4)", b"(2, 5, 6, 4)"))
    with (
        shards.reader("train", verify="never") as reader,
        pytest.raises(ShardError, match=r"header says int16 \(2, 5, 6, 4\), the table says int16"),
    ):
        reader.read(0)


def test_a_damaged_chunk_is_an_error_even_without_checksums(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(1), codec="blosc")
    # The chunk table follows the 128-byte header: bytes per chunk, then the number of chunks.
    flip_a_bit(shards, 0, byte=132)
    with (
        shards.reader("train", verify="never") as reader,
        pytest.raises(ShardError, match=r"sample 'train-000'.*is damaged"),
    ):
        reader.read(0)


@pytest.mark.parametrize(
    ("row", "dtype", "problem"),
    [
        ((3, 6, 5, 4), "int16", "not channels or axes"),
        ((6, 5, 4), "int16", "not channels or axes"),
        ((2, 6, 5, 4), "uint8", "out is uint8"),
        ((2, 6, 5, 4), "bool", "out is bool"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_row_that_cannot_hold_the_sample_is_refused(
    tmp_path: Path, row: tuple[int, ...], dtype: str, problem: str, count: int
) -> None:
    shards = packed(tmp_path, random_samples(2))
    with shards.reader("train") as reader, pytest.raises(ConfigError, match=problem):
        reader.read_into(range(count), np.zeros((count, *row), dtype))


def test_each_sample_needs_a_row(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(2))
    with shards.reader("train") as reader, pytest.raises(ConfigError, match="3 rows for 2 samples"):
        reader.read_into([0, 1], np.zeros((3, 2, 6, 5, 4), np.int16))


def test_no_samples_fill_no_rows(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(1))
    with shards.reader("train") as reader:
        reader.read_into([], np.zeros((0, 2, 6, 5, 4), np.int16))


@pytest.mark.parametrize("sample", [-1, 2])
def test_a_sample_number_outside_the_split_is_refused(tmp_path: Path, sample: int) -> None:
    shards = packed(tmp_path, random_samples(2))
    with shards.reader("train") as reader:
        with pytest.raises(IndexError, match=f"sample {sample} is outside split 'train' of 2"):
            reader.shape(sample)
        with pytest.raises(IndexError, match="outside split"):
            reader.read_into([0, sample], np.zeros((2, 2, 6, 5, 4), np.int16))


def test_a_field_that_is_not_packed_is_refused_with_those_that_are(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(1))
    with (
        shards.reader("train") as reader,
        pytest.raises(ConfigError, match=r"'images'; this data set holds image.*mean 'image'"),
    ):
        reader.shape(0, "images")


def test_verify_takes_three_words(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(1))
    with pytest.raises(ConfigError, match=r"'frist'; allowed: first, always, never.*mean 'first'"):
        Reader(shards, "train", verify="frist")  # type: ignore[arg-type]


def test_a_closed_reader_says_so(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(1))
    reader = shards.reader("train")
    reader.close()
    reader.close()
    with pytest.raises(ShardError, match="its reader was closed"):
        reader.read(0)


def test_a_hint_for_coming_samples_changes_nothing(tmp_path: Path) -> None:
    samples = random_samples(3)
    shards = packed(tmp_path, samples)
    with shards.reader("train") as reader:
        reader.will_need([0, 2])
        np.testing.assert_array_equal(reader.read(2), images(shards, samples)[2])


def test_the_reader_keeps_no_reference_to_a_row(tmp_path: Path) -> None:
    shards = packed(tmp_path, random_samples(2))
    out = np.zeros((2, 2, 6, 5, 4), np.float32)
    before = sys.getrefcount(out)
    with shards.reader("train") as reader:
        reader.read_into([0, 1], out)
        assert sys.getrefcount(out) == before


def test_no_memory_of_volume_size_is_taken_once_a_thread_is_warm(tmp_path: Path) -> None:
    shape = (2, 40, 128, 129)
    for codec in CODECS:
        shards = packed(
            tmp_path / codec, random_samples(2, shape=shape), codec=codec, shard_bytes=1 << 26
        )
        outs: list[NDArray[Any]] = [
            np.zeros((2, *shape), np.int16),
            np.zeros((2, *shape), np.float32),
            np.zeros((2, 2, 20, 128, 140), np.float32),
        ]
        with shards.reader("train", verify="always") as reader:
            for out in outs:
                reader.read_into([0, 1], out)
            tracemalloc.start()
            for out in outs:
                reader.read_into([1, 0], out)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 200_000


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_overlap_is_centred_whole_and_never_longer_than_either(stored: int, asked: int) -> None:
    (source,), (target,) = centre_overlap((stored,), (asked,))
    assert source.stop - source.start == target.stop - target.start == min(stored, asked)
    assert source.start == max(0, stored - asked) // 2
    assert target.start == max(0, asked - stored) // 2


def test_a_real_volume_reads_as_nibabel_reads_it(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "nifti" / "N01_nibabel_core" / "anatomical.nii"
    image = nibabel.loadsave.load(path)
    assert isinstance(image, nibabel.nifti1.Nifti1Image)
    volume = np.asarray(image.dataobj)
    shards = packed(tmp_path, [Sample(key="P1", image=volume)], codec="blosc")
    np.testing.assert_array_equal(shards.read("train", 0)["image"], volume)


def test_only_the_pages_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four samples to a page and two pages make the table of a billion samples small.
    monkeypatch.setattr(members_module, "TABLE_BLOCK_ROWS", 4)
    monkeypatch.setattr(members_module, "_MAX_PAGES", 2)
    samples = [*random_samples(18), *random_samples(3, split="val", seed=4)]
    shards = packed(tmp_path, samples)
    expected = images(shards, samples)
    out = np.zeros((18, 2, 6, 5, 4), np.int16)
    with shards.reader("train") as reader, shards.reader("val") as val:
        for order in (np.arange(18), np.random.default_rng(0).permutation(18)):
            reader.read_into(order, out)
            for row, sample in zip(out, order, strict=True):
                np.testing.assert_array_equal(row, expected[sample])
        for number, image in enumerate(images(shards, samples, "val")):
            np.testing.assert_array_equal(val.read(number), image)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("stored", "wanted", "survives"),
    [
        ("int16", "float32", True),
        ("int16", "float16", True),
        ("int16", "int32", True),
        ("float64", "float32", True),
        ("uint8", "int16", True),
        ("int16", "int8", False),
        ("int16", "uint16", False),
        ("uint16", "int16", False),
        ("uint16", "float16", False),
        ("int32", "float16", False),
        ("float32", "int32", False),
    ],
)
def test_a_cast_in_which_voxels_could_wrap_or_overflow_is_refused(
    tmp_path: Path, codec: str, stored: str, wanted: str, survives: bool
) -> None:
    extreme = int(np.iinfo(stored).max) if np.dtype(stored).kind in "iu" else 100
    image = np.full((1, 2, 2, 2), extreme, dtype=stored)
    image[0, 0, 0, 0] = 1
    shards = packed(tmp_path / "set", [Sample(key="P1", image=image)], codec=codec)
    out = np.zeros((1, 1, 2, 2, 2), dtype=wanted)
    with shards.reader("train") as reader:
        if survives:
            reader.read_into([0], out)
            assert np.isfinite(out).all()
            assert out[0, 0, 0, 0, 0] == 1
            assert np.allclose(out[0, 0, 1].astype(float), float(extreme), rtol=1e-3)
        else:
            with pytest.raises(ConfigError, match="which it cannot hold"):
                reader.read_into([0], out)
