"""The weight of every sample under strategies that draw sample by sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.members import ClassTable
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.unit_strategies import RepeatFactor, SampleWeights


def unit_weights(
    table: ClassTable, strategy: Strategy, column: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Give the weight of every sample number.

    Args:
        table: who belongs to which class.
        strategy: `repeat_factor` or `sample_weights`.
        column: `(N,)` weights that the strategy names by a column, or None.

    Returns:
        `(N,)` weights of at least 0: for `repeat_factor` the draws per epoch.

    Raises:
        ConfigError: not one weight per sample, or a column that nobody read.
    """
    if isinstance(strategy, RepeatFactor):
        return _repeat_factors(table, strategy)
    assert isinstance(strategy, SampleWeights)
    if isinstance(strategy.weights, str):
        if column is None:
            raise ConfigError(
                f"sample_weights: weights is {strategy.weights!r}, the name of a column, and a "
                f"list of labels has none. Give one number per sample, (N,)."
            )
        return SampleWeights(weights=column).weights  # type: ignore[no-any-return]
    weights: NDArray[np.float64] = strategy.weights
    if len(weights) != table.num_samples:
        raise ConfigError(
            f"sample_weights: weights has {len(weights)} numbers for {table.num_samples} samples; "
            f"give one per sample."
        )
    return weights


def _repeat_factors(table: ClassTable, strategy: RepeatFactor) -> NDArray[np.float64]:
    """Give every sample the largest repeat factor of its labels; 1 to a sample without any."""
    sizes = np.array(list(table.sizes.values()), dtype=np.float64)
    drawn = sum(group.size for group in table.members)
    factors = strategy.factors(sizes / max(1, drawn))
    if table.membership is not None:
        by_label = np.where(table.membership, factors[None, :], 1.0)
        return np.asarray(by_label.max(axis=1, initial=1.0), dtype=np.float64)
    weights = np.zeros(table.num_samples)
    for group, number in zip(table.members, table.groups, strict=True):
        weights[group.pick_first(np.arange(group.size, dtype=np.int64))] = factors[number]
    return weights
