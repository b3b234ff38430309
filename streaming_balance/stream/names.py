"""How a member's name gives the key of its sample, and which names are refused.

A key is what webdataset makes of a name: everything up to the first dot of the base name, folders
kept; the rest, in lower case, is the field. Keys with dots, such as DICOM's numbers, need the
other rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from streaming_balance.errors import ConfigError, did_you_mean

KeyRule = Literal["webdataset", "last_dot"]

MAX_NAME_BYTES = 4096  # the longest path Linux takes

# webdataset keeps notes about a shard under such names and never makes samples of them.
_METADATA = re.compile(r"__[^/]*__(?:$|/)")


def split_at_first_dot(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and field as webdataset does.

    Args:
        name: the member's name.

    Returns:
        Key and field; None for a name without a dot and for hidden files (`._P1.cls`, which
        webdataset would gather in a sample named like their folder).

    Examples:
        >>> split_at_first_dot("train/P1.image.NPB")
        ('train/P1', 'image.npb')
        >>> split_at_first_dot("v1.2/README") is None
        True
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, field = base.partition(".")
    return (folder + slash + stem, field.lower()) if stem and dot else None


def split_at_last_dot(name: str) -> tuple[str, str] | None:
    """Split a member's name at the last dot of its base name, for keys that hold dots.

    Args:
        name: the member's name.

    Returns:
        Key and field; None for a name without a dot and for hidden files.

    Examples:
        >>> split_at_last_dot("1.2.840.113619.dcm")
        ('1.2.840.113619', 'dcm')
        >>> split_at_last_dot("P1.image.npb")
        ('P1.image', 'npb')
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, field = base.rpartition(".")
    hidden = base.startswith(".")
    return (folder + slash + stem, field.lower()) if stem and dot and not hidden else None


def key_rule(keys: KeyRule) -> Callable[[str], tuple[str, str] | None]:
    """Give the function that splits names by the rule `keys`.

    Raises:
        ConfigError: there is no such rule.
    """
    if keys not in get_args(KeyRule):
        raise ConfigError(
            f"keys is {keys!r}; it must be one of {', '.join(get_args(KeyRule))}."
            + did_you_mean(keys, get_args(KeyRule))
        )
    return split_at_first_dot if keys == "webdataset" else split_at_last_dot


def is_metadata(name: str) -> bool:
    """Say whether webdataset keeps notes under this name and makes no sample of it.

    Examples:
        >>> is_metadata("__info__"), is_metadata("__meta__/P1.json"), is_metadata("P1.json")
        (True, True, False)
    """
    return name.startswith("__") and _METADATA.match(name) is not None


def missing_fields(wanted: Iterable[str], fields: Iterable[str]) -> list[str]:
    """Name what a sample lacks, sorted.

    Args:
        wanted: fields it must have; `image` is there as `image`, `image.npb` or `image.npy`.
        fields: fields it has.

    Returns:
        Those of `wanted` that no field is, or starts with before a dot.

    Examples:
        >>> missing_fields({"image", "cls"}, ["image.npb", "json"])
        ['cls']
    """
    present = list(fields)
    return sorted(
        name
        for name in wanted
        if not any(found == name or found.startswith(name + ".") for found in present)
    )


def readable_name(raw: bytes) -> tuple[str, str | None]:
    r"""Decode a member's name, and say what is wrong with it.

    Args:
        raw: the bytes of the name.

    Returns:
        The name, for the eyes where it is no text; what is wrong with it, or None.

    Examples:
        >>> readable_name(b"a/P1.cls")
        ('a/P1.cls', None)
        >>> readable_name(b"../P1.cls")
        ('../P1.cls', "leads out of its folder by '..'")
    """
    if len(raw) > MAX_NAME_BYTES:
        shown = raw[:80].decode("ascii", "backslashreplace")
        return shown, f"has a name of {len(raw):,} bytes, over {MAX_NAME_BYTES:,}"
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        return raw.decode("ascii", "backslashreplace"), "has a name that is no UTF-8"
    if not name:
        return name, "has no name"
    if any(letter < " " or letter == "\x7f" for letter in name):
        shown = name.encode("unicode_escape").decode("ascii")
        return shown, "holds NUL or another control character in its name"
    if name.startswith("/"):
        return name, "has an absolute name"
    if ".." in name and ".." in name.split("/"):
        return name, "leads out of its folder by '..'"
    return name, None
