"""Values of a JSON document, each of the type it must have."""

from __future__ import annotations


def text_of(value: object) -> str:
    """Give a string back, refuse the rest."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def texts_of(values: object) -> tuple[str, ...]:
    """Give a list of different strings back as a tuple, refuse the rest."""
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return tuple(text_of(value) for value in values)


def count_of(value: object) -> int:
    """Give a number of things back, refuse the rest."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise TypeError(f"{value!r} is no count")
    return value
