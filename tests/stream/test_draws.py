"""Keyed choices: the raw words of the stream, taken one after the other."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.plan.keys import words
from streaming_balance.stream.draws import KeyedWords


@given(key=st.integers(0, 2**128 - 1), taken=st.integers(0, 1100), bound=st.integers(1, 2**40))
def test_a_choice_is_the_word_at_its_place_times_the_bound_without_its_last_64_digits(
    key: int, taken: int, bound: int
) -> None:
    stream = words(key, taken + 600).tolist()
    choices = KeyedWords(key, taken=taken)
    for place in range(taken, taken + 600):
        assert choices.taken == place
        assert choices.below(bound) == stream[place] * bound // 2**64


@pytest.mark.parametrize("bound", [2, 3, 7])
def test_all_choices_are_as_likely_as_each_other(bound: int) -> None:
    choices = KeyedWords(1)
    found = Counter(choices.below(bound) for _ in range(1000 * bound))
    assert set(found) == set(range(bound))
    assert all(abs(count - 1000) < 6 * 1000**0.5 for count in found.values())
