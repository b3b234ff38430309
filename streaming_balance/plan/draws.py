"""From classes and a strategy to the draws of every batch."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.independent import IndependentDraws
from streaming_balance.plan.keys import key_family, stream_key
from streaming_balance.plan.members import ClassMembers, ClassTable, fixed_subset
from streaming_balance.plan.quotas import StepQuotas, split_totals
from streaming_balance.plan.rotation import BLOCK_PLACES, Rotation, spacing_for
from streaming_balance.plan.shape import EpochShape
from streaming_balance.plan.strategies import Downsample
from streaming_balance.plan.strategy import Strategy, Target
from streaming_balance.plan.totals import EpochTotals

CACHED_EPOCHS = 4


class Draws(Protocol):
    """What a plan needs to know of its draws; every method is a pure function of its arguments."""

    def members_of(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        """Give the `(K,)` lists of sample numbers of a global batch, in class order."""
        ...

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(K,)` draws per class of a global batch."""
        ...

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(N,)` deliveries per sample before a step."""
        ...


class QuotaDraws:
    """Exact quotas in every batch, endless passes within every class.

    Args:
        members: `(K,)` the units of each class that the strategy uses.
        num_samples: samples in the split, N.
        strategy: its name and whether it may repeat.
        seed: the run's seed.
        shape: steps and batch sizes of an epoch.
        target: the strategy's exact shares.
    """

    __slots__ = ("_epochs", "_members", "_num_samples", "_rotations", "_seed", "_shape", "totals")

    def __init__(
        self,
        members: tuple[ClassMembers, ...],
        *,
        num_samples: int,
        strategy: Strategy,
        seed: int,
        shape: EpochShape,
        target: Target,
    ) -> None:
        self._members, self._num_samples = members, num_samples
        self._seed, self._shape = seed, shape
        ideal = [share * shape.num_draws for share in target.shares]
        ranking = self._keyed_order("totals")
        self.totals = EpochTotals(ideal, tie_order=np.argsort(ranking).tolist())
        self._rotations = [
            Rotation(
                seed=seed,
                label=members.label,
                size=max(1, members.size),
                hashes=members.hashes,
                spacing=spacing_for(max(1, members.size), self._windows(number, strategy)),
                lead=number * BLOCK_PLACES // len(self._members),
                sorted_up_to=members.sorted_up_to,
            )
            for number, members in enumerate(self._members)
        ]
        self._epochs: OrderedDict[int, tuple[list[int], StepQuotas, list[int]]] = OrderedDict()

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(K,)` draws per class of a global batch."""
        return np.array(self._counts(epoch, step)[1], dtype=np.int64)

    def members_of(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        """Give the `(K,)` lists of sample numbers of a global batch, in class order."""
        before, counts = self._counts(epoch, step)
        drawn = []
        for number, members in enumerate(self._members):
            units, turns = self._rotations[number].take(before[number], counts[number])
            drawn.append(members.pick(units, turns))
        return drawn

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(N,)` deliveries per sample before a step."""
        exposure = np.zeros(self._num_samples, dtype=np.int64)
        if step == self._shape.num_steps:
            before = list(self.totals.before(epoch + 1))
        else:
            before, _ = self._counts(epoch, step)
        for number, members in enumerate(self._members):
            if members.size:
                members.spread(self._rotations[number].turns_before(before[number]), exposure)
        return exposure

    def _counts(self, epoch: int, step: int) -> tuple[list[int], list[int]]:
        """Give each class's ordinal at the start of a step, and its draws in it."""
        base, walk, last = self._epoch(epoch)
        if last and step == self._shape.num_steps - 1:
            whole = self.totals.of(epoch)
            early = [total - late for total, late in zip(whole, last, strict=True)]
            return [start + count for start, count in zip(base, early, strict=True)], last
        # The walk counts in the epoch's keyed class order; class order comes back here.
        order = self._class_order(epoch)
        before, counts = walk.at(step)
        ordinals, drawn = list(base), [0] * len(base)
        for place, number in enumerate(order):
            ordinals[number] += before[place]
            drawn[number] = counts[place]
        return ordinals, drawn

    def _epoch(self, epoch: int) -> tuple[list[int], StepQuotas, list[int]]:
        """Give an epoch's starting ordinals, its walk, and its short last batch if it has one."""
        known = self._epochs.get(epoch)
        if known is None:
            known = self._epochs[epoch] = self._start_epoch(epoch)
            while len(self._epochs) > CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return known

    def _start_epoch(self, epoch: int) -> tuple[list[int], StepQuotas, list[int]]:
        """Lay out the quotas of an epoch."""
        shape, seed = self._shape, self._seed
        totals, last = list(self.totals.of(epoch)), []
        order = self._class_order(epoch)
        steps = shape.num_steps
        if shape.is_short:
            # The short batch comes off first, so that the others split evenly.
            offset = stream_key(seed, "short", epoch) % shape.num_draws
            ordered = [totals[number] for number in order]
            short = split_totals(ordered, shape.num_draws, shape.last_size, offset)
            last = [0] * len(totals)
            for place, number in enumerate(order):
                last[number] = short[place]
                totals[number] -= short[place]
            steps -= 1
        node_key = key_family(seed, "quota", epoch)
        walk = StepQuotas(
            [totals[number] for number in order],
            steps=max(1, steps),
            offset_of=lambda start, length: node_key(start, length) % length,
        )
        return list(self.totals.before(epoch)), walk, last

    def _class_order(self, epoch: int) -> list[int]:
        """Give the epoch's keyed class order."""
        return self._keyed_order("classes", epoch)

    def _keyed_order(self, purpose: str, *parts: int) -> list[int]:
        """Order classes by keys of their labels."""
        keys = [stream_key(self._seed, purpose, *parts, member.label) for member in self._members]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def _windows(self, number: int, strategy: Strategy) -> list[int]:
        """List the numbers of consecutive draws in which nobody should repeat needlessly."""
        ideal, shape = self.totals.ideal[number], self._shape
        size = self._members[number].size
        most = math.ceil(ideal)
        windows: list[int] = []
        for total in range(math.floor(ideal), most + 1):
            windows += shape.batch_shares(total)
        exact_passes = self.totals.is_constant and most == size
        # Now and then one fewer than all: epochs and passes drift apart, and an epoch spans a seam.
        drifting = isinstance(strategy, Downsample) and ideal < most == size
        if most < size or drifting or (not strategy.replacement and not exact_passes):
            windows.append(most)
        return windows


