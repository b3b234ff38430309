"""Who may stand in for a damaged sample: the class's others, each for one slot only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.plan.epoch import BalancedPlan

STRATEGIES: list[Any] = [
    "class_balanced",
    None,
    {"name": "class_balanced", "draw": "iid"},
    {"name": "p_k", "P": 2, "M": 3},
    {"name": "repeat_factor", "threshold": 0.5},
    {"name": "downsample", "rotate": False},
    {"name": "class_balanced", "strata": ["site"]},
]
LABELS = ["HGG"] * 21 + ["LGG"] * 9
SITES = ["a", "b", "c"] * 10


def plan_of(balance: Any, *, seed: int = 3, patients: list[str] | None = None) -> BalancedPlan:
    """Plan batches of 6 over 30 samples at three sites."""
    sites = {"site": SITES} if isinstance(balance, dict) and "strata" in balance else None
    return BalancedPlan.from_labels(
        LABELS, global_batch_size=6, balance=balance, seed=seed, strata=sites, patients=patients
    )


@pytest.mark.parametrize("balance", STRATEGIES, ids=str)
def test_candidates_are_the_cell_s_others_and_no_two_slots_share_one(balance: Any) -> None:
    plan = plan_of(balance)
    has_strata = isinstance(balance, dict) and "strata" in balance
    cells = [
        label + (site if has_strata else "") for label, site in zip(LABELS, SITES, strict=True)
    ]
    used = set(np.flatnonzero(plan.exposure(40, 0)).tolist())
    for step in range(plan.num_steps(0)):
        batch = plan.batch(0, step).tolist()
        offered: dict[str, list[int]] = {}
        for slot, sample in enumerate(batch):
            candidates = plan.substitutes(0, step, slot).tolist()
            assert {cells[number] for number in candidates} <= {cells[sample]}
            offered.setdefault(cells[sample], []).extend(candidates)
        for cell, candidates in offered.items():
            waiting = {n for n in used if cells[n] == cell} - set(batch)
            # Together the slots of a cell are offered everybody who waits, each of them once.
            assert sorted(candidates) == sorted(waiting)


def test_the_first_candidates_of_a_class_are_dealt_to_its_slots_in_turn() -> None:
    plan = plan_of("class_balanced")
    labels = [LABELS[number] for number in plan.batch(0, 0)]
    first = labels.index("LGG")
    lists = [plan.substitutes(0, 0, first + i).tolist() for i in range(3)]
    # 9 LGG, 3 of them in the batch: 6 wait, and each slot is offered every third.
    assert [len(offered) for offered in lists] == [2, 2, 2]
    again = plan_of("class_balanced", seed=4)
    others = [number for i in range(3) for number in again.substitutes(0, 0, i).tolist()]
    assert sorted(others) != sorted(number for offered in lists for number in offered)


def test_the_order_of_candidates_is_another_in_every_batch_and_near_uniform() -> None:
    plan = plan_of("class_balanced")
    firsts = np.zeros(30, dtype=int)
    for epoch in range(60):
        for step in range(plan.num_steps(epoch)):
            for slot in range(6):
                firsts[plan.substitutes(epoch, step, slot)[0]] += 1
    for lowest, stop in ((0, 21), (21, 30)):
        share = firsts[lowest:stop] / firsts[lowest:stop].sum() * (stop - lowest)
        assert 0.7 < share.min() <= share.max() < 1.3


def test_a_patient_stands_in_with_one_of_its_own_samples_and_not_always_the_same() -> None:
    patients = [f"P{number // 3}" for number in range(30)]
    plan = plan_of("class_balanced", patients=patients)
    shown: dict[str, set[int]] = {}
    for epoch in range(20):
        for step in range(plan.num_steps(epoch)):
            here = {patients[number] for number in plan.batch(epoch, step)}
            for slot in range(6):
                for number in plan.substitutes(epoch, step, slot).tolist():
                    assert patients[number] not in here
                    shown.setdefault(patients[number], set()).add(number)
    assert {len(samples) for samples in shown.values()} == {3}


def test_under_unit_sample_nobody_of_a_patient_in_the_batch_stands_in() -> None:
    patients = [f"P{number // 2}" for number in range(30)]
    plan = plan_of({"name": "class_balanced", "unit": "sample"}, patients=patients)
    offered = 0
    for epoch in range(5):
        for step in range(plan.num_steps(epoch)):
            here = {patients[number] for number in plan.batch(epoch, step)}
            for slot in range(6):
                candidates = plan.substitutes(epoch, step, slot).tolist()
                assert not here & {patients[number] for number in candidates}
                offered += len(candidates)
    assert offered


def test_nobody_is_left_where_the_batch_holds_the_whole_class() -> None:
    plan = BalancedPlan.from_labels(["a"] * 2 + ["b"] * 9, global_batch_size=4)
    labels = ["a" if number < 2 else "b" for number in plan.batch(0, 0)]
    assert plan.substitutes(0, 0, labels.index("a")).tolist() == []


def test_samples_of_weight_0_never_stand_in() -> None:
    weights = [0.0] * 5 + [1.0] * 25
    plan = plan_of({"name": "sample_weights", "weights": weights})
    offered = {n for slot in range(6) for n in plan.substitutes(0, 0, slot).tolist()}
    assert offered == set(range(5, 30)) - set(plan.batch(0, 0).tolist())


@given(slot=st.integers(-3, 9))
def test_a_slot_that_is_not_there_is_refused(slot: int) -> None:
    plan = plan_of("class_balanced")
    if 0 <= slot < 6:
        assert plan.substitutes(0, 0, slot).dtype == np.int64
        return
    with pytest.raises(IndexError, match=f"no slot {slot}"):
        plan.substitutes(0, 0, slot)
