"""Literal independent weighted draws, as a pure function of position.

For comparison with the usual sampler: same shares, no quotas, no fairness. A batch is read from a
keyed stream at a place that follows from its step, so any batch can be had without the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.keys import stream_key, words
from streaming_balance.plan.members import ClassMembers
from streaming_balance.plan.shape import EpochShape
from streaming_balance.plan.targets import EpochTargets

WORDS_PER_DRAW = 3
WORDS_PER_BLOCK = 4
# Counting what was drawn reads the stream in pieces of about so many draws: some 50 MB at work.
DRAWS_AT_ONCE = 1 << 20
_UNIT_SCALE = 2.0**-53
_UNIT_SHIFT = np.uint64(11)
_TURN_SHIFT = np.uint64(2)


class IndependentDraws:
    """Draws a class by its share, then a unit of the class, each independent of all others.

    Args:
        members: `(G,)` the units of each group.
        num_samples: samples in the split, N.
        seed: the run's seed.
        targets: shares and shape of every epoch.
    """

    __slots__ = ("_bounds", "_members", "_num_samples", "_seed", "_targets")

    def __init__(
        self,
        members: tuple[ClassMembers, ...],
        *,
        num_samples: int,
        seed: int,
        targets: EpochTargets,
    ) -> None:
        self._members, self._num_samples, self._seed = members, num_samples, seed
        self._targets = targets
        self._bounds: dict[int, NDArray[np.float64]] = {}

    @property
    def members(self) -> Sequence[ClassMembers]:
        """`(G,)` the units of each group."""
        return self._members

    def shape(self, epoch: int) -> EpochShape:
        """Give the steps and batch sizes of an epoch."""
        return self._targets.shape(epoch)

    def shares(self, epoch: int) -> list[float]:
        """Give the `(G,)` share of each group."""
        return [float(share) for share in self._targets.group_shares(epoch)]

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(G,)` draws per group of a global batch."""
        return np.array([len(drawn) for drawn in self.members_of(epoch, step)], dtype=np.int64)

    def members_of(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        """Give the `(G,)` lists of sample numbers of a global batch, group by group."""
        size = self.shape(epoch).size_of(step)
        stream = self._stream(epoch, step, 1)[0, :size]
        return self._by_class(epoch, stream)

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(N,)` deliveries per sample before a step, by counting every draw."""
        exposure = np.zeros(self._num_samples, dtype=np.int64)
        for earlier in range(epoch):
            self._count(earlier, self.shape(earlier).num_steps, exposure)
        self._count(epoch, step, exposure)
        return exposure

    def _count(self, epoch: int, steps: int, exposure: NDArray[np.int64]) -> None:
        """Add the draws of the first `steps` steps of an epoch."""
        shape = self.shape(epoch)
        steps_at_once = max(1, DRAWS_AT_ONCE // shape.batch_size)
        for first in range(0, steps, steps_at_once):
            here = min(steps_at_once, steps - first)
            stream = self._stream(epoch, first, here)
            sizes = np.full(here, shape.batch_size)
            sizes[-1] = shape.size_of(first + here - 1)
            drawn = stream[np.arange(shape.batch_size) < sizes[:, None]]
            for picked in self._by_class(epoch, drawn):
                exposure += np.bincount(picked, minlength=self._num_samples)

    def _stream(self, epoch: int, step: int, steps: int) -> NDArray[np.uint64]:
        """Read the words of consecutive batches: `(steps, B, 3)`."""
        key = stream_key(self._seed, "iid", epoch)
        size = self.shape(epoch).batch_size
        blocks = -(-size * WORDS_PER_DRAW // WORDS_PER_BLOCK)
        raw = words(key, steps * blocks * WORDS_PER_BLOCK, first_block=step * blocks)
        used = raw.reshape(steps, -1)[:, : size * WORDS_PER_DRAW]
        return used.reshape(steps, size, WORDS_PER_DRAW)

    def _by_class(self, epoch: int, drawn: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
        """Turn `(m, 3)` words into sample numbers, group by group."""
        uniform = (drawn[:, :2] >> _UNIT_SHIFT).astype(np.float64) * _UNIT_SCALE
        classes = np.searchsorted(self._bounds_of(epoch), uniform[:, 0], side="right")
        picked = []
        for number, members in enumerate(self._members):
            mine = classes == number
            units = (uniform[mine, 1] * members.size).astype(np.int64)
            # The third word chooses among the samples of a patient.
            turns = (drawn[mine, 2] >> _TURN_SHIFT).astype(np.int64)
            picked.append(members.pick(units, turns))
        return picked

    def _bounds_of(self, epoch: int) -> NDArray[np.float64]:
        """Give the running sums of an epoch's shares."""
        place = min(epoch, self._targets.settled_epoch)
        bounds = self._bounds.get(place)
        if bounds is None:
            shares = np.array(self._targets.group_shares(place), dtype=np.float64)
            bounds = np.cumsum(shares)
            # Rounding may leave the last sum below 1; draws above it belong to the last group.
            bounds[np.flatnonzero(shares)[-1] :] = 1.0
            self._bounds[place] = bounds
        return bounds
