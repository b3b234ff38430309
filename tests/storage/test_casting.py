"""No voxel that is finite as stored becomes infinite on its way into a batch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.storage.filling import SLAB_BYTES
from streaming_balance.storage.shards import ShardSet, open_shards
from tests.building import Sample, pack

SMALL, LARGE = (1, 4, 4, 4), (1, 3, 512, 512)


def packed(folder: Path, codec: str, *images: Any) -> ShardSet:
    """Pack images as P0, P1, ..."""
    samples = [Sample(key=f"P{number}", image=image) for number, image in enumerate(images)]
    pack(folder, samples, codec=codec, shard_bytes=1 << 24)
    return open_shards(folder)


def row_for(shape: tuple[int, ...], dtype: str, way: str) -> Any:
    """Make one row that asks for a stored shape whole, cropped, or strided."""
    channels, *space = shape
    if way == "cropped":
        return np.zeros((1, channels, *(side - 1 for side in space)), dtype)
    if way == "strided":
        return np.zeros((1, channels, *space, 2), dtype)[..., 0]
    return np.zeros((1, *shape), dtype)


@pytest.mark.parametrize("way", ["whole", "cropped", "strided"])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("codec", ["npy", "blosc"])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float32", "float16"), ("float64", "float16"), ("float64", "float32")],
)
def test_a_value_beyond_the_dtype_asked_for_names_its_sample_and_the_way_out(
    tmp_path: Path, stored: str, wanted: str, codec: str, shape: tuple[int, ...], way: str
) -> None:
    assert np.prod(LARGE) * 4 > SLAB_BYTES, "large means more than one slab"
    image = np.ones(shape, stored)
    image[0, 1, 1, 1] = float(np.finfo(wanted).max) * 2
    shards = packed(tmp_path / "set", codec, np.ones(shape, stored), image)
    number = shards.keys("train").tolist().index("P1")
    with shards.reader("train") as reader:
        row = row_for(shape, wanted, way)
        reader.read_into([1 - number], row)
        assert (row == 1).all()
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"'P1'.*Use float32, and cast on the device"):
                reader.read_into([number], row)


def test_among_small_neighbours_read_together_the_right_sample_is_named(tmp_path: Path) -> None:
    images = [np.full(SMALL, float(number), np.float32) for number in range(9)]
    images[5][0, 0, 0, 0] = 70_000
    shards = packed(tmp_path / "set", "npy", *images)
    with shards.reader("train") as reader:
        reader.read_into(range(9), np.zeros((9, *SMALL), np.float32))
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"'P5'.*beyond 65504, the largest of float16"):
                reader.read_into(range(9), np.zeros((9, *SMALL), np.float16))


@pytest.mark.parametrize("codec", ["npy", "blosc"])
def test_stored_infinities_and_the_largest_value_pass(tmp_path: Path, codec: str) -> None:
    image = np.full(SMALL, 65_504, np.float32)
    image[0, 0, 0, :3] = np.inf, -np.inf, np.nan
    shards = packed(tmp_path / "set", codec, image)
    with shards.reader("train") as reader:
        out = np.zeros((1, *SMALL), np.float16)
        reader.read_into([0], out)
    np.testing.assert_array_equal(out[0], image)


def test_the_caller_s_own_numpy_settings_stay_as_they_are(tmp_path: Path) -> None:
    shards = packed(tmp_path / "set", "npy", np.full(SMALL, 1e6, np.float32))
    before = np.geterr()
    with shards.reader("train") as reader:
        with pytest.raises(ConfigError):
            reader.read_into([0], np.zeros((1, *SMALL), np.float16))
        assert np.geterr() == before


def test_every_thread_finds_values_that_do_not_fit(tmp_path: Path) -> None:
    shards = packed(tmp_path / "set", "blosc", np.full(SMALL, 1e6, np.float32))
    refused: list[str] = []
    with shards.reader("train") as reader:

        def read() -> None:
            try:
                reader.read_into([0], np.zeros((1, *SMALL), np.float16))
            except ConfigError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(refused) == 4
