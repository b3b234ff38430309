"""Keyed permutations: one to one, unbiased, and indifferent to who else is there."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.permutation import (
    FeistelPermutation,
    mix64,
    order_of,
    shuffled,
    sort_keys,
)

REJECT = 1e-6
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def chi_square(observed: NDArray[np.int64], expected: float) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("seed", "answers"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_mix64_gives_the_published_splitmix64_sequence(seed: int, answers: list[int]) -> None:
    # SplitMix64 adds the golden gamma before each output and mixes the sum.
    states = [(seed + (turn + 1) * GOLDEN_GAMMA) % 2**64 for turn in range(len(answers))]
    assert mix64(np.array(states, dtype=np.uint64)).tolist() == answers


def test_mix64_leaves_its_argument_alone() -> None:
    values = np.arange(5, dtype=np.uint64)
    mix64(values)
    assert values.tolist() == [0, 1, 2, 3, 4]


@given(key=st.integers(0, 2**128 - 1))
def test_both_halves_of_a_key_matter_and_distinct_hashes_stay_distinct(key: int) -> None:
    hashes = np.arange(1000, dtype=np.uint64)
    own = sort_keys(key, hashes)
    assert len(set(own.tolist())) == 1000
    assert (sort_keys(key ^ 1, hashes) != own).all()
    assert (sort_keys(key ^ (1 << 64), hashes) != own).all()


def test_equal_keys_keep_the_order_they_stand_in() -> None:
    # Long enough for an unstable sort to disturb them.
    keys = np.tile(np.array([3, 1, 2], dtype=np.uint64), 500)
    expected = sorted(range(1500), key=lambda place: (int(keys[place]), place))
    assert order_of(keys).tolist() == expected


@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60, unique=True),
    gone=st.integers(0, 59),
    key=st.integers(0, 2**128 - 1),
)
def test_a_member_that_leaves_does_not_move_the_others_among_themselves(
    hashes: list[int], gone: int, key: int
) -> None:
    gone %= len(hashes)
    rest = hashes[:gone] + hashes[gone + 1 :]
    before = [hashes[m] for m in shuffled(key, np.array(hashes, dtype=np.uint64))]
    after = [rest[m] for m in shuffled(key, np.array(rest, dtype=np.uint64))]
    assert after == [value for value in before if value != hashes[gone]]


def test_every_order_of_five_members_is_equally_likely() -> None:
    hashes = mix64(np.arange(5, dtype=np.uint64))
    draws = 12_000
    seen = Counter(
        tuple(shuffled(stream_key(0, "order", number), hashes).tolist()) for number in range(draws)
    )
    observed = np.array([seen[order] for order in itertools.permutations(range(5))])
    assert chi_square(observed, draws / 120) < stats.chi2.isf(REJECT, 119)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**128 - 1))
@settings(max_examples=200)
def test_a_feistel_permutation_is_one_to_one_at_every_size(size: int, key: int) -> None:
    order = FeistelPermutation(size, key=key)(np.arange(size))
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))


@given(size=st.integers(1, 10**12), key=st.integers(0, 2**128 - 1), data=st.data())
def test_a_place_has_the_same_member_whoever_is_asked_for_beside_it(
    size: int, key: int, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    order = FeistelPermutation(size, key=key)
    together = order(np.array(places))
    alone = [int(order(np.array([place]))[0]) for place in places]
    assert together.tolist() == alone
    assert together.min() >= 0
    assert together.max() < size
    assert len(set(together.tolist())) == len(set(places))


def test_the_feistel_rectangle_has_hardly_a_spare_cell() -> None:
    for size in [2, 3, 10, 1000, 10**6 + 3, 2**20 + 1, 10**9, 3 * 10**9 + 7]:
        order = FeistelPermutation(size, key=1)
        cells = int(order._rows) * int(order._columns)
        assert size <= cells <= size + 2 * int(size**0.5) + 2


@pytest.mark.parametrize(("size", "draws"), [(7, 2500), (64, 1500)])
def test_a_feistel_permutation_puts_every_member_at_every_place_equally_often(
    size: int, draws: int
) -> None:
    table = np.zeros((size, size), dtype=np.int64)
    everyone = np.arange(size)
    for number in range(draws):
        key = stream_key(1, "order", number)
        table[everyone, FeistelPermutation(size, key=key)(everyone)] += 1
    # Rows and columns are fixed sums: (size - 1)^2 degrees of freedom.
    assert chi_square(table, draws / size) < stats.chi2.isf(REJECT, (size - 1) ** 2)


def test_neighbours_in_a_feistel_permutation_are_unrelated() -> None:
    size, draws = 11, 3500
    table = np.zeros((size, size), dtype=np.int64)
    for number in range(draws):
        first, second = FeistelPermutation(size, key=stream_key(2, "order", number))(
            np.array([4, 5])
        )
        table[first, second] += 1
    assert table.trace() == 0
    observed = table[~np.eye(size, dtype=bool)]
    limit = stats.chi2.isf(REJECT, size * (size - 1) - 1)
    assert chi_square(observed, draws / (size * (size - 1))) < limit


def test_a_large_feistel_permutation_spreads_a_run_of_places_evenly() -> None:
    size = 50_000_000
    order = FeistelPermutation(size, key=stream_key(3, "order"))(np.arange(100_000))
    cells = np.bincount(order * 1000 // size, minlength=1000)
    assert chi_square(cells, 100.0) < stats.chi2.isf(REJECT, 999)
    gaps = np.diff(order) % size * 1000 // size
    assert chi_square(np.bincount(gaps, minlength=1000), 99.999) < stats.chi2.isf(REJECT, 999)
