"""Options every strategy shares: what is allowed, and the words for what is not."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.plan.frozen import FrozenMapping
from streaming_balance.plan.options import (
    as_in_data,
    check_number,
    exact_decimal,
    is_number,
    matched,
    named_numbers,
    order_labels,
    whole_number,
)
from streaming_balance.plan.strategies import parse_strategy
from streaming_balance.plan.weights import check_beta


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("unit", "patients", r"unit is 'patients'; allowed: .* Did you mean 'patient'\?"),
        ("unit", ["patient"], "unit is"),
        ("last", "shrt", r"last is 'shrt'; allowed: 'full', 'short', 'drop'. Did you mean 'short'"),
        ("last", None, "last is None"),
        ("draw", "IID", "draw is 'IID'; allowed: 'quota', 'iid'"),
        ("empty_class", "drop", "empty_class is 'drop'; allowed: 'error', 'renormalize'"),
        ("replacement", 0, "replacement is 0; use true or false"),
        ("replacement", None, "replacement is None; use true or false"),
        ("num_samples", 0, "num_samples is 0; use null, a positive integer, or one of 'dataset'"),
        ("num_samples", -3, "num_samples is -3"),
        ("num_samples", 1.5, "num_samples is 1.5"),
        ("num_samples", True, "num_samples is True"),
        ("num_samples", [4], r"num_samples is \[4\]"),
        ("num_samples", "oversampel", r"num_samples is 'oversampel'.* Did you mean 'oversample'\?"),
    ],
)
def test_a_value_no_strategy_can_have_is_named_with_what_is_allowed(
    option: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"class_balanced: {message}"):
        parse_strategy({"name": "class_balanced", option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw": "iid"}, "draw: iid draws with replacement; drop replacement: false"),
        ({"last": "short"}, "replacement: false keeps full batches only; drop last: short"),
    ],
)
def test_options_that_contradict_replacement_false_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_strategy({"name": "power", "replacement": False, **options})


@pytest.mark.parametrize("value", [3, np.int32(3), np.uint64(3), torch.tensor(3), np.array(3)])
def test_integers_of_any_library_are_integers(value: object) -> None:
    number = whole_number(value)
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize(
    "value", [3.0, True, np.bool_(False), "3", None, np.array([1, 2]), torch.tensor(1.5), 3 + 0j]
)
def test_what_only_resembles_an_integer_is_none(value: object) -> None:
    assert whole_number(value) is None


def test_numbers_lie_within_their_bounds() -> None:
    assert check_number(1, setting="x", least=0, most=1) == 1.0
    assert check_number(0, setting="x", least=0, most=1) == 0.0
    with pytest.raises(ConfigError, match=r"x is 0; it must be a number in \(0, 1\]"):
        check_number(0, setting="x", least=0, most=1, open_below=True)
    with pytest.raises(ConfigError, match=r"x is inf; it must be a number in \[0, 1\]"):
        check_number(float("inf"), setting="x", least=0, most=1)


def test_floats_are_read_as_the_decimals_they_were_written_as() -> None:
    assert exact_decimal(0.1) + exact_decimal(0.2) == Fraction(3, 10)
    assert exact_decimal(1e-05) == Fraction(1, 10**5)
    assert exact_decimal(2) == 2


def test_labels_that_are_numbers_come_in_their_order_and_others_as_text() -> None:
    assert order_labels([10, 9, 1, 9]) == [1, 9, 10]
    assert order_labels(["10", "9", "-1", "1e1"]) == ["-1", "9", "10", "1e1"]
    assert order_labels(["10", "9", "b"]) == ["10", "9", "b"]
    assert not is_number("inf")
    assert is_number(2.5)


def test_weights_keep_their_kind_and_shares_may_be_zero() -> None:
    assert named_numbers("w", [1, 2.5], zero=False) == (1.0, 2.5)
    assert named_numbers("w", {0: 1, "b": 0}, zero=True) == FrozenMapping({"0": 1.0, "b": 0.0})
    with pytest.raises(ConfigError, match=r"w gives class 1 -1; use numbers >= 0"):
        named_numbers("w", [0, -1], zero=True)


def test_matching_leaves_out_empty_classes_on_request_only() -> None:
    named = {"a": 1.0, "b": 2.0}
    sizes = {"b": 0, "a": 3}
    assert matched("w", named, sizes, empty_class="renormalize") == {"a": 1.0}
    with pytest.raises(ConfigError, match=r"w gives class 'b' 2, .*Labels there: 'b' \(0\), 'a'"):
        matched("w", named, sizes, empty_class="error")
    assert matched("w", {"a": 1.0, "b": 0.0}, sizes, empty_class="error") == {"a": 1.0}


def test_a_setting_is_named_as_the_user_knows_it() -> None:
    with pytest.raises(ConfigError, match=r"data.balancing.beta is 1; .*such as 0\.999"):
        check_beta(1, setting="data.balancing.beta")


def test_a_label_that_could_be_two_of_the_data_is_not_guessed() -> None:
    assert as_in_data({"1": 2.0}, ["1.0", "01"]) == {"1": 2.0}
    assert as_in_data({"1": 2.0, "1.00": 3.0}, ["1.0"]) == {"1.0": 2.0, "1.00": 3.0}


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(kind: Callable[[int], Any]) -> None:
    assert check_number(kind(2), setting="x", least=0, most=2) == 2.0
    assert named_numbers("w", {"a": kind(2)}, zero=False) == FrozenMapping({"a": 2.0})


@pytest.mark.parametrize("value", [10**400, np.float64("inf"), np.bool_(True), True, "2", None, 2j])
def test_what_is_no_finite_number_is_refused_by_setting(value: object) -> None:
    with pytest.raises(ConfigError, match="x is"):
        check_number(value, setting="x", least=0, most=2)
    with pytest.raises(ConfigError, match="w gives class 'a'"):
        named_numbers("w", {"a": value}, zero=False)
