"""Labels as users hold them (lists, arrays, tensors on any device), and where to find them."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from streaming_balance.errors import ConfigError
from streaming_balance.plan.labels import on_host

# One per sample: a list, a tuple, an array, a tensor on any device, a column of a table.
Labels: TypeAlias = ArrayLike | torch.Tensor
Strata: TypeAlias = Labels | Mapping[str, Labels]


def plain_labels(labels: Labels) -> ArrayLike:
    """Give labels as a plan takes them.

    Args:
        labels: `(N,)` one label per sample: a list, a tuple, a numpy array of any dtype, a torch
            tensor on any device, or anything numpy can read, such as a column of a table.

    Returns:
        The same labels as a list, a tuple or an array; an array is not copied.

    Examples:
        >>> plain_labels(torch.tensor([1, 0], dtype=torch.int8))
        array([1, 0], dtype=int8)
    """
    return labels if isinstance(labels, list | tuple) else np.asarray(on_host(labels))


def plain_strata(strata: Strata | None) -> ArrayLike | dict[str, ArrayLike] | None:
    """Give strata as a plan takes them.

    Args:
        strata: name -> `(N,)` values; or `(N,)` or `(N, S)` values without names.

    Examples:
        >>> plain_strata({"site": torch.tensor([1, 2])})
        {'site': array([1, 2])}
    """
    if isinstance(strata, Mapping):
        return {str(name): plain_labels(values) for name, values in strata.items()}
    return None if strata is None else plain_labels(strata)


def labels_of(dataset: Dataset[Any], labels: Labels | None, *, caller: str) -> Labels:
    """Give the labels of a dataset's samples, never by reading the samples.

    Args:
        dataset: a map-style dataset, perhaps with `.targets`.
        labels: `(N,)` labels as the user gave them, or None to take `.targets`.
        caller: the function to name in messages.

    Returns:
        The labels as they are, one per sample of the dataset.

    Raises:
        ConfigError: neither is there, or there are more or fewer labels than samples.
    """
    found: Labels | None = getattr(dataset, "targets", None) if labels is None else labels
    if found is None:
        raise ConfigError(
            f"{caller}: labels is None and {type(dataset).__name__} has no .targets. Give "
            f"labels=, one per sample; they are never found by reading the samples."
        )
    samples = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
    count = len(cast(Sized, found))
    if count != samples:
        raise ConfigError(
            f"{caller}: there are {count} labels for {samples} samples; give one per sample, "
            f"in the order of the dataset."
        )
    return found
