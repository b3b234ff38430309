"""Epoch totals whose shares change: scheduled epoch after epoch, and for strata within labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

from streaming_balance.plan.totals import EpochTotals

CHECKPOINT_EPOCHS = 64


class Totals(Protocol):
    """Draws per class in every epoch."""

    def of(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in `epoch`."""
        ...

    def before(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in all epochs before `epoch`."""
        ...


class WalkedTotals:
    """Totals for shares that may differ from epoch to epoch.

    Every total is the floor or the ceiling of its ideal and every epoch sums to its ideals' sum;
    seats that fractions add up to go to the classes that lag behind most.

    Args:
        ideal_of: gives the `(K,)` exact draws of an epoch; their sum is an integer.
        tie_order: `(K,)` rank of each class among those that lag alike.

    Examples:
        >>> totals = WalkedTotals(lambda _: [Fraction(285, 2)] * 2, tie_order=[0, 1])
        >>> totals.of(0), totals.of(1), totals.before(2)
        ((143, 142), (142, 143), (285, 285))
    """

    __slots__ = ("_checkpoints", "_ideal_of", "_recent", "_tie_order")

    def __init__(
        self, ideal_of: Callable[[int], Sequence[Fraction]], *, tie_order: Sequence[int]
    ) -> None:
        self._ideal_of, self._tie_order = ideal_of, tuple(tie_order)
        none = tuple(0 for _ in tie_order)
        # Draws before every so-many-th epoch, and the ideal ones.
        self._checkpoints = [(none, tuple(Fraction(0) for _ in tie_order))]
        self._recent = (0, self._checkpoints[0])

    def of(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in `epoch`."""
        before, after = self.before(epoch), self.before(epoch + 1)
        return tuple(late - early for early, late in zip(before, after, strict=True))

    def before(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in all epochs before `epoch`."""
        number = epoch // CHECKPOINT_EPOCHS
        while len(self._checkpoints) <= number:
            start = (len(self._checkpoints) - 1) * CHECKPOINT_EPOCHS
            following = self._walk(self._checkpoints[-1], start, start + CHECKPOINT_EPOCHS)
            self._checkpoints.append(following)
        start, state = self._recent
        if not number * CHECKPOINT_EPOCHS <= start <= epoch:
            start, state = number * CHECKPOINT_EPOCHS, self._checkpoints[number]
        reached = self._walk(state, start, epoch)
        # Replaced as a whole: threads may ask at the same time.
        self._recent = (epoch, reached)
        return reached[0]

    def _walk(
        self, state: tuple[tuple[int, ...], tuple[Fraction, ...]], start: int, stop: int
    ) -> tuple[tuple[int, ...], tuple[Fraction, ...]]:
        """Hand out the draws of the epochs from `start` to `stop`."""
        taken, owed = list(state[0]), list(state[1])
        for epoch in range(start, stop):
            ideal = self._ideal_of(epoch)
            lags = []
            for number, draws in enumerate(ideal):
                whole = draws.numerator // draws.denominator
                taken[number] += whole
                owed[number] += draws
                if whole != draws:
                    lags.append((taken[number] - owed[number], self._tie_order[number], number))
            seats = int(sum(owed, Fraction(0))) - sum(taken)
            for _, _, number in sorted(lags)[:seats]:
                taken[number] += 1
        return tuple(taken), tuple(owed)


class ScheduledTotals:
    """Totals of a schedule: walked until its shares settle, then as for shares that stay.

    Args:
        ideal_of: gives the `(K,)` exact draws of an epoch; their sum is an integer.
        settled_epoch: from this epoch on all are alike.
        tie_order: `(K,)` rank of each class among equally urgent ones.
    """

    __slots__ = ("_settled", "_settled_epoch", "_walked")

    def __init__(
        self,
        ideal_of: Callable[[int], Sequence[Fraction]],
        *,
        settled_epoch: int,
        tie_order: Sequence[int],
    ) -> None:
        self._settled_epoch = settled_epoch
        self._walked = WalkedTotals(ideal_of, tie_order=tie_order)
        self._settled = EpochTotals(ideal_of(settled_epoch), tie_order=tie_order)

    def of(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in `epoch`."""
        if epoch < self._settled_epoch:
            return self._walked.of(epoch)
        return self._settled.of(epoch - self._settled_epoch)

    def before(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in all epochs before `epoch`."""
        if epoch <= self._settled_epoch:
            return self._walked.before(epoch)
        early = self._walked.before(self._settled_epoch)
        late = self._settled.before(epoch - self._settled_epoch)
        return tuple(first + more for first, more in zip(early, late, strict=True))


class JointTotals:
    """Totals of strata: whole classes are scheduled first, then the strata inside each.

    So a class has the floor or the ceiling of its share of an epoch whatever its strata round to.

    Args:
        labels: totals of whole classes.
        inside: per class, the exact shares of its strata in it, `(S_c,)` that sum to 1.
        tie_orders: per class, `(S_c,)` rank of each stratum among equally urgent ones.
    """

    __slots__ = ("_labels", "_strata")

    def __init__(
        self,
        labels: Totals,
        *,
        inside: Sequence[Sequence[Fraction]],
        tie_orders: Sequence[Sequence[int]],
    ) -> None:
        self._labels = labels
        self._strata: list[Totals] = [
            WalkedTotals(_share_out(labels, number, shares), tie_order=order)
            if len(shares) > 1
            else _Only(labels, number)
            for number, (shares, order) in enumerate(zip(inside, tie_orders, strict=True))
        ]

    def of(self, epoch: int) -> tuple[int, ...]:
        """Give the draws per stratum in `epoch`, class after class."""
        return tuple(draws for strata in self._strata for draws in strata.of(epoch))

    def before(self, epoch: int) -> tuple[int, ...]:
        """Give the draws per stratum in all epochs before `epoch`, class after class."""
        return tuple(draws for strata in self._strata for draws in strata.before(epoch))


class _Only:
    """A class with one stratum, or none that is drawn: what the class gets."""

    __slots__ = ("_labels", "_number")

    def __init__(self, labels: Totals, number: int) -> None:
        self._labels, self._number = labels, number

    def of(self, epoch: int) -> tuple[int, ...]:
        """Give the class's draws in `epoch`."""
        return (self._labels.of(epoch)[self._number],)

    def before(self, epoch: int) -> tuple[int, ...]:
        """Give the class's draws in all epochs before `epoch`."""
        return (self._labels.before(epoch)[self._number],)


def _share_out(
    labels: Totals, number: int, shares: Sequence[Fraction]
) -> Callable[[int], list[Fraction]]:
    """Say how many draws each stratum of a class ideally has in an epoch."""

    def ideal(epoch: int) -> list[Fraction]:
        draws = labels.of(epoch)[number]
        return [draws * share for share in shares]

    return ideal
