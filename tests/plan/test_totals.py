"""Epoch totals: fractions carry over epochs, at any epoch, for any number of classes."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.plan.totals import EpochTotals

LAST_WALKED = 1 << 20


@st.composite
def ideals(draw: st.DrawFn) -> list[Fraction]:
    """Exact draws per epoch of 1 to 20 classes, whole in sum."""
    weights = draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=20).filter(any))
    draws = draw(st.integers(1, 3000))
    return [Fraction(weight * draws, sum(weights)) for weight in weights]


@st.composite
def awkward_ideals(draw: st.DrawFn, *, most: int = 20, least: float = 1e-9) -> list[Fraction]:
    """Shares as floats give them: denominators beyond any that could repeat."""
    weights = draw(st.lists(st.floats(least, 1), min_size=2, max_size=most))
    exact = [Fraction(weight) for weight in weights]
    draws = draw(st.integers(1, 3000))
    return [share * draws / sum(exact) for share in exact]


def check_carry(ideal: list[Fraction], epochs: int, slack: Fraction) -> None:
    totals = EpochTotals(ideal, tie_order=list(range(len(ideal))))
    running = [0] * len(ideal)
    for epoch in range(epochs):
        assert totals.before(epoch) == tuple(running)
        counts = totals.of(epoch)
        assert sum(counts) == sum(ideal)
        for number, (count, exact) in enumerate(zip(counts, ideal, strict=True)):
            assert math.floor(exact) <= count <= math.ceil(exact)
            running[number] += count
            assert abs(running[number] - exact * (epoch + 1)) < 1 + slack


@given(ideal=ideals())
@settings(max_examples=50)
def test_every_class_stays_within_one_of_its_ideal_at_every_epoch(ideal: list[Fraction]) -> None:
    check_carry(ideal, 70, Fraction(0))


@given(ideal=awkward_ideals())
@settings(max_examples=25)
def test_shares_that_never_repeat_stay_within_one_as_well(ideal: list[Fraction]) -> None:
    check_carry(ideal, 70, Fraction(1, 10**6))


def test_many_heavy_classes_stay_within_one() -> None:
    # Rates of nearly one leave a single epoch of slack: the case that breaks plain deadlines.
    for parts in [[99, 98, 97, 96, 10], [50, 51, 99, 100, 100], [1] * 20, [89, 90, 91, 30]]:
        fractions = [Fraction(part, 100) for part in parts]
        fractions.append(math.ceil(sum(fractions)) - sum(fractions, Fraction(0)))
        check_carry(fractions, 230, Fraction(0))


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        # By deadline alone six seats go wrong here ...
        ([17, 8, 16, 18, 13, 12, 17, 19], 20),
        # ... and here by deadline and overlap without the deadline of the group.
        ([8, 6, 12, 14, 12, 13, 15], 16),
    ],
)
def test_classes_that_need_every_rule_of_precedence_stay_within_one(
    parts: list[int], whole: int
) -> None:
    check_carry([Fraction(part, whole) for part in parts], 5 * whole, Fraction(0))


def test_half_draws_alternate() -> None:
    totals = EpochTotals([Fraction(285, 2)] * 2, tie_order=[0, 1])
    assert [totals.of(epoch) for epoch in range(3)] == [(143, 142), (142, 143), (143, 142)]
    swapped = EpochTotals([Fraction(285, 2)] * 2, tie_order=[1, 0])
    assert swapped.of(0) == (142, 143)


def test_whole_draws_are_the_same_in_every_epoch_without_end() -> None:
    totals = EpochTotals([Fraction(3), Fraction(5)], tie_order=[0, 1])
    assert totals.is_constant
    assert totals.of(10**15) == (3, 5)
    assert totals.before(10**15) == (3 * 10**15, 5 * 10**15)


def test_short_periods_reach_any_epoch_at_once() -> None:
    totals = EpochTotals([Fraction(10, 3), Fraction(11, 3), Fraction(2)], tie_order=[0, 1, 2])
    period = [totals.of(epoch) for epoch in range(3)]
    assert np.sum(period, axis=0).tolist() == [10, 11, 6]
    for epoch in (3 * 10**12, 3 * 10**12 + 1, 3 * 10**12 + 2):
        assert totals.of(epoch) == period[epoch % 3]
    assert totals.before(3 * 10**12) == (10**13, 11 * 10**12, 6 * 10**12)


def test_jumping_to_epoch_10_000_gives_what_walking_there_gives() -> None:
    ideal = [Fraction(value) for value in (142.4142135, 100.7182818)]
    ideal.append(Fraction(300) - sum(ideal))
    straight = EpochTotals(ideal, tie_order=[0, 1, 2])
    walked = EpochTotals(ideal, tie_order=[0, 1, 2])
    running = np.zeros(3, dtype=np.int64)
    for epoch in range(1000):
        running += walked.of(epoch)
    assert straight.before(10_000)[0] == pytest.approx(1424142.135, abs=1)
    assert straight.before(1000) == tuple(running.tolist())
    assert straight.of(999) == walked.of(999)


@given(ideal=awkward_ideals(most=10), epoch=st.integers(2000, 6000))
@settings(max_examples=25, deadline=None)
def test_an_epoch_asked_at_once_is_the_epoch_that_walking_finds(
    ideal: list[Fraction], epoch: int
) -> None:
    tie_order = list(range(len(ideal)))
    walked = EpochTotals(ideal, tie_order=tie_order)
    for earlier in range(0, epoch, 64):
        walked.before(earlier)
    straight = EpochTotals(ideal, tie_order=tie_order)
    assert straight.before(epoch) == walked.before(epoch)
    assert straight.of(epoch) == walked.of(epoch)


@given(ideal=awkward_ideals(most=10, least=0.05), epoch=st.integers(2**21, 2**60))
@settings(max_examples=25, deadline=None)
def test_shares_that_never_repeat_are_within_one_at_any_epoch(
    ideal: list[Fraction], epoch: int
) -> None:
    totals = EpochTotals(ideal, tie_order=list(range(len(ideal))))
    for place in (epoch, epoch + 1):
        slack = 1 + Fraction(place, 2**32)
        for count, exact in zip(totals.before(place), ideal, strict=True):
            assert abs(count - exact * place) < slack
    assert sum(totals.of(epoch)) == sum(ideal)


def test_a_far_epoch_of_shares_that_never_repeat_schedules_a_thousand_epochs_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduled = 0
    real = EpochTotals._advance

    def counting(
        self: EpochTotals, taken: tuple[int, ...], start: int, epochs: int
    ) -> tuple[int, ...]:
        nonlocal scheduled
        scheduled += epochs
        return real(self, taken, start, epochs)

    monkeypatch.setattr(EpochTotals, "_advance", counting)
    ideal = [Fraction(value) for value in (142.4142135, 100.7182818)]
    ideal.append(Fraction(300) - sum(ideal))
    for epoch in (600_000, 10**8, 10**9):
        scheduled = 0
        totals = EpochTotals(ideal, tie_order=[0, 1, 2])
        assert totals.before(epoch)[0] == pytest.approx(142.4142135 * epoch, abs=1.5)
        assert scheduled < 1000


def test_shares_that_never_repeat_end_at_a_million_epochs_with_a_way_out() -> None:
    # Whether the rare class had its one draw in four billion epochs, no short look back can tell.
    totals = EpochTotals([Fraction(1, 2**32), 1 - Fraction(1, 2**32)], tie_order=[0, 1])
    with pytest.raises(ConfigError, match=r"epoch 1048640 is too far.*such as 0\.25"):
        totals.before(LAST_WALKED + 64)


def test_threads_asking_in_any_order_get_the_same_totals() -> None:
    ideal = [Fraction(1, 7), Fraction(3, 11), Fraction(45, 77)]
    alone = EpochTotals(ideal, tie_order=[2, 0, 1])
    shared = EpochTotals(ideal, tie_order=[2, 0, 1])
    epochs = np.random.default_rng(0).permutation(400).tolist()
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(shared.before, epochs))
    assert got == [alone.before(epoch) for epoch in epochs]
