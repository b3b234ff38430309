"""Class weights from class sizes: the formulas, by label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.options import as_in_data, is_number, listed

# What users call each way to weigh a loss, and its one name here.
METHODS: Mapping[str, str] = {
    "inverse_frequency": "inverse_frequency",
    "inverse_freq": "inverse_frequency",
    "balanced": "inverse_frequency",
    "effective_num": "effective_num",
    "effective_number": "effective_num",
    "uniform": "uniform",
    "manual": "manual",
}
# A class counts as favoured over a more common one from this many points of the loss on: closer
# than a point in a hundred is what rounding and mild settings do.
NOTABLE_SHARE = 0.01

Label = TypeVar("Label")


def effective_numbers(class_sizes: NDArray[np.int64], *, beta: float) -> NDArray[np.float64]:
    """Give the effective number of samples of each class.

    Args:
        class_sizes: `(K,)` training samples per class, each at least 1.
        beta: how much samples overlap, in [0, 1). 0 counts every class as one sample.

    Returns:
        `(K,)` effective numbers (1 - beta^n) / (1 - beta), between 1 and n.

    Raises:
        ConfigError: `beta` lies outside [0, 1), or a class has no sample.

    Source:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
        proposition 1.

    Examples:
        BraTS 2018, 75 low-grade against 210 high-grade patients:

        >>> effective_numbers(np.array([75, 210]), beta=0.999).round(2)
        array([ 72.29, 189.5 ])
    """
    check_beta(beta)
    if (class_sizes < 1).any():
        raise ConfigError(f"class sizes are {class_sizes.tolist()}; each must be at least 1.")
    return _effective(class_sizes.astype(np.float64), beta)


def check_beta(beta: float, *, setting: str = "beta") -> float:
    """Give `beta` if it lies in [0, 1).

    Raises:
        ConfigError: names the setting and the value.

    Examples:
        >>> check_beta(0.999)
        0.999
    """
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < 1:
        raise ConfigError(f"{setting} is {beta!r}; it must be a number in [0, 1), such as 0.999.")
    return float(beta)


def inverse_frequency_weights(sizes: Mapping[Label, float]) -> dict[Label, float]:
    """Weigh each class by N / (K n_c), over the K classes that have samples.

    Args:
        sizes: label -> samples, counted or expected, at least 0.

    Returns:
        label -> weight without unit, in the same order; 0 for a class without samples. The mean
        over all samples is 1.

    Source:
        King and Zeng, "Logistic Regression in Rare Events Data", 2001; "balanced" in scikit-learn.

    Examples:
        >>> inverse_frequency_weights({"LGG": 75, "HGG": 210, "none yet": 0})
        {'LGG': 1.9, 'HGG': 0.6785714285714286, 'none yet': 0.0}
    """
    total, present = sum(sizes.values()), sum(1 for size in sizes.values() if size)
    return {label: total / (present * size) if size else 0.0 for label, size in sizes.items()}


def effective_number_weights(sizes: Mapping[Label, float], *, beta: float) -> dict[Label, float]:
    """Weigh each class by 1 / E_n, the inverse of its effective number of samples.

    Args:
        sizes: label -> samples, counted or expected, at least 0.
        beta: how much samples overlap, in [0, 1). 0 weighs all classes alike; towards 1 the
            weights tend to 1 / n_c.

    Returns:
        label -> weight, in the same order, not normalised; 0 for a class without samples.

    Raises:
        ConfigError: `beta` lies outside [0, 1).

    Source:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.

    Examples:
        >>> weights = effective_number_weights({"LGG": 75, "HGG": 210}, beta=0.999)
        >>> {label: round(weight, 6) for label, weight in weights.items()}
        {'LGG': 0.013833, 'HGG': 0.005277}
    """
    present = {label: size for label, size in sizes.items() if size}
    effective = _effective(np.array(list(present.values()), dtype=np.float64), check_beta(beta))
    return dict.fromkeys(sizes, 0.0) | dict(zip(present, (1 / effective).tolist(), strict=True))


def normalised(weights: Mapping[Label, float]) -> dict[Label, float]:
    """Scale weights to sum to the number of classes that have one above 0.

    Examples:
        >>> normalised({"LGG": 3.0, "HGG": 1.0, "none yet": 0.0})
        {'LGG': 1.5, 'HGG': 0.5, 'none yet': 0.0}
    """
    total, present = sum(weights.values()), sum(1 for weight in weights.values() if weight)
    return {label: weight * present / total for label, weight in weights.items()}


def weigh_classes(
    method: str,
    sizes: Mapping[Label, float],
    *,
    beta: float = 0.999,
    manual_weights: Mapping[str, float] | Sequence[float] | None = None,
    normalize: bool = False,
    is_ordered: bool = False,
) -> dict[Label, float]:
    """Give the loss weight of every class.

    Args:
        method: `inverse_frequency`, `effective_num`, `uniform` or `manual`, or an alias.
        sizes: label -> samples, counted or expected, in class order; at least one above 0.
        beta: overlap of samples for `effective_num`, in [0, 1).
        manual_weights: label -> weight, or weights in class order, for `manual`.
        normalize: scale the weights to sum to the number of classes that have samples.
        is_ordered: whether somebody declared the class order, so that a list of weights is plain.

    Returns:
        label -> weight, in class order; 0 for a class without samples.

    Raises:
        ConfigError: an unknown method, no sample in any class, or manual weights that do not fit
            the classes.

    Examples:
        >>> weigh_classes("manual", {0: 75, 1: 210}, manual_weights=[3, 1], normalize=True)
        {0: 1.5, 1: 0.5}
    """
    check_beta(beta)
    known = METHODS.get(str(method))
    if known is None:
        hint = did_you_mean(str(method), METHODS)
        raise ConfigError(f"method is {method!r}; allowed: {listed(METHODS)}.{hint}")
    if not any(sizes.values()):
        raise ConfigError(f"no class of {listed(sizes)} has a sample; there is nothing to weigh.")
    if known == "inverse_frequency":
        weights = inverse_frequency_weights(sizes)
    elif known == "effective_num":
        weights = effective_number_weights(sizes, beta=beta)
    elif known == "uniform":
        weights = {label: 1.0 if size else 0.0 for label, size in sizes.items()}
    else:
        named = _named(manual_weights, sizes, is_ordered=is_ordered)
        weights = {label: named[label] if size else 0.0 for label, size in sizes.items()}
    return normalised(weights) if normalize else weights


def loss_shares(
    shares: Mapping[Label, float], weights: Mapping[Label, float]
) -> dict[Label, float]:
    """Give the share of the loss that each class gets from sampling and weights together.

    Args:
        shares: label -> share of what is delivered.
        weights: label -> weight in the loss, at least one above 0 among the delivered.

    Returns:
        label -> share of the loss where all samples are equally hard; the shares sum to 1.

    Examples:
        Natural sampling under inverse frequency is balanced; balanced sampling is reversed:

        >>> weights = inverse_frequency_weights({"LGG": 75, "HGG": 210})
        >>> for lgg in (75 / 285, 0.5):
        ...     found = loss_shares({"LGG": lgg, "HGG": 1 - lgg}, weights)
        ...     print({label: round(share, 3) for label, share in found.items()})
        {'LGG': 0.5, 'HGG': 0.5}
        {'LGG': 0.737, 'HGG': 0.263}
    """
    parts = {label: share * weights[label] for label, share in shares.items()}
    total = sum(parts.values())
    return {label: part / total for label, part in parts.items()}


def is_reversed(sizes: Mapping[Label, float], shares: Mapping[Label, float]) -> bool:
    """Say whether a class gets notably more of the loss than one that is more common.

    Args:
        sizes: label -> samples.
        shares: label -> share of the loss; classes without samples have none.

    Examples:
        >>> is_reversed({"LGG": 75, "HGG": 210}, {"LGG": 0.5, "HGG": 0.5})
        False
        >>> is_reversed({"LGG": 75, "HGG": 210}, {"LGG": 0.737, "HGG": 0.263})
        True
    """
    # The largest share among the classes rarer than the one looked at.
    most_of_rarer, most_so_far, previous = 0.0, 0.0, 0.0
    for label in sorted(sizes, key=lambda label: sizes[label]):
        if sizes[label] > previous:
            most_of_rarer, previous = most_so_far, sizes[label]
        if shares[label] < most_of_rarer - NOTABLE_SHARE:
            return True
        most_so_far = max(most_so_far, shares[label])
    return False


def _effective(sizes: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """Give (1 - beta^n) / (1 - beta) for every n."""
    if beta == 0:
        return np.ones(len(sizes))
    # expm1 and log1p keep all digits where beta is so close to 1 that beta^n rounds to 1.
    return np.asarray(np.expm1(sizes * np.log1p(beta - 1)) / (beta - 1), dtype=np.float64)


def _named(
    weights: Mapping[str, float] | Sequence[float] | None,
    sizes: Mapping[Label, float],
    *,
    is_ordered: bool,
) -> dict[Label, float]:
    """Give manual weights by label; a list only where its order is unmistakable."""
    example = "{" + ", ".join(f"{label}: 1.0" for label in sizes) + "}"
    if not weights:
        raise ConfigError(
            f"manual_weights is {weights!r}, but method 'manual' needs them, such as {example}."
        )
    if isinstance(weights, Mapping):
        named = {str(label): weight for label, weight in weights.items()}
        return _matched(as_in_data(named, sizes), sizes)
    if len(weights) != len(sizes):
        raise ConfigError(
            f"manual_weights has {len(weights)} entries for the {len(sizes)} classes "
            f"{listed(sizes)}. Write a mapping: {example}."
        )
    if not is_ordered and not all(is_number(label) for label in sizes):
        raise ConfigError(
            "manual_weights is a list, but the labels are text and no class order was declared: a "
            f"swapped list would boost the majority in silence. Write a mapping: {example}."
        )
    return dict(zip(sizes, weights, strict=True))


def _matched(named: Mapping[str, float], sizes: Mapping[Label, float]) -> dict[Label, float]:
    """Check that weights name the classes, all that have samples and no other."""
    labels = {str(label): label for label in sizes}
    for name in named:
        if name not in labels:
            raise ConfigError(
                f"manual_weights names {name!r}, but the classes are {listed(sizes)}."
                + did_you_mean(name, labels)
            )
    for name, label in labels.items():
        # What has no sample weighs 0, named or not.
        if name not in named and sizes[label]:
            raise ConfigError(
                f"manual_weights leaves out {label!r}; the classes are {listed(sizes)}."
            )
    return {label: float(named.get(name, 0.0)) for name, label in labels.items()}
