"""Turns within a class across a change of plan, counted over the draws and nothing else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.plan.carried_rotation import (
    CarriedRotation,
    ListedPass,
    PassBegun,
    SamePass,
    make_rotation,
)
from streaming_balance.plan.members import NUMBERED_EXACT_LIMIT, ClassMembers, sized_table
from streaming_balance.plan.rotation import Rotation, Spacing, spacing_for, split_spacing

# Too large to be sorted: places of a pass are computed one by one.
LARGE = NUMBERED_EXACT_LIMIT + 700


def group_of(size: int) -> ClassMembers:
    return sized_table({"LGG": size}).members[0]


def plain(size: int, spacing: Spacing, *, seed: int = 0) -> Rotation:
    return make_rotation(group_of(size), seed=seed, spacing=spacing)


def carried(size: int, spacing: Spacing, begun: PassBegun, *, seed: int = 1) -> CarriedRotation:
    return CarriedRotation(group_of(size), seed=seed, spacing=spacing, begun=begun)


def draws(rotation: Rotation, count: int, *, start: int = 0) -> list[int]:
    members: list[int] = rotation.take(start, count)[0].tolist()
    return members


def most_repeats(drawn: list[int], window: int) -> int:
    """Count by brute force how often anybody comes in any `window` consecutive draws."""
    counts = Counter(drawn[:window])
    worst = max(counts.values())
    for gone, come in zip(drawn, drawn[window:], strict=False):
        counts[gone] -= 1
        counts[come] += 1
        worst = max(worst, counts[come])
    return worst


def check_windows(drawn: list[int], windows: list[int], size: int) -> None:
    """Check that no window that counts repeats anybody needlessly."""
    for window in windows:
        if 0 < window <= len(drawn):
            assert most_repeats(drawn, window) <= -(-window // size)


def checked_draws(turns: CarriedRotation, old: Rotation, cut: int) -> NDArray[np.int64]:
    """Check the draws of a large class after a change; give three passes of them."""
    waiting = old.take(cut, LARGE - cut % LARGE)[0]
    drawn = turns.take(0, len(waiting) + 3 * LARGE)[0]
    np.testing.assert_array_equal(drawn[: len(waiting)], waiting)
    for number in range(3):
        start = len(waiting) + number * LARGE
        assert np.array_equal(np.sort(drawn[start : start + LARGE]), np.arange(LARGE))
    for start in (0, len(waiting) - 3, len(waiting) + LARGE - 3, len(waiting) + 2 * LARGE - 700):
        np.testing.assert_array_equal(turns.take(start, 600)[0], drawn[start : start + 600])
        counted = np.bincount(drawn[:start], minlength=LARGE) + old.turns_before(cut)
        np.testing.assert_array_equal(turns.turns_before(start), counted)
    # Those who had their turn do not come in the order of the old pass again.
    served = old.take(cut - cut % LARGE, cut % LARGE)[0]
    again = drawn[len(waiting) : len(waiting) + len(served)]
    assert len(served) < 10 or (served != again).mean() > 0.9
    return drawn


@given(
    size=st.integers(1, 40),
    windows=st.lists(st.integers(0, 100), min_size=1, max_size=4),
    owed=st.data(),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=300)
def test_no_window_repeats_anybody_needlessly_across_the_change(
    size: int, windows: list[int], owed: st.DataObject, seed: int
) -> None:
    waiting = owed.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size))
    begun = ListedPass(np.array(waiting, dtype=np.int64), np.zeros(size, dtype=np.int64))
    turns = carried(size, spacing_for(size, windows), begun, seed=seed)
    drawn = draws(turns, len(waiting) + 6 * size)
    assert drawn[: len(waiting)] == waiting
    for number in range(6):
        start = len(waiting) + number * size
        assert sorted(drawn[start : start + size]) == list(range(size))
    check_windows(drawn, windows, size)


@given(
    size=st.integers(2, 40),
    windows=st.lists(st.integers(0, 60), min_size=1, max_size=2),
    cuts=st.lists(st.integers(0, 90), min_size=1, max_size=4),
)
@settings(max_examples=200)
def test_a_chain_of_changes_serves_in_turn_and_counts_on(
    size: int, windows: list[int], cuts: list[int]
) -> None:
    spacing = spacing_for(size, windows)
    turns = plain(size, spacing)
    total = np.zeros(size, dtype=np.int64)
    for number, cut in enumerate(cuts, 1):
        drawn = draws(turns, cut)
        for length in range(0, cut + 1, 7):
            here = total + np.bincount(drawn[:length], minlength=size)
            assert here.max() - here.min() <= 1
        total += np.bincount(drawn, minlength=size)
        assert turns.turns_before(cut).tolist() == total.tolist()
        place = turns.place(cut)
        waiting = draws(turns, size - place, start=cut) if place else []
        assert {int(total[member]) for member in waiting} <= {int(total.min())}
        following = carried(size, spacing, SamePass(turns, cut), seed=number)
        assert draws(following, len(waiting)) == waiting
        turns = following
    check_windows(draws(turns, 4 * size), windows, size)


def test_a_pass_that_has_just_ended_owes_nobody_a_turn() -> None:
    old = plain(10, spacing_for(10, [3]))
    for ordinal in (0, 10, 30):
        turns = carried(10, spacing_for(10, [3]), SamePass(old, ordinal))
        own = plain(10, spacing_for(10, [3]), seed=1)
        assert draws(turns, 25) == draws(own, 25)
        assert turns.turns_before(0).tolist() == [ordinal // 10] * 10


@pytest.mark.parametrize("owed", [1, 3, 5, 9])
def test_two_groups_make_every_pass_after_the_change_whole(owed: int) -> None:
    begun = ListedPass(np.arange(owed, dtype=np.int64), np.zeros(10, dtype=np.int64))
    turns = carried(10, split_spacing(10, 10 - owed), begun)
    passes = [draws(turns, 10, start=10 * number) for number in range(30)]
    assert all(sorted(drawn) == list(range(10)) for drawn in passes)
    # Inside the two parts the order changes from pass to pass.
    assert len(set(map(tuple, passes))) > 20


@pytest.mark.parametrize("windows", [[1], [40], [700], [5000], [LARGE - 90], [2 * LARGE - 90]])
@pytest.mark.parametrize("cut", [3, LARGE // 2 + 11, 2 * LARGE - 5])
def test_a_large_class_is_carried_over_without_being_listed(windows: list[int], cut: int) -> None:
    spacing = spacing_for(LARGE, windows)
    old = plain(LARGE, spacing)
    turns = carried(LARGE, spacing, SamePass(old, cut))
    drawn = checked_draws(turns, old, cut)
    check_windows(drawn.tolist(), windows, LARGE)
    # Once more, from the middle of the pass that the first change found begun or of its own.
    for again in (1, LARGE - cut % LARGE + 77):
        third = carried(LARGE, spacing, SamePass(turns, again), seed=2)
        place = turns.place(again)
        waiting = turns.take(again, LARGE - place if place else 0)[0]
        np.testing.assert_array_equal(third.take(0, len(waiting))[0], waiting)
        check_windows(draws(third, len(waiting) + 2 * LARGE), windows, LARGE)


@pytest.mark.parametrize(("before", "after"), [(700, 5000), (700, LARGE - 90), (5000, 700)])
def test_a_large_class_may_keep_its_turns_farther_apart_than_before(
    before: int, after: int
) -> None:
    # Left inside the places that the seam has reordered.
    cut = LARGE + 300
    old = plain(LARGE, spacing_for(LARGE, [before]))
    turns = carried(LARGE, spacing_for(LARGE, [after]), SamePass(old, cut))
    check_windows(checked_draws(turns, old, cut).tolist(), [after], LARGE)


@pytest.mark.parametrize("windows", [[40], [5000]])
@pytest.mark.parametrize("count", [0, 1, 4000, LARGE])
def test_a_large_class_that_units_have_left_or_joined_is_carried_over_too(
    windows: list[int], count: int
) -> None:
    waiting = np.random.default_rng(5).permutation(LARGE)[:count].astype(np.int64)
    begun = ListedPass(waiting, np.zeros(LARGE, dtype=np.int64))
    turns = carried(LARGE, spacing_for(LARGE, windows), begun)
    drawn = turns.take(0, count + 3 * LARGE)[0]
    np.testing.assert_array_equal(drawn[:count], waiting)
    for number in range(3):
        start = count + number * LARGE
        assert np.array_equal(np.sort(drawn[start : start + LARGE]), np.arange(LARGE))
    check_windows(drawn.tolist(), windows, LARGE)
    third = carried(LARGE, spacing_for(LARGE, [5000]), SamePass(turns, count + 500), seed=2)
    np.testing.assert_array_equal(third.take(0, LARGE - 500)[0], drawn[count + 500 : count + LARGE])
    check_windows(draws(third, 3 * LARGE), [5000], LARGE)


@pytest.mark.parametrize("owed", [7, LARGE // 2, LARGE - 7])
def test_two_groups_of_a_large_class_make_every_pass_whole(owed: int) -> None:
    old = plain(LARGE, spacing_for(LARGE, [1]))
    turns = carried(LARGE, split_spacing(LARGE, LARGE - owed), SamePass(old, LARGE - owed))
    for number in range(3):
        drawn = turns.take(number * LARGE, LARGE)[0]
        assert np.array_equal(np.sort(drawn), np.arange(LARGE))
