"""From one plan to the next: who is still owed a turn where a run changes its plan.

Units are found again by their names, whatever group of their class they stand in now. Those who
had no turn in the pass that the old plan began come first, in the old order; newcomers join in the
new plan's own passes, and whoever has left is not waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ResumeError
from streaming_balance.plan.carried_rotation import ListedPass, PassBegun, SamePass
from streaming_balance.plan.draws import Draws, TurnedDraws
from streaming_balance.plan.members import ClassMembers, ClassTable
from streaming_balance.plan.permutation import EXACT_LIMIT
from streaming_balance.plan.strategy import Strategy

UNITS_SHOWN = 5
WAY_OUT = "or start a new run, whose counts begin at 0."


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two plans of a change."""

    draws: Draws
    """Its draws."""
    table: ClassTable
    """Who belongs to which class."""
    strategy: Strategy
    """What shares it asks for."""
    named_by: str
    """What tells its units apart: `patient ids`, `sample keys` or `sample numbers`."""

    @property
    def unit(self) -> str:
        """What its classes cycle over: `patient` or `sample`."""
        return "patient" if self.table.by_patient else "sample"

    @property
    def class_names(self) -> list[str]:
        """`(G,)` the class that each group is part of."""
        names = list(self.table.quota_sizes)
        return [names[number] for number in self.table.groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """Where the units of an old plan's groups stand in a new plan."""

    same: dict[int, int]
    """New group -> the old group of the same name that has the same units in the same order."""
    found: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Any other old group, in order -> `(n,)` new group of each unit, -1 for none, and `(n,)` its
    number there."""


def carried_draws(old: Side, new: Side, *, epoch: int, step: int) -> TurnedDraws:
    """Give the draws of a new plan that goes on where an old one was left.

    Args:
        old: the plan that was left.
        new: the plan that goes on.
        epoch: where the old plan was left; the new one begins with the first step of this epoch.
        step: where the old plan was left: the first batch that was not delivered.

    Returns:
        The new plan's draws, after those who are owed a turn.

    Raises:
        ResumeError: a plan does not draw in passes, the unit or the class of a unit differs, or
            units cannot be found again.
    """
    before, after = _in_passes(old, "old"), _in_passes(new, "new")
    _check_units(old, new)
    by_number = new.named_by == "sample numbers" or old.table.digest == new.table.digest
    if not by_number:
        _check_names_kept(old, new)
    everybody = match_units(old.table.members, new.table.members, by_number=by_number)
    _check_classes(old, new, everybody, by_number=by_number)
    uses_all = old.draws.members is old.table.members and new.draws.members is new.table.members
    matches = (
        everybody if uses_all else match_units(before.members, after.members, by_number=by_number)
    )
    begun = passes_begun(before, after.members, matches, before.ordinals(epoch, step))
    return after.carried(epoch, begun)


def match_units(
    old: Sequence[ClassMembers], new: Sequence[ClassMembers], *, by_number: bool
) -> Matches:
    """Find the units of old groups in new ones.

    Args:
        old: `(G,)` the units of each group.
        new: `(H,)` the units of each group.
        by_number: whether a unit is told by the number of its first sample; else by its name.
    """
    by_label = {group.label: number for number, group in enumerate(old)}
    same = {
        number: by_label[group.label]
        for number, group in enumerate(new)
        if group.label in by_label and _are_same(old[by_label[group.label]], group, by_number)
    }
    others = [number for number in range(len(new)) if number not in same and new[number].size]
    names = [_names(new[number], by_number) for number in others]
    known = np.concatenate(names) if names else np.empty(0, dtype=np.int64)
    sizes = [len(part) for part in names]
    groups = np.repeat(np.array(others, dtype=np.int64), sizes)
    units = np.arange(len(known)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    order = np.argsort(known, kind="stable")
    found, kept = {}, set(same.values())
    for number, group in enumerate(old):
        if group.size and number not in kept:
            wanted = _names(group, by_number)
            new_groups = np.full(group.size, -1, dtype=np.int64)
            new_units = np.full(group.size, -1, dtype=np.int64)
            if len(known):
                nearest = np.searchsorted(known, wanted, sorter=order)
                places = order[np.minimum(nearest, len(known) - 1)]
                is_found = known[places] == wanted
                new_groups[is_found] = groups[places[is_found]]
                new_units[is_found] = units[places[is_found]]
            found[number] = new_groups, new_units
    return Matches(same=same, found=found)


def passes_begun(
    old: TurnedDraws, new: Sequence[ClassMembers], matches: Matches, ordinals: Sequence[int]
) -> list[PassBegun | None]:
    """Give the passes that a new plan finds begun.

    Args:
        old: the draws of the plan before.
        new: `(H,)` the units of each group that the new plan draws from.
        matches: where the old plan's units stand there.
        ordinals: `(G,)` draws of each old group.

    Returns:
        `(H,)` the pass of each group; None where it has no units. Where an old pass had just
        ended, nobody is owed a turn.
    """
    changed = {number: group for number, group in enumerate(new) if number not in matches.same}
    turns = {number: np.zeros(group.size, dtype=np.int64) for number, group in changed.items()}
    owed = {number: [np.empty(0, dtype=np.int64)] for number in changed}
    for number, (groups, units) in matches.found.items():
        rotation, ordinal = old.rotations[number], ordinals[number]
        place = rotation.place(ordinal)
        waiting, _ = rotation.take(ordinal, rotation.size - place if place else 0)
        had = rotation.turns_before(ordinal)
        for joined in np.unique(groups[groups >= 0]).tolist():
            is_here = groups == joined
            turns[joined][units[is_here]] = had[is_here]
            owed[joined].append(units[waiting[is_here[waiting]]])
    begun: list[PassBegun | None] = []
    for number, group in enumerate(new):
        if number in matches.same:
            before = matches.same[number]
            begun.append(SamePass(old.rotations[before], ordinals[before]))
        elif group.size:
            begun.append(ListedPass(np.concatenate(owed[number]), turns[number]))
        else:
            begun.append(None)
    return begun


def _names(group: ClassMembers, by_number: bool) -> NDArray[np.generic]:
    """Give what tells the units of a group apart: `(n,)`."""
    if by_number or group.names is None:
        return group.pick_first(np.arange(group.size, dtype=np.int64))
    return group.names


def _are_same(old: ClassMembers, new: ClassMembers, by_number: bool) -> bool:
    """Say whether two groups have the same units in the same order, and any at all."""
    if old.size != new.size or not new.size:
        return False
    if by_number and old.samples is None and new.samples is None:
        return old.first == new.first
    return bool(np.array_equal(_names(old, by_number), _names(new, by_number)))


def _in_passes(side: Side, which: str) -> TurnedDraws:
    """Give the draws of a plan that draws in passes."""
    if isinstance(side.draws, TurnedDraws):
        return side.draws
    strategy = side.strategy
    found = strategy.name if strategy.draws_units else f"{strategy.name} with draw: {strategy.draw}"
    raise ResumeError(
        f"balance: the {which} plan is {found}, which draws at random and not in passes, so that "
        f"nobody is owed a turn; exposure is carried over between plans that draw in passes. Use "
        f"a strategy that gives shares to classes on both sides, {WAY_OUT}"
    )


def _check_units(old: Side, new: Side) -> None:
    """Refuse to go on with other units, or with units that have other names."""
    if old.unit != new.unit:
        raise ResumeError(
            f"unit: the old plan cycles over {old.unit}s, the new one over {new.unit}s; exposure "
            f"is carried over between plans of one unit. Set unit: {old.unit}, {WAY_OUT}"
        )
    if old.named_by != new.named_by:
        raise ResumeError(
            f"the old plan tells {old.unit}s apart by {old.named_by}, the new one by "
            f"{new.named_by}, so that nobody can be found again. Build both plans the same way, "
            f"{WAY_OUT}"
        )


def _check_names_kept(old: Side, new: Side) -> None:
    """Refuse to look for units in a changed table where plans do not hold their names."""
    for which, side in (("old", old), ("new", new)):
        for name, group in zip(side.class_names, side.table.members, strict=True):
            if group.size and group.names is None:
                raise ResumeError(
                    f"class {name!r} has {group.size} {side.unit}s together in "
                    f"the {which} plan, and a plan holds names of up to {EXACT_LIMIT}: in a table "
                    f"that changed they cannot be found again. Keep samples, labels, strata and "
                    f"exclude as they are, {WAY_OUT}"
                )


def _check_classes(old: Side, new: Side, matches: Matches, *, by_number: bool) -> None:
    """Refuse units that have changed their class."""
    torn, count = [], 0
    labels, labels_now = old.class_names, new.class_names
    for number, (groups, _) in matches.found.items():
        for joined in np.unique(groups[groups >= 0]).tolist():
            label, now = labels[number], labels_now[joined]
            if now != label:
                names = _names(old.table.members[number], by_number)[groups == joined]
                torn += [
                    f"{name!r} from {label!r} to {now!r}" for name in names[:UNITS_SHOWN].tolist()
                ]
                count += len(names)
    if torn:
        more = ", ..." if count > UNITS_SHOWN else ""
        raise ResumeError(
            f"label: {count} {old.unit}s have changed their class, {', '.join(torn[:UNITS_SHOWN])}"
            f"{more}; turns are carried over within a class. Keep the labels of the old plan, "
            f"{WAY_OUT}"
        )
