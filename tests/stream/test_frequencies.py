"""Class frequencies: declared, or frozen counts per window, and who was met."""

from __future__ import annotations

from fractions import Fraction

import pytest

from streaming_balance.stream.frequencies import ClassFrequencies


def read(frequencies: ClassFrequencies, labels: str) -> list[int]:
    """Read samples as a run does; give the places at which a window began."""
    borders = []
    for label in labels:
        if not frequencies.left:
            frequencies.freeze()
            borders.append(sum(frequencies.counts.values()))
        frequencies.left -= 1
        frequencies.counts[label] += 1
    return borders


def test_windows_double_until_they_have_their_length() -> None:
    frequencies = ClassFrequencies("ab", declared=None, window=20, pseudo_counts=1)
    assert read(frequencies, "a" * 100) == [1, 2, 4, 8, 16, 32, 52, 72, 92]


def test_counts_hold_from_border_to_border() -> None:
    frequencies = ClassFrequencies("ab", declared=None, window=4, pseudo_counts=0.5)
    read(frequencies, "aab")
    assert frequencies.sizes == {"a": Fraction(5, 2), "b": Fraction(1, 2)}
    assert frequencies.met == {"a"}
    read(frequencies, "bb")
    assert frequencies.sizes == {"a": Fraction(5, 2), "b": Fraction(5, 2)}
    assert frequencies.met == {"a", "b"}
    assert frequencies.share("a") == 0.5


def test_a_class_not_met_has_no_share() -> None:
    frequencies = ClassFrequencies("ab", declared=None, window=4, pseudo_counts=1)
    assert (frequencies.share("a"), frequencies.share("b")) == (0.0, 0.0)
    read(frequencies, "aaa")
    assert (frequencies.share("a"), frequencies.share("b")) == (1.0, 0.0)


def test_declared_frequencies_never_change() -> None:
    declared = {"a": 0.9, "b": 0.1}
    frequencies = ClassFrequencies("abc", declared=declared, window=1, pseudo_counts=1)
    assert read(frequencies, "ccc" * 100) == []
    assert frequencies.sizes == {"a": Fraction(9, 10), "b": Fraction(1, 10), "c": 0}
    assert frequencies.met == {"a", "b"}
    assert frequencies.share("a") == pytest.approx(0.9)


def test_a_class_declared_to_be_absent_is_not_met() -> None:
    declared = {"a": 3.0, "b": 0.0}
    assert ClassFrequencies("ab", declared=declared, window=1, pseudo_counts=1).met == {"a"}
