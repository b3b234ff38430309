"""When everybody was seen first and last: found by walking a run's batches from both ends.

No strategy needs a formula of its own for it, and jumps, substitutions and changes of plan are in
the batches that are walked. Each walk ends once everybody who was ever delivered is found: after a
pass or two of the slowest class, however long the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming_balance.report.runs import Run, delivered_batches
from streaming_balance.report.tallies import Tallies

NOWHERE = -1


@dataclass(frozen=True, slots=True, order=True)
class Sighting:
    """A batch in which somebody was seen."""

    leg: int
    """Number of the leg, from 0: epochs of two plans may have the same number."""
    epoch: int
    """Epoch of the batch."""
    step: int
    """Step of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sightings:
    """When everybody was seen, in the order of training; whoever never was has None."""

    first: Mapping[str, Sighting | None]
    """Who -> the batch in which they were seen first."""
    last: Mapping[str, Sighting | None]
    """Who -> the batch in which they were seen last."""


def patient_sightings(tallies: Tallies) -> Sightings:
    """Find the batches in which each patient was seen first and last.

    A partner in a mixed batch is a member of it, so mixing moves nothing.

    Args:
        tallies: what became of everybody in a run.

    Returns:
        By patient, everybody in the training splits of the run's legs.
    """
    delivered = tallies.by_patient("delivered") > 0
    return find_sightings(tallies.run, tallies.names, tallies.owners, delivered)


def find_sightings(
    run: Run,
    names: Sequence[str],
    owners: Sequence[NDArray[np.int64]],
    delivered: NDArray[np.bool_],
) -> Sightings:
    """Find the batches in which each of some was seen first and last.

    Args:
        run: a run, built again from its state.
        names: who they are.
        owners: per leg `(N,)` the number of whom each sample belongs to, -1 for nobody asked about.
        delivered: `(len(names),)` whether they were ever delivered.

    Returns:
        By name.
    """
    first = first_places(_walk(run, owners), delivered)
    last = first_places(_walk(run, owners, backward=True), delivered)
    return Sightings(first=_by_name(names, first), last=_by_name(names, last))


def first_places(
    batches: Iterable[tuple[tuple[int, ...], NDArray[np.int64]]], wanted: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Find for each number the first of some batches that holds it.

    Args:
        batches: (place, `(B,)` numbers) one after another; -1 is no number. Taken from only until
            all that are wanted are found.
        wanted: `(n,)` whether to look for a number.

    Returns:
        `(n, 3)` places; -1 where a number was not wanted or not found.

    Examples:
        >>> batches = [((0, 0, 0), np.array([2, 1])), ((0, 0, 1), np.array([1, -1]))]
        >>> first_places(batches, np.array([False, True, True])).tolist()
        [[-1, -1, -1], [0, 0, 0], [0, 0, 0]]
    """
    places = np.full((len(wanted), 3), NOWHERE, dtype=np.int64)
    # The last entry is what -1 looks up: nobody.
    missing = np.append(wanted, np.False_)
    left = int(missing.sum())
    upcoming = iter(batches)
    while left and (batch := next(upcoming, None)) is not None:
        place, numbers = batch
        found = np.unique(numbers[missing[numbers]])
        places[found] = place
        missing[found] = False
        left -= len(found)
    return places


def _walk(
    run: Run, owners: Sequence[NDArray[np.int64]], *, backward: bool = False
) -> Iterator[tuple[tuple[int, ...], NDArray[np.int64]]]:
    """Give all batches of a run as the numbers of whom their samples belong to."""
    numbered = list(enumerate(run.legs))
    for number, leg in reversed(numbered) if backward else numbered:
        for place, members in delivered_batches(leg, backward=backward):
            yield (number, place.epoch, place.step), owners[number][members]


def _by_name(names: Sequence[str], places: NDArray[np.int64]) -> dict[str, Sighting | None]:
    """Give places by name."""
    return {
        name: None if place[0] == NOWHERE else Sighting(*place)
        for name, place in zip(names, places.tolist(), strict=True)
    }
