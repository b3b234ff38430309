"""What a strategy asks of every epoch, down to the strata of each class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from streaming_balance.errors import ConfigError
from streaming_balance.plan.members import ClassMembers, ClassTable
from streaming_balance.plan.shape import EpochShape
from streaming_balance.plan.strategy import Strategy, Target


class EpochTargets:
    """Shares, length and shape of any epoch.

    Args:
        table: who belongs to which class, and to which stratum of it.
        members: `(G,)` the units of each group that the strategy uses.
        strategy: what is asked for.
        global_batch_size: samples in a global batch.

    Raises:
        ConfigError: the strategy cannot be met with these classes.
    """

    __slots__ = (
        "_epochs",
        "_global_batch_size",
        "_members",
        "_strategy",
        "_table",
        "inside",
        "settled_epoch",
    )

    def __init__(
        self,
        table: ClassTable,
        members: Sequence[ClassMembers],
        strategy: Strategy,
        *,
        global_batch_size: int,
    ) -> None:
        self._table, self._members, self._strategy = table, members, strategy
        self._global_batch_size = global_batch_size
        self.settled_epoch = strategy.settled_epoch
        """From this epoch on every epoch asks for the same."""
        self.inside = shares_inside(table, members, strategy)
        """Per class, the exact shares of its strata in it: they sum to 1."""
        self._epochs: dict[int, tuple[Target, EpochShape]] = {}
        self.shape(0)
        self.shape(self.settled_epoch)

    def target(self, epoch: int) -> Target:
        """Give the shares of whole classes and the length of an epoch."""
        return self._of(epoch)[0]

    def shape(self, epoch: int) -> EpochShape:
        """Give the steps and batch sizes of an epoch."""
        return self._of(epoch)[1]

    def label_draws(self, epoch: int) -> list[Fraction]:
        """Give the `(K,)` exact draws that each class should have in an epoch."""
        target, shape = self._of(epoch)
        return [share * shape.num_draws for share in target.shares]

    def group_shares(self, epoch: int) -> list[Fraction]:
        """Give the `(G,)` exact share of each stratum, or class where there are no strata."""
        return [
            share * inside
            for share, strata in zip(self.target(epoch).shares, self.inside, strict=True)
            for inside in strata
        ]

    def totals_asked(self, epoch: int) -> list[range]:
        """Give the totals that an epoch may ask of each group: `(G,)` ranges.

        Classes get the floor or the ceiling of their draws, and strata that of their part of it.
        """
        return [
            range(math.floor(math.floor(draws) * inside), math.ceil(math.ceil(draws) * inside) + 1)
            for draws, strata in zip(self.label_draws(epoch), self.inside, strict=True)
            for inside in strata
        ]

    def _of(self, epoch: int) -> tuple[Target, EpochShape]:
        """Compute what an epoch asks for, once."""
        place = min(epoch, self.settled_epoch)
        known = self._epochs.get(place)
        if known is None:
            target = self._strategy.target(self._table.quota_sizes, place)
            if not self._strategy.replacement and self._table.has_strata:
                target = self._without_repeats(target)
            shape = EpochShape(target, self._strategy, global_batch_size=self._global_batch_size)
            known = self._epochs[place] = (target, shape)
        return known

    def _without_repeats(self, target: Target) -> Target:
        """Shorten an epoch until no stratum has to repeat anybody."""
        shares = [
            share * inside
            for share, strata in zip(target.shares, self.inside, strict=True)
            for inside in strata
        ]
        groups = zip(self._members, shares, strict=True)
        longest = min(int(group.size / share) for group, share in groups if share)
        wanted = self._strategy.num_samples
        if isinstance(wanted, int) and wanted > longest:
            raise ConfigError(
                f"{self._strategy.name}: num_samples is {wanted} with replacement: false, but at "
                f"most {longest} draws keep the shares of all strata without repeating anybody."
            )
        return Target(shares=target.shares, num_draws=min(target.num_draws, longest))


def shares_inside(
    table: ClassTable, members: Sequence[ClassMembers], strategy: Strategy
) -> list[list[Fraction]]:
    """Share each class out among its strata: by size, or evenly among those that have units.

    Args:
        table: which class each group belongs to.
        members: `(G,)` the units of each group.
        strategy: its `strata_shares` says which.

    Returns:
        Per class the share of each of its strata in it; they sum to 1, or are all 0.
    """
    is_uniform = strategy.strata_shares == "uniform"
    inside: list[list[Fraction]] = [[] for _ in table.quota_sizes]
    for group, number in zip(members, table.groups, strict=True):
        inside[number].append(Fraction(bool(group.size) if is_uniform else group.size))
    for weights in inside:
        total = sum(weights, Fraction(0))
        weights[:] = [weight / total if total else Fraction(0) for weight in weights]
    return inside
