"""Systematic draws: any expectation per sample, met by the floor or the ceiling in every epoch.

Samples stand in a row, each as long as its weight, and marks are set along the row at equal
distances from a keyed start: a sample is drawn once for every mark on it. The draws of an epoch
then stand in the order of the row; cut into as many runs as a batch has places, every batch takes
one draw of each run, so that it crosses the whole row and the copies of a sample lie in different
batches.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.members import ClassMembers
from streaming_balance.plan.permutation import FeistelPermutation, shuffled, sort_keys
from streaming_balance.plan.shape import EpochShape

CACHED_EPOCHS = 2
# Sums of weights stay below 2^52: there floats count every whole number.
WEIGHT_BITS = 52
# Steps beyond this are permuted by a network instead of being sorted.
SORTED_STEPS = 1 << 13


class SystematicDraws:
    """Draws by weight per sample.

    Args:
        members: `(G,)` the samples of each class, one sample per unit.
        weights: `(N,)` weight of every sample number; those of samples in no class do not count.
        num_samples: samples in the split, N.
        seed: the run's seed.
        shape: steps and batch sizes of an epoch; None where an epoch is as long as its weights,
            each worth one draw, add up to, give or take one.
        batch_size: samples in a global batch.

    Source:
        Madow, "On the theory of systematic sampling", Annals of Mathematical Statistics 1949.
    """

    __slots__ = (
        "_batch_size",
        "_bounds",
        "_epochs",
        "_kept_shifts",
        "_members",
        "_num_samples",
        "_row",
        "_seed",
        "_shape",
        "_sums",
        "_unit",
    )

    def __init__(
        self,
        members: Sequence[ClassMembers],
        *,
        weights: NDArray[np.float64],
        num_samples: int,
        seed: int,
        shape: EpochShape | None,
        batch_size: int,
    ) -> None:
        self._num_samples, self._seed = num_samples, seed
        self._members = [_drawn(group, weights) for group in members]
        self._shape, self._batch_size = shape, batch_size
        ordered = [_keyed_order(group, seed) for group in members]
        self._row = np.concatenate(ordered) if ordered else np.empty(0, dtype=np.int64)
        self._bounds = np.cumsum([len(samples) for samples in ordered])
        lengths, exponent = exact_weights(weights[self._row])
        self._sums = np.cumsum(lengths)
        self._unit = 1 << exponent if exponent >= 0 else 0
        self._epochs: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._kept_shifts: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = (
            OrderedDict()
        )

    @property
    def members(self) -> Sequence[ClassMembers]:
        """`(G,)` the samples of each class that have a weight."""
        return self._members

    def shape(self, epoch: int) -> EpochShape:
        """Give the steps and batch sizes of an epoch."""
        if self._shape is not None:
            return self._shape
        draws = (int(self._sums[-1]) + self._start(epoch)) // self._unit
        return EpochShape.of_draws(draws, batch_size=self._batch_size, last="short")

    def shares(self, epoch: int) -> list[float]:  # noqa: ARG002 - all epochs are alike
        """Give the `(G,)` part of all draws that each group is expected to get."""
        totals = np.diff(np.concatenate([[0], self._sums])[np.concatenate([[0], self._bounds])])
        return [int(total) / int(self._sums[-1]) for total in totals]

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(G,)` draws per group of a global batch."""
        return np.array([len(drawn) for drawn in self.members_of(epoch, step)], dtype=np.int64)

    def members_of(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        """Give the `(G,)` lists of sample numbers of a global batch."""
        places = self._places(epoch, np.array([step], dtype=np.int64))
        units = np.sort(np.searchsorted(self._cumulative(epoch), places, side="right"))
        cuts = np.searchsorted(units, self._bounds)
        return np.split(self._row[units], cuts[:-1])

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(N,)` deliveries per sample before a step."""
        drawn = np.zeros(len(self._row), dtype=np.int64)
        for earlier in range(epoch):
            drawn += np.diff(self._cumulative(earlier), prepend=0)
        if step:
            places = self._places(epoch, np.arange(step, dtype=np.int64))
            units = np.searchsorted(self._cumulative(epoch), places, side="right")
            drawn += np.bincount(units, minlength=len(self._row))
        exposure = np.zeros(self._num_samples, dtype=np.int64)
        exposure[self._row] = drawn
        return exposure

    def _cumulative(self, epoch: int) -> NDArray[np.int64]:
        """Give how many draws of an epoch fall to the samples up to each one of the row."""
        known = self._epochs.get(epoch)
        if known is None:
            marks = 1 if self._shape is None else self._shape.num_draws
            known = _marks_reached(self._sums, marks, self._start(epoch), self._distance)
            self._epochs[epoch] = known
            while len(self._epochs) > CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return known

    @property
    def _distance(self) -> int:
        """The length of row that a mark stands for, times the marks of an epoch if they are set."""
        return self._unit if self._shape is None else int(self._sums[-1])

    def _start(self, epoch: int) -> int:
        """Give the keyed start of an epoch's marks."""
        return stream_key(self._seed, "systematic", epoch) % self._distance

    def _places(self, epoch: int, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the places, among the draws of an epoch, that some steps deliver."""
        shape = self.shape(epoch)
        length = shape.num_steps
        turns = self._turns(epoch, length, steps)
        long_shifts, short_shifts = self._shifts(epoch)
        starts = length * np.arange(len(long_shifts), dtype=np.int64)
        places = [(starts[:, None] + (turns[None, :] + long_shifts[:, None]) % length).ravel()]
        if len(short_shifts) and length > 1:
            # The last batch takes no part in these runs: whoever comes after it moves up.
            is_whole = steps < length - 1
            last = self._last_turn(epoch, length)
            turns = turns[is_whole] - (turns[is_whole] > last)
            runs = np.arange(len(short_shifts), dtype=np.int64)
            starts = length * len(long_shifts) + (length - 1) * runs
            shifted = (turns[None, :] + short_shifts[:, None]) % (length - 1)
            places.append((starts[:, None] + shifted).ravel())
        return np.concatenate(places)

    def _turns(self, epoch: int, length: int, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the keyed turn of steps, `(steps,)`, in every run of an epoch."""
        key = stream_key(self._seed, "systematic steps", epoch)
        if length > SORTED_STEPS:
            return FeistelPermutation(length, key=key)(steps)
        return shuffled(key, np.arange(length, dtype=np.uint64))[steps]

    def _last_turn(self, epoch: int, length: int) -> int:
        """Give the turn of an epoch's last step."""
        return int(self._turns(epoch, length, np.array([length - 1], dtype=np.int64))[0])

    def _shifts(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give how far each run of an epoch starts from its first turn: long runs, short ones.

        Shifts are keyed, so that the same samples do not always meet, but where a sample lies
        across two runs the second goes on with batches that its copies in the first did not reach.
        """
        known = self._kept_shifts.get(epoch)
        if known is None:
            known = self._kept_shifts[epoch] = self._new_shifts(epoch)
            while len(self._kept_shifts) > CACHED_EPOCHS:
                self._kept_shifts.popitem(last=False)
        return known

    def _new_shifts(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose the shifts of an epoch."""
        shape = self.shape(epoch)
        length, size = shape.num_steps, shape.batch_size
        num_long = shape.last_size if shape.is_short else size
        lengths = np.full(size, length, dtype=np.int64)
        lengths[num_long:] -= 1
        if length == 1:
            return np.zeros(num_long, dtype=np.int64), np.zeros(0, dtype=np.int64)
        copies = self._copies_across(epoch, np.cumsum(lengths) - lengths)
        words = sort_keys(
            stream_key(self._seed, "systematic shifts", epoch), np.arange(size, dtype=np.uint64)
        )
        # A step back by 1 to copies - 1 batches would meet the sample's copies again.
        free = np.maximum(1, lengths - np.maximum(1, copies) + 1)
        chosen = (words % free.astype(np.uint64)).astype(np.int64)
        jumps = np.where(chosen > 0, chosen + np.maximum(1, copies) - 1, 0)
        long_shifts = np.cumsum(jumps[:num_long]) % length
        if num_long == size:
            return long_shifts, np.zeros(0, dtype=np.int64)
        # The turn after the one that took the last place of the last long run, among whole batches.
        last = self._last_turn(epoch, length)
        turn = -int(long_shifts[-1]) % length
        turn = (turn + 1) % length if turn == last else turn
        first = -(turn - (turn > last)) % (length - 1)
        return long_shifts, (first + np.cumsum(jumps[num_long:])) % (length - 1)

    def _copies_across(self, epoch: int, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the copies of the sample at each place if it has the place before, too; else 0."""
        cumulative = self._cumulative(epoch)
        units = np.searchsorted(cumulative, starts, side="right")
        first = np.where(units > 0, cumulative[units - 1], 0)
        return np.where(first < starts, cumulative[units] - first, 0)


def exact_weights(weights: Sequence[float] | NDArray[np.float64]) -> tuple[NDArray[np.int64], int]:
    """Write weights as whole numbers, as fine as exact sums allow.

    Args:
        weights: `(n,)` finite numbers of at least 0, one of them above 0.

    Returns:
        `(n,)` whole numbers, and the power of two that stands for a weight of 1.

    Examples:
        >>> numbers, exponent = exact_weights([1.0, 2.5])
        >>> (numbers / 2.0**exponent).tolist()
        [1.0, 2.5]
    """
    values = np.asarray(weights, dtype=np.float64)
    exponent = WEIGHT_BITS - math.frexp(math.fsum(values.tolist()))[1]
    return np.rint(np.ldexp(values, exponent)).astype(np.int64), exponent


def _drawn(group: ClassMembers, weights: NDArray[np.float64]) -> ClassMembers:
    """Leave out samples of weight 0: they are never drawn."""
    drawn = weights[group.pick_first(np.arange(group.size, dtype=np.int64))] > 0
    return group if drawn.all() else group.subset(np.flatnonzero(drawn).astype(np.int64))


def _keyed_order(group: ClassMembers, seed: int) -> NDArray[np.int64]:
    """Put the samples of a group in a keyed order that lasts for the run."""
    samples = group.pick_first(np.arange(group.size, dtype=np.int64))
    return samples[shuffled(stream_key(seed, "row", group.label), group.hashes())]


def _marks_reached(
    sums: NDArray[np.int64], marks: int, start: int, distance: int
) -> NDArray[np.int64]:
    """Give floor((sums * marks + start) / distance), exactly although products overflow.

    Floats give the quotient but for its last digits; what is missing shows in the remainder, which
    is small enough to survive arithmetic modulo 2^64.
    """
    quotient = np.floor(sums.astype(np.float64) * (marks / distance)).astype(np.int64)
    with np.errstate(over="ignore"):
        product = sums.view(np.uint64) * np.uint64(marks) + np.uint64(start)
        while True:
            rest = (product - quotient.view(np.uint64) * np.uint64(distance)).view(np.int64)
            off = np.where(rest < 0, -1, np.where(rest >= distance, 1, 0))
            if not off.any():
                return quotient
            quotient += off
