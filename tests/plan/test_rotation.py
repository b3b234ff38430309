"""Turns within a class: whole passes, seams and groups that keep turns apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.plan.permutation import EXACT_LIMIT, mix64
from streaming_balance.plan.rotation import SEAM_LIMIT, Rotation, Spacing, spacing_for

LARGE = EXACT_LIMIT + 1001


def rotation(
    size: int, spacing: Spacing, *, seed: int = 0, label: str = "LGG", hashes_from: int = 0
) -> Rotation:
    def hashes() -> NDArray[np.uint64]:
        assert size <= EXACT_LIMIT, "a large class must never be hashed whole"
        return mix64(np.arange(hashes_from, hashes_from + size, dtype=np.uint64))

    return Rotation(seed=seed, label=label, size=size, hashes=hashes, spacing=spacing)


def most_repeats(draws: list[int], window: int) -> int:
    """Count by brute force how often anybody comes in any `window` consecutive draws."""
    counts = Counter(draws[:window])
    worst = max(counts.values())
    for gone, come in zip(draws, draws[window:], strict=False):
        counts[gone] -= 1
        counts[come] += 1
        worst = max(worst, counts[come])
    return worst


@given(
    size=st.integers(1, 40),
    windows=st.lists(st.integers(0, 100), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=300)
def test_no_window_repeats_anybody_needlessly_and_passes_stay_whole(
    size: int, windows: list[int], seed: int
) -> None:
    turns = rotation(size, spacing_for(size, windows), seed=seed)
    passes = 8
    members, numbers = turns.take(0, passes * size)
    for number in range(passes):
        one = members[number * size : (number + 1) * size]
        assert sorted(one.tolist()) == list(range(size))
    assert numbers.tolist() == [number for number in range(passes) for _ in range(size)]
    for window in windows:
        if 0 < window <= passes * size:
            assert most_repeats(members.tolist(), window) <= -(-window // size)


def test_a_window_of_up_to_half_the_class_leaves_the_whole_class_free_to_mix() -> None:
    # 2q - 1 = 75 for q = 38: the last that a seam can serve; 39 needs groups of 37.
    assert spacing_for(75, [38]) == Spacing(group=75, window=38)
    assert spacing_for(75, [39]) == Spacing(group=25, window=1)
    assert spacing_for(74, [38]) == Spacing(group=37, window=1)
    assert spacing_for(75, []) == Spacing(group=75, window=1)
    assert spacing_for(10**9, [SEAM_LIMIT]).window == SEAM_LIMIT
    assert spacing_for(10**9, [SEAM_LIMIT + 1]) == Spacing(group=5 * 10**8, window=1)


@given(size=st.integers(1, 30), spacing=st.integers(1, 40), data=st.data())
def test_draws_are_the_same_however_they_are_cut(
    size: int, spacing: int, data: st.DataObject
) -> None:
    kind = spacing_for(size, [spacing])
    whole, numbers = rotation(size, kind).take(0, 6 * size)
    turns = rotation(size, kind)
    for _ in range(10):
        start = data.draw(st.integers(0, 5 * size))
        count = data.draw(st.integers(0, size))
        members, before = turns.take(start, count)
        np.testing.assert_array_equal(members, whole[start : start + count])
        np.testing.assert_array_equal(before, numbers[start : start + count])
        counted = np.bincount(whole[:start], minlength=size)
        np.testing.assert_array_equal(turns.turns_before(start), counted)


def test_consecutive_passes_are_different_orders() -> None:
    turns = rotation(75, spacing_for(75, [4]))
    orders = {tuple(turns.take(number * 75, 75)[0].tolist()) for number in range(50)}
    assert len(orders) == 50


def test_with_groups_two_members_meet_in_both_orders() -> None:
    turns = rotation(20, Spacing(group=5, window=1))
    passes = np.array([turns.take(20 * number, 20)[0] for number in range(40)])
    places = passes.argsort(axis=1)
    groups = places // 5
    assert (groups == groups[0]).all()
    assert len({tuple(row) for row in passes.tolist()}) == 40
    assert (places != places[0]).any(axis=0).all()


def test_the_first_places_of_a_pass_stay_unpredictable_after_the_seam_is_repaired() -> None:
    # 75 members, window 38: every member may stand first unless it stood among the last 37.
    size, window = 75, 38
    firsts: Counter[int] = Counter()
    for seed in range(400):
        members, _ = rotation(size, spacing_for(size, [window]), seed=seed).take(0, size + 1)
        firsts[int(members[size])] += 1
        assert members[size] not in members[window:size]
    assert len(firsts) > 65


@given(size=st.integers(1, 60), window=st.integers(1, 80), seed=st.integers(0, 2**64 - 1))
def test_the_first_pass_is_the_same_however_far_turns_are_kept_apart(
    size: int, window: int, seed: int
) -> None:
    free, _ = rotation(size, spacing_for(size, []), seed=seed).take(0, size)
    apart, _ = rotation(size, spacing_for(size, [window]), seed=seed).take(0, size)
    assert apart.tolist() == free.tolist()


def test_labels_and_seeds_reach_different_orders() -> None:
    free = Spacing(group=75, window=1)
    orders = [
        rotation(75, free, seed=seed, label=label).take(0, 75)[0].tolist()
        for seed in (0, 1)
        for label in ("LGG", "HGG")
    ]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(
    "spacing",
    [
        Spacing(group=LARGE, window=1),
        Spacing(group=LARGE, window=300),
        Spacing(group=9000, window=1),
    ],
)
def test_a_large_class_gives_whole_passes_and_keeps_turns_apart(spacing: Spacing) -> None:
    turns = rotation(LARGE, spacing)
    first, _ = turns.take(0, LARGE)
    assert np.array_equal(np.sort(first), np.arange(LARGE))
    around, numbers = turns.take(LARGE - 400, 800)
    np.testing.assert_array_equal(around[:400], first[-400:])
    assert numbers.tolist() == [0] * 400 + [1] * 400
    if spacing.window > 1:
        assert most_repeats(around.tolist(), spacing.window) == 1
    small = [int(turns.take(place, 1)[0][0]) for place in range(LARGE - 5, LARGE + 5)]
    assert small == around[395:405].tolist()
    again = turns.turns_before(LARGE + 2500)
    expected = np.ones(LARGE, dtype=np.int64)
    expected[turns.take(LARGE, 2500)[0]] += 1
    np.testing.assert_array_equal(again, expected)


def test_groups_of_a_large_class_are_fixed_and_mix_inside() -> None:
    turns = rotation(LARGE, Spacing(group=9000, window=1))
    passes = [turns.take(number * LARGE, 9000)[0] for number in (0, 1)]
    assert set(passes[0].tolist()) == set(passes[1].tolist())
    assert (passes[0] != passes[1]).mean() > 0.99
    last = LARGE - LARGE % 9000
    ends = [turns.take(number * LARGE + last, LARGE - last)[0] for number in (0, 1)]
    assert set(ends[0].tolist()) == set(ends[1].tolist())


def test_the_limit_between_sorted_and_computed_passes_is_served_from_both_sides() -> None:
    for size in (EXACT_LIMIT, EXACT_LIMIT + 1):
        members, _ = rotation(size, Spacing(group=size, window=64)).take(0, size)
        assert np.array_equal(np.sort(members), np.arange(size))
