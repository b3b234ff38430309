from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.shards import ShardSet, open_shards
from tests.building import Sample, by_key, open_files, pack, random_samples


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Ten training and four validation samples; the training ones come from two sites."""
    train = [
        Sample(
            key=sample.key,
            image=sample.image,
            patient=f"patient-{sample.key}",
            label=sample.label,
            columns={"site": "AB"[number % 2]},
        )
        for number, sample in enumerate(random_samples(10))
    ]
    val = [
        Sample(
            key=sample.key,
            image=sample.image,
            label=sample.label,
            split="val",
            columns={"site": "C"},
        )
        for sample in random_samples(4, split="val", seed=1)
    ]
    return [*train[::-1], *val]


@pytest.fixture(scope="module")
def shards(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The samples above, two to a shard."""
    folder = tmp_path_factory.mktemp("cohort")
    pack(folder, samples, codec="blosc", shard_bytes=9_000)
    return open_shards(folder)


def test_a_data_set_says_what_it_holds(shards: ShardSet) -> None:
    assert shards.splits == ("train", "val")
    assert shards.train_splits == ("train",)
    assert shards.classes == ["HGG", "LGG"]
    assert shards.columns == ("site",)
    assert shards.arrays == ("image",)
    assert len(shards) == 14
    assert (shards.size("train"), shards.size("val")) == (10, 4)
    assert shards.digest == shards.manifest.digest
    assert repr(shards) == f"<ShardSet {shards.path}: train 10, val 4>"


def test_arrays_per_split_stand_in_sample_number_order(
    shards: ShardSet, samples: list[Sample]
) -> None:
    keys = [str(key) for key in shards.keys("train")]
    known = by_key(samples)
    # Sorted by class HGG then LGG, then by patient.
    expected = sorted(
        (sample for sample in samples if sample.split == "train"),
        key=lambda sample: (sample.label, sample.key),
    )
    assert keys == [sample.key for sample in expected]
    assert shards.labels("train").dtype == np.int64
    assert shards.labels("train").tolist() == [
        shards.classes.index(known[key].label) for key in keys
    ]
    assert shards.patients("train").tolist() == [f"patient-{key}" for key in keys]
    assert shards.column("train", "site").tolist() == [known[key].columns["site"] for key in keys]


def test_arrays_cannot_be_written(shards: ShardSet) -> None:
    for array in (
        shards.labels("train"),
        shards.keys("train"),
        shards.patients("train"),
        shards.column("train", "site"),
        shards.packed_order("train"),
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[1]


def test_packed_order_is_the_order_of_packing(shards: ShardSet, samples: list[Sample]) -> None:
    assert len(shards.manifest.shards) > 3
    for split in shards.splits:
        packed = [sample.key for sample in samples if sample.split == split]
        assert shards.keys(split)[shards.packed_order(split)].tolist() == packed
        assert shards.packed_order(split).dtype == np.int64


def test_a_sample_reads_as_it_was_packed(shards: ShardSet, samples: list[Sample]) -> None:
    known = by_key(samples)
    for split in shards.splits:
        for number, key in enumerate(shards.keys(split)):
            read = shards.read(split, number)
            assert set(read) == {"image"}
            np.testing.assert_array_equal(read["image"], known[str(key)].image)
            assert read["image"].dtype == np.int16


def test_reading_compares_checksums_every_time(tmp_path: Path) -> None:
    pack(tmp_path, random_samples(1))
    shards = open_shards(tmp_path)
    shards.read("train", 0)
    path = tmp_path / shards.manifest.shards[0].name
    with path.open("r+b") as file:
        file.seek(800)
        file.write(b"\xff\x00\xff")
    with pytest.raises(ShardError, match="xxh3-64"):
        shards.read("train", 0)


def test_closing_closes_files_and_keeps_arrays(tmp_path: Path) -> None:
    pack(tmp_path, random_samples(2))
    shards = open_shards(tmp_path)
    shards.read("train", 0)
    shards.close()
    assert not any(place.startswith(str(tmp_path)) for place in open_files())
    assert shards.labels("train").tolist() == [0, 1]
    shards.read("train", 1)
    shards.close()
    shards.close()


def test_text_paths_and_paths_open_alike(shards: ShardSet) -> None:
    assert open_shards(str(shards.path)).digest == shards.digest


ASKING: dict[str, Callable[[ShardSet], object]] = {
    "size": lambda shards: shards.size("trian"),
    "labels": lambda shards: shards.labels("trian"),
    "patients": lambda shards: shards.patients("trian"),
    "keys": lambda shards: shards.keys("trian"),
    "column": lambda shards: shards.column("trian", "site"),
    "packed_order": lambda shards: shards.packed_order("trian"),
    "read": lambda shards: shards.read("trian", 0),
    "reader": lambda shards: shards.reader("trian"),
}


@pytest.mark.parametrize("question", ASKING)
def test_an_unknown_split_is_answered_with_the_known_ones(shards: ShardSet, question: str) -> None:
    with pytest.raises(ConfigError, match=r"'trian'.*train, val.*Did you mean 'train'"):
        ASKING[question](shards)


def test_an_unknown_column_is_answered_with_the_known_ones(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"'sites'.*site.*Did you mean 'site'"):
        shards.column("train", "sites")


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "http", "https"])
def test_remote_addresses_are_said_to_come_later(scheme: str) -> None:
    with pytest.raises(ConfigError, match=rf"{scheme}:// addresses come in a later release"):
        open_shards(f"{scheme}://bucket/cohort")


def test_storage_options_of_a_folder_are_refused(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"storage_options holds endpoint, region"):
        open_shards(shards.path, storage_options={"region": "eu", "endpoint": "x"})


def test_windows_is_told_of_wsl(monkeypatch: pytest.MonkeyPatch, shards: ShardSet) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match="WSL"):
        open_shards(shards.path)


@pytest.mark.parametrize("address", [None, 5, "", b"cohort", ["cohort"]])
def test_what_is_no_address_is_refused_with_the_way_out(address: Any) -> None:
    with pytest.raises(ConfigError, match=r"address is .*manifest\.json: open_shards\('cohort/'\)"):
        open_shards(address)


@pytest.mark.parametrize("sample", ["train-000", True, np.True_, 1.0, None, (1,)])
def test_a_sample_that_is_no_number_is_answered_with_those_there_are(
    shards: ShardSet, sample: Any
) -> None:
    with pytest.raises(ConfigError, match=r"sample is .*0 to 9.*shards\.keys\('train'\)"):
        shards.read("train", sample)


def test_numbers_of_numpy_name_samples(shards: ShardSet) -> None:
    for number in (np.int64(3), np.uint8(3)):
        read = shards.read("train", number)  # type: ignore[arg-type]
        np.testing.assert_array_equal(read["image"], shards.read("train", 3)["image"])


@pytest.mark.parametrize(
    "way", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))]
)
def test_a_data_set_that_is_sent_elsewhere_is_opened_again_there(
    shards: ShardSet, way: Callable[[ShardSet], ShardSet]
) -> None:
    again = way(shards)
    assert again is not shards
    assert (again.path, again.digest) == (shards.path, shards.digest)
    np.testing.assert_array_equal(again.read("val", 1)["image"], shards.read("val", 1)["image"])
