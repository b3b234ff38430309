"""Loaders over samples with several findings: labels (b, K), counted finding by finding."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.audit import audit_run
from streaming_balance.report.distribution import batch_class_counts
from streaming_balance.report.plan_summary import summarise_plan
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader
from streaming_balance.training.mixing import mixup
from streaming_balance.training.shard_dataset import ShardDataset
from streaming_balance.training.state import LoaderState
from tests.building import Sample
from tests.training.cohorts import packed, voxels

CLASSES = ("Effusion", "Hernia", "Mass")
# Of 24 patients 4 have Hernia, 2 of them Mass too; 8 have Mass, 8 Effusion, 6 nothing.
LABELS = [*["Hernia"] * 2, *["Hernia|Mass"] * 2, *["Mass"] * 6, *["Effusion"] * 8, *[""] * 6]
TARGET = {"name": "class_balanced", "target_label": "Hernia"}


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """24 patients to train on, 5 to evaluate."""
    train = [
        Sample(key=f"T{number:02d}", image=voxels(number), label=label)
        for number, label in enumerate(LABELS)
    ]
    val = [
        Sample(key=f"V{n}", image=voxels(90 + n), label=label, split="val")
        for n, label in enumerate(["Mass", "", "Effusion|Hernia|Mass", "Mass", "Hernia"])
    ]
    folder = tmp_path_factory.mktemp("chest") / "packed"
    return packed(folder, [*train, *val], classes=CLASSES, multi_label=True)


def findings_of(key: str) -> set[str]:
    """Say what a training sample was packed with."""
    return set(LABELS[int(key[1:])].split("|")) - {""}


def check_labels(batch: dict[str, Any]) -> None:
    """Compare the rows of a batch with what its samples were packed with."""
    label = batch["label"]
    assert label.dtype == torch.int64
    assert label.shape == (len(batch["key"]), len(CLASSES))
    for key, row in zip(batch["key"], label.tolist(), strict=True):
        assert {name for name, has in zip(CLASSES, row, strict=True) if has} == findings_of(key)
        assert set(row) <= {0, 1}


@pytest.mark.parametrize(
    "balance",
    [
        None,
        TARGET,
        {"name": "repeat_factor", "threshold": 0.5},
        {"name": "class_balanced", "strata": "label_set"},
    ],
)
def test_every_row_of_a_batch_is_the_findings_of_its_sample(
    chest: ShardSet, balance: dict[str, Any] | None
) -> None:
    with train_loader(chest, global_batch_size=8, balance=balance, num_threads=1) as train:
        batches = list(train)
    assert batches
    for batch in batches:
        check_labels(batch)


def test_natural_order_delivers_every_sample_once(chest: ShardSet) -> None:
    with train_loader(chest, global_batch_size=8, num_threads=1) as train:
        keys = [key for batch in train for key in batch["key"]]
    assert sorted(keys) == [f"T{number:02d}" for number in range(24)]


def test_balancing_on_the_rarest_finding_gives_every_batch_half_of_it(chest: ShardSet) -> None:
    column = CLASSES.index("Hernia")
    with train_loader(chest, global_batch_size=8, balance=TARGET, num_threads=1) as train:
        assert [int(batch["label"][:, column].sum()) for batch in train] == [4, 4, 4]


def test_two_ranks_get_the_labels_of_the_global_batch(chest: ShardSet) -> None:
    for rank in range(2):
        loader = train_loader(
            chest, global_batch_size=8, balance=TARGET, rank=rank, num_ranks=2, num_threads=1
        )
        with loader as train:
            for batch in train:
                check_labels(batch)
                assert int(batch["label"][:, 1].sum()) == 2


def test_a_strategy_that_needs_one_class_per_sample_names_the_ways_out(chest: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"several labels.*repeat_factor.*target_label"):
        train_loader(chest, global_batch_size=8, balance="class_balanced")


def test_evaluation_delivers_the_findings_in_packed_order(chest: ShardSet) -> None:
    with eval_loader(chest, split="val", batch_size=2, num_threads=1) as val:
        rows = [row for batch in val for row in batch["label"].tolist()]
    assert rows == [[0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0]]
    assert val.stats()["class_counts"] == {"Effusion": 1, "Hernia": 2, "Mass": 3}


def test_a_transform_sees_the_row_of_its_sample_and_may_change_it(chest: ShardSet) -> None:
    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        assert sample["label"].shape == (3,)
        assert sample["label"].dtype == torch.int64
        return sample | {"label": 1 - sample["label"]}

    with eval_loader(chest, split="val", batch_size=5, num_threads=1, transform=transform) as val:
        (batch,) = list(val)
    assert batch["label"].tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 0, 1]]


def test_changing_the_labels_of_a_batch_leaves_those_of_the_next_epoch_alone(
    chest: ShardSet,
) -> None:
    with eval_loader(chest, split="val", batch_size=5, num_threads=1) as val:
        for _ in range(2):
            (batch,) = list(val)
            assert int(batch["label"].sum()) == 6
            batch["label"].fill_(9)


def test_statistics_and_audit_count_a_sample_for_each_of_its_findings(chest: ShardSet) -> None:
    with train_loader(chest, global_batch_size=8, balance=TARGET, num_threads=1) as train:
        delivered = [key for batch in train for key in batch["key"]]
        stats, state = train.stats(), train.state_dict()
    counted = Counter(name for key in delivered for name in findings_of(key))
    assert stats["class_counts"] == {name: counted[name] for name in CLASSES}
    assert stats["exposure_spread"].keys() == set(CLASSES)
    audit = audit_run(chest, LoaderState.from_dict(json.loads(json.dumps(state))))
    times = Counter(delivered)
    for name, entry in audit.classes.items():
        mine = [times[f"T{n:02d}"] for n in range(24) if name in findings_of(f"T{n:02d}")]
        assert (entry.patients, entry.delivered) == (len(mine), sum(mine))
        assert (entry.exposure_min, entry.exposure_max) == (min(mine), max(mine))
        assert entry.share == pytest.approx(sum(mine) / 24)


def test_a_resumed_run_gives_the_batches_of_an_uninterrupted_one(chest: ShardSet) -> None:
    def loader() -> Any:
        return train_loader(chest, global_batch_size=8, balance=TARGET, seed=5, num_threads=1)

    with loader() as train:
        whole = [(batch["key"], batch["label"].tolist()) for batch in train]
    with loader() as train:
        next(iter(train))
        state = train.state_dict()
    with loader() as train:
        train.load_state_dict(state)
        rest = [(batch["key"], batch["label"].tolist()) for batch in train]
    assert rest == whole[1:]


@pytest.mark.parametrize(
    "balance", [None, TARGET, {"name": "class_balanced", "strata": "label_set"}]
)
def test_a_plan_is_summed_up_by_finding(chest: ShardSet, balance: dict[str, Any] | None) -> None:
    train = train_loader(chest, global_batch_size=8, balance=balance, num_threads=1)
    summary = summarise_plan(chest, train.plan, split="train", epochs=1)
    with train:
        batches = [
            Counter(name for key in batch["key"] for name in findings_of(key)) for batch in train
        ]
    before = Counter(name for n in range(24) for name in findings_of(f"T{n:02d}"))
    for name, entry in summary.classes.items():
        counts = [batch[name] for batch in batches]
        assert (entry.patients, entry.before, entry.after) == (
            before[name],
            before[name],
            sum(counts),
        )
        assert (entry.quota_least, entry.quota_most) == (min(counts), max(counts))
        assert entry.share == pytest.approx(sum(counts) / (8 * len(batches)))
    assert summary.splits["val"] == {"Effusion": 1, "Hernia": 2, "Mass": 3}


def test_a_plan_of_one_class_against_the_rest_is_summed_up_by_class(small: ShardSet) -> None:
    balance = {"name": "class_balanced", "target_label": "LGG"}
    train = train_loader(small, global_batch_size=4, balance=balance)
    summary = summarise_plan(small, train.plan, split="train", epochs=1)
    train.close()
    shown = {
        label: (entry.before, entry.quota_least, entry.quota_most, entry.share)
        for label, entry in summary.classes.items()
    }
    assert shown == {"HGG": (9, 2, 2, 0.5), "LGG": (5, 2, 2, 0.5)}


def test_pictures_count_a_sample_for_each_of_its_findings(chest: ShardSet) -> None:
    plan = BalancedPlan.for_shards(chest, global_batch_size=8, balance=TARGET)
    counts = batch_class_counts(plan, chest.labels("train"), num_classes=3, num_batches=3)
    keys = chest.keys("train")
    for step, row in enumerate(counts.tolist()):
        held = Counter(name for key in keys[plan.batch(0, step)] for name in findings_of(key))
        assert row == [held[name] for name in CLASSES]


def test_a_data_set_of_one_finding_has_one_column(tmp_path: Path) -> None:
    samples = [
        Sample(key=f"T{number}", image=voxels(number), label="Hernia" if number < 2 else "")
        for number in range(6)
    ]
    shards = packed(tmp_path / "chest", samples, classes=["Hernia"], multi_label=True)
    with train_loader(shards, global_batch_size=2, balance=TARGET, num_threads=1) as train:
        batches = list(train)
    assert [batch["label"].sum(dim=0).tolist() for batch in batches] == [[1]] * 3


def test_transforms_in_processes_give_the_rows_of_findings_that_threads_give(
    chest: ShardSet,
) -> None:
    def rows(workers: int) -> list[Any]:
        with train_loader(
            chest,
            global_batch_size=8,
            balance=TARGET,
            transform=flipped,
            workers=workers,
            num_threads=1,
        ) as train:
            return [(batch["key"], batch["label"].tolist()) for batch in train]

    assert rows(2) == rows(0)


def flipped(sample: dict[str, Any]) -> dict[str, Any]:
    """Turn every finding over."""
    return sample | {"label": 1 - sample["label"]}


def test_a_packed_split_as_a_dataset_gives_rows_of_findings(chest: ShardSet) -> None:
    dataset = ShardDataset(chest, "val")
    assert dataset[2]["label"].tolist() == dataset.targets[2].tolist()
    held = dict(zip(chest.keys("val").tolist(), dataset.labels.tolist(), strict=True))
    assert held == {
        "V0": "Mass",
        "V1": "",
        "V2": "Effusion|Hernia|Mass",
        "V3": "Mass",
        "V4": "Hernia",
    }
    dataset.close()


def test_batches_of_findings_can_be_mixed(chest: ShardSet) -> None:
    with train_loader(chest, global_batch_size=8, balance=TARGET, num_threads=1) as train:
        batch = next(iter(train))
    mixed = mixup(batch, num_classes=3)
    weight, partner = mixed["lam"][:, None], mixed["label"]
    assert partner.shape == (8, 3)
    rows = weight * mixed["label_a"] + (1 - weight) * mixed["label_b"]
    assert np.allclose(partner.numpy(), rows.numpy(), atol=1e-6)


def test_mixing_in_the_loader_gives_rows_of_findings(chest: ShardSet) -> None:
    with train_loader(
        chest, global_batch_size=8, balance=TARGET, num_threads=1, mixing={"name": "cutmix"}
    ) as train:
        batch = next(iter(train))
    assert batch["label"].shape == (8, 3)
    assert torch.equal(batch["label_a"].sum(0)[1], torch.tensor(4))
