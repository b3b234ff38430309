"""Beta draws: the right distribution, from operations that round alike everywhere."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from streaming_balance.plan.keys import stream_key, words
from streaming_balance.training.beta import (
    exponential_less_1,
    logarithm,
    symmetric_beta,
    unit_interval,
)

DRAWS = 20_000
# A right sampler fails one such comparison in a million.
SIGNIFICANCE = 1e-6


def uniforms(name: str) -> NDArray[np.float64]:
    """Give rows of four numbers of (0, 1) from a named stream."""
    return unit_interval(words(stream_key(5, name), 4 * DRAWS)).reshape(DRAWS, 4)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.5, 0.9, 1.0, 1.001, 1.5, 2.0, 8.0, 32.0, 1e4])
def test_draws_are_distributed_as_scipy_says(alpha: float) -> None:
    drawn = symmetric_beta(alpha, uniforms(f"alpha {alpha}"))
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_halves_of_small_alpha_are_distributed_as_scipy_says(alpha: float) -> None:
    # Near 1 a float cannot tell draws apart, near 0 it can: the lower half is compared.
    drawn = symmetric_beta(alpha, uniforms(f"alpha {alpha}"))
    low = drawn[drawn < 0.5]
    assert stats.binomtest(len(low), DRAWS).pvalue > SIGNIFICANCE
    below = stats.beta(alpha, alpha)
    assert stats.kstest(low, lambda x: 2 * below.cdf(x)).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 0.3, 1.0, 3.0, 1e6, 1e9])
def test_draws_of_any_alpha_lie_in_the_unit_interval_with_mean_and_variance_of_the_law(
    alpha: float,
) -> None:
    drawn = symmetric_beta(alpha, uniforms("moments"))
    variance = 1 / (4 * (2 * alpha + 1))
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.mean() == pytest.approx(0.5, abs=5 * math.sqrt(variance / DRAWS))
    assert drawn.var() == pytest.approx(variance, rel=0.05)


def test_extreme_words_give_numbers_not_infinities() -> None:
    ends = unit_interval(np.array([0, 2**64 - 1], dtype=np.uint64))
    corners = np.stack(np.meshgrid(*[ends] * 4), axis=-1).reshape(-1, 4)
    for alpha in (1e-9, 0.2, 1.0, 1.5, 1e9):
        drawn = symmetric_beta(alpha, corners)
        assert ((drawn >= 0) & (drawn <= 1)).all()


def exact(function: str, value: float) -> Decimal:
    """Compute a function with 40 digits."""
    with localcontext() as context:
        context.prec = 40
        return Decimal(value).ln() if function == "ln" else Decimal(value).exp() - 1


def test_logarithms_are_right_to_the_last_bits_from_the_smallest_number_on() -> None:
    values = np.concatenate([uniforms("logarithm")[:300, 0], 10.0 ** -np.arange(1, 300, 7), [1.5]])
    for value, found in zip(values.tolist(), logarithm(values).tolist(), strict=True):
        assert abs(Decimal(found) / exact("ln", value) - 1) < Decimal("1e-15")


def test_exponentials_are_right_to_the_last_bits_near_0_and_far_from_it() -> None:
    values = np.concatenate(
        [
            *(sign * 10.0 ** -np.arange(0, 25, dtype=float) for sign in (1, -1)),
            60 * (uniforms("exponential")[:300, 0] - 0.5),
        ]
    )
    for value, found in zip(values.tolist(), exponential_less_1(values).tolist(), strict=True):
        assert abs(Decimal(found) / exact("exp", value) - 1) < Decimal("1e-15")


@pytest.mark.parametrize(
    ("alpha", "drawn"),
    [
        (0.2, ["0x1.f0a6c45878a51p-2", "0x1.9a11e4ff3e4b1p-7", "0x1.e0226f9ed85e5p-1"]),
        (1.0, ["0x1.be80697053d3fp-1", "0x1.5352da77ecee8p-4", "0x1.ce47ef2d93840p-7"]),
        (4.0, ["0x1.e3cde329aab64p-2", "0x1.87c6fe92743c9p-2", "0x1.314edc0f4428ep-1"]),
    ],
)
def test_the_bits_of_draws_never_change(alpha: float, drawn: list[str]) -> None:
    stream = unit_interval(words(7, 12)).reshape(3, 4)
    assert [number.hex() for number in symmetric_beta(alpha, stream).tolist()] == drawn
