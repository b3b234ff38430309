"""Arrays that are stored alike have one number, and no others share it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.storage import members as members_module
from streaming_balance.storage.kinds import ABSENT
from streaming_balance.storage.members import SplitMembers
from streaming_balance.storage.shards import ShardSet, open_shards
from tests.building import Sample, pack

# What an image is stored as, three samples each: (dtype, shape, axes).
STORED: Sequence[tuple[str, tuple[int, ...], str]] = (
    ("uint8", (2, 3), "HW"),
    ("int16", (2, 3), "HW"),
    ("int16", (3, 2), "HW"),
    ("int16", (2, 3, 4), "CHW"),
    ("int16", (2, 3, 4), "DHW"),
    ("int16", (1, 2, 3, 4), "CDHW"),
)


def mixed(folder: Path) -> tuple[ShardSet, dict[str, tuple[Any, ...]]]:
    """Pack samples of all kinds, every fourth with a mask: key -> what it is stored as."""
    samples, stored = [], {}
    for number in range(18):
        dtype, shape, axes = STORED[number % len(STORED)]
        key = f"P{number:02d}"
        seg = np.zeros(shape[-2:], np.uint8) if number % 4 == 0 else None
        samples.append(Sample(key=key, image=np.ones(shape, dtype), axes=axes, seg=seg))
        stored[key] = (dtype, shape, axes)
    pack(folder, samples)
    return open_shards(folder), stored


@pytest.mark.parametrize("rows_of_a_page", [4, 65_536])
def test_numbers_are_equal_exactly_where_arrays_are_stored_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_of_a_page: int
) -> None:
    monkeypatch.setattr(members_module, "TABLE_BLOCK_ROWS", rows_of_a_page)
    shards, stored = mixed(tmp_path)
    members = SplitMembers(shards.table, "train", shards.arrays)
    order = np.random.default_rng(0).permutation(18)
    numbers = members.kind_numbers(order, "image").tolist()
    described = [stored[str(key)] for key in shards.keys("train")[order]]
    for one, what in zip(numbers, described, strict=True):
        for other, what_else in zip(numbers, described, strict=True):
            assert (one == other) == (what == what_else)
        kind, (dtype, shape, axes) = members.kind(one), what
        assert (kind.codec, kind.dtype, kind.shape) == ("npy", np.dtype(dtype), shape)
        assert kind.row_shape == (shape if axes[0] == "C" else (1, *shape))


def test_samples_without_the_array_are_of_no_kind(tmp_path: Path) -> None:
    shards, _ = mixed(tmp_path)
    members = SplitMembers(shards.table, "train", shards.arrays)
    numbers = members.kind_numbers(np.arange(18), "seg")
    keys = shards.keys("train")
    assert [str(key) for key in keys[numbers != ABSENT]] == ["P00", "P04", "P08", "P12", "P16"]


def test_no_samples_have_no_kinds_and_wrong_questions_are_refused(tmp_path: Path) -> None:
    shards, _ = mixed(tmp_path)
    members = SplitMembers(shards.table, "train", shards.arrays)
    assert members.kind_numbers(np.arange(0), "image").tolist() == []
    with pytest.raises(IndexError, match="sample 18 is outside"):
        members.kind_numbers(np.array([3, 18]), "image")
    with pytest.raises(ConfigError, match="field is 'mask'"):
        members.kind_numbers(np.array([3]), "mask")
