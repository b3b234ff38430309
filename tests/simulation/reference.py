"""What one process that nothing ever stops receives: the plan walked straight, written anew.

Neither courses nor quarantines nor states are used here. Who stands in for a damaged sample
follows the rule alone: the reserve of a class is its patients that are not in the batch, in keyed
order, and the i-th of its q slots tries the places i, i + q, i + 2q, ... until one is sound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan
from tests.simulation.cases import Recipe, Table, cells_of

Place = tuple[int, int]
Record = tuple[int, int, int, int, int]
"""Epoch, step, slot, sample, substitute."""
NOBODY = -1


def expect(found: object, wanted: object, what: str) -> None:
    """Compare what there is with what there should be."""
    if found != wanted:
        raise AssertionError(f"{what}: found {found}, expected {wanted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """What a global batch should be."""

    place: Place
    """Epoch and step."""
    planned: tuple[int, ...]
    """Sample number in each slot."""
    delivered: tuple[int, ...]
    """Who is delivered there; `NOBODY` where nobody is left to stand in."""

    def records(self, slots: Collection[int]) -> list[Record]:
        """Say who stands in for whom in some of the slots."""
        return [
            (*self.place, slot, self.planned[slot], self.delivered[slot])
            for slot in slots
            if self.planned[slot] != self.delivered[slot]
        ]


class Reference:
    """The uninterrupted run of a training program, from where a plan took over.

    Args:
        table: the data set.
        recipe: what the plan is made from.
        plan: the plan, built for this reference alone.
        damaged: samples that cannot be read.
        jumps: batches received -> epochs that the program then jumps to.
        start: batches received under plans before, and how many of the jumps that are due there
            have been made.
    """

    def __init__(
        self,
        table: Table,
        recipe: Recipe,
        plan: BalancedPlan,
        *,
        damaged: frozenset[int],
        jumps: Mapping[int, tuple[int, ...]],
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.recipe, self.plan, self.start = recipe, plan, start[0]
        self.table, self.cells = table, cells_of(table, recipe)
        self._damaged, self._jumps, self._jumped = damaged, jumps, start[1]
        self._places: list[Place] = []
        self._batches: dict[Place, GlobalBatch] = {}
        names = table.owners if plan.unit == "patient" else table.keys("train")
        self._units: list[str] = names.tolist()
        is_in = (~np.isin(table.owners, recipe.exclude)).tolist()
        owners: list[str] = table.owners.tolist()
        units = set(compress(zip(self.cells, self._units, owners, strict=True), is_in))
        self._cell_owners = Counter((cell, owner) for cell, _, owner in units)

    def place(self, received: int, jumped: int | None = None) -> Place:
        """Say which batch comes after so many, with all the jumps due there made, or some."""
        if jumped is not None:
            return self._jump(self._arrival(received), received, jumped)
        while len(self._places) <= received - self.start:
            here = self.start + len(self._places)
            self._places.append(self._jump(self._arrival(here), here, None))
        return self._places[received - self.start]

    def skipped(self, received: int, jumped: int) -> list[tuple[Place, Place]]:
        """List what was jumped over until then: from the batch that was due to the one that came.

        All jumps without a batch between them are one, and those that come back are none.
        """
        moments = [(number, None) for number in range(self.start, received)]
        spans = [
            (self._arrival(number), self.place(number, done))
            for number, done in (*moments, (received, jumped))
        ]
        return [(due, came) for due, came in spans if due != came]

    def batch(self, number: int) -> GlobalBatch:
        """Give what the batch after so many should be."""
        place = self.place(number)
        if place not in self._batches:
            planned = tuple(self.plan.batch(*place).tolist())
            delivered = list(planned)
            hit = [slot for slot, sample in enumerate(planned) if sample in self._damaged]
            if hit:
                for slot, substitute in self._stand_ins(place, planned, hit).items():
                    delivered[slot] = substitute
            self._batches[place] = GlobalBatch(
                place=place, planned=planned, delivered=tuple(delivered)
            )
        return self._batches[place]

    def counts(self, delivered: Sequence[int]) -> NDArray[np.int64]:
        """Count how often each sample is among these."""
        return np.bincount(np.array(delivered, dtype=np.int64), minlength=len(self.cells))

    def _arrival(self, received: int) -> Place:
        """Give the place after so many batches, before the jumps that are due there."""
        if received == self.start:
            return (self.plan.first_epoch, 0)
        epoch, step = self.place(received - 1)
        return (epoch, step + 1) if step + 1 < self.plan.num_steps(epoch) else (epoch + 1, 0)

    def _jump(self, place: Place, received: int, jumped: int | None) -> Place:
        """Make the jumps that are due after so many batches, from the first up to `jumped`."""
        done = self._jumped if received == self.start else 0
        for target in self._jumps.get(received, ())[done:jumped]:
            epoch = max(target, self.plan.first_epoch)
            # Naming the epoch that runs keeps the place in it.
            if epoch != place[0]:
                place = (epoch, 0)
        return place

    def _stand_ins(self, place: Place, planned: tuple[int, ...], hit: list[int]) -> dict[int, int]:
        """Choose who stands in at each slot whose sample is damaged, and check the choice."""
        stand_ins: dict[int, int] = {}
        seen: set[int] = set()
        for slot in hit:
            cell = self.cells[planned[slot]]
            slots = [other for other, sample in enumerate(planned) if self.cells[sample] == cell]
            candidates = self.plan.substitutes(*place, slot).tolist()
            units = {self._units[sample] for sample in candidates}
            what = f"candidates {candidates} of slot {slot} at {place}"
            expect(
                {self.cells[sample] for sample in candidates} - {cell}, set(), f"cells of {what}"
            )
            owners = {self.table.owners[sample] for sample in candidates}
            present = {self.table.owners[sample] for sample in planned}
            expect(owners & present, set(), f"patients in the batch, of {what}")
            expect(len(units), len(candidates), f"units among {what}")
            expect(seen & set(candidates), set(), f"of another slot, too, among {what}")
            seen |= set(candidates)
            self._check_count(cell, len(candidates), slots.index(slot), slots, planned)
            sound = [sample for sample in candidates if sample not in self._damaged]
            stand_ins[slot] = sound[0] if sound else NOBODY
        return stand_ins

    def _check_count(
        self, cell: str, count: int, turn: int, slots: list[int], planned: tuple[int, ...]
    ) -> None:
        """Check that every q-th of those whose patient is not in the batch is a candidate."""
        if self.recipe.balance.get("rotate") is False:
            return  # Only a fixed subset of the class may ever be delivered.
        present = {self.table.owners[sample] for sample in planned}
        waiting = sum(
            units
            for (owner_cell, owner), units in self._cell_owners.items()
            if owner_cell == cell and owner not in present
        )
        wanted = len(range(turn, waiting, len(slots)))
        expect(count, wanted, f"candidates for slot {turn} of {len(slots)} where {waiting} wait")
