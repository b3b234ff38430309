"""Class weights from labels, under the names that users of other libraries know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from streaming_balance.errors import ConfigError
from streaming_balance.plan.distribution import count_labels
from streaming_balance.plan.options import listed, named_numbers, order_labels, whole_number
from streaming_balance.plan.weights import effective_number_weights, weigh_classes

ManualWeights = Mapping[Any, float] | Sequence[float] | Tensor | None


class LabelWeights(dict[Any, float]):
    """Weights by label, in label order; a dict that can become a tensor.

    Examples:
        >>> weights = LabelWeights({1: 0.5, 0: 1.5})
        >>> weights, weights.to_tensor(2)
        ({0: 1.5, 1: 0.5}, tensor([1.5000, 0.5000]))
    """

    def __init__(self, weights: Mapping[Any, float]) -> None:
        ordered = order_labels(weights)
        super().__init__({label: float(weights[label]) for label in ordered})

    def to_tensor(
        self,
        num_classes: int | None = None,
        *,
        classes: Sequence[Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Give the weights by class number.

        Args:
            num_classes: length of the tensor, K; None takes as few as hold all labels.
            classes: labels in the order of their numbers, such as `shards.classes`. None: a label
                that is a whole number is its own class number, and text labels are numbered in
                label order, which is not the order of a data set that declares another.
            dtype: floating dtype of the tensor.

        Returns:
            `(K,)` weights; 0 for a class number without a weight.

        Raises:
            ConfigError: a label without a class number below `num_classes`.

        Examples:
            >>> weights = compute_class_weights(["LGG"] * 75 + ["HGG"] * 210)
            >>> weights.to_tensor(classes=["LGG", "HGG"])
            tensor([1.9000, 0.6786])
        """
        numbers = class_numbers(self, classes)
        fewest = max(numbers.values()) + 1
        length = num_classes if num_classes is not None else max(fewest, len(classes or ()))
        if length < fewest:
            label = max(numbers, key=numbers.__getitem__)
            raise ConfigError(
                f"num_classes is {num_classes!r}, but label {label!r} is class {numbers[label]}; "
                f"it must be at least {fewest}."
            )
        tensor = torch.zeros(length, dtype=dtype)
        tensor[list(numbers.values())] = torch.tensor(list(self.values()), dtype=dtype)
        return tensor


def class_numbers(weights: Mapping[Any, float], classes: Sequence[Any] | None) -> dict[Any, int]:
    """Give the class number of every label that has a weight.

    Args:
        weights: label -> weight.
        classes: labels in the order of their numbers, or None.

    Raises:
        ConfigError: no weights, a label that `classes` lacks, or a negative one.

    Examples:
        >>> class_numbers({"LGG": 1.9, "HGG": 0.7}, ["LGG", "HGG"])
        {'LGG': 0, 'HGG': 1}
        >>> class_numbers({3: 1.9, 5: 0.7}, None)
        {3: 3, 5: 5}
    """
    if not weights:
        raise ConfigError("there are no class weights; give at least one.")
    if classes is not None:
        places = {str(label): number for number, label in enumerate(classes)}
        unknown = [label for label in weights if str(label) not in places]
        if unknown:
            raise ConfigError(
                f"a weight is given for {unknown[0]!r}, which is none of the classes "
                f"{listed(classes)}."
            )
        return {label: places[str(label)] for label in weights}
    if not all(is_class_number(label) for label in weights):
        return {label: number for number, label in enumerate(order_labels(weights))}
    found = {label: int(label) for label in weights}
    if min(found.values()) < 0:
        raise ConfigError(
            f"label {min(found.values())} is negative and cannot be a class number. Leave labels "
            f"to ignore out before weights are computed, or give classes=."
        )
    return found


def compute_class_weights(
    labels: ArrayLike | Tensor, strategy: str = "inverse_freq", beta: float = 0.999
) -> LabelWeights:
    """Weigh classes by how rare they are.

    Args:
        labels: `(N,)` one label per sample: text or numbers, in a list, an array or a tensor.
        strategy: `inverse_freq` (also `inverse_frequency`, `balanced`) for N / (K n_c), `uniform`
            for ones, `effective_num` for 1 / E_n.
        beta: overlap of samples for `effective_num`, in [0, 1).

    Returns:
        label -> weight, in label order.

    Raises:
        ConfigError: labels that cannot be counted, an unknown strategy, or `beta` out of range.

    Source:
        King and Zeng 2001 for N / (K n_c); Cui et al., CVPR 2019, for 1 / E_n.

    Examples:
        >>> compute_class_weights(["LGG"] * 75 + ["HGG"] * 210)
        {'HGG': 0.6785714285714286, 'LGG': 1.9}
    """
    if strategy == "manual":
        raise ConfigError(
            "strategy is 'manual', which computes nothing. Give the weights to the loss, or to "
            "compute_weights_from_config(..., method='manual', manual_weights=...)."
        )
    return LabelWeights(weigh_classes(strategy, count_labels(labels), beta=beta))


