"""Draws from Beta(alpha, alpha) that are the same bits on every machine.

The logarithms of the C library differ in their last bit between platforms, and samplers of numpy
and torch change between releases. Here are only operations that IEEE 754 rounds alike everywhere:
the four of arithmetic, the square root, and taking a float apart and putting it together.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

UNIFORMS_PER_DRAW = 4
# 52 bits and a half: no draw is 0 or 1, whose logarithm or odds have no end.
_UNIT_SHIFT = np.uint64(12)
_UNIT_SCALE = 2.0**-52
# ln 2 in two parts: the last 20 bits of the first are 0, so that its multiples here are exact.
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
# A double holds exp(x) for |x| up to here.
_MOST_EXPONENT = 700.0
# Terms after which each series below is exact to a double on its range.
_LOG_TERMS = 12
_EXP_TERMS = 15
_COS_TERMS = 13


def unit_interval(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn raw words into numbers of the open interval (0, 1).

    Examples:
        >>> ends = unit_interval(np.array([0, 2**64 - 1], dtype=np.uint64))
        >>> bool(ends[0] > 0), bool(ends[1] < 1)
        (True, True)
    """
    halves = (raw >> _UNIT_SHIFT).astype(np.float64) + 0.5
    return np.asarray(halves * _UNIT_SCALE, dtype=np.float64)


def symmetric_beta(alpha: float, uniforms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn uniform numbers into draws from Beta(alpha, alpha), without rejection.

    Args:
        alpha: above 0. Below 1 most draws lie near 0 and 1, at 1 they are uniform, above 1 they
            gather around 1/2.
        uniforms: `(n, 4)` independent numbers of the open interval (0, 1).

    Returns:
        `(n,)` draws in [0, 1].

    Source:
        Devroye, "Non-Uniform Random Variate Generation", 1986: Ulrich's polar method for symmetric
        beta variates (IX.4) and the power of a uniform that lowers a gamma parameter by one (IX.3).

    Examples:
        >>> symmetric_beta(1.0, np.array([[0.25, 0.5, 0.5, 0.5]])).tolist()
        [0.25]
    """
    if alpha == 1:
        return np.asarray(uniforms[:, 0], dtype=np.float64)
    if alpha > 1:
        return _by_polar_method(alpha, uniforms)[0]
    # Two gammas of alpha + 1 share their sum as Beta(alpha + 1, alpha + 1); each times a uniform
    # to the power 1 / alpha is a gamma of alpha.
    share, other = _by_polar_method(alpha + 1, uniforms)
    powers = (logarithm(uniforms[:, 3]) - logarithm(uniforms[:, 2])) / alpha
    log_odds = powers + logarithm(other) - logarithm(share)
    return np.asarray(1 / (2 + exponential_less_1(log_odds)), dtype=np.float64)


def _by_polar_method(
    alpha: float, uniforms: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw from Beta(alpha, alpha), alpha >= 1: each draw, and what is missing to 1."""
    radius = np.sqrt(-exponential_less_1(logarithm(uniforms[:, 0]) * (2 / (2 * alpha - 1))))
    offset = radius * _cosine_of_turns(uniforms[:, 1])
    # Kept above 0, where logarithms begin; no draw that a float can hold comes near.
    tiny = np.finfo(np.float64).tiny
    return np.maximum((1 + offset) / 2, tiny), np.maximum((1 - offset) / 2, tiny)


def logarithm(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the natural logarithm of positive, normal numbers.

    Examples:
        >>> bool(np.allclose(logarithm(np.array([0.5, 3.0])), [-0.6931471805599453, math.log(3)]))
        True
    """
    mantissa, exponent = np.frexp(values)
    small = mantissa < math.sqrt(0.5)
    mantissa = np.where(small, 2 * mantissa, mantissa)
    exponent = exponent - small
    # ln m = 2 artanh((m - 1) / (m + 1)), an odd series of numbers below 0.172.
    ratio = (mantissa - 1) / (mantissa + 1)
    square, total = ratio * ratio, np.zeros_like(ratio)
    for power in range(2 * _LOG_TERMS - 1, 0, -2):
        total = total * square + 2 / power
    return np.asarray(exponent * _LN2_HIGH + (total * ratio + exponent * _LN2_LOW))


def exponential_less_1(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give exp(x) - 1, exact to a few bits near 0 too; beyond |x| = 700 that of 700.

    Examples:
        >>> exponential_less_1(np.array([0.0, 1e-20])).tolist()
        [0.0, 1e-20]
    """
    bounded = np.clip(values, -_MOST_EXPONENT, _MOST_EXPONENT)
    exponent = np.rint(bounded / math.log(2))
    rest = (bounded - exponent * _LN2_HIGH) - exponent * _LN2_LOW
    total = np.zeros_like(rest)
    for divisor in range(_EXP_TERMS, 0, -1):
        total = (total + 1) * rest / divisor
    doublings = exponent.astype(np.int64)
    return np.asarray(np.ldexp(total, doublings) + (np.ldexp(1.0, doublings) - 1))


def _cosine_of_turns(turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give cos(2 pi t) for t in [0, 1]."""
    # Folded to a quarter turn, where the series is short: cos(2 pi t) = cos(2 pi (1 - t)), and
    # beyond a quarter it is -cos(2 pi (1/2 - t)).
    half = np.where(turns > 0.5, 1 - turns, turns)
    beyond = half > 0.25
    angle = np.where(beyond, 0.5 - half, half) * (2 * math.pi)
    square, total = angle * angle, np.ones_like(angle)
    # cos x = 1 - x^2/(1 2) (1 - x^2/(3 4) (1 - ...)).
    for term in range(_COS_TERMS, 0, -1):
        total = 1 - total * square / ((2 * term - 1) * (2 * term))
    return np.asarray(np.where(beyond, -total, total))
