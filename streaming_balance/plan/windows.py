"""How many draws in a row must not repeat anybody: what the order within a class is made for."""

from __future__ import annotations

import math

from streaming_balance.plan.strategies import Downsample
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.targets import EpochTargets


class Windows:
    """The numbers of consecutive draws of a group in which nobody should repeat needlessly.

    Args:
        targets: what every epoch asks for.
        strategy: whether it may repeat within an epoch.
        is_joint: whether classes have strata, whose totals stray a little farther.
    """

    __slots__ = ("_draws", "_is_joint", "_strategy", "_targets")

    def __init__(self, targets: EpochTargets, strategy: Strategy, *, is_joint: bool) -> None:
        self._strategy, self._targets, self._is_joint = strategy.settled, targets, is_joint
        settled = targets.settled_epoch
        # With repeats, what lies between the first epoch and the one where a schedule settles lies
        # between their numbers of draws, too.
        epochs = (0, settled) if self._strategy.replacement else range(settled + 1)
        self._draws = {
            epoch: [share * targets.shape(epoch).num_draws for share in targets.group_shares(epoch)]
            for epoch in epochs
        }

    def of(self, number: int, size: int) -> list[int]:
        """List the windows of a group of `size` units."""
        windows = []
        for epoch in self._draws:
            windows += self._within_batches(number, epoch)
        is_exact = all(draws[number] == size for draws in self._draws.values())
        if self._targets.settled_epoch or self._is_joint:
            windows = list(range(min(windows), max(windows) + 1))
        for epoch in self._draws:
            windows += self._within_epoch(number, epoch, size, is_exact=is_exact)
        return windows

    def _totals(self, number: int, epoch: int) -> range:
        """Give the totals that an epoch may ask of a group."""
        ideal = self._draws[epoch][number]
        stray = int(self._is_joint)
        return range(max(0, math.floor(ideal) - stray), math.ceil(ideal) + stray + 1)

    def _within_batches(self, number: int, epoch: int) -> list[int]:
        """List what a batch may ask of a group."""
        shape = self._targets.shape(epoch)
        return [part for total in self._totals(number, epoch) for part in shape.batch_shares(total)]

    def _within_epoch(self, number: int, epoch: int, size: int, *, is_exact: bool) -> list[int]:
        """Give what an epoch asks of a group, where it can do without repeating anybody."""
        most = self._totals(number, epoch)[-1]
        # Where every epoch asks for all, it is a pass. Where now and then one asks for fewer,
        # epochs and passes drift apart, and an epoch spans a seam.
        exact_passes = is_exact and not self._is_joint
        drifting = isinstance(self._strategy, Downsample) and most == size and not is_exact
        if most < size or drifting or (not self._strategy.replacement and not exact_passes):
            return [most]
        return []
