"""How many samples each class has: counted from labels of any kind, and said in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.labels import complete_array
from streaming_balance.plan.options import listed, order_labels
from streaming_balance.plan.weights import inverse_frequency_weights

# Whole numbers within such a range are counted without sorting, a slice at a time.
COUNTED_RANGE = 1 << 16
COUNTED_AT_ONCE = 1 << 20
# A sentence about a thousand classes helps nobody.
CLASSES_SAID = 20
RATIO = "ratio"


def count_labels(labels: ArrayLike) -> dict[Any, int]:
    """Count the samples of each class.

    Args:
        labels: `(N,)` one label per sample: text or numbers of any dtype, in a list, an array or a
            tensor on any device.

    Returns:
        label -> samples, in label order (by number, else as text); labels are plain Python values.

    Raises:
        ConfigError: no labels, a missing label, or more than one label per sample.

    Examples:
        >>> count_labels([10, 9, 10, 1]), count_labels(["LGG", "HGG", "LGG"])
        ({1: 1, 9: 1, 10: 2}, {'HGG': 1, 'LGG': 2})
    """
    array = complete_array("labels", labels)
    if array.ndim != 1 or not len(array):
        raise ConfigError(
            f"labels have shape {array.shape}; give one label per sample, (N,) with N >= 1."
        )
    if array.dtype == object:
        array = _without_objects(array)
    if array.dtype.kind in "iu":
        lowest, highest = int(array.min()), int(array.max())
        if highest - lowest < COUNTED_RANGE and highest < 1 << 63:
            counts = _counted(array, lowest, highest - lowest + 1)
            return {lowest + int(at): int(counts[at]) for at in np.flatnonzero(counts)}
    distinct, counts = np.unique(array, return_counts=True)
    found = dict(zip(distinct.tolist(), counts.tolist(), strict=True))
    return {label: found[label] for label in order_labels(found)}


def get_class_distribution(
    labels: ArrayLike, class_names: Sequence[str] | Mapping[Any, str] | None = None
) -> dict[Any, Any]:
    """Describe how unequal the classes are.

    Args:
        labels: `(N,)` one label per sample, as `count_labels` takes them.
        class_names: names by class number, or label -> name; a class named here and without a
            sample is listed with a count of 0. None: classes are called by their labels.

    Returns:
        class name -> {`count`, `percentage` (0 to 100), `weight` N / (K n_c), 0 where there is no
        sample}, in label order; and `ratio`, the largest count over the smallest above 0.

    Raises:
        ConfigError: labels that cannot be counted, a label without a name, two classes of one name,
            or a class called `ratio`.

    Examples:
        BraTS 2018, 75 low-grade and 210 high-grade patients:

        >>> found = get_class_distribution([0] * 75 + [1] * 210, ["LGG", "HGG"])
        >>> found["LGG"]
        {'count': 75, 'percentage': 26.31578947368421, 'weight': 1.9}
        >>> found["ratio"]
        2.8
    """
    counts = _by_name(count_labels(labels), class_names)
    if RATIO in counts:
        raise ConfigError(
            f"a class is called {RATIO!r}, which is the key of the ratio of largest to smallest. "
            f"Give it another name in class_names."
        )
    total, weights = sum(counts.values()), inverse_frequency_weights(counts)
    described: dict[Any, Any] = {
        name: {"count": count, "percentage": 100 * count / total, "weight": weights[name]}
        for name, count in counts.items()
    }
    return described | {RATIO: class_ratio(counts)}


def class_ratio(sizes: Mapping[Any, float]) -> float:
    """Give the largest size over the smallest above 0.

    Examples:
        >>> class_ratio({"LGG": 75, "HGG": 210, "none yet": 0})
        2.8
    """
    present = [size for size in sizes.values() if size]
    return max(present) / min(present)


def distribution_sentence(
    sizes: Mapping[Any, float], *, noun: str, total: float | None = None
) -> str:
    """Say class sizes in a line, for a log.

    Args:
        sizes: label -> size, at least one above 0.
        noun: what is counted, in the plural.
        total: what is 100 %; None: the sum, as where every sample has one label.

    Examples:
        >>> distribution_sentence({"LGG": 75, "HGG": 210}, noun="patients")
        'LGG: 75 patients (26.3%), HGG: 210 patients (73.7%); largest to smallest 2.800'
    """
    total = sum(sizes.values()) if total is None else total
    said = [
        f"{label}: {f'{size:.1f}'.removesuffix('.0')} {noun} ({100 * size / total:.1f}%)"
        for label, size in list(sizes.items())[:CLASSES_SAID]
    ]
    if len(sizes) > CLASSES_SAID:
        said.append(f"and {len(sizes) - CLASSES_SAID} classes more")
    return f"{', '.join(said)}; largest to smallest {class_ratio(sizes):.3f}"


def _without_objects(array: NDArray[Any]) -> NDArray[Any]:
    """Give an array of Python objects as numbers where all are numbers, else as text."""
    labels = array.tolist()
    nested = [label for label in labels if isinstance(label, list | tuple | np.ndarray)]
    if nested:
        raise ConfigError(f"a sample has several labels ({nested[0]!r}); give one per sample.")
    plain = np.asarray(labels)
    return np.asarray([str(label) for label in labels]) if plain.dtype == object else plain


def _counted(array: NDArray[Any], lowest: int, width: int) -> NDArray[np.int64]:
    """Count whole numbers slice by slice, so that 10^8 labels of a byte need no copy of 8."""
    counts = np.zeros(width, dtype=np.int64)
    for start in range(0, len(array), COUNTED_AT_ONCE):
        part = array[start : start + COUNTED_AT_ONCE].astype(np.int64) - lowest
        counts += np.bincount(part, minlength=width)
    return counts


def _by_name(
    counts: Mapping[Any, int], class_names: Sequence[str] | Mapping[Any, str] | None
) -> dict[Any, int]:
    """Call classes by their names, in label order; named classes without a sample count 0."""
    if class_names is None:
        return dict(counts)
    if isinstance(class_names, str):
        raise ConfigError(f"class_names is {class_names!r}, one text; give a list of names.")
    if isinstance(class_names, Mapping):
        names = dict(class_names)
    elif set(counts) <= set(class_names):
        names = {name: name for name in class_names}
    else:
        names = dict(enumerate(class_names))
    nameless = [label for label in counts if label not in names]
    if nameless:
        raise ConfigError(
            f"class_names has no name for label {nameless[0]!r}; it names {listed(names)}, and the "
            f"labels are {listed(counts)}. Give a name for each, or label -> name."
        )
    if len({str(name) for name in names.values()}) < len(names):
        raise ConfigError(f"class_names gives two classes one name: {listed(names.values())}.")
    return {name: counts.get(label, 0) for label, name in names.items()}
