"""Epoch totals of strata: whole classes are scheduled first, then the strata inside each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from streaming_balance.plan.walked_totals import Totals

CHECKPOINT_EPOCHS = 64


class JointTotals:
    """Totals of strata: a class has its share of an epoch whatever its strata round to.

    A stratum gets the floor or the ceiling of its part of what its class gets in the epoch; the
    seats that fractions add up to go to the strata that lag behind most.

    Args:
        labels: totals of whole classes.
        inside: per class, the exact shares of its strata in it, `(S_c,)` that sum to 1.
        tie_orders: per class, `(S_c,)` rank of each stratum among those that lag alike.
    """

    __slots__ = ("_checkpoints", "_classes", "_labels", "_recent")

    def __init__(
        self,
        labels: Totals,
        *,
        inside: Sequence[Sequence[Fraction]],
        tie_orders: Sequence[Sequence[int]],
    ) -> None:
        self._labels = labels
        self._classes = list(map(_Parts, inside, tie_orders))
        none = tuple((0,) * len(shares) for shares in inside)
        # Draws before every so-many-th epoch, and before the epoch asked for last.
        self._checkpoints = [none]
        self._recent = (0, none)

    def of(self, epoch: int) -> tuple[int, ...]:
        """Give the draws per stratum in `epoch`, class after class."""
        before, after = self.before(epoch), self.before(epoch + 1)
        return tuple(late - early for early, late in zip(before, after, strict=True))

    def before(self, epoch: int) -> tuple[int, ...]:
        """Give the draws per stratum in all epochs before `epoch`, class after class."""
        number = epoch // CHECKPOINT_EPOCHS
        while len(self._checkpoints) <= number:
            start = (len(self._checkpoints) - 1) * CHECKPOINT_EPOCHS
            following = self._walk(self._checkpoints[-1], start, start + CHECKPOINT_EPOCHS)
            self._checkpoints.append(following)
        start, taken = self._recent
        if not number * CHECKPOINT_EPOCHS <= start <= epoch:
            start, taken = number * CHECKPOINT_EPOCHS, self._checkpoints[number]
        taken = self._walk(taken, start, epoch)
        # Replaced as a whole: threads may ask at the same time.
        self._recent = (epoch, taken)
        return tuple(draws for strata in taken for draws in strata)

    def _walk(
        self, taken: tuple[tuple[int, ...], ...], start: int, stop: int
    ) -> tuple[tuple[int, ...], ...]:
        """Hand out the draws of the epochs from `start` to `stop`."""
        before = self._labels.before(start)
        for epoch in range(start, stop):
            after = self._labels.before(epoch + 1)
            taken = tuple(
                parts.following(strata, early, late)
                for parts, strata, early, late in zip(
                    self._classes, taken, before, after, strict=True
                )
            )
            before = after
        return taken


class _Parts:
    """How the draws of one class are shared out among its strata."""

    __slots__ = ("_tie_order", "_unit", "_weights")

    def __init__(self, shares: Sequence[Fraction], tie_order: Sequence[int]) -> None:
        self._unit = math.lcm(*(share.denominator for share in shares), 1)
        self._weights = [int(share * self._unit) for share in shares]
        self._tie_order = list(tie_order)

    def following(self, taken: tuple[int, ...], before: int, after: int) -> tuple[int, ...]:
        """Give the draws of all epochs to the end of one.

        Args:
            taken: `(S,)` draws before the epoch.
            before: draws of the class before the epoch.
            after: draws of the class to its end.
        """
        if len(taken) < 2:
            return tuple(after for _ in taken)
        reached, lags = [], []
        for number, weight in enumerate(self._weights):
            whole, rest = divmod((after - before) * weight, self._unit)
            reached.append(taken[number] + whole)
            if rest:
                lag = reached[number] * self._unit - after * weight
                lags.append((lag, self._tie_order[number], number))
        for _, _, number in sorted(lags)[: after - sum(reached)]:
            reached[number] += 1
        return tuple(reached)
