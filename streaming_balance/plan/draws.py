"""From classes and a strategy to the draws of every batch."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.carried_rotation import PassBegun, deliveries, make_rotation
from streaming_balance.plan.class_turns import ClassTurns
from streaming_balance.plan.independent import IndependentDraws
from streaming_balance.plan.keys import key_family, stream_key
from streaming_balance.plan.members import ClassMembers, ClassTable, fixed_subset
from streaming_balance.plan.quotas import StepQuotas, apportion, split_totals
from streaming_balance.plan.rotation import BLOCK_PLACES, Rotation, spacing_for, split_spacing
from streaming_balance.plan.shape import EpochShape
from streaming_balance.plan.strata_totals import JointTotals
from streaming_balance.plan.strategies import Downsample
from streaming_balance.plan.strategy import Strategy, Target
from streaming_balance.plan.systematic import SystematicDraws
from streaming_balance.plan.targets import EpochTargets, shares_inside
from streaming_balance.plan.totals import EpochTotals
from streaming_balance.plan.unit_strategies import ClassesBySamples, RepeatFactor
from streaming_balance.plan.unit_weights import unit_weights
from streaming_balance.plan.walked_totals import Totals, WalkedTotals
from streaming_balance.plan.windows import Windows

CACHED_EPOCHS = 4


class Draws(Protocol):
    """What a plan needs to know of its draws; every method is a pure function of its arguments."""

    @property
    def members(self) -> Sequence[ClassMembers]:
        """`(G,)` the units of each group that the strategy draws from."""
        ...

    def shape(self, epoch: int) -> EpochShape:
        """Give the steps and batch sizes of an epoch."""
        ...

    def shares(self, epoch: int) -> list[float]:
        """Give the `(G,)` part of an epoch's draws that each group should get."""
        ...

    def members_of(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        """Give the `(G,)` lists of sample numbers of a global batch, group by group."""
        ...

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(G,)` draws per group of a global batch."""
        ...

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(N,)` deliveries per sample before a step."""
        ...


class QuotaDraws:
    """Exact quotas in every batch, endless passes within every group.

    Args:
        table: classes and the groups they consist of.
        members: `(G,)` the units of each group that the strategy uses.
        strategy: its name and whether it may repeat.
        seed: the run's seed.
        targets: shares, length and shape of every epoch.
    """

    __slots__ = (
        "_epochs",
        "_label_of",
        "_members",
        "_num_samples",
        "_seed",
        "_starts",
        "_targets",
        "_windows",
        "rotations",
        "totals",
    )

    rotations: list[Rotation]
    """`(G,)` whose turn it is in each group, by the ordinals that `ordinals` gives."""

    def __init__(
        self,
        table: ClassTable,
        members: tuple[ClassMembers, ...],
        *,
        strategy: Strategy,
        seed: int,
        targets: EpochTargets,
    ) -> None:
        self._members, self._num_samples = members, table.num_samples
        labels = list(table.quota_sizes)
        self._label_of = [labels[number] for number in table.groups]
        self._seed, self._targets = seed, targets
        self.totals = self._totals(table)
        self._windows = Windows(targets, strategy, is_joint=table.has_strata)
        self.rotations = [self._rotation(number) for number in range(len(members))]
        self._starts = [0] * len(members)
        self._epochs: OrderedDict[int, tuple[list[int], StepQuotas, list[int]]] = OrderedDict()

    @property
    def members(self) -> Sequence[ClassMembers]:
        """`(G,)` the units of each group that the strategy draws from."""
        return self._members

    def shape(self, epoch: int) -> EpochShape:
        """Give the steps and batch sizes of an epoch."""
        return self._targets.shape(epoch)

    def shares(self, epoch: int) -> list[float]:
        """Give the `(G,)` share of each group."""
        return [float(share) for share in self._targets.group_shares(epoch)]

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(G,)` draws per group of a global batch."""
        return np.array(self._counts(epoch, step)[1], dtype=np.int64)

    def members_of(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        """Give the `(G,)` lists of sample numbers of a global batch, group by group."""
        before, counts = self._counts(epoch, step)
        drawn = []
        for members, rotation, start, count in zip(
            self._members, self.rotations, self._since_start(before), counts, strict=True
        ):
            units, turns = rotation.take(start, count)
            drawn.append(members.pick(units, turns))
        return drawn

    def ordinals(self, epoch: int, step: int) -> list[int]:
        """Give the `(G,)` draws of each group before a step, since the start or the change."""
        if step == self.shape(epoch).num_steps:
            return self._since_start(list(self.totals.before(epoch + 1)))
        return self._since_start(self._counts(epoch, step)[0])

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give the `(N,)` deliveries per sample before a step, since the start or the change."""
        ordinals = self.ordinals(epoch, step)
        return deliveries(self._members, self.rotations, ordinals, num_samples=self._num_samples)

    def carried(self, first_epoch: int, begun: Sequence[PassBegun | None]) -> QuotaDraws:
        """Give these draws from an epoch on, after those who are owed a turn.

        Args:
            first_epoch: the epoch of the change: ordinals count from its first step.
            begun: `(G,)` the pass that each group stands in; None where it has no units.
        """
        # What has been computed of quotas is the same for both.
        draws = copy.copy(self)
        draws._starts = list(self.totals.before(first_epoch))
        draws.rotations = [self._rotation(number, one) for number, one in enumerate(begun)]
        return draws

    def _rotation(self, number: int, begun: PassBegun | None = None) -> Rotation:
        """Decide whose turn it is in a group."""
        group = self._members[number]
        size = max(1, group.size)
        spacing = spacing_for(size, self._windows.of(number, group.size))
        if begun is not None and 0 < begun.owed < size and self._windows.are_passes(number, size):
            # An epoch, which was one pass, is now the end of one and the beginning of another.
            spacing = split_spacing(size, size - begun.owed)
        lead = number * BLOCK_PLACES // len(self._members)
        return make_rotation(group, seed=self._seed, spacing=spacing, lead=lead, begun=begun)

    def _since_start(self, before: list[int]) -> list[int]:
        """Count draws from the change of plan on, where there was one."""
        return [count - start for count, start in zip(before, self._starts, strict=True)]

    def _counts(self, epoch: int, step: int) -> tuple[list[int], list[int]]:
        """Give each group's ordinal at the start of a step, and its draws in it."""
        base, walk, last = self._epoch(epoch)
        if last and step == self.shape(epoch).num_steps - 1:
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
        shape, seed = self.shape(epoch), self._seed
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
        """Give the epoch's keyed class order; the strata of a class stay together in it."""
        return self._keyed_order(range(len(self._members)), "classes", epoch)

    def _keyed_order(self, groups: Iterable[int], purpose: str, *parts: int) -> list[int]:
        """Order groups by keys of their labels, and those of one label by keys of their own."""

        def key(number: int) -> tuple[int, int]:
            label, name = self._label_of[number], self._members[number].label
            own = 0 if name == label else stream_key(self._seed, purpose, *parts, name)
            return stream_key(self._seed, purpose, *parts, label), own

        return sorted(groups, key=key)

    def _totals(self, table: ClassTable) -> Totals:
        """Schedule the totals of classes, and inside them those of their strata."""
        targets = self._targets
        labels = list(table.quota_sizes)
        keys = [stream_key(self._seed, "totals", label) for label in labels]
        ranking = sorted(range(len(keys)), key=keys.__getitem__)
        tie_order = np.argsort(ranking).tolist()
        whole: Totals
        if targets.settled_epoch:
            whole = WalkedTotals(targets.label_draws, tie_order=tie_order)
        else:
            whole = EpochTotals(targets.label_draws(0), tie_order=tie_order)
        if not table.has_strata:
            return whole
        tie_orders = []
        for number in range(len(labels)):
            mine = [place for place, owner in enumerate(table.groups) if owner == number]
            ranked = self._keyed_order(mine, "strata")
            tie_orders.append([ranked.index(place) for place in mine])
        return JointTotals(whole, inside=targets.inside, tie_orders=tie_orders)


# Draws in passes: what a change of plan can go on with.
TurnedDraws = QuotaDraws | ClassTurns


def used_members(table: ClassTable, strategy: Strategy, seed: int) -> tuple[ClassMembers, ...]:
    """Give the units the strategy uses: all of them, or one fixed subset with its strata."""
    if not isinstance(strategy, Downsample) or strategy.rotate:
        return table.members
    kept = strategy.resampled(table.sizes)
    used, inside = list(table.members), shares_inside(table, table.members, strategy)
    for number, label in enumerate(table.classes):
        mine = [place for place, owner in enumerate(table.groups) if owner == number]
        if not any(table.members[place].size for place in mine):
            continue
        counts = apportion(inside[number], kept[str(label)])
        for place, count in zip(mine, counts.tolist(), strict=True):
            used[place] = fixed_subset(table.members[place], count, seed=seed)
    return tuple(used)


def make_draws(
    table: ClassTable,
    strategy: Strategy,
    *,
    seed: int,
    global_batch_size: int,
    weights: NDArray[np.float64] | None = None,
) -> Draws:
    """Choose how a strategy draws.

    Args:
        table: who belongs to which class.
        strategy: says how samples are drawn, and which of them.
        seed: the run's seed.
        global_batch_size: samples in a global batch.
        weights: `(N,)` weight of every sample, for `sample_weights` by the name of a column.

    Returns:
        What a plan asks for its batches.

    Raises:
        ConfigError: the strategy cannot be met with these classes and this batch.
    """
    if strategy.draws_units:
        return _by_weight(table, strategy, weights, seed=seed, batch_size=global_batch_size)
    members = used_members(table, strategy, seed)
    targets = EpochTargets(table, members, strategy, global_batch_size=global_batch_size)
    if isinstance(strategy, ClassesBySamples):
        return _in_turn(table, strategy, seed=seed, shape=targets.shape(0))
    if strategy.draw == "iid":
        return IndependentDraws(members, num_samples=table.num_samples, seed=seed, targets=targets)
    return QuotaDraws(table, members, strategy=strategy, seed=seed, targets=targets)


def _in_turn(
    table: ClassTable, strategy: ClassesBySamples, *, seed: int, shape: EpochShape
) -> ClassTurns:
    """Draw P classes and M units of each."""
    present = sum(group.size > 0 for group in table.members)
    if strategy.batch_size != shape.batch_size:
        raise ConfigError(
            f"p_k: P x M is {strategy.P} x {strategy.M} = {strategy.batch_size}, but "
            f"global_batch_size is {shape.batch_size}; make them equal."
        )
    if int(strategy.P or 0) > present:
        raise ConfigError(
            f"p_k: P is {strategy.P}, but only {present} classes have samples; use P <= {present}."
        )
    return ClassTurns(
        table.members,
        num_samples=table.num_samples,
        seed=seed,
        shape=shape,
        classes_per_batch=int(strategy.P or 0),
        units_per_class=int(strategy.M or 0),
    )


def _by_weight(
    table: ClassTable,
    strategy: Strategy,
    weights: NDArray[np.float64] | None,
    *,
    seed: int,
    batch_size: int,
) -> SystematicDraws:
    """Draw by a weight per sample."""
    lengths = unit_weights(table, strategy, weights)
    included = np.concatenate(
        [group.pick_first(np.arange(group.size, dtype=np.int64)) for group in table.members]
    )
    total = math.fsum(lengths[included].tolist())
    if not total:
        raise ConfigError(f"{strategy.name}: all weights are 0; nothing could be drawn.")
    exact_length = isinstance(strategy, RepeatFactor)
    if exact_length and strategy.last == "short":
        shape = None
    else:
        length = math.ceil(total) if exact_length else strategy.target(table.quota_sizes).num_draws
        if exact_length and strategy.last == "drop":
            length = math.floor(total)
        target = Target(shares=(Fraction(1),), num_draws=length)
        shape = EpochShape(target, strategy, global_batch_size=batch_size)
    return SystematicDraws(
        table.members,
        weights=lengths,
        num_samples=table.num_samples,
        seed=seed,
        shape=shape,
        batch_size=batch_size,
    )
