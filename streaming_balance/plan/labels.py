"""Labels as users hold them: one per sample, or several, of any type, none of them missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import order_labels

# How several labels of a sample are written as one text.
LABEL_SEPARATOR = "|"
UNKNOWN_CLASS = "unknown"
# Whole numbers this close together are numbered by counting.
COUNTED_RANGE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What samples are labelled with."""

    classes: tuple[Any, ...]
    """`(K,)` labels in class order."""
    codes: NDArray[np.int64]
    """`(N,)` class number of every sample, -1 for those without a label that are left out."""
    membership: NDArray[np.bool_] | None = None
    """`(N, K)` which labels each sample has, where they may be several; `codes` are then 0."""


def read_labels(labels: ArrayLike, *, unknown: str = "error") -> Labels:
    """Number the classes of labels, one or several per sample.

    Args:
        labels: `(N,)` one label per sample, of any type; or a list with a list of labels for each
            sample; or `(N, K)` zeros and ones, one column per class, as an array or nested lists.
        unknown: what a missing label means: `error`, `drop` or `own_class`. An empty list of
            labels is not missing: the sample has none of them.

    Returns:
        Class numbers, or which of the classes each sample has.

    Raises:
        ConfigError: no labels, or a missing one under `error`.

    Examples:
        >>> read_labels(["LGG", "HGG", "LGG"]).codes.tolist()
        [1, 0, 1]
        >>> read_labels([["Mass", "Hernia"], [], ["Mass"]]).membership.tolist()
        [[True, True], [False, False], [False, True]]
    """
    entries = _listed_entries(labels)
    if entries is not None and not _is_nested_matrix(entries):
        return _from_lists(entries, unknown=unknown)
    array = _as_array("labels", labels)
    if array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "biuf":
        return _from_matrix(array)
    if unknown != "error" and array.ndim == 1:
        return _with_unknown(_as_given(array, labels), own_class=unknown == "own_class")
    codes, classes = class_codes(labels)
    return Labels(classes=tuple(classes), codes=codes)


def class_codes(labels: ArrayLike) -> tuple[NDArray[np.int64], list[Any]]:
    """Number the classes of a list of labels.

    Args:
        labels: `(N,)` labels of any type: numbers, text, numpy or torch.

    Returns:
        `(N,)` class numbers, and the labels in class order (by number, else as text).

    Raises:
        ConfigError: no labels, a missing label, or more than one label per sample.

    Examples:
        >>> codes, classes = class_codes(["LGG", "HGG", "LGG"])
        >>> codes.tolist(), classes
        ([1, 0, 1], ['HGG', 'LGG'])
    """
    array = complete_array("labels", labels)
    if array.ndim != 1 or not len(array):
        raise ConfigError(
            f"labels have shape {array.shape}; they must be one label per sample, (N,) with N >= 1."
        )
    if array.dtype == object:
        nested = [label for label in array.tolist() if isinstance(label, list | tuple | np.ndarray)]
        if nested:
            raise ConfigError(f"a sample has several labels ({nested[0]!r}); give one per sample.")
        array = np.asarray([str(label) for label in array.tolist()])
    distinct, inverse = _distinct(array)
    ordered = order_labels(distinct.tolist())
    rank = {label: number for number, label in enumerate(ordered)}
    recode = np.array([rank[label] for label in distinct.tolist()], dtype=np.int64)
    return recode[inverse], ordered


