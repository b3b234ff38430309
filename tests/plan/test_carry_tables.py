"""Runs that change their plan along with their table: packed, numbered or large."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import ResumeError
from streaming_balance.plan import members
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import open_shards
from tests.building import Sample, pack
from tests.plan.carrying import following


def test_a_hundred_million_samples_are_carried_over_without_being_listed() -> None:
    sizes = {"common": 90_000_000, "rare": 9_000_000, "rarest": 1_000_000}
    old = BalancedPlan.from_class_sizes(sizes, global_batch_size=12)
    tracemalloc.start()
    new = BalancedPlan.from_class_sizes(sizes, global_batch_size=24, seed=1)
    plan = new.carried_from(old, epoch=3, step=1_234_567)
    first = plan.batch(3, 0)
    far = [plan.batch(epoch, 77) for epoch in (4, 5, 40)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000
    assert all(len(set(batch.tolist())) == 24 for batch in far)
    # A batch of 24 takes what two batches of 12 would have taken.
    ahead = [old.batch(3, 1_234_567), old.batch(3, 1_234_568)]
    assert sorted(first.tolist()) == sorted(np.concatenate(ahead).tolist())


def test_numbered_classes_that_grow_or_shrink_are_carried_over() -> None:
    before, after = {"a": 20_000, "b": 9_000}, {"a": 20_000, "b": 9_500}
    for old_sizes, new_sizes in ((before, after), (after, before)):
        old = BalancedPlan.from_class_sizes(old_sizes, global_batch_size=40)
        new = BalancedPlan.from_class_sizes(new_sizes, global_batch_size=40, seed=1)
        plan = new.carried_from(old, epoch=0, step=200)
        shared = 20_000 + min(old_sizes["b"], new_sizes["b"])
        for place in ((0, 100), (0, 300), (2, 10)):
            total = old.exposure(0, 200)[:shared] + plan.exposure(*place)[:shared]
            assert np.ptp(total[:20_000]) <= 1
            assert np.ptp(total[20_000:]) <= 1
        for step in (0, 249, 250, 251, 300):
            assert len(set(plan.batch(0, step).tolist())) == 40


def packed(folder: Path, names: Sequence[str]) -> Any:
    """Pack small images of two samples per patient: a's of class HGG, others of class LGG."""
    image = np.zeros((1, 2, 2, 2), dtype=np.int16)
    samples = [
        Sample(
            key=f"{name}__{number}",
            image=image,
            patient=name,
            label="HGG" if name[0] == "a" else "LGG",
        )
        for name in names
        for number in range(2)
    ]
    pack(folder, samples)
    return open_shards(folder)


@pytest.mark.parametrize("unit", ["patient", "sample"])
def test_a_packed_cohort_that_loses_and_gains_patients_is_carried_over(
    tmp_path: Path, unit: str
) -> None:
    names = [*(f"a{number}" for number in range(9)), *(f"b{number}" for number in range(5))]
    old_shards = packed(tmp_path / "old", names)
    new_shards = packed(tmp_path / "new", ["a00", "b00", *names])
    balance = {"name": "class_balanced", "unit": unit}
    old = BalancedPlan.for_shards(old_shards, global_batch_size=4, balance=balance)
    new = BalancedPlan.for_shards(
        new_shards, global_batch_size=4, balance=balance, seed=1, exclude=["a4", "b2"]
    )
    plan = new.carried_from(old, epoch=0, step=2)
    keys = [list(shards.keys("train")) for shards in (old_shards, new_shards)]
    total: Counter[str] = Counter()
    for step in range(2):
        total.update(keys[0][row] for row in old.batch(0, step))
    come: Counter[str] = Counter()
    for epoch, step in following(plan, (0, 0), 40)[:-1]:
        come.update(keys[1][row] for row in plan.batch(epoch, step))
        here = total + come
        for label in "ab":
            turns: Counter[str] = Counter(
                {
                    (key[:2] if unit == "patient" else key): 0
                    for key in keys[0]
                    if key[0] == label and key[:2] not in ("a4", "b2")
                }
            )
            for key, count in here.items():
                name = key.split("__")[0] if unit == "patient" else key
                if name in turns:
                    turns[name] += count
            assert max(turns.values()) - min(turns.values()) <= 1
    assert not {key for key in come if key[:3] in ("a4_", "b2_")}
    assert {key for key in come if key[:3] in ("a00", "b00")}
    assert all(abs(here[f"{name}__0"] - here[f"{name}__1"]) <= 1 for name in names)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_sample_numbers_are_not_taken_for_keys(tmp_path: Path) -> None:
    shards = packed(tmp_path, ["a0", "a1", "b0", "b1"])
    balance = {"name": "class_balanced", "unit": "sample"}
    by_key = BalancedPlan.for_shards(shards, global_batch_size=2, balance=balance)
    by_number = BalancedPlan.from_labels(
        ["HGG"] * 4 + ["LGG"] * 4, global_batch_size=2, balance=balance
    )
    with pytest.raises(ResumeError, match="apart by sample numbers, the new one by sample keys"):
        by_key.carried_from(by_number, epoch=0, step=1)


def test_a_class_whose_names_are_not_held_is_carried_over_only_with_its_table_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A class of more than a million takes minutes to pack.
    monkeypatch.setattr(members, "EXACT_LIMIT", 8)
    shards = packed(tmp_path, [*(f"a{number}" for number in range(9)), "b0", "b1", "b2"])
    old = BalancedPlan.for_shards(shards, global_batch_size=2)
    same = BalancedPlan.for_shards(shards, global_batch_size=2, seed=1)
    plan = same.carried_from(old, epoch=0, step=2)
    assert sorted(plan.batch(0, 0).tolist()) == sorted(old.batch(0, 2).tolist())
    fewer = BalancedPlan.for_shards(shards, global_batch_size=2, exclude=["b1"])
    with pytest.raises(ResumeError, match=r"class 'HGG' has 9 patients together in the old plan"):
        fewer.carried_from(old, epoch=0, step=2)
