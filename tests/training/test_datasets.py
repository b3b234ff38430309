"""Balanced loaders and subsets over any map-style dataset, none of whose samples is looked at."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from streaming_balance.errors import ConfigError
from streaming_balance.training.datasets import (
    downsample_dataset,
    get_balanced_dataloader,
    upsample_dataset,
)
from streaming_balance.training.samplers import BalancedBatchSampler
from streaming_balance.training.shard_dataset import ShardDataset
from tests.training.cohorts import cohort, packed
from tests.training.sampler_cases import Numbers, Unreadable, global_states_untouched

# Loaders fork their workers; Python 3.12 warns of that wherever there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

LABELS = [0] * 210 + [1] * 75


class Targeted(Unreadable):
    """An unreadable dataset that says its labels."""

    def __init__(self, targets: Any) -> None:
        super().__init__(len(targets))
        self.targets = targets


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.0, (75, 75)), (0.5, (150, 75)), (75 / 210, (210, 75)), (0.9, (83, 75))],
)
def test_downsampling_thins_the_large_class_to_the_ratio(
    ratio: float, expected: tuple[int, int]
) -> None:
    subset = downsample_dataset(Unreadable(285), ratio, labels=LABELS)
    assert isinstance(subset, Subset)
    counts = Counter(subset.targets)
    assert (counts[0], counts[1]) == expected
    assert len(set(subset.indices)) == len(subset) == sum(expected)
    assert list(subset.indices) == sorted(subset.indices)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.0, (210, 210)), (0.5, (210, 105)), (75 / 210, (210, 75))]
)
def test_upsampling_repeats_the_small_class_to_the_ratio(
    ratio: float, expected: tuple[int, int]
) -> None:
    subset = upsample_dataset(Unreadable(285), ratio, labels=LABELS)
    counts = Counter(subset.targets)
    assert (counts[0], counts[1]) == expected
    copies = Counter(subset.indices)
    assert set(copies) == set(range(285))
    for label in (0, 1):
        times = [copies[i] for i in range(285) if LABELS[i] == label]
        assert max(times) - min(times) <= 1
    # The dataset itself comes first, in its own order.
    assert list(subset.indices[:285]) == list(range(285))


def test_more_than_two_classes_each_have_the_ratio_to_the_extreme_one() -> None:
    labels = ["a"] * 40 + ["b"] * 20 + ["c"] * 5
    assert Counter(downsample_dataset(Unreadable(65), 0.5, labels=labels).targets) == {
        "a": 10,
        "b": 10,
        "c": 5,
    }
    assert Counter(upsample_dataset(Unreadable(65), 0.5, labels=labels).targets) == {
        "a": 40,
        "b": 20,
        "c": 20,
    }


@pytest.mark.parametrize("function", [downsample_dataset, upsample_dataset])
def test_the_seed_decides_which_samples_are_chosen(function: Any) -> None:
    def chosen(seed: int) -> list[int]:
        return sorted(function(Unreadable(285), 0.6, seed=seed, labels=LABELS).indices)

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)


def test_downsampling_keeps_what_a_sampler_of_one_fixed_subset_hands_out() -> None:
    kept = downsample_dataset(Unreadable(285), 0.7, seed=5, labels=LABELS).indices
    balance = {"name": "downsample", "target_ratio": 0.7, "rotate": False}
    sampler = BalancedBatchSampler(LABELS, balance=balance, seed=5)
    for _ in range(2):
        assert sorted(index for batch in sampler for index in batch) == list(kept)


@pytest.mark.parametrize(
    "targets", [LABELS, tuple(LABELS), np.array(LABELS, dtype=np.int16), torch.tensor(LABELS)]
)
def test_targets_are_found_and_carried_on_as_what_they_were(targets: Any) -> None:
    subset = downsample_dataset(Targeted(targets))
    found: Any = subset.targets
    assert type(found).__name__ == type(targets).__name__.replace("tuple", "list")
    assert getattr(found, "dtype", None) == getattr(targets, "dtype", None)
    assert [int(label) for label in found] == [LABELS[index] for index in subset.indices]


class Column:
    """What a table library gives: no list, but numpy reads it."""

    def __len__(self) -> int:
        return len(LABELS)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(LABELS, dtype=dtype)


def test_a_column_of_a_table_is_carried_on_as_an_array() -> None:
    subset = downsample_dataset(Unreadable(285), labels=Column())
    assert isinstance(subset.targets, np.ndarray)
    assert Counter(subset.targets.tolist()) == {0: 75, 1: 75}


def test_a_subset_of_a_subset_is_balanced_by_its_own_targets() -> None:
    half = downsample_dataset(Targeted(LABELS), 0.5)
    equal = downsample_dataset(half)
    assert Counter(equal.targets) == {0: 75, 1: 75}
    assert isinstance(equal.dataset, Subset)


def test_a_subset_reads_the_samples_it_names() -> None:
    subset = upsample_dataset(Numbers(6), labels=[0, 0, 0, 0, 1, 1])
    batches = DataLoader(subset, batch_size=4)
    assert [i for batch in batches for i in batch.tolist()] == [0, 1, 2, 3, 4, 5, 4, 5]


def test_an_exceeded_ratio_is_warned_of_with_both_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    subset = downsample_dataset(Unreadable(285), 0.2, labels=LABELS)
    assert len(subset) == 285
    assert "target_ratio is 0.2, but smallest to largest is 0.357" in caplog.text


@pytest.mark.parametrize("function", [downsample_dataset, upsample_dataset])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"labels": LABELS, "target_ratio": 0.0}, r"target_ratio is 0\.0; .*\(0, 1\]"),
        ({"labels": LABELS, "target_ratio": 1.5}, r"target_ratio is 1\.5"),
        ({"labels": LABELS, "seed": -1}, "seed is -1"),
        ({"labels": LABELS[:-1]}, "284 labels for 285 samples; give one per sample"),
        ({}, r"labels is None and Unreadable has no \.targets\. Give labels="),
    ],
)
def test_a_wrong_argument_is_named(function: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        function(Unreadable(285), **arguments)


def test_a_balanced_loader_holds_its_share_in_every_batch() -> None:
    loader = get_balanced_dataloader(Numbers(285), LABELS, batch_size=10, seed=4)
    assert isinstance(loader.batch_sampler, BalancedBatchSampler)
    assert len(loader) == 29
    for batch in loader:
        assert sum(LABELS[i] for i in batch.tolist()) == 5
    again = get_balanced_dataloader(Numbers(285), LABELS, batch_size=10, seed=4)
    assert [b.tolist() for b in again] == list(BalancedBatchSampler(LABELS, batch_size=10, seed=4))


@pytest.mark.parametrize(("strategy", "rare"), [("uniform", 2), ("balanced", 4), ("none", 2)])
def test_a_balanced_loader_knows_the_names_of_weightings(strategy: str, rare: int) -> None:
    loader = get_balanced_dataloader(Numbers(285), LABELS, batch_size=8, strategy=strategy)
    counts = [sum(LABELS[i] for i in batch.tolist()) for batch in loader]
    assert min(counts) >= rare
    assert max(counts) <= rare + 1


def test_without_labels_the_loader_is_torch_s_own() -> None:
    loader = get_balanced_dataloader(Targeted(LABELS), batch_size=7)
    assert (loader.batch_size, type(loader.sampler)) == (7, SequentialSampler)
    shuffled = get_balanced_dataloader(Targeted(LABELS), shuffle=True)
    assert (shuffled.batch_size, type(shuffled.sampler)) == (1, RandomSampler)
    assert loader.generator is None


def test_labels_and_shuffle_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="shuffle=True together with labels"):
        get_balanced_dataloader(Numbers(285), LABELS, shuffle=True)
    get_balanced_dataloader(Numbers(285), LABELS, shuffle=False)


def test_a_balanced_loader_works_with_workers() -> None:
    loader = get_balanced_dataloader(Numbers(285), LABELS, batch_size=10, num_workers=2)
    expected = list(BalancedBatchSampler(LABELS, batch_size=10))
    assert [batch.tolist() for batch in loader] == expected


def test_a_packed_split_is_balanced_by_patient_and_only_for_training(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort())
    train, val = ShardDataset(shards, "train"), ShardDataset(shards, "val")
    loader = get_balanced_dataloader(train, train.targets, batch_size=4)
    assert isinstance(loader.batch_sampler, BalancedBatchSampler)
    assert loader.batch_sampler.plan.unit == "patient"
    for batch in loader:
        assert sorted(batch["label"].tolist()) == [0, 0, 1, 1]
    half = downsample_dataset(train)
    assert list(half.patients) == [train.patients[i] for i in half.indices]
    for balance in (downsample_dataset, upsample_dataset):
        with pytest.raises(ConfigError, match="'val', which is not for training"):
            balance(val)
    with pytest.raises(ConfigError, match="'val', which is not for training"):
        get_balanced_dataloader(val, val.targets)


def test_nothing_touches_the_global_generators() -> None:
    with global_states_untouched():
        downsample_dataset(Unreadable(285), labels=LABELS)
        upsample_dataset(Unreadable(285), labels=LABELS)
        for workers in (0, 2):
            list(get_balanced_dataloader(Numbers(285), LABELS, 8, num_workers=workers))


def test_nothing_is_said_of_batches_of_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    downsample_dataset(Unreadable(285), labels=LABELS)
    assert caplog.text == ""
