"""Checks and messages that all strategies share."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, SupportsIndex, cast

import numpy as np

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.frozen import FrozenMapping

LABEL_STRATUM = "label"
LABEL_SET_STRATUM = "label_set"
LENGTH_NAMES = ("dataset", "oversample", "undersample")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "unit": ("patient", "sample", None),
    "last": ("full", "short", "drop"),
    "draw": ("quota", "iid"),
    "empty_class": ("error", "renormalize"),
    "unknown": ("error", "drop", "own_class"),
    "on_exceeded": ("warn", "error"),
    "strata_shares": ("natural", "uniform"),
}


def listed(names: Iterable[object]) -> str:
    """Write names for a message: `'a', 'b'`.

    Examples:
        >>> listed(["LGG", "HGG"])
        "'LGG', 'HGG'"
    """
    return ", ".join(repr(name) for name in names)


def whole_number(value: object) -> int | None:
    """Give an integer of any library as a plain one; None for all else, bools included.

    Examples:
        >>> whole_number(3), whole_number(3.0), whole_number(True)
        (3, None, None)
    """
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return int(operator.index(cast(SupportsIndex, value)))
    except TypeError:
        return None


def real_number(value: object) -> float | None:
    """Give a finite number of any library as a plain one; None for all else, bools included.

    Examples:
        >>> real_number(3), real_number(np.float32(0.5)), real_number(True), real_number(10**400)
        (3.0, 0.5, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def check_choice(strategy: str, option: str, value: object) -> None:
    """Refuse a value that is none of the option's choices.

    Raises:
        ConfigError: names strategy, option, value and choices.
    """
    allowed = CHOICES[option]
    if value not in allowed:
        hint = did_you_mean(str(value), [str(choice) for choice in allowed])
        raise ConfigError(f"{strategy}: {option} is {value!r}; allowed: {listed(allowed)}.{hint}")


def check_number(
    value: object, *, setting: str, least: float, most: float, open_below: bool = False
) -> float:
    """Give `value` as a number within [least, most], or (least, most] where `open_below`.

    Raises:
        ConfigError: names the setting, the value and the range.

    Examples:
        >>> check_number(0.5, setting="alpha", least=0, most=1)
        0.5
    """
    bracket = "(" if open_below else "["
    wanted = f"it must be a number in {bracket}{least:g}, {most:g}]"
    number = real_number(value)
    if number is None or number < least or number > most or (open_below and number == least):
        raise ConfigError(f"{setting} is {value!r}; {wanted}.")
    return number


def check_length(strategy: str, length: object) -> None:
    """Refuse an epoch length that is neither null, a positive integer nor a known name.

    Raises:
        ConfigError: names the value and what is allowed.
    """
    if length is None or length in LENGTH_NAMES:
        return
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ConfigError(
            f"{strategy}: num_samples is {length!r}; use null, a positive integer, or one of "
            f"{listed(LENGTH_NAMES)}." + did_you_mean(str(length), LENGTH_NAMES)
        )


def checked_strata(strategy: str, strata: object) -> tuple[str, ...] | None:
    """Give the names of strata columns as a tuple; one name is a list of one.

    Raises:
        ConfigError: no names, or one of them twice.

    Examples:
        >>> checked_strata("class_balanced", ["label", "site"])
        ('label', 'site')
        >>> checked_strata("class_balanced", "label_set")
        ('label_set',)
    """
    if strata is None:
        return None
    names = (strata,) if isinstance(strata, str) else strata
    if (
        not isinstance(names, list | tuple)
        or not names
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) < len(names)
    ):
        raise ConfigError(
            f"{strategy}: strata is {strata!r}; list the columns to balance jointly, each once, "
            f"such as [label, site]."
        )
    return tuple(names)


def exact_decimal(number: float) -> Fraction:
    """Read a float as the decimal the user wrote: 0.7 is 7/10.

    Examples:
        >>> exact_decimal(0.7)
        Fraction(7, 10)
    """
    return Fraction(str(number))


def is_number(label: object) -> bool:
    """Say whether a label is a number, or text that reads as one.

    Examples:
        >>> is_number("10"), is_number("LGG"), is_number("nan")
        (True, False, False)
    """
    return _number_of(label) is not None


