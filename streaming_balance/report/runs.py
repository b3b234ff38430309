"""A run, built again from its state: the plan of each of its legs, and what was delivered by it.

A run has one leg, and one more for every time it was carried over to another plan. A leg is walked
in stretches: from where it started, or where a jump landed, to where the next jump left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ResumeError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.saved_states import SavedState, check_is_of_training
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.legs import plan_of
from streaming_balance.training.records import Substitution
from streaming_balance.training.state import LoaderState, Position

_AS_SAVED = "Use the state as the loader saved it."


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A run under one plan, and how far it came under it."""

    shards: ShardSet
    """The data set it was trained on."""
    split: str
    """The split it was trained on."""
    plan: BalancedPlan
    """The plan it followed."""
    saved: SavedState
    """Its state."""

    @property
    def state(self) -> LoaderState:
        """How far it came, what it jumped over, and who stood in for whom."""
        return self.saved.state


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run from its start to a state."""

    legs: tuple[Leg, ...]
    """Its legs, the first one first."""
    shards: ShardSet
    """The data set it is asked about: most often that of the last leg."""

    @property
    def last(self) -> Leg:
        """The leg it stands in."""
        return self.legs[-1]

    @property
    def state(self) -> LoaderState:
        """Where it stands."""
        return self.last.state


@dataclass(frozen=True, slots=True, order=True)
class Stretch:
    """Batches that were delivered one after another."""

    start: Position
    """The first batch."""
    stop: Position
    """The batch after the last one."""

    def __contains__(self, place: Position) -> bool:
        """Say whether a batch was delivered here."""
        return self.start <= place < self.stop


def rebuild_run(shards: ShardSet, saved: SavedState, *, tables: Sequence[ShardSet] = ()) -> Run:
    """Build the plans of a run again, and check that its state fits them.

    Args:
        shards: the data set the run is asked about.
        saved: the state of its training loader.
        tables: other data sets it was trained on, or their tables alone.

    Returns:
        The run, every leg with the plan that its state names.

    Raises:
        ResumeError: the state is one of an evaluation; belongs to a data set that is not given;
            its settings do not give the plan it names; or it names places that plan lacks.
    """
    check_is_of_training(saved.state)
    given = (shards, *tables)
    known = {one.digest: one for one in reversed(given)}
    parts = _parts(saved)
    for part in parts:
        if part.state.shards_digest not in known:
            raise _unknown_data_set(part.state.shards_digest, given)
    legs = (_rebuilt_leg(known[part.state.shards_digest], part, given) for part in parts)
    return Run(legs=tuple(legs), shards=shards)


def checked_leg(leg: Leg) -> Leg:
    """Give a leg back if its state stands, jumped and substituted only where its plan has batches.

    Raises:
        ResumeError: names what its plan does not have.
    """
    try:
        _check_places(leg)
    except (IndexError, OverflowError) as error:
        raise ResumeError(
            f"the state names a place that its plan does not have ({error}). {_AS_SAVED}"
        ) from error
    return leg


def stretches(state: LoaderState) -> tuple[Stretch, ...]:
    """Give what was delivered under a state's plan, in order.

    Examples:
        >>> state = LoaderState(plan_digest="", settings={}, shards_digest="",
        ...     position=Position(4, 1), skipped=((Position(0, 2), Position(3, 0)),))
        >>> for stretch in stretches(state):
        ...     print(stretch)
        Stretch(start=Position(epoch=0, step=0), stop=Position(epoch=0, step=2))
        Stretch(start=Position(epoch=3, step=0), stop=Position(epoch=4, step=1))
    """
    before = state.carried_from
    first = Position(0 if before is None else before.state.position.epoch, 0)
    starts = (first, *(landed for _, landed in state.skipped))
    stops = (*(left for left, _ in state.skipped), state.position)
    return tuple(map(Stretch, starts, stops))


def delivered_batches(
    leg: Leg, *, backward: bool = False
) -> Iterator[tuple[Position, NDArray[np.int64]]]:
    """Give every global batch of a leg as it was delivered, those who stood in for others included.

    Args:
        leg: a leg of a run.
        backward: the last batch first.

    Returns:
        Place and `(B,)` sample numbers of each batch, in the order of training or against it.
    """
    swaps = placed_substitutions(leg.state)
    walked = list(enumerate(stretches(leg.state)))
    for number, stretch in reversed(walked) if backward else walked:
        for place in _places(leg.plan, stretch, backward=backward):
            members = leg.plan.batch(place.epoch, place.step)
            records = swaps.get((number, place), ())
            if records:
                members = members.copy()
            for record in records:
                members[record.slot] = record.substitute
            yield place, members


def count_batches(leg: Leg) -> int:
    """Count the global batches that were delivered under a leg's plan."""
    return sum(
        stop - first
        for stretch in stretches(leg.state)
        for _, first, stop in _epochs_of(leg.plan, stretch)
    )


