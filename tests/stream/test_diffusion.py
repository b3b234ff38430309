"""Error diffusion: counts within 1 of the sum of the rates, over all passes."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.stream.diffusion import ONE, ErrorDiffusion, whole_rate

RATES = st.one_of(st.integers(0, ONE), st.integers(0, 5000 * ONE))
PASSES = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.lists(RATES, max_size=30)), max_size=12)


@given(word=st.integers(0, 2**64 - 1), passes=PASSES)
def test_every_count_is_floor_or_ceiling_and_the_sum_is_within_one_in_every_pass(
    word: int, passes: list[tuple[int, list[int]]]
) -> None:
    diffusion = ErrorDiffusion(word=word)
    given_out, ideal = 0, Fraction(0)
    for next_word, rates in passes:
        for rate in rates:
            count = diffusion.take(rate)
            given_out, ideal = given_out + count, ideal + Fraction(rate, ONE)
            assert rate // ONE <= count <= -(-rate // ONE)
            assert abs(given_out - ideal) < 1
            assert diffusion.given == given_out
            assert diffusion.ideal == pytest.approx(float(ideal), abs=1e-9)
        diffusion.begin_pass(word=next_word)


@given(rate=st.integers(0, ONE))
def test_the_first_sample_is_taken_with_a_chance_that_is_its_rate(rate: int) -> None:
    # The phase is the word's upper 52 bits: taken from the word at which phase + rate reaches 1.
    first = -(-(ONE - rate) * 2**64 // ONE)
    if first < 2**64:
        assert ErrorDiffusion(word=first).take(rate) == 1
    if first > 0:
        assert ErrorDiffusion(word=first - 1).take(rate) == 0


@given(word=st.integers(0, 2**64 - 1), rates=st.lists(RATES, max_size=10))
def test_a_state_goes_on_where_it_was_taken(word: int, rates: list[int]) -> None:
    diffusion, restored = ErrorDiffusion(word=word), ErrorDiffusion(word=0)
    for rate in rates:
        diffusion.take(rate)
    restored.load(diffusion.state())
    diffusion.begin_pass(word=5)
    restored.begin_pass(word=5)
    assert [restored.take(rate) for rate in rates] == [diffusion.take(rate) for rate in rates]
    assert restored.ideal == diffusion.ideal


def test_a_rate_is_rounded_to_the_nearest_unit() -> None:
    assert whole_rate(Fraction(1)) == ONE
    assert whole_rate(Fraction(2, 3)) == (2 * ONE + 1) // 3
    assert whole_rate(Fraction(0)) == 0