def used_members(table: ClassTable, strategy: Strategy, seed: int) -> tuple[ClassMembers, ...]:
    """Give the units the strategy uses: all of them, or one fixed subset."""
    if not isinstance(strategy, Downsample) or strategy.rotate:
        return table.members
    kept = strategy.resampled(table.sizes)
    return tuple(
        fixed_subset(members, kept.get(members.label, 0), seed=seed) if members.size else members
        for members in table.members
    )


def make_draws(
    table: ClassTable, strategy: Strategy, *, seed: int, shape: EpochShape, target: Target
) -> Draws:
    """Choose exact or independent draws.

    Args:
        table: who belongs to which class.
        strategy: says how samples are drawn, and which of them.
        seed: the run's seed.
        shape: steps and batch sizes of an epoch.
        target: the strategy's exact shares.

    Returns:
        What a plan asks for its batches.
    """
    members = used_members(table, strategy, seed)
    if strategy.draw == "iid":
        return IndependentDraws(
            members,
            num_samples=table.num_samples,
            shares=np.array(target.shares, dtype=np.float64),
            seed=seed,
            shape=shape,
        )
    return QuotaDraws(
        members,
        num_samples=table.num_samples,
        strategy=strategy,
        seed=seed,
        shape=shape,
        target=target,
    )
