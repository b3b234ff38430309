"""The k smallest ranks: exact ranks, and the same members in any order."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.stream.bottom_k import BottomK, uniform_rank, weighted_rank

WORDS = st.integers(0, 2**128 - 1)


@given(word=WORDS, weight=st.floats(1e-6, 1e6))
def test_a_weighted_rank_is_minus_the_logarithm_of_a_uniform_number_over_the_weight(
    word: int, weight: float
) -> None:
    rank, tie = weighted_rank(word, weight)
    # u = 1 - (word + 1/2) / 2**128; for small words the logarithm is the series x + x^2/2 + ...
    x = (Fraction(word) + Fraction(1, 2)) / 2**128
    assert tie == word
    assert rank > 0
    if x < Fraction(1, 2**30):
        assert rank * weight == pytest.approx(float(x + x * x / 2), rel=1e-12)
    elif x < Fraction(999, 1000):
        assert rank * weight == pytest.approx(-math.log(float(1 - x)), rel=1e-6)


@pytest.mark.parametrize("word", [0, 1, 2**127, 2**128 - 1, 2**128 - 2**60])
def test_a_weighted_rank_is_a_number_at_both_ends(word: int) -> None:
    assert 0 < weighted_rank(word, 1.0)[0] < 45


def test_larger_words_have_larger_ranks() -> None:
    spread = [2**place for place in range(128)] + [2**128 - 1]
    for ranks in ([weighted_rank(word, 3.0) for word in spread], list(map(uniform_rank, spread))):
        assert all(one < other for one, other in pairwise(ranks))


@given(words=st.lists(st.integers(0, 50), max_size=40), size=st.integers(0, 8))
def test_whoever_is_not_kept_is_handed_back(words: list[int], size: int) -> None:
    kept: BottomK[int] = BottomK(size=size)
    back: list[int] = []
    for word in words:
        back.extend(kept.offer(uniform_rank(word), word))
    assert [value for _, value, _ in kept.ranked()] == sorted(set(words))[:size]
    assert sorted([*back, *(value for _, value, _ in kept.ranked())]) == sorted(words)
    assert len(kept) == min(size, len(set(words)))


@given(
    members=st.dictionaries(st.integers(0, 99), st.integers(0, 30), max_size=30),
    size=st.integers(1, 8),
    most=st.integers(1, 80),
    data=st.data(),
)
def test_parts_absorbed_in_any_order_keep_what_one_keeps(
    members: dict[int, int], size: int, most: int, data: st.DataObject
) -> None:
    alone: BottomK[int] = BottomK(size=size, most_bytes=most)
    parts: list[BottomK[int]] = [BottomK(size=size, most_bytes=most) for _ in range(3)]
    for word, num_bytes in members.items():
        alone.offer(uniform_rank(word), word, num_bytes)
        part = data.draw(st.sampled_from(parts))
        part.offer(uniform_rank(word), word, num_bytes)
    whole: BottomK[int] = BottomK(size=size, most_bytes=most)
    for part in data.draw(st.permutations(parts)):
        before = [*whole.ranked(), *part.ranked()]
        gone = whole.absorb(part)
        assert len(whole) + len(gone) == len(before)
    assert list(whole.ranked()) == list(alone.ranked())
    assert whole.num_bytes == alone.num_bytes == sum(entry[2] for entry in whole.ranked())
    assert whole.bar == alone.bar


@given(members=st.dictionaries(st.integers(0, 99), st.integers(0, 30), max_size=30))
def test_a_state_keeps_the_bar_too(members: dict[int, int]) -> None:
    kept: BottomK[int] = BottomK(size=5, most_bytes=60)
    for word, num_bytes in members.items():
        kept.offer(weighted_rank(word << 100, 2.0), word, num_bytes)
    restored: BottomK[int] = BottomK(size=5, most_bytes=60)
    restored.load(kept.state(lambda value: value), lambda value: value)
    assert list(restored.ranked()) == list(kept.ranked())
    assert restored.bar == kept.bar