def compute_effective_num_weights(targets: ArrayLike | Tensor, beta: float = 0.999) -> LabelWeights:
    """Weigh classes by the inverse of their effective number of samples.

    Args:
        targets: `(N,)` one label per sample, as in `compute_class_weights`.
        beta: how much samples overlap, in [0, 1).

    Returns:
        label -> 1 / E_n with E_n = (1 - beta^n) / (1 - beta), in label order, not normalised.

    Raises:
        ConfigError: labels that cannot be counted, or `beta` out of range.

    Source:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.

    Examples:
        >>> weights = compute_effective_num_weights([0] * 75 + [1] * 210)
        >>> round(weights[0], 6), round(weights[1], 6)
        (0.013833, 0.005277)
    """
    return LabelWeights(effective_number_weights(count_labels(targets), beta=beta))


def compute_weights_from_config(
    targets: ArrayLike | Tensor,
    method: str,
    beta: float = 0.999,
    manual_weights: ManualWeights = None,
    normalize: bool = False,
    num_classes: int | None = None,
) -> LabelWeights:
    """Give class weights from the keys of a `class_weights` section.

    Args:
        targets: `(N,)` one label per sample, as in `compute_class_weights`.
        method: `inverse_frequency`, `effective_num` or `manual`.
        beta: overlap of samples for `effective_num`, in [0, 1).
        manual_weights: label -> weight, or positive numbers in label order, for `manual`.
        normalize: scale the weights to sum to the number of classes that have samples.
        num_classes: how many classes there are where labels are class numbers; those without
            samples get weight 0. None: the classes found.

    Returns:
        label -> weight, in label order.

    Raises:
        ConfigError: labels that cannot be counted or do not fit `num_classes`, an unknown method, a
            value out of range, or weights that do not fit the classes.

    Examples:
        >>> weights = compute_weights_from_config(
        ...     [0] * 75 + [1] * 210, "inverse_frequency", normalize=True, num_classes=3
        ... )
        >>> weights.to_tensor()
        tensor([1.4737, 0.5263, 0.0000])
    """
    sizes = _with_empty_classes(count_labels(targets), num_classes)
    weights = weigh_classes(
        method,
        sizes,
        beta=beta,
        manual_weights=_checked_weights(manual_weights),
        normalize=normalize,
    )
    return LabelWeights(weights)


def is_class_number(label: object) -> bool:
    """Say whether a label is its own class number: a whole number or a flag, and no text.

    Examples:
        >>> is_class_number(2), is_class_number(2.0), is_class_number(True), is_class_number("2")
        (True, True, True, False)
    """
    if isinstance(label, float):
        return label.is_integer()
    return isinstance(label, bool | np.bool_) or whole_number(label) is not None


def _checked_weights(
    weights: ManualWeights,
) -> Mapping[str, float] | tuple[float, ...] | None:
    """Check manual weights; tensors and arrays are taken for lists."""
    if weights is None:
        return None
    plain: Any = weights.tolist() if isinstance(weights, Tensor | np.ndarray) else weights
    return named_numbers("manual_weights", plain, zero=False)


def _with_empty_classes(sizes: Mapping[Any, int], num_classes: int | None) -> dict[Any, int]:
    """Add the classes without samples, where labels are class numbers."""
    if num_classes is None:
        return dict(sizes)
    if whole_number(num_classes) is None or num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes!r}; use null or an integer of at least 1.")
    if len(sizes) == num_classes and not any(is_class_number(label) for label in sizes):
        return dict(sizes)
    for label in sizes:
        if not is_class_number(label) or not 0 <= label < num_classes:
            raise ConfigError(
                f"num_classes is {num_classes!r}, but there is a label {label!r}; labels must be "
                f"whole numbers from 0 to {num_classes - 1}. Leave num_classes out to weigh the "
                f"classes that have samples."
            )
    return dict.fromkeys(range(num_classes), 0) | dict(sizes)
