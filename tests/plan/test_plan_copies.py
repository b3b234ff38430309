"""Copies of a plan, in this process and in others: a frozen value stays the value it is."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan


class Shards:
    """Nine patients of two classes, of one sample each."""

    classes = ["a", "b"]  # noqa: RUF012
    train_splits = ("train",)

    def labels(self, split: str) -> NDArray[np.int64]:
        assert split == "train"
        return np.array([0] * 5 + [1] * 4, dtype=np.int64)

    def patients(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return np.array([f"P{number}" for number in range(9)])

    def keys(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return np.array([f"P{number}__0" for number in range(9)])

    def column(self, split: str, name: str) -> NDArray[np.str_]:
        raise KeyError(split, name)


def plan_of(**options: Any) -> BalancedPlan:
    labels = ["LGG"] * 75 + ["HGG"] * 210
    return BalancedPlan.from_labels(labels, global_batch_size=8, **options)


COPIED: list[dict[str, Any]] = [
    {"seed": 3},
    {"balance": None},
    {"patients": [f"P{number // 2}" for number in range(285)][::-1], "balance": None},
    {"balance": {"name": "target", "shares": {"LGG": 0.3, "HGG": 0.7}, "last": "short"}},
    {"balance": {"name": "manual_weights", "weights": {"LGG": 2.8, "HGG": 1.0}, "draw": "iid"}},
    {"balance": {"name": "downsample", "rotate": False}},
]


@pytest.mark.parametrize("options", COPIED)
def test_a_pickled_plan_comes_back_as_an_equal_plan(options: dict[str, Any]) -> None:
    plan = plan_of(**options)
    plan.batch(1, 3)
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.settings == plan.settings
    assert (again.sizes, again.guarantees, again.warnings) == (
        plan.sizes,
        plan.guarantees,
        plan.warnings,
    )
    assert again.strategy == plan.strategy
    for place in ((0, 0), (7, 18)):
        assert again.batch(*place).tolist() == plan.batch(*place).tolist()


def test_a_plan_over_shards_is_pickled_without_the_shards() -> None:
    plan = BalancedPlan.for_shards(Shards(), global_batch_size=4, exclude=["P2"])
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.settings == plan.settings
    assert b"Shards" not in pickle.dumps(plan)


def test_a_copy_of_a_plan_is_the_plan() -> None:
    plan = plan_of()
    assert copy.copy(plan) is plan
    assert copy.deepcopy([plan])[0] is plan


def test_a_spawned_process_plans_the_same_batches() -> None:
    plans = [plan_of(**options) for options in COPIED]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        got = list(pool.map(first_batch, plans))
    assert got == [first_batch(plan) for plan in plans]


def first_batch(plan: BalancedPlan) -> tuple[str, list[int]]:
    """Give what a process is asked for: the plan's digest and its first batch."""
    return plan.digest, plan.batch(0, 0).tolist()


@pytest.mark.parametrize("options", [options for options in COPIED if options.get("balance")])
def test_strategies_are_copied_and_pickled_as_equal_values(options: dict[str, Any]) -> None:
    strategy = plan_of(**options).strategy
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert copy.copy(strategy) == strategy
    assert copy.deepcopy(strategy) == strategy
