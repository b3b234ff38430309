"""A packed split, sample by sample: the voxels as packed, in any process, for any DataLoader."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.samplers import BalancedBatchSampler
from streaming_balance.training.shard_dataset import ShardDataset
from tests.building import Sample, by_key, open_files, pack, random_samples
from tests.training.cohorts import SHAPE, cohort, packed, voxels
from tests.training.sampler_cases import global_states_untouched

# Loaders fork their workers; Python 3.12 warns of that wherever there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

MADE = by_key(cohort())


@pytest.fixture
def train(small: ShardSet) -> ShardDataset:
    return ShardDataset(small, "train")


def test_a_sample_is_what_was_packed(train: ShardDataset, small: ShardSet) -> None:
    assert len(train) == 14
    for number, key in enumerate(small.keys("train").tolist()):
        sample = train[number]
        assert sample["image"].dtype == torch.float32
        assert np.array_equal(sample["image"].numpy(), MADE[key].image)
        assert {name: sample[name] for name in ("key", "patient", "sample")} == {
            "key": key,
            "patient": key,
            "sample": number,
        }
        assert train.classes[sample["label"]] == MADE[key].label
        assert type(sample["label"]) is type(sample["sample"]) is int


def test_many_samples_at_once_are_the_samples_one_by_one(train: ShardDataset) -> None:
    wanted = [7, 0, 13, 7, 3]
    for sample, number in zip(train.__getitems__(wanted), wanted, strict=True):
        alone = train[number]
        assert torch.equal(sample.pop("image"), alone.pop("image"))
        assert sample == alone
    assert train.__getitems__([]) == []


def test_samples_of_one_call_and_of_the_next_do_not_overwrite_each_other(
    train: ShardDataset,
) -> None:
    kept = [train.__getitems__([number, number + 1])[0]["image"] for number in range(0, 12, 2)]
    for image, number in zip(kept, range(0, 12, 2), strict=True):
        assert torch.equal(image, train[number]["image"])


def test_targets_labels_and_patients_are_known_without_reading(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort())
    for shard in shards.manifest.shards:
        (shards.path / shard.name).write_bytes(b"")
    dataset = ShardDataset(shards, "train")
    keys = shards.keys("train").tolist()
    assert dataset.labels.tolist() == [MADE[key].label for key in keys]
    assert [dataset.classes[number] for number in dataset.targets] == dataset.labels.tolist()
    assert dataset.patients.tolist() == keys
    assert (dataset.split, dataset.is_for_training) == ("train", True)
    assert not ShardDataset(shards, "val").is_for_training
    with pytest.raises(ShardError):
        dataset[0]


def test_a_configuration_that_names_classes_balances_the_labels(train: ShardDataset) -> None:
    balance = {"name": "target", "shares": {"LGG": 0.75, "HGG": 0.25}}
    for batch in BalancedBatchSampler(train.labels, batch_size=4, balance=balance):
        assert sorted(train.labels[batch].tolist()) == ["HGG", "LGG", "LGG", "LGG"]


@pytest.mark.parametrize("index", [np.int64(3), torch.tensor(3), -11])
def test_a_number_of_any_library_names_a_sample(train: ShardDataset, index: Any) -> None:
    assert train[index]["sample"] == 3


def test_a_sample_that_is_not_there_is_an_index_error(train: ShardDataset) -> None:
    for index in (14, -15):
        with pytest.raises(IndexError, match="samples 0 to 13"):
            train[index]
    assert [sample["sample"] for sample in train] == list(range(14))  # type: ignore[attr-defined]
    for wrong in ("H00", True, 1.0):
        with pytest.raises(ConfigError, match=r"called by their numbers, 0 to 13.*shards\.keys"):
            train[wrong]  # type: ignore[index]


def test_dtype_and_size_are_those_of_the_loaders(small: ShardSet) -> None:
    stored = ShardDataset(small, "train", dtype=None)
    assert stored[0]["image"].dtype == torch.int16
    sized = ShardDataset(small, "train", size=(2, 3, 9))
    image = sized[0]["image"].numpy()
    expected = np.zeros((2, 2, 3, 9), dtype=np.float32)
    expected[..., 2:7] = MADE[str(small.keys("train")[0])].image[:, 1:3]
    assert np.array_equal(image, expected)
    for wrong in ({"size": (2, 3)}, {"size": "2"}, {"dtype": torch.bfloat16}, {"verify": "no"}):
        with pytest.raises(ConfigError):
            ShardDataset(small, "train", **wrong)[0]
    with pytest.raises(ConfigError, match=r"split is 'trian'.*Did you mean 'train'"):
        ShardDataset(small, "trian")
    with pytest.raises(ConfigError, match="open_shards"):
        ShardDataset(str(small.path), "train")  # type: ignore[arg-type]


def test_masks_keep_their_dtype_and_may_be_missing(tmp_path: Path) -> None:
    samples = random_samples(4)
    mask = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4) % 3
    first = Sample(key=samples[0].key, image=samples[0].image, label="LGG", seg=mask)
    pack(tmp_path / "cohort", [first, *samples[1:]])
    dataset = ShardDataset(open_shards(tmp_path / "cohort"), "train")
    with_mask = [s for s in dataset.__getitems__(range(4)) if "seg" in s]
    assert [s["key"] for s in with_mask] == [first.key]
    assert with_mask[0]["seg"].dtype == torch.uint8
    assert np.array_equal(with_mask[0]["seg"].numpy().squeeze(), mask)


def test_unequal_shapes_come_as_they_are(tmp_path: Path) -> None:
    shapes = [(1, 2, 3, 4), (1, 4, 3, 2), (1, 2, 3, 4)]
    samples = [
        Sample(key=f"P{n}", image=voxels(n, shape), label="HGG" if n else "LGG")
        for n, shape in enumerate(shapes)
    ]
    dataset = ShardDataset(packed(tmp_path / "cohort", samples), "train")
    for sample in dataset.__getitems__([0, 1, 2]):
        number = int(sample["key"][1:])
        assert np.array_equal(sample["image"].numpy(), voxels(number, shapes[number]))


def test_a_transform_of_the_sample_is_applied(small: ShardSet) -> None:
    dataset = ShardDataset(small, "train", transform=lambda s: s | {"mean": s["image"].mean()})
    assert dataset[2]["mean"] == dataset[2]["image"].mean()


def test_a_transform_whose_arguments_nobody_can_look_up_is_called(small: ShardSet) -> None:
    assert ShardDataset(small, "train", transform=dict)[2]["sample"] == 2


def test_a_transform_that_wants_a_generator_is_refused_with_the_way_out(small: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"takes a generator.*train_loader"):
        ShardDataset(small, "train", transform=lambda sample, rng: sample)  # noqa: ARG005


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (2, "spawn")])
def test_a_dataloader_delivers_balanced_volumes_with_any_kind_of_worker(
    train: ShardDataset, workers: int, context: str | None
) -> None:
    # Files are open before the workers start: each must open its own.
    train[0]
    sampler = BalancedBatchSampler(train.targets, batch_size=4, seed=2, patients=train.patients)
    expected = list(sampler)
    sampler.set_epoch(0)
    loader = DataLoader(
        train, batch_sampler=sampler, num_workers=workers, multiprocessing_context=context
    )
    got = []
    for batch in loader:
        assert batch["image"].shape == (4, *SHAPE)
        for image, key in zip(batch["image"], batch["key"], strict=True):
            assert np.array_equal(image.numpy(), MADE[key].image)
        assert batch["label"].dtype == torch.int64
        assert sorted(batch["label"].tolist()) == [0, 0, 1, 1]
        got.append(batch["sample"].tolist())
    assert got == expected


def test_a_copy_reads_through_files_of_its_own(train: ShardDataset) -> None:
    train[0]
    for twin in (pickle.loads(pickle.dumps(train)), copy.deepcopy(train)):
        train.close()
        assert np.array_equal(twin[5]["image"].numpy(), train[5]["image"].numpy())
        twin.close()


def test_closing_and_letting_go_close_the_files(small: ShardSet) -> None:
    before = open_files()
    dataset = ShardDataset(small, "train")
    dataset.__getitems__(range(14))
    assert open_files() - before
    dataset.close()
    dataset.close()
    assert open_files() <= before
    dataset[0]
    del dataset
    assert open_files() <= before


def test_a_forked_child_opens_files_of_its_own_and_leaves_the_parent_s(
    train: ShardDataset,
) -> None:
    train[0]
    parent = train._own_files()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        train[3]
        answers.put((train._own_files() is parent, train._own_files().process == os.getpid()))

    process = context.Process(target=child)
    process.start()
    assert answers.get() == (False, True)
    process.join()
    assert process.exitcode == 0
    assert train[3]["sample"] == 3
    assert train._own_files() is parent


def test_nothing_touches_the_global_generators(train: ShardDataset) -> None:
    with global_states_untouched():
        train.__getitems__(range(14))
