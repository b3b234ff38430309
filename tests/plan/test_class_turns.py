"""Batches of P classes and M units of each: everybody in turn, nobody twice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.strategies import parse_strategy


def plan_of(labels: Any, classes: int, units: int, **options: Any) -> BalancedPlan:
    build = {key: options.pop(key) for key in ("seed", "patients") if key in options}
    batch = options.pop("batch", classes * units)
    balance = {"name": "p_k", "P": classes, "M": units, **options}
    return BalancedPlan.from_labels(labels, global_batch_size=batch, balance=balance, **build)


def labels_of(sizes: list[int], seed: int = 0) -> NDArray[np.int64]:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.Generator(np.random.PCG64(seed)).permutation(labels)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Give class sizes, P, M and a seed."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 30)), min_size=1, max_size=20))
    return (
        sizes,
        draw(st.integers(1, len(sizes))),
        draw(st.integers(1, 9)),
        draw(st.integers(0, 2**64 - 1)),
    )


@given(case=cases())
@settings(max_examples=80)
def test_every_batch_holds_p_classes_and_m_units_of_each_in_turn(
    case: tuple[list[int], int, int, int],
) -> None:
    sizes, classes, units, seed = case
    labels = labels_of(sizes)
    plan = plan_of(labels, classes, units, seed=seed)
    turns = np.zeros(len(sizes), dtype=np.int64)
    counted = np.zeros(len(labels), dtype=np.int64)
    assert plan.num_steps(0) == math.ceil(len(labels) / (classes * units))
    for epoch in range(3):
        for step in range(plan.num_steps(epoch)):
            np.testing.assert_array_equal(plan.exposure(epoch, step), counted)
            batch = plan.batch(epoch, step)
            per_class = np.bincount(labels[batch], minlength=len(sizes))
            assert sorted(per_class.tolist()) == [0] * (len(sizes) - classes) + [units] * classes
            assert plan.quotas(epoch, step).tolist() == per_class.tolist()
            here = np.bincount(batch, minlength=len(labels))
            counted += here
            turns += per_class > 0
            assert turns.max() - turns.min() <= 1
            for number, size in enumerate(sizes):
                inside = counted[labels == number]
                assert inside.max() - inside.min() <= 1
                # Nobody twice where the class has enough; else everybody as often as possible.
                assert here[labels == number].max() <= math.ceil(units / size)
    np.testing.assert_array_equal(plan.exposure(3, 0), counted)


@given(case=cases(), place=st.tuples(st.integers(0, 400), st.integers(0, 10**6)))
@settings(max_examples=40)
def test_any_place_is_reached_alone_and_counts_what_came_before(
    case: tuple[list[int], int, int, int], place: tuple[int, int]
) -> None:
    sizes, classes, units, seed = case
    labels = labels_of(sizes)
    plan = plan_of(labels, classes, units, seed=seed)
    epoch, step = place[0], place[1] % plan.num_steps(0)
    before, after = plan.exposure(epoch, step), plan.exposure(epoch, step + 1)
    np.testing.assert_array_equal(
        after - before, np.bincount(plan.batch(epoch, step), minlength=len(labels))
    )
    assert before.sum() == (epoch * plan.num_steps(0) + step) * classes * units
    again = plan_of(labels, classes, units, seed=seed)
    assert again.batch(epoch, step).tolist() == plan.batch(epoch, step).tolist()


def test_patients_take_turns_and_so_do_their_samples() -> None:
    # Six patients of two classes with 1 to 6 samples each; a turn shows the next sample.
    owner = np.repeat(np.arange(6), np.arange(1, 7))
    labels = owner % 2
    plan = plan_of(labels, 2, 3, patients=[f"P{number}" for number in owner])
    assert plan.unit == "patient"
    counted = np.zeros(len(owner), dtype=np.int64)
    for epoch in range(40):
        batch = plan.batch(epoch, 0)
        assert sorted(owner[batch].tolist()) == [0, 1, 2, 3, 4, 5]
        counted += np.bincount(batch, minlength=len(owner))
        for patient in range(6):
            mine = counted[owner == patient]
            assert mine.sum() == epoch + 1
            assert mine.max() - mine.min() <= 1
    assert plan.num_steps(0) == 1
    assert plan.guarantees["no_twin_in_a_batch"]
    np.testing.assert_array_equal(plan.exposure(40, 0), counted)


def test_classes_meet_in_many_combinations() -> None:
    plan = plan_of(labels_of([10] * 8), 2, 4, seed=1)
    pairs = {
        tuple(np.flatnonzero(plan.quotas(epoch, step)).tolist())
        for epoch in range(20)
        for step in range(plan.num_steps(epoch))
    }
    assert len(pairs) == 28


def test_a_class_keeps_its_order_when_another_is_added() -> None:
    few = plan_of(["a"] * 6 + ["b"] * 6, 2, 2)
    many = plan_of(["a"] * 6 + ["b"] * 6 + ["c"] * 6, 3, 2)

    def order(plan: BalancedPlan, label: int) -> list[int]:
        steps = [(epoch, step) for epoch in range(4) for step in range(plan.num_steps(epoch))]
        return [m for place in steps for m in plan._draws.members_of(*place)[label].tolist()]

    for label in (0, 1):
        assert order(few, label)[:16] == order(many, label)[:16]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_parts_of_all_ranks_are_the_global_batch(ranks: int) -> None:
    plan = plan_of(labels_of([9, 4, 7]), 2, 4)
    for step in range(plan.num_steps(1)):
        parts = [plan.rank_batch(1, step, rank=rank, num_ranks=ranks) for rank in range(ranks)]
        assert sorted(np.concatenate(parts).tolist()) == sorted(plan.batch(1, step).tolist())
        assert {len(part) for part in parts} <= {8 // ranks, -(-8 // ranks)}


def test_an_epoch_is_as_long_as_asked_for() -> None:
    assert plan_of(labels_of([9, 4, 7]), 2, 4, num_samples=33).num_steps(0) == 5
    assert plan_of(labels_of([9, 4, 7]), 2, 4, num_samples=33, last="drop").num_steps(0) == 4
    assert plan_of(labels_of([9, 4, 7]), 2, 4, num_samples="oversample").num_steps(0) == 4


def test_every_class_has_the_same_share() -> None:
    plan = plan_of(labels_of([9, 4, 7]), 2, 4)
    assert plan.shares == {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}
    assert plan.prior_shift() == pytest.approx({0: 27 / 20, 1: 12 / 20, 2: 21 / 20}, rel=1e-12)


def test_empty_classes_never_have_a_turn_once_that_was_asked_for() -> None:
    sizes = {"a": 5, "b": 0, "c": 6}
    balance = {"name": "p_k", "P": 2, "M": 2}
    with pytest.raises(ConfigError, match="'b' is declared but has no training sample"):
        BalancedPlan.from_class_sizes(sizes, global_batch_size=4, balance=balance)
    plan = BalancedPlan.from_class_sizes(
        sizes, global_batch_size=4, balance=balance | {"empty_class": "renormalize"}
    )
    assert all(plan.quotas(epoch, 0).tolist() == [2, 0, 2] for epoch in range(5))
    assert plan.shares == {"a": 0.5, "b": 0, "c": 0.5}


def test_warnings_speak_of_m_and_not_of_the_batch() -> None:
    # Ten classes in batches of two are what P = 2 asks for; a class of 3 is too small for M = 4.
    labels = labels_of([8] * 9 + [3])
    assert plan_of(labels, 2, 3).warnings == ()
    (said,) = plan_of(labels, 2, 4).warnings
    assert "class 9 has 3, fewer than the 4" in said.replace("'", "")
    assert "up to 2 times in one batch" in said


def test_settings_make_the_same_plan_again() -> None:
    plan = plan_of(labels_of([9, 4, 7]), 2, 4, last="drop")
    assert plan.settings["balance"] == {"name": "p_k", "P": 2, "M": 4, "last": "drop"}
    assert parse_strategy(plan.settings["balance"]) == plan.strategy


@pytest.mark.parametrize(
    ("classes", "units", "options", "said"),
    [
        (2, 4, {"batch": 9}, "P x M is 2 x 4 = 8, but global_batch_size is 9; make them equal"),
        (4, 2, {}, "P is 4, but only 3 classes have samples; use P <= 3"),
        (2, 4, {"last": "short"}, "fewer than P x M is none; use full or drop"),
        (2, 4, {"draw": "iid"}, "draw: iid is for strategies that give classes a share"),
        (2, 4, {"replacement": False}, "replacement: false is for strategies"),
        (2, 4, {"strata": ["site"]}, "leave strata out"),
        (0, 4, {"batch": 4}, "P is 0; it must be an integer of at least 1"),
        (2.0, 4, {"batch": 8}, r"P is 2\.0"),
        (True, 4, {"batch": 4}, "P is True"),
        (2, 2.5, {"batch": 5}, r"M is 2\.5"),
    ],
)
def test_batches_that_cannot_be_are_refused_with_the_way_out(
    classes: Any, units: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_of(labels_of([9, 4, 7]), classes, units, **options)