def placed_substitutions(
    state: LoaderState,
) -> Mapping[tuple[int, Position], Sequence[Substitution]]:
    """Say in which delivery of its batch each substitution took place.

    A batch is delivered twice where `set_epoch` went back. A sample that was sound the first time
    and damaged the second has one record: damage stays, so records belong to the last deliveries.

    Returns:
        (number of the stretch, place) -> its records.

    Raises:
        ResumeError: a record is of a batch that was not delivered, or not so often.
    """
    walked = stretches(state)
    by_slot: dict[tuple[Position, int], list[Substitution]] = defaultdict(list)
    for record in state.substitutions:
        by_slot[Position(record.epoch, record.step), record.slot].append(record)
    placed: dict[tuple[int, Position], list[Substitution]] = defaultdict(list)
    for (place, slot), records in by_slot.items():
        through = [number for number, stretch in enumerate(walked) if place in stretch]
        if len(records) > len(through):
            raise ResumeError(
                f"substitutions: {len(records)} records name epoch {place.epoch}, step "
                f"{place.step}, slot {slot}, a place that was delivered {len(through)} times. "
                f"{_AS_SAVED}"
            )
        for number, record in zip(through[-len(records) :], records, strict=True):
            placed[number, place].append(record)
    return placed


def _parts(saved: SavedState) -> list[SavedState]:
    """Take the states of all legs out of the last one, the first leg first."""
    parts = [saved]
    while (before := parts[-1].state.carried_from) is not None:
        parts.append(SavedState.of(before.state))
    return parts[::-1]


def _unknown_data_set(wanted: str, given: Sequence[ShardSet]) -> ResumeError:
    """Say which data set is missing, and how to give it."""
    found = "; ".join(f"{one.path} is {one.digest}" for one in given)
    return ResumeError(
        f"the state belongs to the data set {wanted}, but {found}. Give the folder the run was "
        f"trained on. If that was packed anew since, give what is left of it, manifest.json and "
        f"samples.arrow, too: --table FOLDER."
    )


def _rebuilt_leg(shards: ShardSet, saved: SavedState, given: Sequence[ShardSet]) -> Leg:
    """Build a leg's plan again, and check that its state fits it."""
    plan, split = plan_of(saved.state, given), str(saved.state.settings["split"])
    return checked_leg(Leg(shards=shards, split=split, plan=plan, saved=saved))


def _check_places(leg: Leg) -> None:
    """Refuse a state that stands, jumped or substituted where its plan has no batch."""
    plan = leg.plan
    for stretch in stretches(leg.state):
        for place in (stretch.start, stretch.stop):
            if place.step > plan.num_steps(place.epoch):
                raise IndexError(f"epoch {place.epoch} has no step {place.step}")
        if stretch.start > stretch.stop:
            raise ResumeError(
                f"skipped: the state goes from epoch {stretch.start.epoch}, step "
                f"{stretch.start.step} back to epoch {stretch.stop.epoch}, step "
                f"{stretch.stop.step} without a jump. {_AS_SAVED}"
            )
    for (_, place), records in placed_substitutions(leg.state).items():
        members = plan.batch(place.epoch, place.step)
        for record in records:
            if record.substitute >= plan.num_samples:
                raise IndexError(f"sample {record.substitute} of {plan.num_samples}")
            if members[record.slot] != record.sample:
                raise ResumeError(
                    f"substitutions: a record has sample {record.sample} at epoch {place.epoch}, "
                    f"step {place.step}, slot {record.slot}, where the plan has "
                    f"{members[record.slot]}. {_AS_SAVED}"
                )


def _places(plan: BalancedPlan, stretch: Stretch, *, backward: bool) -> Iterator[Position]:
    """Give the batches of a stretch one by one."""
    for epoch, first, stop in _epochs_of(plan, stretch, backward=backward):
        steps = range(first, stop)
        for step in reversed(steps) if backward else steps:
            yield Position(epoch, step)


def _epochs_of(
    plan: BalancedPlan, stretch: Stretch, *, backward: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Divide a stretch into epochs: (epoch, first step, step after the last)."""
    start, stop = stretch.start, stretch.stop
    epochs = range(start.epoch, stop.epoch + 1)
    for epoch in reversed(epochs) if backward else epochs:
        first = start.step if epoch == start.epoch else 0
        yield epoch, first, stop.step if epoch == stop.epoch else plan.num_steps(epoch)
