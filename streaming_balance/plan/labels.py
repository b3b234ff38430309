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
            sample; or `(N, K)` zeros and ones, one column per class.
        unknown: what a missing label means: `error`, `drop` or `own_class`.

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
    if isinstance(labels, list | tuple) and any(_is_several(label) for label in labels):
        return _from_lists(labels)
    array = _as_array("labels", labels)
    if array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "biuf":
        return _from_matrix(array)
    if unknown != "error":
        return _with_unknown(array, own_class=unknown == "own_class")
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
    each = array
    if array.dtype.kind == "U" and (array == "nan").any() and not isinstance(values, np.ndarray):
        # A list of text and NaN has just become text: look at what was there before.
        each = np.asarray(values, dtype=object)
    missing = np.flatnonzero(_is_missing(each.ravel()))
    if missing.size:
        raise ConfigError(f"{missing.size} {name} are missing, the first at sample {missing[0]}.")
    return array


def _is_missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Mark what is None or no finite number: `(N,)`."""
    if values.dtype == object:
        marks = [v is None or (isinstance(v, float) and not math.isfinite(v)) for v in values]
        return np.array(marks, dtype=np.bool_)
    if values.dtype.kind == "f":
        return np.asarray(~np.isfinite(values), dtype=np.bool_)
    return np.zeros(0, dtype=np.bool_)


def _as_array(name: str, values: ArrayLike) -> NDArray[Any]:
    """Give values as an array with as many entries for each sample."""
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ConfigError(
            f"{name} have different numbers of entries per sample; give one per sample, (N,)."
        ) from error


def _is_several(label: object) -> bool:
    """Say whether a sample's label is a list of labels."""
    return isinstance(label, list | tuple | set | frozenset)


def _from_lists(labels: Sequence[Any]) -> Labels:
    """Read a list of labels for each sample."""
    wrong = [number for number, several in enumerate(labels) if not _is_several(several)]
    if wrong:
        raise ConfigError(
            f"{len(wrong)} of {len(labels)} samples have no list of labels, the first is sample "
            f"{wrong[0]}: {labels[wrong[0]]!r}. Give every sample a list, [] where it has none."
        )
    classes = order_labels([label for several in labels for label in several])
    if not classes:
        raise ConfigError("no sample has any label; nothing can be planned.")
    number_of = {label: number for number, label in enumerate(classes)}
    membership = np.zeros((len(labels), len(classes)), dtype=np.bool_)
    for sample, several in enumerate(labels):
        membership[sample, [number_of[label] for label in several]] = True
    return Labels(
        classes=tuple(classes), codes=np.zeros(len(labels), np.int64), membership=membership
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
    missing = np.zeros(len(array), dtype=np.bool_)
    if array.dtype == object or array.dtype.kind == "f":
        missing = _is_missing(array)
    known, classes = class_codes(array[~missing])
    codes = np.full(len(array), len(classes) if own_class else -1, dtype=np.int64)
    codes[~missing] = known
    if own_class and missing.any():
        if UNKNOWN_CLASS in map(str, classes):
            raise ConfigError(
                f"unknown: own_class needs a class {UNKNOWN_CLASS!r} for missing labels, but there "
                f"is one of that name; use unknown: drop, or rename it."
            )
        classes = [*classes, UNKNOWN_CLASS]
    return Labels(classes=tuple(classes), codes=codes)
