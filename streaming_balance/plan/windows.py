"""How many draws in a row must not repeat anybody: what the order within a class is made for."""

from __future__ import annotations

from streaming_balance.plan.strategies import Downsample
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.targets import EpochTargets


class Windows:
    """The numbers of consecutive draws of a group in which nobody should repeat needlessly.

    Args:
        targets: what every epoch asks for.
        strategy: whether it may repeat within an epoch.
        is_joint: whether classes have strata.
    """

    __slots__ = ("_is_joint", "_strategy", "_targets", "_totals")

    def __init__(self, targets: EpochTargets, strategy: Strategy, *, is_joint: bool) -> None:
        self._strategy, self._targets, self._is_joint = strategy.settled, targets, is_joint
        settled = targets.settled_epoch
        # With repeats, what lies between the first epoch and the one where a schedule settles lies
        # between their numbers of draws, too.
        epochs = (0, settled) if self._strategy.replacement else range(settled + 1)
        self._totals = {epoch: targets.totals_asked(epoch) for epoch in epochs}

    def of(self, number: int, size: int) -> list[int]:
        """List the windows of a group of `size` units."""
        windows = []
        for epoch in self._totals:
            windows += self._within_batches(number, epoch)
        is_exact = self.are_passes(number, size)
        if self._targets.settled_epoch or self._is_joint:
            windows = list(range(min(windows), max(windows) + 1))
        for epoch in self._totals:
            windows += self._within_epoch(number, epoch, size, is_exact=is_exact)
        return windows

    def are_passes(self, number: int, size: int) -> bool:
        """Say whether every epoch asks a group of `size` units for each of them once."""
        return all(set(totals[number]) == {size} for totals in self._totals.values())

    def _within_batches(self, number: int, epoch: int) -> list[int]:
        """List what a batch may ask of a group."""
        shape = self._targets.shape(epoch)
        return [part for total in self._totals[epoch][number] for part in shape.batch_shares(total)]

    def _within_epoch(self, number: int, epoch: int, size: int, *, is_exact: bool) -> list[int]:
        """Give what an epoch asks of a group, where it can do without repeating anybody."""
        most = self._totals[epoch][number][-1]
        # Where every epoch asks for all, it is a pass. Where now and then one asks for fewer,
        # epochs and passes drift apart, and an epoch spans a seam.
        drifting = isinstance(self._strategy, Downsample) and most == size and not is_exact
        if most < size or drifting or (not self._strategy.replacement and not is_exact):
            return [most]
        return []
