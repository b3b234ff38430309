"""Quotas: floor or ceiling everywhere, exact sums, nothing negative, no drift."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.plan.quotas import (
    StepQuotas,
    apportion,
    exact_shares,
    quotas,
    split_totals,
)

WEIGHTS = st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any)


@st.composite
def epochs(draw: st.DrawFn) -> tuple[list[int], int]:
    """Totals of up to 12 classes that fill a whole number of batches."""
    steps = draw(st.integers(1, 60))
    totals = draw(st.lists(st.integers(0, 300), min_size=1, max_size=12))
    totals[-1] += -sum(totals) % steps
    return totals, steps


def test_the_largest_remainders_get_what_is_left_over() -> None:
    # 10 draws at 0.61, 0.24, 0.15: 6.1, 2.4, 1.5 -> 6, 2, 1 and one more for the last.
    assert apportion([0.61, 0.24, 0.15], 10).tolist() == [6, 2, 2]


def test_equal_remainders_go_to_the_lower_class() -> None:
    assert apportion([1, 1], 285).tolist() == [143, 142]
    assert apportion([1, 1, 1], 125).tolist() == [42, 42, 41]
    assert apportion([1, 1, 1, 1], 2).tolist() == [1, 1, 0, 0]


@given(weights=WEIGHTS, draws=st.integers(0, 5000))
def test_apportioning_sums_up_and_no_exchange_of_a_draw_brings_it_nearer(
    weights: list[int], draws: int
) -> None:
    counts = apportion(weights, draws).tolist()
    ideal = [Fraction(weight * draws, sum(weights)) for weight in weights]
    assert sum(counts) == draws
    for count, exact in zip(counts, ideal, strict=True):
        assert math.floor(exact) <= count <= math.ceil(exact)
    # Largest remainder minimises the squared error: moving a draw never helps, and where it would
    # change nothing the lower class holds it.
    for giver, taker in ((g, t) for g in range(len(counts)) for t in range(len(counts)) if g != t):
        gain = (ideal[taker] - counts[taker]) - (ideal[giver] - counts[giver])
        assert gain <= 1
        assert gain < 1 or not counts[giver] or giver < taker


def test_the_reference_epoch_totals_are_met(vectors: dict[str, Any]) -> None:
    for case in vectors["quota_epoch"]["cases"].values():
        even = [Fraction(1, len(case["counts"]))] * len(case["counts"])
        got = apportion(even, sum(case["counts"])).tolist()
        assert got == case["uniform_target_epoch_N_largest_remainder"]


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf"), float("-inf")])
def test_an_impossible_share_is_named_by_class_and_value(share: float) -> None:
    with pytest.raises(ConfigError, match=rf"share of class 1 is {share}; .*finite and >= 0"):
        exact_shares([1.0, share])


def test_shares_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="all 3 shares are 0; at least one"):
        apportion([0, 0, 0], 4)


@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda w: sum(w) > 0))
def test_exact_shares_sum_to_exactly_one(weights: list[float]) -> None:
    shares = exact_shares(weights)
    assert sum(shares) == 1
    assert shares[0] == Fraction(weights[0]) / sum(map(Fraction, weights))


def test_two_batches_of_three_and_five_are_worked_out_by_hand() -> None:
    # Left half of 3 + 5: floor(3/2) = 1, floor(8/2) - 1 = 3; an offset of 1 gives 2 and 4 - 2 = 2.
    assert quotas([3, 5], 2).tolist() == [[1, 3], [2, 2]]
    assert quotas([3, 5], 2, offset=1).tolist() == [[2, 2], [1, 3]]
    assert split_totals([3, 5], 2, 1, offset=1) == [2, 2]


def test_the_reference_quota_rows_are_met(vectors: dict[str, Any]) -> None:
    plan = vectors["quota_plan_proposed"]
    for case in plan["cases"].values():
        assert quotas(case["epoch_totals"], case["batches"]).tolist() == case["quota_rows"]


def test_the_reference_sequence_of_two_classes_is_met(vectors: dict[str, Any]) -> None:
    ticks = vectors["quota_plan_proposed"]["two_class_sequence"]
    minority, draws = ticks["a"], ticks["b"]
    reached = [split_totals([minority, draws - minority], draws, t, 0)[0] for t in range(20)]
    assert np.diff(reached).tolist() == ticks["first_19_is_minority"]


@given(epoch=epochs(), offset=st.integers(0, 1000))
def test_every_batch_gets_floor_or_ceiling_and_every_sum_is_exact(
    epoch: tuple[list[int], int], offset: int
) -> None:
    totals, steps = epoch
    rows = quotas(totals, steps, offset)
    assert rows.shape == (steps, len(totals))
    assert rows.sum(axis=0).tolist() == totals
    assert (rows.sum(axis=1) == sum(totals) // steps).all()
    for number, total in enumerate(totals):
        assert rows[:, number].min() >= total // steps
        assert rows[:, number].max() <= -(-total // steps)


def test_quotas_of_100_random_share_vectors_are_never_negative_and_hardly_drift() -> None:
    random = np.random.default_rng(16)
    for _ in range(100):
        classes, steps = int(random.integers(3, 21)), int(random.integers(1, 200))
        totals = apportion(random.dirichlet(np.full(classes, 0.4)).tolist(), steps * 16).tolist()
        rows = quotas(totals, steps, int(random.integers(0, 1000)))
        assert rows.min() >= 0
        ideal = np.outer(np.arange(1, steps + 1), totals) / steps
        # Nested rounding adds up less than 1 per level of the tree, about 2.8 in practice.
        assert np.abs(rows.cumsum(axis=0) - ideal).max() < 4


@given(epoch=epochs(), data=st.data())
def test_a_batch_is_the_same_in_whatever_order_batches_are_asked_for(
    epoch: tuple[list[int], int], data: st.DataObject
) -> None:
    totals, steps = epoch

    def offset_of(start: int, length: int) -> int:
        return (start * 7919 + length * 31) % length

    in_turn = StepQuotas(totals, steps=steps, offset_of=offset_of)
    rows = [in_turn.at(step) for step in range(steps)]
    jumping = StepQuotas(totals, steps=steps, offset_of=offset_of)
    before = [0] * len(totals)
    for ordinal, counts in rows:
        assert ordinal == before
        before = [b + count for b, count in zip(before, counts, strict=True)]
    for step in data.draw(st.lists(st.integers(0, steps - 1), max_size=30)):
        assert jumping.at(step) == rows[step]


def test_a_batch_of_a_very_long_epoch_takes_a_handful_of_nodes() -> None:
    nodes: list[tuple[int, int]] = []

    def offset_of(start: int, length: int) -> int:
        nodes.append((start, length))
        return 0

    steps = 10**9
    walk = StepQuotas([steps, 2 * steps, steps], steps=steps, offset_of=offset_of)
    assert walk.at(123_456_789) == ([123_456_789, 246_913_578, 123_456_789], [1, 2, 1])
    assert len(nodes) <= 30
    nodes.clear()
    for step in range(1000):
        walk.at(step)
    # A walk through neighbouring batches costs two new nodes a step and a descent to begin with.
    assert len(nodes) <= 2 * 1000 + 30
