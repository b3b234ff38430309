"""Whose turn it is after a change of plan: first those who had none in the pass that was left.

The pass that the old plan began counts as pass -1 of the new one: its members stand in it as they
stood under the old plan, and the new plan starts inside it. Everything that holds between two
passes, at their seam or by their groups, then holds between this one and pass 0, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.members import ClassMembers
from streaming_balance.plan.rotation import Rotation, Spacing


class PassBegun(Protocol):
    """A pass that another plan began, in units of the plan that ends it."""

    @property
    def owed(self) -> int:
        """How many units are still to come: the last places of the pass."""
        ...

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Give the units at consecutive places."""
        ...

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the units at any places."""
        ...

    def turns_had(self) -> NDArray[np.int64]:
        """Count the turns of every unit so far: `(n,)`."""
        ...


class SamePass:
    """A pass of a class whose units are the same in both plans: never listed.

    Args:
        rotation: the old plan's turns.
        ordinal: the draw at which it was left; where it starts a pass, nobody is owed a turn.
    """

    __slots__ = ("_ordinal", "_rotation", "_start", "owed")

    def __init__(self, rotation: Rotation, ordinal: int) -> None:
        place = rotation.place(ordinal)
        self._rotation, self._ordinal, self._start = rotation, ordinal, ordinal - place
        self.owed = rotation.size - place if place else 0

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Give the units at consecutive places."""
        return self._rotation.take(self._start + start, count)[0]

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the units at any places."""
        return self._rotation.at(self._start, places)

    def turns_had(self) -> NDArray[np.int64]:
        """Count the turns of every unit so far: `(n,)`."""
        return self._rotation.turns_before(self._ordinal)


class ListedPass:
    """A pass of a class that units have left or joined.

    Args:
        owed: `(r,)` the units that are still to come, in order.
        turns_had: `(n,)` turns of every unit so far; 0 for newcomers.

    Examples:
        >>> begun = ListedPass(np.array([3, 0]), np.array([1, 2, 2, 1]))
        >>> begun.take(0, 4)
        array([1, 2, 3, 0])
    """

    __slots__ = ("_order", "_turns_had", "owed")

    def __init__(self, owed: NDArray[np.int64], turns_had: NDArray[np.int64]) -> None:
        self.owed, self._turns_had = len(owed), turns_had
        is_served = np.ones(len(turns_had), dtype=np.bool_)
        is_served[owed] = False
        self._order = np.concatenate([np.flatnonzero(is_served).astype(np.int64), owed])

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Give the units at consecutive places."""
        return self._order[start : start + count]

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the units at any places."""
        return self._order[places]

    def turns_had(self) -> NDArray[np.int64]:
        """Count the turns of every unit so far: `(n,)`."""
        return self._turns_had


class CarriedRotation(Rotation):
    """The turns of one class from a change of plan on; ordinal 0 is the first draw after it.

    Args:
        group: the units.
        seed: the run's seed.
        spacing: how far apart turns are kept.
        lead: as for `Rotation`.
        begun: the pass that the plan before began.
    """

    __slots__ = ("_begun", "_head_starts", "_several")

    _first_seam = 0

    def __init__(
        self, group: ClassMembers, *, seed: int, spacing: Spacing, lead: int = 0, begun: PassBegun
    ) -> None:
        super().__init__(
            seed=seed,
            label=group.label,
            size=group.size,
            hashes=group.hashes,
            spacing=spacing,
            lead=lead,
            sorted_up_to=group.sorted_up_to,
            owners=group.owners,
        )
        self._begun, self._several = begun, group.starts is not None
        self._head_starts: NDArray[np.int64] | None = None

    def take(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the draws with ordinals `start` to `start + count - 1`, as `Rotation` does.

        Returns:
            `(count,)` members, and `(count,)` how many turns each had before, those under earlier
            plans included; these only where units have several samples, which take turns.
        """
        members, turns = super().take(start - self._begun.owed, count)
        if self._several:
            turns += self._turns_brought()[members]
        return members, turns

    def place(self, ordinal: int) -> int:
        """Give the place in its pass of the draw with this ordinal: [0, n)."""
        return super().place(ordinal - self._begun.owed)

    def at(self, start: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the members at any places, `(m,)`, of the pass that starts with ordinal `start`."""
        return super().at(start - self._begun.owed, places)

    def turns_before(self, ordinal: int) -> NDArray[np.int64]:
        """Count each member's turns before an ordinal, those under earlier plans included."""
        return self._turns_brought() + super().turns_before(ordinal - self._begun.owed)

    def _turns_brought(self) -> NDArray[np.int64]:
        """Count each member's turns up to the end of pass -1: `(n,)`."""
        if self._head_starts is None:
            turns = self._begun.turns_had().copy()
            turns[self._owed()] += 1
            self._head_starts = turns
        return self._head_starts

    def _owed(self) -> NDArray[np.int64]:
        """List those who are owed a turn, in order."""
        return self._tail(-1, self._begun.owed)

    def _places(self, pass_number: int, start: int, count: int) -> NDArray[np.int64]:
        """Give the members at consecutive places of one pass, or of the pass begun."""
        if pass_number < 0:
            return self._begun.take(start, count)
        return super()._places(pass_number, start, count)

    def _scattered(self, pass_number: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the members at any places of one pass, or of the pass begun."""
        if pass_number < 0:
            return self._begun.at(places)
        return super()._scattered(pass_number, places)

    def _tail(self, pass_number: int, count: int) -> NDArray[np.int64]:
        """Give the last members of a pass; of the pass begun only those who are still to come."""
        if pass_number < 0:
            count = min(count, self._begun.owed)
            return self._begun.take(self.size - count, count)
        return super()._tail(pass_number, count)

    def _seats(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Order the members as in the first pass: those who came right before it come last."""
        seats, owed = super()._seats(hashes), self._owed()
        is_served = np.ones(self.size, dtype=np.bool_)
        is_served[owed] = False
        return np.concatenate([seats[is_served[seats]], owed])

    def _seated(self, seats: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the members at places of the first pass, which nobody lists in a class so large.

        Those who had their turn stand there in an order of their own, not in that of pass 0.
        """
        served = self.size - self._begun.owed
        if served == self.size:
            return super()._seated(seats)
        places, early = seats.copy(), seats < served
        if early.any():
            places[early] = self._network(served, 0)(seats[early])
        return self._begun.at(places)


def make_rotation(
    group: ClassMembers,
    *,
    seed: int,
    spacing: Spacing,
    lead: int = 0,
    begun: PassBegun | None = None,
) -> Rotation:
    """Decide whose turn it is in a class.

    Args:
        group: its units; where there are none, nobody may ask for a turn.
        seed: the run's seed.
        spacing: how far apart turns are kept.
        lead: as for `Rotation`.
        begun: the pass that the plan before began, or None where there was no such plan.
    """
    if begun is not None:
        return CarriedRotation(group, seed=seed, spacing=spacing, lead=lead, begun=begun)
    return Rotation(
        seed=seed,
        label=group.label,
        size=max(1, group.size),
        hashes=group.hashes,
        spacing=spacing,
        lead=lead,
        sorted_up_to=group.sorted_up_to,
        owners=group.owners,
    )


def deliveries(
    members: Sequence[ClassMembers],
    rotations: Sequence[Rotation],
    ordinals: Sequence[int],
    *,
    num_samples: int,
) -> NDArray[np.int64]:
    """Count how often each sample came before some ordinals, under this plan alone.

    Args:
        members: `(G,)` the units of each group.
        rotations: `(G,)` whose turn it is in each group.
        ordinals: `(G,)` draws of each group.
        num_samples: samples in the split, N.

    Returns:
        `(N,)` deliveries per sample number.
    """
    counts = np.zeros(num_samples, dtype=np.int64)
    brought = np.zeros(num_samples, dtype=np.int64)
    for group, rotation, ordinal in zip(members, rotations, ordinals, strict=True):
        if group.size:
            group.spread(rotation.turns_before(ordinal), counts)
            if isinstance(rotation, CarriedRotation):
                group.spread(rotation.turns_before(0), brought)
    return counts - brought
