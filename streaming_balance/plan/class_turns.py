"""Batches of P classes and M units of each: classes take turns, and so do the units in each."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.carried_rotation import PassBegun, deliveries, make_rotation
from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.members import ClassMembers
from streaming_balance.plan.permutation import mix64
from streaming_balance.plan.rotation import Rotation, spacing_for
from streaming_balance.plan.shape import EpochShape


class ClassTurns:
    """Draws P classes per batch in turn, and the next M units of each.

    Args:
        members: `(K,)` the units of each class.
        num_samples: samples in the split, N.
        seed: the run's seed.
        shape: steps of an epoch; every batch is full.
        classes_per_batch: P, at most the number of classes that have units.
        units_per_class: M.
    """

    __slots__ = (
        "_classes",
        "_first_epoch",
        "_members",
        "_num_samples",
        "_per_batch",
        "_present",
        "_seed",
        "_shape",
        "_units",
        "rotations",
    )

    rotations: list[Rotation]
    """`(K,)` whose turn it is in each class, by the ordinals that `ordinals` gives."""

    def __init__(
        self,
        members: Sequence[ClassMembers],
        *,
        num_samples: int,
        seed: int,
        shape: EpochShape,
        classes_per_batch: int,
        units_per_class: int,
    ) -> None:
        self._members, self._num_samples, self._shape = members, num_samples, shape
        self._seed, self._first_epoch = seed, 0
        self._per_batch, self._units = classes_per_batch, units_per_class
        self._present = [number for number, group in enumerate(members) if group.size]
        names = [stream_key(0, "class", members[number].label) for number in self._present]
        hashes = mix64(np.array([name & (2**64 - 1) for name in names], dtype=np.uint64))
        self._classes = Rotation(
            seed=seed,
            label="classes in turn",
            size=len(self._present),
            hashes=lambda: hashes,
            spacing=spacing_for(len(self._present), [classes_per_batch]),
        )
        self.rotations = [self._rotation(group) for group in members]

    @property
    def members(self) -> Sequence[ClassMembers]:
        """`(K,)` the units of each class."""
        return self._members

    def shape(self, epoch: int) -> EpochShape:  # noqa: ARG002 - all epochs are alike
        """Give the steps and batch sizes of an epoch: all epochs are alike."""
        return self._shape

    def shares(self, epoch: int) -> list[float]:  # noqa: ARG002 - all epochs are alike
        """Give the `(K,)` part of all draws that each class gets in the long run."""
        return [bool(group.size) / len(self._present) for group in self._members]

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(K,)` draws per class of a global batch: M or none."""
        counts = np.zeros(len(self._members), dtype=np.int64)
        for place in self._chosen(epoch, step)[0].tolist():
            counts[self._present[place]] = self._units
        return counts

    def members_of(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        """Give the `(K,)` lists of sample numbers of a global batch."""
        chosen, turns = self._chosen(epoch, step)
        drawn = [np.empty(0, dtype=np.int64) for _ in self._members]
        for place, turn in zip(chosen.tolist(), turns.tolist(), strict=True):
            number = self._present[place]
            units, passes = self.rotations[number].take(turn * self._units, self._units)
            drawn[number] = self._members[number].pick(units, passes)
        return drawn

    def ordinals(self, epoch: int, step: int) -> list[int]:
        """Give the `(K,)` draws of each class before a step, since the start or the change."""
        counts = [0] * len(self._members)
        turns = self._classes.turns_before(self._ordinal(epoch, step))
        for number, turn in zip(self._present, turns.tolist(), strict=True):
            counts[number] = turn * self._units
        return counts

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(N,)` deliveries per sample before a step, since the start or the change."""
        ordinals = self.ordinals(epoch, step)
        return deliveries(self._members, self.rotations, ordinals, num_samples=self._num_samples)

    def carried(self, first_epoch: int, begun: Sequence[PassBegun | None]) -> ClassTurns:
        """Give these draws from an epoch on, after those who are owed a turn.

        Args:
            first_epoch: the epoch of the change: classes begin to take turns anew at its first
                step, and ordinals count from there.
            begun: `(K,)` the pass that each class stands in; None where it has no units.
        """
        draws = copy.copy(self)
        draws._first_epoch = first_epoch
        draws.rotations = list(map(self._rotation, self._members, begun))
        return draws

    def _rotation(self, group: ClassMembers, begun: PassBegun | None = None) -> Rotation:
        """Decide whose turn it is in a class."""
        spacing = spacing_for(max(1, group.size), [self._units])
        return make_rotation(group, seed=self._seed, spacing=spacing, begun=begun)

    def _ordinal(self, epoch: int, step: int) -> int:
        """Count the class turns before a step, since the start or the change."""
        epochs = epoch - self._first_epoch
        return (epochs * self._shape.num_steps + step) * self._per_batch

    def _chosen(self, epoch: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the classes of a batch, and how many turns each had before."""
        return self._classes.take(self._ordinal(epoch, step), self._per_batch)
