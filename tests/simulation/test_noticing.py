"""What the simulator is for: each of these faults, put into the package, is noticed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.errors import BalanceError
from streaming_balance.plan import ranks
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.reserve import reserve as sound_reserve
from streaming_balance.training import state as states
from streaming_balance.training.course import Course, Past
from streaming_balance.training.quarantine import Quarantine
from streaming_balance.training.records import Recorders, Substitution
from streaming_balance.training.requests import BatchRequest
from streaming_balance.training.state import LoaderState, Position
from tests.simulation.cluster import Tally, check

# A line tracer makes thousands of cases three times as slow; smaller tests run the same lines.
pytestmark = pytest.mark.no_cover

# Faults that need a rare constellation show up in one case in twenty.
MOST_CASES = 150
Patch = pytest.MonkeyPatch
FAULTS: dict[str, Callable[[Patch], None]] = {}


def fault(break_it: Callable[[Patch], None]) -> Callable[[Patch], None]:
    """Add a fault to the list, by its name."""
    FAULTS[break_it.__name__] = break_it
    return break_it


@fault
def the_last_batch_of_an_epoch_is_left_out(patch: Patch) -> None:
    def after(self: Course, position: Position) -> Position:
        if position.step + 2 < self.plan.num_steps(position.epoch):
            return Position(position.epoch, position.step + 1)
        return Position(position.epoch + 1, 0)

    patch.setattr(Course, "after", after)


@fault
def prefetched_batches_count_as_delivered(patch: Patch) -> None:
    sound = Course.request

    def request(self: Course, position: Position) -> BatchRequest:
        self.position = max(self.position, position)
        return sound(self, position)

    patch.setattr(Course, "request", request)


@fault
def records_of_prefetched_batches_are_kept(patch: Patch) -> None:
    sound = Quarantine.settled
    made: list[Substitution] = []

    def settled(self: Quarantine, request: BatchRequest) -> BatchRequest:
        request = sound(self, request)
        made.extend(request.substitutions)
        return request

    def advance(self: Course, position: Position, _: Iterable[Substitution] = ()) -> None:
        self._records.extend(made)
        made.clear()
        self.position = position

    patch.setattr(Quarantine, "settled", settled)
    patch.setattr(Course, "advance", advance)


@fault
def jumps_are_forgotten(patch: Patch) -> None:
    def jump(self: Course, target: Position) -> None:
        self.position = target

    patch.setattr(Course, "jump", jump)


@fault
def jumps_without_a_batch_between_them_stay_several(patch: Patch) -> None:
    def jump(self: Course, target: Position) -> None:
        self._skipped = (*self._skipped, (self.position, target))
        self.position = target

    patch.setattr(Course, "jump", jump)


@fault
def jumps_are_lost_when_a_state_is_loaded(patch: Patch) -> None:
    sound = Course.resume

    def resume(self: Course, saved: LoaderState, *, plan: BalancedPlan) -> None:
        sound(self, replace(saved, skipped=()), plan=plan)

    patch.setattr(Course, "resume", resume)


@fault
def records_are_lost_when_a_state_is_loaded(patch: Patch) -> None:
    sound = Course.resume

    def resume(self: Course, saved: LoaderState, *, plan: BalancedPlan) -> None:
        sound(self, replace(saved, substitutions=()), plan=plan)

    patch.setattr(Course, "resume", resume)


@fault
def what_was_incomplete_is_forgotten_when_a_state_is_loaded(patch: Patch) -> None:
    sound = Course.resume

    def resume(self: Course, saved: LoaderState, *, plan: BalancedPlan) -> None:
        sound(self, saved, plan=plan)
        self._past = replace(self._past, complete=True)

    patch.setattr(Course, "resume", resume)


@fault
def a_state_of_one_rank_passes_for_that_of_all(patch: Patch) -> None:
    patch.setattr(Recorders, "of", lambda _ranks, num_ranks: None)  # noqa: ARG005


@fault
def merging_keeps_the_records_of_the_first_rank_only(patch: Patch) -> None:
    def united(records: Iterable[Iterable[Substitution]]) -> tuple[Substitution, ...]:
        return tuple(sorted(next(iter(records))))

    patch.setattr("streaming_balance.training.merging.united", united)


@fault
def merging_counts_what_all_ranks_loaded_once_for_each(patch: Patch) -> None:
    def united(records: Iterable[Iterable[Substitution]]) -> tuple[Substitution, ...]:
        return tuple(sorted(one for rank in records for one in rank))

    patch.setattr("streaming_balance.training.merging.united", united)


@fault
def merging_takes_a_batch_delivered_twice_for_one(patch: Patch) -> None:
    def united(records: Iterable[Iterable[Substitution]]) -> tuple[Substitution, ...]:
        return tuple(sorted({one for rank in records for one in rank}))

    patch.setattr("streaming_balance.training.merging.united", united)


@fault
def two_slots_of_a_class_share_a_candidate(patch: Patch) -> None:
    def reserve(members: Any, batch: NDArray[np.int64], **place: int) -> NDArray[np.int64]:
        waiting = sound_reserve(members, batch, **place)
        return np.repeat(waiting, 2)[: len(waiting)]

    patch.setattr("streaming_balance.plan.steps.reserve", reserve)


@fault
def the_reserve_holds_those_who_are_in_the_batch(patch: Patch) -> None:
    def reserve(members: Any, batch: NDArray[np.int64], **place: int) -> NDArray[np.int64]:
        return sound_reserve(members, batch[:0], **place)

    patch.setattr("streaming_balance.plan.steps.reserve", reserve)


@fault
def who_stands_in_depends_on_who_knows_of_the_damage(patch: Patch) -> None:
    sound = Quarantine._substitution

    def chosen(self: Quarantine, request: BatchRequest, place: int, sample: int) -> Substitution:
        record = sound(self, request, place, sample)
        others = self._candidates(record.epoch, record.step, record.slot).tolist()
        known = len(self._damaged)
        if known > 1 and len(others) > 1:
            record = replace(record, substitute=others[known % len(others)])
        return record

    patch.setattr(Quarantine, "_substitution", chosen)


@fault
def a_stand_in_that_is_damaged_too_is_recorded_as_the_damaged_one(patch: Patch) -> None:
    sound = Quarantine.settled

    def settled(self: Quarantine, request: BatchRequest) -> BatchRequest:
        again = sound(self, replace(request, substitutions=()))
        return replace(again, substitutions=again.substitutions or request.substitutions)

    patch.setattr(Quarantine, "settled", settled)


@fault
def the_members_of_a_batch_depend_on_the_number_of_ranks(patch: Patch) -> None:
    sound = Course.request

    def request(self: Course, position: Position) -> BatchRequest:
        asked = sound(self, position)
        members = np.roll(self.plan.batch(position.epoch, position.step), self.num_ranks - 1)
        return replace(asked, samples=members[asked.slots])

    patch.setattr(Course, "request", request)


@fault
def the_rest_of_a_batch_that_ranks_do_not_divide_is_dropped(patch: Patch) -> None:
    sound = ranks.rank_slots

    def rank_slots(size: int, *, rank: int, num_ranks: int, key: int) -> NDArray[np.int64]:
        return sound(size - size % num_ranks, rank=rank, num_ranks=num_ranks, key=key)

    patch.setattr("streaming_balance.plan.steps.rank_slots", rank_slots)


@fault
def ranks_get_neighbouring_slots_instead_of_their_share_of_every_class(patch: Patch) -> None:
    def rank_slots(size: int, *, rank: int, num_ranks: int, key: int) -> NDArray[np.int64]:
        return np.array_split(np.arange(size), num_ranks)[(rank + key) % num_ranks]

    patch.setattr("streaming_balance.plan.steps.rank_slots", rank_slots)


@fault
def the_audit_leaves_substitutions_out(patch: Patch) -> None:
    def delivered(plan: BalancedPlan, state: LoaderState) -> NDArray[np.int64]:
        return states.delivered(plan, replace(state, substitutions=()))

    patch.setattr("tests.simulation.witness.delivered", delivered)


@fault
def the_audit_adds_what_was_jumped_over(patch: Patch) -> None:
    def delivered(plan: BalancedPlan, state: LoaderState) -> NDArray[np.int64]:
        return states.delivered(plan, replace(state, skipped=()))

    patch.setattr("tests.simulation.witness.delivered", delivered)


@fault
def a_changed_plan_goes_on_at_the_step_of_the_old_one(patch: Patch) -> None:
    sound = Course.carry_over

    def carry_over(self: Course, saved: LoaderState, *, old: BalancedPlan) -> None:
        sound(self, saved, old=old)
        last = self.plan.num_steps(saved.position.epoch) - 1
        self.position = replace(saved.position, step=min(last, saved.position.step))

    patch.setattr(Course, "carry_over", carry_over)


@fault
def the_run_before_a_change_of_plan_is_forgotten_when_a_state_is_loaded(patch: Patch) -> None:
    sound = Course.resume

    def resume(self: Course, saved: LoaderState, *, plan: BalancedPlan) -> None:
        sound(self, saved, plan=plan)
        self._past = Past(substitutions=saved.substitutions, complete=self._past.complete)

    patch.setattr(Course, "resume", resume)


@fault
def every_record_makes_the_state_larger_than_it_needs_to_be(patch: Patch) -> None:
    sound = LoaderState.to_dict
    patch.setattr(LoaderState, "to_dict", lambda self: sound(self) | {"places": list(range(2000))})


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(monkeypatch: Patch, name: str) -> None:
    FAULTS[name](monkeypatch)
    seeds = iter(range(MOST_CASES))
    with pytest.raises((AssertionError, BalanceError)) as noticed:
        all(check(seed) for seed in seeds)
    assert re.fullmatch(
        r"This is seed (\d+)\. See it again: python tools/simulate\.py --seed \1",
        noticed.value.__notes__[-1],
    )
    assert next(seeds, MOST_CASES) == int(noticed.value.__notes__[-1].split()[-1]) + 1


def test_without_a_fault_the_same_cases_pass() -> None:
    assert sum((check(seed) for seed in range(10)), Tally())["cases"] == 10


def test_the_same_seed_tells_the_same_story() -> None:
    stories: list[list[str]] = [[], []]
    for story in stories:
        for seed in range(5):
            check(seed, story.append)
    assert stories[0] == stories[1]
    assert len(stories[0]) > 50
