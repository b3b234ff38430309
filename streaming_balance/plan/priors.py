"""What the classes' shares of the draws say about the priors a model is trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.members import ClassTable
from streaming_balance.plan.options import check_number
from streaming_balance.plan.steps import PlannedSteps, check_epoch
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


class PlannedPriors(PlannedSteps):
    """The shares of a plan, and the priors a model is trained with by them."""

    __slots__ = ("_weights", "classes", "sizes", "strategy")

    _weights: NDArray[np.float64] | None
    classes: list[Any]
    """Labels in class order."""
    sizes: Mapping[Any, int]
    """Label -> number of units, in class order."""
    strategy: Strategy
    """What shares are asked for."""

    @property
    def shares(self) -> dict[Any, float]:
        """Label -> share of the draws, in class order; of a schedule, once it has settled."""
        return self.shares_in(self.strategy.settled_epoch)

    def shares_in(self, epoch: int) -> dict[Any, float]:
        """Give the share of the draws that each class should have in an epoch.

        Returns:
            Label -> share in [0, 1], in class order. They sum to 1 unless samples have several
            labels: then each says how many of the draws have the label.
        """
        by_group = self._draws.shares(check_epoch(epoch))
        shares = class_shares(self._table, self.strategy, by_group, weights=self._weights)
        return dict(zip(self.classes, shares.values(), strict=True))

    def prior_shift(self, epoch: int | None = None) -> dict[Any, float]:
        """Give the factor from training prior back to natural prior, per class.

        Multiply predicted probabilities by it and normalise to undo what balancing did to them.

        Args:
            epoch: whose training prior; None: of a schedule, once it has settled.

        Returns:
            Label -> natural share / training share; classes that are never drawn are left out.

        Source:
            Saerens, Latinne and Decaestecker, Neural Computation 2002.

        Examples:
            A score of 0.5 for LGG after balanced training means 0.263 in the clinic:

            >>> from streaming_balance.plan.epoch import BalancedPlan
            >>> labels = ["LGG"] * 75 + ["HGG"] * 210
            >>> shift = BalancedPlan.from_labels(labels, global_batch_size=8).prior_shift()
            >>> round(0.5 * shift["LGG"] / (0.5 * shift["LGG"] + 0.5 * shift["HGG"]), 3)
            0.263
        """
        drawn = sum(group.size for group in self._table.members)
        return {
            label: self.sizes[label] / drawn / share for label, share in self._prior(epoch).items()
        }

    def logit_adjustment(self, tau: float = 1.0, epoch: int | None = None) -> dict[Any, float]:
        """Give what to add to each class's logit in the loss, or to take off it afterwards.

        Args:
            tau: strength, a finite number; 1 is exact for calibrated scores.
            epoch: whose training prior; None: of a schedule, once it has settled.

        Returns:
            Label -> tau * ln(training share); classes that are never drawn are left out.

        Raises:
            ConfigError: `tau` is no finite number.

        Source:
            Menon et al., "Long-tail learning via logit adjustment", ICLR 2021; with the *sampled*
            prior, which is what the model sees.

        Examples:
            >>> from streaming_balance.plan.epoch import BalancedPlan
            >>> labels = ["LGG"] * 75 + ["HGG"] * 210
            >>> plan = BalancedPlan.from_labels(labels, global_batch_size=8, balance=None)
            >>> {label: round(shift, 3) for label, shift in plan.logit_adjustment().items()}
            {'HGG': -0.305, 'LGG': -1.335}
        """
        strength = check_number(tau, setting="tau", least=-1e9, most=1e9)
        return {label: strength * math.log(share) for label, share in self._prior(epoch).items()}

    def _prior(self, epoch: int | None) -> dict[Any, float]:
        """Give the share of the draws of every class that is drawn."""
        shares = self.shares if epoch is None else self.shares_in(epoch)
        return {label: share for label, share in shares.items() if share}
