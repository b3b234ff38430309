"""Classes of samples whose patients have two labels: they take their patients in turn."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan

BY_SAMPLE = {"name": "class_balanced", "unit": "sample"}


def drawn_in(plan: BalancedPlan, epoch: int) -> list[int]:
    """List the draws of an epoch."""
    steps = range(plan.num_steps(epoch))
    return [number for step in steps for number in plan.batch(epoch, step).tolist()]


def draws_of(plan: BalancedPlan, mine: NDArray[np.bool_], count: int) -> list[int]:
    """List the first draws of one class."""
    found: list[int] = []
    epoch = 0
    while len(found) < count:
        found += [number for number in drawn_in(plan, epoch) if mine[number]]
        epoch += 1
    return found[:count]


# Twelve patients with four samples of class a each; the first two have two of class b as well.
OWNERS = np.array([f"P{number:02}" for number in [*np.repeat(np.arange(12), 4), 0, 0, 1, 1]])
LABELS = np.array(["a"] * 48 + ["b"] * 4)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_patients_of_equal_size_come_round_after_round(seed: int, batch_size: int) -> None:
    # An epoch takes more than the class has: passes mix freely.
    balance = {**BY_SAMPLE, "num_samples": 120}
    plan = BalancedPlan.from_labels(
        LABELS, patients=OWNERS, balance=balance, global_batch_size=batch_size, seed=seed
    )
    order = draws_of(plan, LABELS == "a", 48 * 3)
    for start in range(0, len(order), 48):
        one_pass = order[start : start + 48]
        assert len(set(one_pass)) == 48
        for quarter in range(4):
            owners = [OWNERS[number] for number in one_pass[12 * quarter : 12 * quarter + 12]]
            assert len(set(owners)) == 12


def test_patients_stay_apart_where_passes_keep_to_groups() -> None:
    # 26 of 48 an epoch, nobody twice: groups of 16, in which nobody with two draws has them close.
    plan = BalancedPlan.from_labels(
        LABELS, patients=OWNERS, balance=BY_SAMPLE, global_batch_size=2, seed=0
    )
    order = draws_of(plan, LABELS == "a", 48 * 8)
    for start in range(0, len(order), 16):
        owners = [str(OWNERS[number]) for number in order[start : start + 16]]
        assert max(Counter(owners).values()) == 2
        assert all(first != second for first, second in pairwise(owners))


def test_every_sample_of_a_class_comes_equally_often() -> None:
    plan = BalancedPlan.from_labels(
        LABELS, patients=OWNERS, balance=BY_SAMPLE, global_batch_size=6, seed=4
    )
    exposure = plan.exposure(7, 3)
    counted = Counter(number for epoch in range(7) for number in drawn_in(plan, epoch))
    counted += Counter(number for step in range(3) for number in plan.batch(7, step).tolist())
    assert exposure.tolist() == [counted[number] for number in range(52)]
    for label in ("a", "b"):
        assert np.ptp(exposure[label == LABELS]) <= 1


def test_rounds_differ_from_pass_to_pass() -> None:
    plan = BalancedPlan.from_labels(
        LABELS, patients=OWNERS, balance=BY_SAMPLE, global_batch_size=2, seed=0
    )
    order = draws_of(plan, LABELS == "a", 48 * 4)
    passes = [tuple(order[start : start + 48]) for start in range(0, 48 * 4, 48)]
    assert len(set(passes)) == 4
    assert len({OWNERS[one[0]] for one in passes}) > 1


def twins(plan: BalancedPlan, owners: NDArray[np.str_], epochs: int) -> int:
    """Count the samples beyond the first that a patient has in a batch."""
    return sum(
        times - 1
        for epoch in range(epochs)
        for step in range(plan.num_steps(epoch))
        for times in Counter(owners[plan.batch(epoch, step)].tolist()).values()
    )


def test_patients_of_all_sizes_meet_themselves_seldom() -> None:
    sizes = [1] * 40 + [2] * 20 + [4] * 10 + [8] * 5
    owners = np.array([f"Q{number:03}" for number, size in enumerate(sizes) for _ in range(size)])
    labels = np.array(["a"] * len(owners))
    # One patient with two labels makes the classes take their patients in turn.
    owners, labels = np.append(owners, ["Q000", "R"]), np.append(labels, ["b", "b"])
    strangers = np.append(owners[:-2], ["S", "R"])
    options: dict[str, Any] = {"balance": {"name": "none"}, "global_batch_size": 8}
    in_turn, as_they_come = (
        twins(BalancedPlan.from_labels(labels, patients=who, seed=1, **options), who, 30)
        for who in (owners, strangers)
    )
    # By chance 8 of 160 draws repeat a patient now and then; in turn only at seams, or across a, b.
    assert as_they_come > 200
    assert in_turn < as_they_come / 5


class Rows:
    """The cohort above as a packed split."""

    classes = ["a", "b"]  # noqa: RUF012
    train_splits = ("train",)

    def labels(self, split: str) -> NDArray[np.int64]:
        assert split == "train"
        return np.where(LABELS == "b", 1, 0)

    def patients(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return OWNERS

    def keys(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return np.array([f"k{number:02}" for number in range(52)])

    def column(self, split: str, name: str) -> NDArray[np.str_]:
        raise KeyError(split, name)


@pytest.mark.parametrize("gone", [["P05"], ["P00", "P01"], ["k07"], ["k48", "k49", "k50", "k51"]])
def test_leaving_out_leaves_the_order_of_the_others(gone: list[str]) -> None:
    def order(exclude: list[str]) -> list[int]:
        plan = BalancedPlan.for_shards(
            Rows(),
            balance={"name": "none", "empty_class": "renormalize"},
            global_batch_size=1,
            exclude=exclude,
        )
        # With one draw per batch no seam is repaired.
        keys = Rows().keys("train")
        left = [n for n in range(48) if keys[n] not in exclude and OWNERS[n] not in exclude]
        mine = np.isin(np.arange(52), left)
        # A patient that loses a sample has another rhythm; the others must not notice.
        torn = {OWNERS[n] for n in range(48) if keys[n] in exclude}
        return [n for n in draws_of(plan, mine, 2 * len(left)) if OWNERS[n] not in torn]

    kept = set(order(gone))
    assert order(gone) == [number for number in order([]) if number in kept]
