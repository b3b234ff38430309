"""What a pass should leave of each class, and what was short of it."""

from __future__ import annotations

import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.stream.shortfall import Emission, downsampled


@pytest.mark.parametrize(
    ("seen", "ratio", "left"),
    [
        ({}, 1.0, {}),
        ({"a": 0}, 1.0, {}),
        ({"a": 7, "b": 0}, 0.5, {"a": 7}),
        # 7 / 0.7 is 9.999... or 10.000... in floats; it is 10 to whoever wrote 0.7.
        ({"a": 7, "b": 20}, 0.7, {"a": 7, "b": 10}),
        ({"a": 3, "b": 20}, 0.3, {"a": 3, "b": 10}),
        ({"a": 10, "b": 12}, 0.5, {"a": 10, "b": 12}),
    ],
)
def test_the_smallest_class_that_is_there_sets_the_most(
    seen: dict[str, int], ratio: float, left: dict[str, int]
) -> None:
    assert downsampled(seen, ratio) == left


def test_an_emission_says_what_is_short_and_the_ratio_that_was_achieved() -> None:
    emission = Emission(asked={"a": 5, "b": 4, "c": 1}, went_on={"a": 5, "b": 2})
    assert emission.short == {"b": {"asked": 4, "went_on": 2}, "c": {"asked": 1, "went_on": 0}}
    assert emission.ratio == 0.4
    assert Emission.from_dict(emission.to_dict()) == emission
    with pytest.raises(ConfigError, match="4 samples of class 'b' are asked for, but of 9"):
        emission.check_met({"b": 9})


def test_an_emission_of_nothing_has_no_ratio_and_is_not_short() -> None:
    emission = Emission(asked={}, went_on={})
    assert emission.ratio is None
    emission.check_met({})
