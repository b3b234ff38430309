"""How numbers and lists are written in sentences."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number of things.

    Examples:
        >>> counted(1, "patient"), counted(2000, "patient"), counted(2, "batch", "batches")
        ('1 patient', '2,000 patients', '2 batches')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def joined(parts: Iterable[str]) -> str:
    """Write a list as in a sentence.

    Examples:
        >>> joined(["a"]), joined(["a", "b"]), joined(["a", "b", "c"])
        ('a', 'a and b', 'a, b and c')
    """
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def spanned(least: int, most: int) -> str:
    """Write how many times.

    Examples:
        >>> spanned(1, 1), spanned(2, 3), spanned(4, 4), spanned(0, 1)
        ('once', '2 to 3 times', '4 times', '0 to 1 times')
    """
    if least == most:
        return "once" if most == 1 else f"{most:,} times"
    return f"{least:,} to {most:,} times"
