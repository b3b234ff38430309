"""A plan that goes on from another one: a value like any other, and what it refuses."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest

from streaming_balance.errors import ResumeError
from streaming_balance.plan.epoch import BalancedPlan
from tests.plan.carrying import Cohort, Options, one_each, used_by

PLANS: dict[str, Callable[[], BalancedPlan]] = {
    "quotas": lambda: one_each({"a": 7, "b": 9}).plan(batch=4, balance="class_balanced"),
    "patients": lambda: BalancedPlan.from_labels(
        ["a"] * 9 + ["b"] * 9, patients=[f"P{n // 2}" for n in range(9)] + list("defghijkl"),
        global_batch_size=4,
    ),
    "natural": lambda: BalancedPlan.from_labels(
        ["a"] * 9 + ["b"] * 9, global_batch_size=4, balance=None
    ),
    "in turn": lambda: one_each({"a": 7, "b": 9}).plan(
        batch=4, balance={"name": "p_k", "P": 2, "M": 2}
    ),
    "several labels": lambda: BalancedPlan.from_labels(
        [["x"], ["x", "y"], [], ["y"], ["x"]], global_batch_size=2, balance=None
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANS)
def test_ordinals_add_up_to_what_was_delivered_before_and_after_a_change(kind: str) -> None:
    plan = PLANS[kind]()
    carried = PLANS[kind]().carried_from(plan, epoch=1, step=1)
    for one, place in ((plan, (2, 1)), (plan, (1, plan.num_steps(1))), (carried, (3, 1))):
        ordinals = one.ordinals(*place)
        assert sum(ordinals.values()) == one.exposure(*place).sum()
        names = ["all samples"] if kind == "several labels" else one.classes
        assert list(ordinals) == names
    assert set(carried.ordinals(1, 0).values()) == {0}
    for one in (plan, carried):
        assert one.ordinals(2, one.num_steps(2)) == one.ordinals(3, 0)


def test_strata_have_ordinals_of_their_own() -> None:
    sites = ["x", "y", "y"] * 4
    plan = BalancedPlan.from_labels(
        ["a"] * 6 + ["b"] * 6,
        global_batch_size=4,
        balance={"name": "class_balanced", "strata": ["site"]},
        strata={"site": sites},
    )
    assert plan.ordinals(1, 0) == {"a / x": 2, "a / y": 4, "b / x": 2, "b / y": 4}
    torn = BalancedPlan.from_labels(
        ["a / b"] * 3 + ["a"] * 3,
        global_batch_size=2,
        balance={"name": "class_balanced", "strata": ["site"]},
        strata={"site": ["c"] * 3 + ["b / c"] * 3},
    )
    # Written with a slash, the two would be one.
    assert set(torn.ordinals(1, 0)) == {"a / b\x1fc", "a\x1fb / c"}


@pytest.mark.parametrize("kind", PLANS)
def test_a_carried_plan_is_a_frozen_value_that_pickles(kind: str) -> None:
    old = PLANS[kind]()
    plan = PLANS[kind]().carried_from(old, epoch=1, step=1)
    third = PLANS[kind]().carried_from(plan, epoch=2, step=0)
    for one, first in ((plan, 1), (third, 2)):
        again = pickle.loads(pickle.dumps(one))
        assert again == one
        assert again.settings == one.settings
        assert again.first_epoch == first
        for epoch in range(first, first + 3):
            assert again.batch(epoch, 1).tolist() == one.batch(epoch, 1).tolist()
    with pytest.raises(AttributeError, match="frozen"):
        plan.first_epoch = 0
    assert old.guarantees == plan.guarantees


def test_the_digest_and_the_settings_say_what_was_carried_over() -> None:
    plain = PLANS["quotas"]
    old = plain()
    plan = plain().carried_from(old, epoch=1, step=1)
    assert plan.settings == old.settings | {
        "carried_from": {
            "plan_digest": old.digest,
            "epoch": 1,
            "step": 1,
            "ordinals": {"a": 10, "b": 10},
        }
    }
    assert "carried_from" not in old.settings
    assert plain().carried_from(old, epoch=1, step=1) == plan
    other = one_each({"a": 7, "b": 9}).plan(batch=4, balance="class_balanced", seed=1)
    digests = {
        old.digest,
        plan.digest,
        plain().carried_from(old, epoch=1, step=2).digest,
        plain().carried_from(old, epoch=2, step=1).digest,
        plain().carried_from(other, epoch=1, step=1).digest,
        plain().carried_from(plan, epoch=1, step=1).digest,
    }
    assert len(digests) == 6


def test_steps_before_the_change_belong_to_the_plan_before() -> None:
    plan = PLANS["quotas"]().carried_from(PLANS["quotas"](), epoch=2, step=1)
    for ask in (plan.batch, plan.exposure, plan.quotas, plan.ordinals, plan.batch_size):
        with pytest.raises(IndexError, match=r"epoch 1 belongs to the plan before.*at epoch 2"):
            ask(1, 0)
    assert plan.exposure(2, 0).sum() == 0


def test_a_place_that_the_old_plan_does_not_have_is_refused() -> None:
    old = PLANS["quotas"]()
    plan = PLANS["quotas"]().carried_from(old, epoch=2, step=1)
    with pytest.raises(IndexError, match="step 99 is none"):
        PLANS["quotas"]().carried_from(old, epoch=0, step=99)
    with pytest.raises(IndexError, match="belongs to the plan before"):
        PLANS["quotas"]().carried_from(plan, epoch=1, step=0)


WITHOUT_PASSES: list[Options] = [
    {"name": "class_balanced", "draw": "iid", "unit": "sample"},
    {"name": "repeat_factor", "threshold": 0.5},
    {"name": "sample_weights", "weights": [1.0] * 16},
]


@pytest.mark.parametrize("balance", WITHOUT_PASSES, ids=lambda balance: str(balance["name"]))
def test_plans_without_passes_owe_nobody_a_turn_and_are_refused(balance: Options) -> None:
    cohort = one_each({"a": 7, "b": 9})
    other = cohort.plan(batch=4, balance=balance)
    in_passes = cohort.plan(batch=4, balance={"name": "class_balanced", "unit": "sample"})
    assert other.ordinals(1, 1) == {}
    with pytest.raises(ResumeError, match=f"the old plan is {balance['name']}"):
        in_passes.carried_from(other, epoch=0, step=1)
    with pytest.raises(ResumeError, match=f"the new plan is {balance['name']}"):
        other.carried_from(in_passes, epoch=0, step=1)


def test_another_unit_is_refused() -> None:
    cohort = one_each({"a": 7, "b": 9})
    patients = cohort.plan(batch=4, balance="class_balanced")
    samples = cohort.plan(batch=4, balance={"name": "class_balanced", "unit": "sample"})
    with pytest.raises(ResumeError, match="unit: the old plan cycles over patients, the new one o"):
        samples.carried_from(patients, epoch=0, step=1)


def test_patients_who_changed_their_class_are_named_and_refused() -> None:
    cohort = one_each({"a": 9, "b": 9})
    labels = ["b"] * 7 + ["a"] * 2 + ["b"] * 6 + ["a"] * 3
    moved = Cohort(labels=tuple(labels), owners=cohort.owners)
    old = cohort.plan(batch=4, balance="class_balanced")
    with pytest.raises(ResumeError) as refusal:
        moved.plan(batch=4, balance="class_balanced").carried_from(old, epoch=0, step=1)
    said = str(refusal.value)
    assert "label: 10 patients have changed their class, 'a0' from 'a' to 'b', " in said
    assert "'a4' from 'a' to 'b', ...; turns" in said
    assert "a5" not in said
    assert "'b8'" not in said


def test_a_class_that_only_a_fixed_subset_would_show_is_refused_all_the_same() -> None:
    cohort = one_each({"a": 30, "b": 3})
    fixed = {"name": "downsample", "rotate": False}
    old = cohort.plan(batch=2, balance=fixed)
    unused = sorted(set(cohort.owners) - used_by(cohort, old))[0]
    labels = ["b" if o == unused else c for o, c in zip(cohort.owners, cohort.labels, strict=True)]
    moved = Cohort(labels=tuple(labels), owners=cohort.owners)
    with pytest.raises(ResumeError, match=f"1 patients have changed their class, '{unused}'"):
        moved.plan(batch=2, balance=fixed).carried_from(old, epoch=0, step=1)


def test_a_carried_plan_goes_on_from_one_plan_only() -> None:
    old = PLANS["quotas"]()
    plan = PLANS["quotas"]().carried_from(old, epoch=1, step=1)
    with pytest.raises(ResumeError, match="carried over at epoch 1, step 1 already"):
        plan.carried_from(old, epoch=2, step=1)


def test_a_class_that_everybody_has_left_owes_nobody_a_turn() -> None:
    old = one_each({"a": 7, "b": 9, "c": 5}).plan(batch=6, balance="class_balanced")
    declared = {"name": "class_balanced", "empty_class": "renormalize"}
    for sizes in ({"a": 7, "b": 9}, {"a": 7, "b": 9, "d": 4}):
        cohort = one_each(sizes)
        plan = cohort.plan(batch=6, balance=declared).carried_from(old, epoch=0, step=2)
        assert np.ptp(plan.exposure(30, 0)[:7]) <= 2
        assert plan.ordinals(0, 0) == dict.fromkeys(sizes, 0)
    sized = [
        BalancedPlan.from_class_sizes({"a": 5, "b": size}, global_batch_size=4, balance=declared)
        for size in (4, 0)
    ]
    # Those of class a are owed a turn or none; of class b nobody is left, or nobody was there.
    for before, after in (sized, sized[::-1]):
        plan = after.carried_from(before, epoch=0, step=1)
        total = before.exposure(0, 1)[:5] + plan.exposure(3, 0)[:5]
        assert np.ptp(total) <= 1
