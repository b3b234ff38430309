"""Shards written by `webdataset` itself, indexed in place: planned, loaded, resumed, verified."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.ingest.index import index_shards
from streaming_balance.report.audit import audit_run
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.storage.verify import verify_shards
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader
from streaming_balance.training.shard_dataset import ShardDataset
from streaming_balance.training.state import LoaderState

Volumes = dict[str, NDArray[np.int16]]
NUM_SAMPLES, NUM_RARE = 60, 12


@pytest.fixture
def volumes() -> Volumes:
    """Volumes by key, every fifth of the rare class."""
    generator = np.random.default_rng(7)
    return {
        f"scan{number:03d}": generator.integers(-900, 900, (3, 4, 5), dtype=np.int16)
        for number in range(NUM_SAMPLES)
    }


@pytest.fixture
def tars(volumes: Volumes, tmp_path: Path) -> Path:
    """The volumes as `webdataset.ShardWriter` writes them, in a folder nobody may write to."""
    folder = tmp_path / "tars"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "part-%04d.tar"), maxcount=25, verbose=0) as sink:
        for number, (key, volume) in enumerate(volumes.items()):
            patient = {"patient": {"id": f"P{number // 2}"}}
            label = int(number % 10 in (0, 1))
            sink.write({"__key__": key, "npy": volume, "cls": label, "json": patient})
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    return folder


@pytest.fixture
def shards(tars: Path, tmp_path: Path) -> ShardSet:
    """The index of them."""
    report = index_shards(
        str(tars / "part-*.tar"), out=tmp_path / "index", patient="json:patient.id"
    )
    assert (report.found, report.indexed, report.rejected) == (NUM_SAMPLES, NUM_SAMPLES, ())
    return open_shards(tmp_path / "index")


def loader_of(shards: ShardSet, **settings: Any) -> Any:
    return train_loader(
        shards, global_batch_size=8, balance="class_balanced", seed=3, dtype=None, **settings
    )


def test_a_balanced_loader_delivers_the_very_voxels_that_were_written(
    shards: ShardSet, volumes: Volumes
) -> None:
    delivered = set()
    with loader_of(shards) as loader:
        for batch in loader:
            assert np.bincount(batch["label"].numpy(), minlength=2).tolist() == [4, 4]
            for key, image in zip(batch["key"], batch["image"].numpy(), strict=True):
                np.testing.assert_array_equal(image[0], volumes[key])
                delivered.add(key)
    assert len(delivered) > NUM_RARE


def test_evaluation_delivers_every_sample_once_in_the_order_of_the_tars(
    tars: Path, volumes: Volumes, tmp_path: Path
) -> None:
    index_shards(str(tars / "*.tar"), out=tmp_path / "val", split="val")
    with eval_loader(open_shards(tmp_path / "val"), split="val", batch_size=7) as loader:
        keys = [key for batch in loader for key in batch["key"]]
    assert keys == list(volumes)


def test_resuming_in_the_middle_of_an_epoch_goes_on_as_if_nothing_had_happened(
    shards: ShardSet,
) -> None:
    with loader_of(shards) as whole:
        batches = [batch["key"] for batch in whole]
    with loader_of(shards) as first:
        iterator = iter(first)
        begun = [next(iterator)["key"] for _ in range(3)]
        state = json.loads(json.dumps(first.state_dict()))
    with loader_of(shards) as second:
        second.load_state_dict(state)
        rest = [batch["key"] for batch in second]
    assert begun + rest == batches


def test_patients_come_from_the_json_and_the_audit_names_them(shards: ShardSet) -> None:
    assert set(shards.patients("train")) == {f"P{number}" for number in range(NUM_SAMPLES // 2)}
    with loader_of(shards) as loader:
        list(loader)
        state = LoaderState.from_dict(loader.state_dict())
    exposure = audit_run(shards, state).exposure
    assert set(exposure) == set(shards.patients("train"))


def test_a_dataset_for_torch_loaders_reads_them_too(shards: ShardSet, volumes: Volumes) -> None:
    sample = ShardDataset(shards, "train", dtype=None)[5]
    np.testing.assert_array_equal(sample["image"][0].numpy(), volumes[sample["key"]])


def test_verify_names_the_sample_in_which_a_byte_was_flipped(shards: ShardSet, tars: Path) -> None:
    assert verify_shards(shards.path).ok
    place = shards.table.members("train", "image", [17])
    name = shards.manifest.shards[int(place.shard[0])].name
    path = tars / Path(name).name
    path.chmod(0o644)
    at = int(place.offset[0]) + int(place.stored_bytes[0]) - 1
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    report = verify_shards(shards.path)
    assert not report.ok
    assert {problem.shard for problem in report.problems} == {name}
    assert [problem.key for problem in report.problems if problem.key] == [
        str(shards.keys("train")[17])
    ]
    with pytest.raises(ShardError, match=r"damaged.*index command with --overwrite"):
        shards.read("train", 17)


def test_a_flipped_byte_in_a_header_is_found_by_the_digest_of_the_shard(
    shards: ShardSet, tars: Path
) -> None:
    path = tars / "part-0001.tar"
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(300)
        file.write(b"\x01")
    problems = verify_shards(shards.path).problems
    assert [(problem.shard, problem.key) for problem in problems] == [
        ("../tars/part-0001.tar", None)
    ]
    assert "SHA-256" in problems[0].problem


def test_a_shard_that_changed_its_size_is_refused_at_opening(shards: ShardSet, tars: Path) -> None:
    path = tars / "part-0002.tar"
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ShardError, match=r"part-0002\.tar: size \d+, the index says \d+"):
        open_shards(shards.path)


def test_a_shard_that_is_gone_is_refused_at_opening(shards: ShardSet, tars: Path) -> None:
    tars.chmod(0o755)
    (tars / "part-0000.tar").unlink()
    with pytest.raises(ShardError, match=r"part-0000\.tar is missing or out of reach"):
        open_shards(shards.path)


@pytest.mark.usefixtures("shards")
def test_index_and_tars_can_be_moved_together(volumes: Volumes, tmp_path: Path) -> None:
    home = tmp_path / "elsewhere"
    home.mkdir()
    (tmp_path / "tars").chmod(0o755)
    (tmp_path / "tars").rename(home / "tars")
    (tmp_path / "index").rename(home / "index")
    moved = open_shards(home / "index")
    np.testing.assert_array_equal(
        moved.read("train", 0)["image"], volumes[str(moved.keys("train")[0])]
    )


@pytest.fixture
def pictures(tmp_path: Path) -> ShardSet:
    """Samples of a text and of bytes nobody decodes."""
    (tmp_path / "raw").mkdir()
    with webdataset.TarWriter(str(tmp_path / "raw" / "a.tar")) as sink:
        for number in range(40):
            picture = bytes([number]) * (10 + number)
            sink.write({"__key__": f"p{number}", "bin": picture, "txt": "", "cls": number % 2})
    report = index_shards(tmp_path / "raw" / "a.tar", out=tmp_path / "pictures")
    assert any("kept as bytes" in warning for warning in report.warnings)
    return open_shards(tmp_path / "pictures")


def test_members_without_a_decoder_are_read_as_their_bytes(pictures: ShardSet) -> None:
    assert (pictures.arrays, pictures.bytes_fields) == ((), ("bin", "txt"))
    keys = pictures.keys("train").tolist()
    sample = pictures.read("train", keys.index("p3"))
    assert sample["bin"].tobytes() == b"\x03" * 13
    assert sample["txt"].shape == (0,)
    with pictures.reader("train") as reader:
        assert reader.read(keys.index("p3"), "cls").tobytes() == b"1"


@pytest.mark.parametrize("make", [loader_of, lambda shards: ShardDataset(shards, "train")])
def test_tensors_of_members_without_a_decoder_are_refused_with_the_way_out(
    pictures: ShardSet, make: Any
) -> None:
    with pytest.raises(ConfigError, match=r"member 'p0\.bin' of sample 'p0'.*Give transform="):
        make(pictures)


def test_a_row_of_a_batch_cannot_be_filled_with_bytes(pictures: ShardSet) -> None:
    with (
        pictures.reader("train") as reader,
        pytest.raises(ConfigError, match=r"p0\.bin of sample 'p0' has no decoder"),
    ):
        reader.read_into([0], np.empty((1, 10), np.uint8), field="bin")


def decoded(sample: dict[str, Any]) -> dict[str, Any]:
    """Make an image of one pixel that says how long the bytes are."""
    image = torch.tensor([[[float(len(sample.pop("bin")))]]])
    del sample["txt"]
    return sample | {"image": image}


def test_a_transform_decodes_what_the_package_does_not(pictures: ShardSet) -> None:
    with loader_of(pictures, transform=decoded) as loader:
        for batch in loader:
            for key, image in zip(batch["key"], batch["image"], strict=True):
                assert image.item() == 10 + int(key.removeprefix("p"))
    assert ShardDataset(pictures, "train", transform=decoded)[0]["image"].item() == 10


def test_damaged_bytes_are_stood_in_for_when_that_is_asked_for(pictures: ShardSet) -> None:
    place = pictures.table.members("train", "bin", [0])
    path = pictures.path / pictures.manifest.shards[0].name
    with path.open("r+b") as file:
        file.seek(int(place.offset[0]))
        file.write(b"\xff")
    with loader_of(pictures, transform=decoded) as loader, pytest.raises(ShardError, match="xxh3"):
        list(loader)
    with loader_of(pictures, transform=decoded, on_error="substitute") as loader:
        keys = {key for batch in loader for key in batch["key"]}
        assert loader.stats()["substituted"] > 0
    assert "p0" not in keys
