"""What a data set says about its samples, opened after its shards are gone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from streaming_balance.errors import ConfigError, ShardError, SplitError
from streaming_balance.storage.shards import open_shards, open_table
from tests.building import Sample, pack, random_samples, rewrite_column


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight training samples over several shards, and two validation ones."""
    folder = tmp_path / "cohort"
    pack(folder, [*random_samples(8), *random_samples(2, split="val", seed=1)], shard_bytes=9_000)
    return folder


def delete_shards(folder: Path) -> None:
    """Leave manifest and table alone."""
    shards = list(folder.glob("*.tar"))
    assert len(shards) > 2
    for shard in shards:
        shard.unlink()


def test_a_table_without_shards_says_all_that_the_data_set_said(folder: Path) -> None:
    whole = open_shards(folder)
    said = [
        (split, whole.keys(split).tolist(), whole.patients(split).tolist(), whole.labels(split))
        for split in whole.splits
    ]
    delete_shards(folder)
    with pytest.raises(ShardError, match="is missing or out of reach"):
        open_shards(folder)
    table = open_table(folder)
    assert (table.digest, table.classes, table.splits) == (
        whole.digest,
        whole.classes,
        whole.splits,
    )
    for split, keys, patients, labels in said:
        assert table.keys(split).tolist() == keys
        assert table.patients(split).tolist() == patients
        assert table.labels(split).tolist() == labels.tolist()


def test_reading_a_sample_of_a_shard_that_is_gone_names_it(folder: Path) -> None:
    delete_shards(folder)
    with pytest.raises(ShardError, match=r"train-000000\.tar is missing"):
        open_table(folder).read("train", 0)


def test_a_sample_whose_shard_is_still_there_can_be_read(folder: Path) -> None:
    expected = open_shards(folder).read("train", 3)["image"]
    assert (open_table(folder).read("train", 3)["image"] == expected).all()


def test_a_table_that_is_sent_elsewhere_is_opened_without_shards_there_too(folder: Path) -> None:
    delete_shards(folder)
    assert copy.copy(open_table(folder)).digest == open_table(folder).digest


@pytest.mark.parametrize("name", ["manifest.json", "samples.arrow"])
def test_a_damaged_manifest_or_table_is_refused(folder: Path, name: str) -> None:
    stored = bytearray((folder / name).read_bytes())
    stored[len(stored) // 2] ^= 1
    (folder / name).write_bytes(stored)
    with pytest.raises(ShardError, match=name):
        open_table(folder)


def test_a_missing_table_is_refused(folder: Path) -> None:
    (folder / "samples.arrow").unlink()
    with pytest.raises(ShardError, match=r"samples\.arrow"):
        open_table(folder)


def test_a_patient_in_two_splits_is_refused_without_shards_too(tmp_path: Path) -> None:
    folder = tmp_path / "cohort"
    images = random_samples(3)
    pack(
        folder,
        [
            Sample(key="a", image=images[0].image, patient="P1"),
            Sample(key="b", image=images[1].image, patient="P2"),
            Sample(key="c", image=images[2].image, patient="P3", split="val"),
        ],
    )
    rewrite_column(folder, "patient", ["P1", "P2", "P1"])
    for shard in folder.glob("*.tar"):
        shard.unlink()
    with pytest.raises(SplitError, match="'P1' stands in splits 'train' and 'val'"):
        open_table(folder)


def test_what_is_no_folder_of_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="come in a later release"):
        open_table("s3://bucket/cohort")
    with pytest.raises(ShardError, match="is not a folder"):
        open_table(tmp_path / "nowhere")
