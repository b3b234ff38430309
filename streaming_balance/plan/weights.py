"""Class weights from class sizes: the formulas, in numbers only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError


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
    if beta == 0:
        return np.ones(len(class_sizes))
    # expm1 and log1p keep all digits where beta is so close to 1 that beta^n rounds to 1.
    log_beta = np.log1p(beta - 1)
    return np.asarray(np.expm1(class_sizes * log_beta) / (beta - 1), dtype=np.float64)


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
