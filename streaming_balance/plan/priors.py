"""What the classes' shares of the draws say about the priors a model is trained with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.members import ClassTable
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.unit_weights import unit_weights


def class_shares(
    table: ClassTable,
    strategy: Strategy,
    group_shares: Sequence[float],
    *,
    weights: NDArray[np.float64] | None,
) -> dict[str, float]:
    """Add up the shares of groups to those of classes.

    Args:
        table: who belongs to which class.
        strategy: how samples are weighed, where they have several labels.
        group_shares: `(G,)` share of the draws of each group.
        weights: `(N,)` weights that the strategy names by a column, or None.

    Returns:
        Label as text -> share. With several labels per sample: the part of the draws that has
        the label, so that they need not sum to 1.
    """
    if table.membership is None:
        sums = dict.fromkeys(table.sizes, 0.0)
        for number, share in zip(table.groups, group_shares, strict=True):
            sums[str(table.classes[number])] += share
        return sums
    lengths = np.ones(table.num_samples)
    if strategy.draws_units:
        lengths = unit_weights(table, strategy, weights)
    group = table.members[0]
    drawn = group.pick_first(np.arange(group.size, dtype=np.int64))
    if group.starts is not None and group.samples is not None:
        # The samples of a patient take turns: each stands for a part of it.
        drawn, owned = group.samples, np.diff(group.starts)
        lengths[drawn] = np.repeat(1 / owned, owned)
    expected = lengths[drawn] @ table.membership[drawn] / lengths[drawn].sum()
    return dict(zip(table.sizes, expected.tolist(), strict=True))