def order_labels(labels: Iterable[Any]) -> list[Any]:
    """Put labels in class order: by number where all are numbers, else as text.

    Examples:
        >>> order_labels(["10", "9", "1"]), order_labels(["LGG", "HGG"])
        (['1', '9', '10'], ['HGG', 'LGG'])
    """
    distinct = list(dict.fromkeys(labels))
    if all(is_number(label) for label in distinct):
        return sorted(distinct, key=lambda label: (_number_of(label), str(label)))
    return sorted(distinct, key=str)


def as_in_data(named: Mapping[str, float], labels: Iterable[Any]) -> dict[str, float]:
    """Call classes as the data does, where a label is the same number otherwise written.

    Labels of 0.0 and 1.0, or of False and True, are named 0 and 1 by everybody.

    Args:
        named: label as text -> number, as the user wrote it.
        labels: the labels of the data.

    Returns:
        The same, by the text of the data's label where exactly one is that number.

    Examples:
        >>> as_in_data({"0": 1.0, "1": 2.8}, [0.0, 1.0]), as_in_data({"1": 2.0}, ["1", "1.0"])
        ({'0.0': 1.0, '1.0': 2.8}, {'1': 2.0})
    """
    there = [str(label) for label in labels]
    free = [label for label in there if label not in named]
    called = dict(named)
    for name in [name for name in named if name not in there and is_number(name)]:
        same = [label for label in free if _number_of(label) == _number_of(name)]
        if len(same) == 1 and same[0] not in called:
            called[same[0]] = called.pop(name)
    return called


def named_numbers(
    setting: str, values: Mapping[Any, Any] | Sequence[Any] | None, *, zero: bool
) -> FrozenMapping[float] | tuple[float, ...]:
    """Check weights or shares and freeze them: a mapping by label as text, or a tuple.

    Args:
        setting: the name to use in messages.
        values: label -> number, or numbers in class order.
        zero: whether 0 is a number that makes sense here.

    Raises:
        ConfigError: nothing given, or a value that is not a finite number in range.
    """
    if not values or isinstance(values, str | bytes):
        raise ConfigError(
            f"{setting} is {values!r}; it must map labels to numbers, such as {{LGG: 2.8, HGG: 1}}."
        )
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    checked = {}
    for label, value in pairs:
        number = real_number(value)
        if number is None or number < 0 or (number == 0 and not zero):
            bound = ">= 0" if zero else "> 0"
            raise ConfigError(f"{setting} gives class {label!r} {value!r}; use numbers {bound}.")
        if str(label) in checked:
            raise ConfigError(
                f"{setting} names class {str(label)!r} twice, as text and as a number; keep one."
            )
        checked[str(label)] = number
    if sum(checked.values()) == 0:
        raise ConfigError(f"{setting} are all 0; at least one class needs a share.")
    return FrozenMapping(checked) if isinstance(values, Mapping) else tuple(checked.values())


def matched(
    setting: str, named: Mapping[str, float], sizes: Mapping[str, int], *, empty_class: str
) -> dict[str, float]:
    """Check that the labels a user named are those of the data, and that none is empty.

    Args:
        setting: the name to use in messages.
        named: label -> weight or share, as the user wrote it.
        sizes: label -> number of units in the data.
        empty_class: `error`, or `renormalize` to leave classes without samples out.

    Returns:
        label -> number, in class order, without the empty classes.

    Raises:
        ConfigError: an unknown label, a label left out, or a class without samples.
    """
    there = ", ".join(f"{label!r} ({count})" for label, count in sizes.items())
    named = as_in_data(named, sizes)
    for label in named:
        if label not in sizes:
            raise ConfigError(
                f"{setting} names {label!r}, but no training sample has that label. "
                f"Labels there: {there}.{did_you_mean(label, sizes)}"
            )
    for label, count in sizes.items():
        if label not in named:
            raise ConfigError(f"{setting} leaves out {label!r}. Labels there: {there}.")
        if not count and named[label] > 0 and empty_class == "error":
            raise ConfigError(
                f"{setting} gives class {label!r} {named[label]:g}, but it has no training sample. "
                f"Labels there: {there}. Add samples, or set empty_class: renormalize."
            )
    return {label: named[label] for label, count in sizes.items() if count}


def _number_of(label: object) -> float | None:
    """Give the finite number that a label is or reads as; flags are 0 and 1."""
    if str(label) in ("False", "True"):
        return float(str(label) == "True")
    try:
        number = float(str(label))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
