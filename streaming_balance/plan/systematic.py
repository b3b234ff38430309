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
        self._shape, self._batch_size = shape, batch_size
        ordered = [_keyed_order(group, seed) for group in members]
        self._row = np.concatenate(ordered) if ordered else np.empty(0, dtype=np.int64)
        self._bounds = np.cumsum([len(samples) for samples in ordered])
        lengths, exponent = exact_weights(weights[self._row])
        self._sums = np.cumsum(lengths)
        self._unit = 1 << exponent if exponent >= 0 else 0
        self._epochs: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

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
        whole = shape.num_steps - 1 if shape.is_short else shape.num_steps
        long_runs = shape.last_size if shape.is_short else shape.batch_size
        size = shape.batch_size
        places = []
        # Runs that the last batch takes part in are longer by one.
        for first, runs, length in (
            (0, long_runs, shape.num_steps),
            (long_runs * shape.num_steps, size - long_runs, whole),
        ):
            here = steps[steps < length]
            if not runs or not len(here):
                continue
            turn = self._permuted(epoch, length, here)
            shifts = self._shifts(epoch, length, first, runs)
            starts = first + length * np.arange(runs, dtype=np.int64)
            places.append((starts[:, None] + (turn[None, :] + shifts[:, None]) % length).ravel())
        return np.concatenate(places)

    def _permuted(self, epoch: int, length: int, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the keyed place of steps in a run of an epoch."""
        key = stream_key(self._seed, "systematic steps", epoch, length)
        if length > SORTED_STEPS:
            return FeistelPermutation(length, key=key)(steps)
        return shuffled(key, np.arange(length, dtype=np.uint64))[steps]

    def _shifts(self, epoch: int, length: int, first: int, runs: int) -> NDArray[np.int64]:
        """Give a keyed shift for each run, so that the same samples do not always meet."""
        key = stream_key(self._seed, "systematic shifts", epoch, first)
        words = sort_keys(key, np.arange(runs, dtype=np.uint64))
        return (words % np.uint64(length)).astype(np.int64)


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
