"""Who looks at all that a simulated cluster does, and compares it with the uninterrupted run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.training.legs import plan_of
from streaming_balance.training.merging import merge_states
from streaming_balance.training.requests import BatchRequest
from streaming_balance.training.state import LoaderState, delivered, stretches
from tests.simulation.cases import Case, Leg
from tests.simulation.reference import NOBODY, GlobalBatch, Record, Reference, expect

STATE_BYTES = 4096
# What a state may have as much of as it needs, and what holds the state of a run before.
GROWING = {"settings", "skipped", "substitutions", "carried_from"}
OF_A_RANK = {"substitutions", "recorders"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A saved state, and what must be true of it."""

    text: str
    """The state as JSON: all that a start of the job is given."""
    received: int
    """Batches received, as the training program keeps it."""
    jumped: int
    """Jumps made since the last of them."""
    reference: Reference
    """The uninterrupted run under the state's plan."""
    records: Counter[Record]
    """Substitutions that it should hold."""
    missing: Counter[Record]
    """Substitutions that happened and that it cannot hold: their ranks were not asked."""
    is_complete: bool
    """Whether no rank was left out, ever."""

    def __str__(self) -> str:
        return f"from the state after {self.received} batches and {self.jumped} jumps"


class Witness:
    """Checks what the ranks of one leg receive and save.

    Args:
        case: what is simulated.
        leg: the start of the job.
        reference: the uninterrupted run.
        start: where the job started; None: at the beginning.
    """

    def __init__(
        self, case: Case, leg: Leg, reference: Reference, start: Checkpoint | None
    ) -> None:
        self._case, self._leg, self._reference = case, leg, reference
        self._goes_on = start is not None and start.reference is reference
        self._start = start
        self._records: dict[int, list[tuple[int, Record]]] = {}
        self._parts: dict[int, dict[int, list[int]]] = {}
        self._plan: BalancedPlan | None = None

    def receives(self, rank: int, number: int, request: BatchRequest) -> bool:
        """Check a rank's part of the batch after `number` others; say whether all have theirs."""
        batch = self._reference.batch(number)
        slots = request.slots.tolist()
        expect((request.epoch, request.step), batch.place, "place of a batch")
        wanted = [batch.delivered[slot] for slot in slots]
        expect(request.samples.tolist(), wanted, f"samples in slots {slots} of {batch.place}")
        expect(request.global_size, len(batch.planned), "size of the global batch")
        records = [
            (one.epoch, one.step, one.slot, one.sample, one.substitute)
            for one in request.substitutions
        ]
        expect(sorted(records), sorted(batch.records(slots)), f"records of {batch.place}")
        self._records.setdefault(rank, []).extend((number, record) for record in records)
        parts = self._parts.setdefault(number, {})
        parts[rank] = slots
        if len(parts) < self._leg.num_ranks:
            return False
        self._check_deal(batch, parts)
        return True

    def check_nobody_is_left(self, rank: int, number: int) -> None:
        """Check that a batch which could not be made has a slot that nobody is left for."""
        batch = self._reference.batch(number)
        plan = self._reference.plan
        slots = plan.rank_slots(*batch.place, rank=rank, num_ranks=self._leg.num_ranks)
        stand_ins = [batch.delivered[slot] for slot in slots.tolist()]
        expect(NOBODY in stand_ins, True, f"nobody left at {batch.place} among {stand_ins}")

    def saves(self, states: Mapping[int, LoaderState], received: int, jumped: int) -> Checkpoint:
        """Check the states that ranks gave after so many batches, and what is made of them."""
        saved = [self._through_text(state.to_dict()) for state in states.values()]
        self._check_alike(saved)
        text = json.dumps(merge_states(saved))
        checkpoint = self._expected(text, states, received, jumped)
        self._check_state(LoaderState.from_dict(json.loads(text)), checkpoint)
        common = json.dumps(_common(json.loads(text)))
        expect(len(common) < STATE_BYTES, True, f"few bytes in {common}")
        return checkpoint

    def _check_deal(self, batch: GlobalBatch, parts: Mapping[int, list[int]]) -> None:
        """Check that ranks got every slot once, each its fair part of every class."""
        every_slot = sorted(slot for part in parts.values() for slot in part)
        expect(every_slot, list(range(len(batch.planned))), f"slots of all ranks, {batch.place}")
        numbers = self._case.table.numbers
        counts = np.zeros((len(parts), len(self._case.table.classes) + 1), dtype=np.int64)
        for rank, part in parts.items():
            counts[rank, -1] = len(part)
            np.add.at(counts[rank], numbers[[batch.delivered[slot] for slot in part]], 1)
        apart = np.ptp(counts, axis=0).max()
        expect(apart <= 1, True, f"floor or ceiling of every class on every rank, {counts}")

    def _through_text(self, state: dict[str, Any]) -> dict[str, Any]:
        """Send a state through JSON and through its own reader."""
        again: dict[str, Any] = json.loads(json.dumps(state))
        expect(again, state, "a state sent through JSON")
        expect(LoaderState.from_dict(again).to_dict(), state, "a state read and written")
        return again

    def _check_alike(self, states: list[dict[str, Any]]) -> None:
        """Check that the states of ranks differ in nothing but their records."""
        own = OF_A_RANK if self._case.substitutes else set()
        texts = {
            json.dumps({name: value for name, value in state.items() if name not in own})
            for state in states
        }
        expect(len(texts), 1, f"different states of ranks, {texts}")

    def _expected(
        self, text: str, savers: Mapping[int, LoaderState], received: int, jumped: int
    ) -> Checkpoint:
        """Say what must be true of a state that these ranks saved now."""
        before = self._start
        records, missing = Counter[Record](), Counter[Record]()
        if before is not None and self._goes_on:
            records, missing = before.records.copy(), before.missing.copy()
        for rank, mine in self._records.items():
            # A rank may be a batch ahead when the last one gives its state.
            known = records if rank in savers else missing
            known.update(record for number, record in mine if number < received)
        has_all = not self._case.substitutes or len(savers) == self._leg.num_ranks
        return Checkpoint(
            text=text,
            received=received,
            jumped=jumped,
            reference=self._reference,
            records=records,
            missing=missing,
            is_complete=has_all and (before is None or before.is_complete),
        )

    def _check_state(self, state: LoaderState, expected: Checkpoint) -> None:
        """Check all that a state says."""
        reference, received = self._reference, expected.received
        place = (state.position.epoch, state.position.step)
        expect(place, reference.place(received, expected.jumped), "position of the state")
        skipped = [((a.epoch, a.step), (b.epoch, b.step)) for a, b in state.skipped]
        expect(skipped, reference.skipped(received, expected.jumped), "skipped spans")
        records = Counter(
            (one.epoch, one.step, one.slot, one.sample, one.substitute)
            for one in state.substitutions
        )
        expect(records, expected.records, "records of the state")
        expect(state.complete, expected.is_complete, "whether the state is complete")
        plan = self._plan_of(state)
        batches = [reference.batch(number) for number in range(reference.start, received)]
        walked = [
            (epoch, step)
            for epoch, first, stop in stretches(plan, state)
            for step in range(first, stop)
        ]
        expect(walked, [batch.place for batch in batches], "stretches of the state")
        counts = reference.counts([one for batch in batches for one in batch.delivered])
        for (*_, sample, substitute), times in expected.missing.items():
            counts[sample] += times
            counts[substitute] -= times
        expect(delivered(plan, state).tolist(), counts.tolist(), "deliveries of every sample")

    def _plan_of(self, state: LoaderState) -> BalancedPlan:
        """Build the plan from a state alone, as an audit does; once for all states of a leg."""
        if self._plan is None:
            self._plan = plan_of(state, [self._case.table])  # type: ignore[list-item]
        expect(state.plan_digest, self._plan.digest, "digest of the plan")
        expect(state.settings, self._plan.settings, "settings of the plan")
        return self._plan


def _common(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Leave out what a state may have as much of as it needs, in the runs before it, too."""
    mine = {name: value for name, value in state.items() if name not in GROWING}
    before = state["carried_from"]
    return [mine] if before is None else [mine, *_common(before["state"])]
