"""First and last sightings: against looking through every batch of a run by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.errors import ResumeError
from streaming_balance.report.runs import placed_substitutions, stretches
from streaming_balance.report.sightings import first_places
from streaming_balance.training.records import Substitution
from streaming_balance.training.state import LoaderState, Position

Batches = list[tuple[tuple[int, ...], NDArray[np.int64]]]


@st.composite
def batches_and_wanted(draw: st.DrawFn) -> tuple[Batches, NDArray[np.bool_]]:
    """Some batches of numbers below n, -1 for nobody, and who is looked for."""
    count = draw(st.integers(1, 8))
    members = draw(st.lists(st.lists(st.integers(-1, count - 1), max_size=6), max_size=12))
    wanted = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    batches: Batches = [
        ((number % 2, number // 3, number), np.array(numbers, dtype=np.int64))
        for number, numbers in enumerate(members)
    ]
    return batches, np.array(wanted)


@given(batches_and_wanted())
def test_the_first_batch_with_somebody_is_found(
    case: tuple[Batches, NDArray[np.bool_]],
) -> None:
    batches, wanted = case
    expected = [
        next((list(place) for place, members in batches if number in members), [-1, -1, -1])
        if looked_for
        else [-1, -1, -1]
        for number, looked_for in enumerate(wanted.tolist())
    ]
    assert first_places(iter(batches), wanted).tolist() == expected


def test_no_batch_is_made_after_everybody_is_found() -> None:
    made = []

    def batches() -> Iterator[tuple[tuple[int, ...], NDArray[np.int64]]]:
        for step in range(10):
            made.append(step)
            yield (0, 0, step), np.array([step, -1, step])

    first_places(batches(), np.array([True, False, True, False]))
    assert made == [0, 1, 2]
    first_places(batches(), np.array([False, False]))
    assert made == [0, 1, 2]


def state(
    position: tuple[int, int],
    *,
    skipped: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = (),
    records: tuple[tuple[int, int, int], ...] = (),
) -> LoaderState:
    """A state at a position, with jumps, and records of (epoch, step, slot)."""
    return LoaderState(
        plan_digest="",
        settings={},
        shards_digest="",
        position=Position(*position),
        skipped=tuple((Position(*left), Position(*landed)) for left, landed in skipped),
        substitutions=tuple(
            Substitution(
                epoch=epoch, step=step, slot=slot, sample=0, substitute=number + 1, reason=""
            )
            for number, (epoch, step, slot) in enumerate(records)
        ),
    )


def test_stretches_begin_where_jumps_land_and_end_where_they_leave() -> None:
    jumped = state((4, 1), skipped=(((0, 2), (3, 0)), ((3, 0), (2, 0)), ((2, 5), (4, 0))))
    spans = [
        ((one.start.epoch, one.start.step), (one.stop.epoch, one.stop.step))
        for one in stretches(jumped)
    ]
    assert spans == [((0, 0), (0, 2)), ((3, 0), (3, 0)), ((2, 0), (2, 5)), ((4, 0), (4, 1))]


def test_a_record_belongs_to_the_one_delivery_of_its_batch() -> None:
    placed = placed_substitutions(state((2, 0), records=((1, 3, 0), (0, 1, 2), (1, 3, 1))))
    slots = {key: [record.slot for record in records] for key, records in placed.items()}
    assert slots == {(0, Position(1, 3)): [0, 1], (0, Position(0, 1)): [2]}


def test_records_of_a_batch_delivered_three_times_belong_to_its_last_deliveries() -> None:
    back = (((1, 0), (0, 0)), ((1, 0), (0, 0)))
    two = state((0, 3), skipped=back, records=((0, 2, 7), (0, 2, 7)))
    placed = placed_substitutions(two)
    assert {key: records[0].substitute for key, records in placed.items()} == {
        (1, Position(0, 2)): 1,
        (2, Position(0, 2)): 2,
    }
    # The last stretch ends before step 3: step 3 was delivered twice alone.
    other = placed_substitutions(state((0, 3), skipped=back, records=((0, 3, 7),)))
    assert list(other) == [(1, Position(0, 3))]


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        (((0, 5, 0),), "1 records name epoch 0, step 5, slot 0, a place that was delivered 0 "),
        (((0, 1, 0), (0, 1, 0)), "2 records .* delivered 1 times"),
    ],
)
def test_a_record_of_what_was_not_delivered_is_refused(
    records: tuple[tuple[int, int, int], ...], complaint: str
) -> None:
    with pytest.raises(ResumeError, match=complaint):
        placed_substitutions(state((0, 5), records=records))
