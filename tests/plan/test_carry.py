"""Runs that change their plan: who comes first, and who joins when, situation by situation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.plan.carrying import (
    Options,
    Place,
    draws,
    following,
    one_each,
    patients_of,
    remaining,
    used_by,
)

# Old and new batch size, and sizes of classes in which batches ask for at most half of a class.
SEAMS = [(4, 6, {"a": 11, "b": 14}), (6, 4, {"a": 5, "b": 9, "c": 30}), (8, 8, {"a": 75, "b": 79})]


@pytest.mark.parametrize(("old_batch", "new_batch", "sizes"), SEAMS)
@pytest.mark.parametrize("place", [(0, 1), (1, 0), (3, 2)])
def test_those_without_a_turn_come_first_in_old_order_and_then_the_new_plan_s_own_passes(
    old_batch: int, new_batch: int, sizes: dict[str, int], place: Place
) -> None:
    cohort = one_each(sizes)
    # Up to as many draws as the largest class: no epoch could do without repeating somebody.
    balance = {"name": "class_balanced", "num_samples": len(sizes) * max(sizes.values()) + 1}
    old = cohort.plan(batch=old_batch, balance=balance)
    new = cohort.plan(batch=new_batch, balance=balance, seed=9)
    plan = new.carried_from(old, epoch=place[0], step=place[1])
    for label, size in sizes.items():
        first = remaining(cohort, old, label, place)
        own = draws(cohort, new, label, 4 * size)
        chain = draws(cohort, plan, label, len(first) + 4 * size, start=(place[0], 0))
        assert chain[: len(first)] == first
        window = -(-new_batch // len(sizes))
        own_chain = chain[len(first) :]
        # The head of the first own pass is reordered, among itself and no more than that.
        assert sorted(own_chain[:window]) == sorted(own[:window])
        assert own_chain[window:] == own[window:]
        waiting = set(first[len(first) - window + 1 :] if len(first) >= window else first)
        free = [name for name in own_chain[:window] if name not in waiting]
        assert free == [name for name in own[:window] if name not in waiting]


def test_where_a_class_hardly_covers_a_batch_those_who_came_last_come_last_again() -> None:
    cohort = one_each({"a": 5, "b": 30})
    old = cohort.plan(batch=8, balance="class_balanced")
    new = cohort.plan(batch=8, balance="class_balanced", seed=3)
    plan = new.carried_from(old, epoch=0, step=3)
    first = remaining(cohort, old, "a", (0, 3))
    assert len(first) == 3
    chain = draws(cohort, plan, "a", 3 + 5 * 8)
    others = [name for name in draws(cohort, new, "a", 5) if name not in first]
    assert chain[:8] == [*first, *others, *first]


@pytest.mark.parametrize("last", ["full", "short"])
def test_an_epoch_that_was_everybody_once_stays_so(last: str) -> None:
    cohort = one_each({"a": 12, "b": 36})
    balance = {"name": "instance_balanced", "unit": "patient", "last": last}
    old = cohort.plan(batch=8, balance=balance)
    plan = cohort.plan(batch=8, balance=balance, seed=2).carried_from(old, epoch=1, step=4)
    for epoch in range(1, 6):
        drawn = [row for step in range(6) for row in plan.batch(epoch, step).tolist()]
        assert sorted(drawn) == list(range(48))
        halves = set(drawn[:16])
        assert halves == {row for step in (4, 5) for row in old.batch(1, step).tolist()}


@pytest.mark.parametrize(
    "balance",
    [
        {"name": "progressively_balanced", "num_epochs": 5, "unit": "patient"},
        {"name": "deferred", "num_epochs": 5, "unit": "patient"},
        {"name": "deferred", "start_epoch": 2, "then": {"name": "downsample"}, "unit": "patient"},
    ],
    ids=["progressive", "deferred", "deferred then"],
)
def test_schedules_go_on_in_their_epoch_and_stay_fair(balance: Options) -> None:
    cohort = one_each({"a": 9, "b": 31})
    for old_balance, new_balance in ((balance, "class_balanced"), ("class_balanced", balance)):
        old = cohort.plan(batch=6, balance=old_balance)
        new = cohort.plan(batch=4, balance=new_balance)
        plan = new.carried_from(old, epoch=1, step=3)
        turns = old.exposure(1, 3)
        for epoch in range(1, 7):
            for step in range(plan.num_steps(epoch)):
                batch = plan.batch(epoch, step)
                assert plan.quotas(epoch, step).tolist() == new.quotas(epoch, step).tolist()
                assert len(set(batch.tolist())) == len(batch)
                turns[batch] += 1
                for rows in (slice(0, 9), slice(9, 40)):
                    assert np.ptp(turns[rows]) <= 1


def test_a_withdrawn_patient_never_comes_and_newcomers_join_at_the_next_pass() -> None:
    cohort = one_each({"a": 12, "b": 17})
    old_cohort, new_cohort = cohort.without(["a11", "b16"]), cohort.without(["a3", "b5"])
    old = old_cohort.plan(batch=4, balance="class_balanced")
    new = new_cohort.plan(batch=4, balance="class_balanced", seed=1)
    plan = new.carried_from(old, epoch=0, step=3)
    for label, gone, come in (("a", "a3", "a11"), ("b", "b5", "b16")):
        waiting = remaining(old_cohort, old, label, (0, 3))
        kept = [name for name in waiting if name != gone]
        chain = draws(new_cohort, plan, label, 100)
        assert chain[: len(kept)] == kept
        assert come not in kept
        assert gone not in chain
        size = 11 if label == "a" else 16
        assert come in chain[len(kept) : len(kept) + size]


def test_those_owed_a_turn_are_found_in_whatever_stratum_they_stand_now() -> None:
    cohort = one_each({"a": 12, "b": 20})
    before, after = (
        replace(cohort, sites=tuple("xyz"[number * factor % modulus] for number in range(32)))
        for factor, modulus in ((1, 2), (5, 3))
    )
    balance = {"name": "class_balanced", "strata": ["site"]}
    old = before.plan(batch=8, balance=balance)
    plan = after.plan(batch=8, balance=balance, seed=4).carried_from(old, epoch=0, step=1)
    old_cells, cells = (list(zip(one.labels, one.sites, strict=True)) for one in (before, after))
    ahead = [row for step in range(12) for row in old.batch(*following(old, (0, 0), 12)[step])]
    for cell in sorted(set(cells)):
        # Old stratum after old stratum, each in its old order.
        first = []
        for old_cell in sorted(set(old_cells)):
            order = [row for row in ahead if old_cells[row] == old_cell]
            had = sum(old_cells[row] == old_cell for row in old.batch(0, 0))
            first += [row for row in order[had : old_cells.count(old_cell)] if cells[row] == cell]
        rows = [
            row
            for place in following(plan, (0, 0), 11)
            for row in plan.batch(*place)
            if cells[row] == cell
        ]
        assert 0 < len(first) < len(rows)
        assert rows[: len(first)] == first


def test_fixed_subsets_owe_a_turn_to_those_who_are_still_used() -> None:
    cohort = one_each({"a": 20, "b": 40})
    fixed = {"name": "downsample", "rotate": False}
    old = cohort.plan(batch=8, balance=fixed)
    new = cohort.plan(batch=8, balance=fixed, seed=77)
    plan = new.carried_from(old, epoch=0, step=2)
    waiting = [name for step in (2, 3, 4) for name in patients_of(cohort, old, "b", (0, step))]
    used = used_by(cohort, new)
    assert used_by(cohort, plan) == used
    kept = [name for name in waiting if name in used]
    assert len(waiting) == 12
    assert 0 < len(kept) < 12
    assert draws(cohort, plan, "b", len(kept)) == kept


def test_classes_in_turn_begin_anew_and_their_members_go_on() -> None:
    cohort = one_each({"a": 5, "b": 8, "c": 6, "d": 7})
    in_turn = {"name": "p_k", "P": 2, "M": 3}
    old = cohort.plan(batch=6, balance=in_turn)
    new = cohort.plan(batch=6, balance=in_turn, seed=5)
    plan = new.carried_from(old, epoch=1, step=2)
    total = old.exposure(1, 2)
    for number, place in enumerate(following(plan, (1, 0), 40)[:-1]):
        assert plan.exposure(*place).tolist() == (total - old.exposure(1, 2)).tolist()
        quotas = plan.quotas(*place)
        assert quotas.tolist() == new.quotas(*following(new, (0, 0), number)[-1]).tolist()
        total[plan.batch(*place)] += 1
        for label in "abcd":
            rows = [row for row, name in enumerate(cohort.labels) if name == label]
            assert np.ptp(total[rows]) <= 1
    for label in "abcd":
        first = remaining(cohort, old, label, (1, 2))
        assert draws(cohort, plan, label, len(first), start=(1, 0)) == first


def test_turns_are_carried_between_classes_in_turn_and_shares() -> None:
    cohort = one_each({"a": 5, "b": 8})
    in_turn = cohort.plan(batch=4, balance={"name": "p_k", "P": 2, "M": 2})
    shared = cohort.plan(batch=6, balance="class_balanced")
    for old, new in ((in_turn, shared), (shared, in_turn)):
        plan = new.carried_from(old, epoch=0, step=1)
        for label in "ab":
            first = remaining(cohort, old, label, (0, 1))
            assert draws(cohort, plan, label, len(first)) == first
