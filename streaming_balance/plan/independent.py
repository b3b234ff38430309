"""Literal independent weighted draws, as a pure function of position.

For comparison with the usual sampler: same shares, no quotas, no fairness. A batch is read from a
keyed stream at a place that follows from its step, so any batch can be had without the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.keys import stream_key, words
from streaming_balance.plan.members import ClassMembers
from streaming_balance.plan.shape import EpochShape

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
        members: `(K,)` the units of each class.
        num_samples: samples in the split, N.
        shares: `(K,)` target shares; 0 for a class without units.
        seed: the run's seed.
        shape: steps and batch sizes of an epoch.
    """

    __slots__ = ("_blocks_per_step", "_bounds", "_members", "_num_samples", "_seed", "_shape")

    def __init__(
        self,
        members: tuple[ClassMembers, ...],
        *,
        num_samples: int,
        shares: NDArray[np.float64],
        seed: int,
        shape: EpochShape,
    ) -> None:
        self._members, self._num_samples, self._seed = members, num_samples, seed
        self._bounds, self._shape = np.cumsum(shares), shape
        # Rounding may leave the last sum below 1; draws above it belong to the last class.
        self._bounds[np.flatnonzero(shares)[-1] :] = 1.0
        self._blocks_per_step = -(-shape.batch_size * WORDS_PER_DRAW // WORDS_PER_BLOCK)

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(K,)` draws per class of a global batch."""
        return np.array([len(drawn) for drawn in self.members_of(epoch, step)], dtype=np.int64)

    def members_of(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        """Give the `(K,)` lists of sample numbers of a global batch, in class order."""
        size = self._shape.size_of(step)
        stream = self._stream(epoch, step, 1)[0, :size]
        return [picked for _, picked in self._by_class(stream)]

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(N,)` deliveries per sample before a step, by counting every draw."""
        exposure = np.zeros(self._num_samples, dtype=np.int64)
        for earlier in range(epoch):
            self._count(earlier, self._shape.num_steps, exposure)
        self._count(epoch, step, exposure)
        return exposure

    def _count(self, epoch: int, steps: int, exposure: NDArray[np.int64]) -> None:
        """Add the draws of the first `steps` steps of an epoch."""
        steps_at_once = max(1, DRAWS_AT_ONCE // self._shape.batch_size)
        for first in range(0, steps, steps_at_once):
            here = min(steps_at_once, steps - first)
            stream = self._stream(epoch, first, here)
            sizes = np.full(here, self._shape.batch_size)
            sizes[-1] = self._shape.size_of(first + here - 1)
            drawn = stream[np.arange(self._shape.batch_size) < sizes[:, None]]
            for _, picked in self._by_class(drawn):
                exposure += np.bincount(picked, minlength=self._num_samples)

    def _stream(self, epoch: int, step: int, steps: int) -> NDArray[np.uint64]:
        """Read the words of consecutive batches: `(steps, B, 3)`."""
        key = stream_key(self._seed, "iid", epoch)
        blocks = self._blocks_per_step
        raw = words(key, steps * blocks * WORDS_PER_BLOCK, first_block=step * blocks)
        used = raw.reshape(steps, -1)[:, : self._shape.batch_size * WORDS_PER_DRAW]
        return used.reshape(steps, self._shape.batch_size, WORDS_PER_DRAW)

    def _by_class(self, drawn: NDArray[np.uint64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Turn `(m, 3)` words into sample numbers, class by class."""
        uniform = (drawn[:, :2] >> _UNIT_SHIFT).astype(np.float64) * _UNIT_SCALE
        classes = np.searchsorted(self._bounds, uniform[:, 0], side="right")
        picked = []
        for number, members in enumerate(self._members):
            mine = classes == number
            units = (uniform[mine, 1] * members.size).astype(np.int64)
            # The third word chooses among the samples of a patient.
            turns = (drawn[mine, 2] >> _TURN_SHIFT).astype(np.int64)
            picked.append((number, members.pick(units, turns)))
        return picked