def _distinct(array: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Give the distinct labels, ascending, and the number of each sample's."""
    if array.dtype.kind in "iu":
        least, most = int(array.min()), int(array.max())
        if most - least < COUNTED_RANGE:
            # Small whole numbers are counted: sorting a hundred million takes minutes.
            places = array.astype(np.int64) - least if most < 2**63 else array - array.min()
            places = places.astype(np.int64, copy=False)
            present = np.flatnonzero(np.bincount(places, minlength=most - least + 1))
            number_of = np.zeros(most - least + 1, dtype=np.int64)
            number_of[present] = np.arange(len(present))
            return (present + least).astype(array.dtype), number_of[places]
    distinct, inverse = np.unique(array, return_inverse=True)
    return distinct, inverse.astype(np.int64, copy=False)


def complete_array(name: str, values: ArrayLike) -> NDArray[Any]:
    """Give labels or patients as an array in which none is missing.

    Args:
        name: `labels` or `patients`, for the message.
        values: `(N,)` one per sample.

    Raises:
        ConfigError: one is None or NaN, or samples have different numbers of them.

    Examples:
        >>> complete_array("labels", ["LGG", "HGG"]).tolist()
        ['LGG', 'HGG']
    """
    array = _as_array(name, values)
    missing = np.flatnonzero(_is_missing(_as_given(array, values).ravel()))
    if missing.size:
        raise ConfigError(f"{missing.size} {name} are missing, the first at sample {missing[0]}.")
    return array


def on_host(values: ArrayLike) -> ArrayLike:
    """Bring a tensor to where numpy reads it; leave all else as it is.

    Args:
        values: a tensor of any dtype on any device, or anything else.

    Examples:
        >>> on_host(["LGG", "HGG"])
        ['LGG', 'HGG']
    """
    detach = getattr(values, "detach", None)
    if not callable(detach):
        return values
    tensor: Any = detach().cpu()
    # numpy has no bfloat16, and float32 holds every one of its numbers.
    return tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor  # type: ignore[no-any-return]


def _as_given(array: NDArray[Any], values: ArrayLike) -> NDArray[Any]:
    """Give what was there before a list of text and NaN became text."""
    if array.dtype.kind == "U" and (array == "nan").any() and not isinstance(values, np.ndarray):
        return np.asarray(values, dtype=object)
    return array


def _is_missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Mark what is None or no finite number: as many marks as values, or none at all."""
    if values.dtype == object:
        return np.array([_is_absent(value) for value in values], dtype=np.bool_)
    if values.dtype.kind == "f":
        return np.asarray(~np.isfinite(values), dtype=np.bool_)
    return np.zeros(values.shape, dtype=np.bool_)


def _is_absent(value: object) -> bool:
    """Say whether one value is None, pandas' NA or NaT, or no finite number."""
    if isinstance(value, float | np.floating):
        return not math.isfinite(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _as_array(name: str, values: ArrayLike) -> NDArray[Any]:
    """Give values as an array with as many entries for each sample."""
    try:
        return np.asarray(on_host(values))
    except ValueError as error:
        raise ConfigError(
            f"{name} have different numbers of entries per sample; give one per sample, (N,)."
        ) from error


def _is_several(label: object) -> bool:
    """Say whether a sample's label is a list of labels."""
    return isinstance(label, list | tuple | set | frozenset)


def _listed_entries(labels: ArrayLike) -> Sequence[Any] | None:
    """Give one entry per sample where some of them are lists of labels; else None."""
    entries: Any = labels
    if isinstance(labels, np.ndarray) and labels.dtype == object and labels.ndim == 1:
        entries = labels.tolist()
    if isinstance(entries, list | tuple) and any(map(_is_several, entries)):
        return entries
    return None


def _is_nested_matrix(entries: Sequence[Any]) -> bool:
    """Say whether lists are the rows of a table of zeros and ones, not the names of labels.

    Read as names, such rows would repeat a label, or all samples would have both labels there are.
    """
    first = entries[0]
    width = len(first) if isinstance(first, list | tuple) else 0
    return width > 1 and all(
        isinstance(row, list | tuple)
        and len(row) == width
        and all(isinstance(cell, int | float) and cell in (0, 1) for cell in row)
        for row in entries
    )


def _from_lists(entries: Sequence[Any], *, unknown: str) -> Labels:
    """Read a list of labels for each sample."""
    missing = [
        _is_absent(several) or (_is_several(several) and any(map(_is_absent, several)))
        for several in entries
    ]
    _check_lists(entries, missing, unknown=unknown)
    named = [
        [label for label in several if not _is_absent(label)] if _is_several(several) else []
        for several in entries
    ]
    if len({type(label) for several in named for label in several}) > 1:
        # As in a list of single labels: 1 and "1" are one class.
        named = [[str(label) for label in several] for several in named]
    kept = [several for several, gone in zip(named, missing, strict=True) if not gone]
    classes = order_labels(
        [lb for several in (kept if unknown == "drop" else named) for lb in several]
    )
    codes = np.zeros(len(entries), dtype=np.int64)
    if unknown == "drop":
        codes[missing] = -1
        named = [[] if gone else several for several, gone in zip(named, missing, strict=True)]
    elif any(missing):
        classes = _with_unknown_class(classes)
        named = [
            [*several, UNKNOWN_CLASS] if gone else several
            for several, gone in zip(named, missing, strict=True)
        ]
    if not classes:
        raise ConfigError("no sample has any label; nothing can be planned.")
    number_of = {label: number for number, label in enumerate(classes)}
    membership = np.zeros((len(entries), len(classes)), dtype=np.bool_)
    for sample, several in enumerate(named):
        membership[sample, [number_of[label] for label in several]] = True
    return Labels(classes=tuple(classes), codes=codes, membership=membership)


def _check_lists(entries: Sequence[Any], missing: Sequence[bool], *, unknown: str) -> None:
    """Refuse samples that have no list of labels, and missing labels unless they have a meaning."""
    wrong = [
        number
        for number, (several, gone) in enumerate(zip(entries, missing, strict=True))
        if not gone and not _is_several(several)
    ]
    if wrong:
        raise ConfigError(
            f"{len(wrong)} of {len(entries)} samples have no list of labels, the first is sample "
            f"{wrong[0]}: {entries[wrong[0]]!r}. Give every sample a list, [] where it has none."
        )
    if any(missing) and unknown == "error":
        first = list(missing).index(True)
        raise ConfigError(
            f"{sum(missing)} labels are missing, the first at sample {first}: {entries[first]!r}. "
            f"Give every sample a list, [] where it has no label, or set unknown: drop or "
            f"own_class."
        )
    for number, several in enumerate(entries):
        for label in several if _is_several(several) else ():
            if isinstance(label, list | tuple | set | frozenset | dict | np.ndarray):
                raise ConfigError(
                    f"sample {number} has the label {label!r}; a label is text or a number."
                )


def _from_matrix(array: NDArray[Any]) -> Labels:
    """Read zeros and ones, one column per class."""
    if not len(array) or not np.isin(array, (0, 1)).all():
        raise ConfigError(
            f"labels have shape {array.shape} and other values than 0 and 1; give one label per "
            f"sample, (N,), or several as zeros and ones, (N, K)."
        )
    return Labels(
        classes=tuple(range(array.shape[1])),
        codes=np.zeros(len(array), np.int64),
        membership=array.astype(np.bool_),
    )


def _with_unknown(array: NDArray[Any], *, own_class: bool) -> Labels:
    """Read labels of which some are missing: leave those samples out, or make them a class."""
    missing = _is_missing(array)
    if missing.all():
        raise ConfigError(f"all {len(array)} labels are missing; nothing can be planned.")
    known, classes = class_codes(array[~missing])
    codes = np.full(len(array), -1, dtype=np.int64)
    codes[~missing] = known
    if own_class and missing.any():
        codes[missing] = len(classes)
        classes = _with_unknown_class(classes)
    return Labels(classes=tuple(classes), codes=codes)


def _with_unknown_class(classes: list[Any]) -> list[Any]:
    """Add the class of samples without a label."""
    if UNKNOWN_CLASS in map(str, classes):
        raise ConfigError(
            f"unknown: own_class needs a class {UNKNOWN_CLASS!r} for missing labels, but there "
            f"is one of that name; use unknown: drop, or rename it."
        )
    return [*classes, UNKNOWN_CLASS]
