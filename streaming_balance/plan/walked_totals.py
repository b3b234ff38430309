"""Epoch totals whose ideals change from epoch to epoch."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Epochs are scheduled in blocks, looking a block ahead.
BLOCK_EPOCHS = 64
CACHED_BLOCKS = 4
# A whole draw; what lags and fractions are counted in. 64 fractions ahead stay below 2^58.
UNIT = 1 << 52
# Rounding must not put off a deadline nor bring a turn forward: what adds up in a hundred million
# epochs.
TOLERANCE = 1 << 26


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

    Every total is the floor or the ceiling of its ideal and every epoch sums to its ideals' sum.
    The seats that fractions add up to go to the classes that would be a whole draw behind first,
    as far as the next epochs show; of those alike to the ones that lag most.

    Args:
        ideal_of: gives the `(K,)` exact draws of an epoch; their sum is an integer.
        tie_order: `(K,)` rank of each class among those that are alike.

    Source:
        Tijdeman, "The chairman assignment problem", Discrete Mathematics 1980: earliest deadline
        first keeps everybody within 1 of a share that changes, for one seat at a time.

    Examples:
        >>> totals = WalkedTotals(lambda _: [Fraction(285, 2)] * 2, tie_order=[0, 1])
        >>> totals.of(0), totals.of(1), totals.before(2)
        ((143, 142), (142, 143), (285, 285))
    """

    __slots__ = ("_blocks", "_ideal_of", "_rows", "_starts", "_tie_order")

    def __init__(
        self, ideal_of: Callable[[int], Sequence[Fraction]], *, tie_order: Sequence[int]
    ) -> None:
        self._ideal_of = ideal_of
        self._tie_order = np.array(tie_order, dtype=np.int64)
        none = np.zeros(len(tie_order), dtype=np.int64)
        # Draws before the first epoch of every block, and by how much they fall short of the ideal.
        self._starts = [(tuple(none.tolist()), none)]
        self._blocks: OrderedDict[int, list[tuple[int, ...]]] = OrderedDict()
        self._rows: OrderedDict[int, _Rows] = OrderedDict()

    def of(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in `epoch`."""
        before, after = self.before(epoch), self.before(epoch + 1)
        return tuple(late - early for early, late in zip(before, after, strict=True))

    def before(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in all epochs before `epoch`."""
        number, place = divmod(epoch, BLOCK_EPOCHS)
        if not place and number < len(self._starts):
            return self._starts[number][0]
        return self._block(number)[place]

    def _block(self, number: int) -> list[tuple[int, ...]]:
        """Give the draws before each epoch of a block."""
        while number >= len(self._starts):
            self._walk(len(self._starts) - 1)
        known = self._blocks.get(number)
        return self._walk(number) if known is None else known

    def _walk(self, number: int) -> list[tuple[int, ...]]:
        """Hand out the draws of a block of epochs."""
        here, ahead = self._rows_of(number), self._rows_of(number + 1)
        fractions = np.concatenate([here.fractions, ahead.fractions])
        taken, lags = np.array(self._starts[number][0]), self._starts[number][1]
        reached = []
        for place in range(BLOCK_EPOCHS):
            reached.append(tuple(taken.tolist()))
            served = self._served(lags, fractions[place : place + BLOCK_EPOCHS], here.seats[place])
            taken = taken + here.whole[place] + served
            lags = lags + fractions[place] - served * UNIT
        if number + 1 == len(self._starts):
            self._starts.append((tuple(taken.tolist()), lags))
        self._blocks[number] = reached
        while len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return reached

    def _served(
        self, lags: NDArray[np.int64], fractions: NDArray[np.int64], seats: int
    ) -> NDArray[np.int64]:
        """Say who gets a seat of an epoch: `(K,)` zeros and ones."""
        served = np.zeros(len(lags), dtype=np.int64)
        if seats:
            owed = lags + np.cumsum(fractions, axis=0)
            is_late = owed >= UNIT - TOLERANCE
            deadlines = np.where(is_late.any(axis=0), is_late.argmax(axis=0), len(fractions))
            deadlines[owed[0] <= TOLERANCE] = len(fractions) + 1
            # A whole ideal is met as it is.
            deadlines[fractions[0] == 0] = len(fractions) + 2
            served[np.lexsort((self._tie_order, -owed[0], deadlines))[:seats]] = 1
        return served

    def _rows_of(self, number: int) -> _Rows:
        """Give what the epochs of a block ask for."""
        known = self._rows.get(number)
        if known is None:
            first = number * BLOCK_EPOCHS
            known = _Rows([self._ideal_of(first + place) for place in range(BLOCK_EPOCHS)])
            self._rows[number] = known
            while len(self._rows) > CACHED_BLOCKS:
                self._rows.popitem(last=False)
        return known


class _Rows:
    """The ideals of consecutive epochs: whole draws, fractions, and what fractions add up to."""

    __slots__ = ("fractions", "seats", "whole")

    def __init__(self, ideals: Sequence[Sequence[Fraction]]) -> None:
        rows: dict[tuple[Fraction, ...], tuple[list[int], list[int], int]] = {}
        found = []
        for ideal in map(tuple, ideals):
            if ideal not in rows:
                whole = [math.floor(draws) for draws in ideal]
                parts = [draws - floor for draws, floor in zip(ideal, whole, strict=True)]
                fractions = [round(part * UNIT) for part in parts]
                rows[ideal] = (whole, fractions, int(sum(parts, Fraction(0))))
            found.append(rows[ideal])
        self.whole = np.array([whole for whole, _, _ in found], dtype=np.int64)
        self.fractions = np.array([fractions for _, fractions, _ in found], dtype=np.int64)
        self.seats = [seats for _, _, seats in found]
