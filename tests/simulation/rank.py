"""One simulated rank: its training program, its loader, and the processes that make batches."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from streaming_balance.errors import ShardError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.training.course import Course
from streaming_balance.training.quarantine import Quarantine
from streaming_balance.training.requests import BatchRequest
from streaming_balance.training.state import Position
from tests.simulation.cases import Case, Leg

# A worker process dies alone, by whatever, once in so many batches.
WORKER_DIES_ONCE_IN = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A batch that was made ahead of the training loop."""

    position: Position
    """Where it stands in the run."""
    result: BatchRequest | ShardError
    """The batch, or why there is none."""


class Maker:
    """A process that makes batches, and knows of the damage it has met."""

    def __init__(self, plan: BalancedPlan, case: Case, random: np.random.Generator) -> None:
        self._quarantine = Quarantine(plan.substitutes) if case.substitutes else None
        self._damaged, self._random = case.damaged, random

    def make(self, request: BatchRequest) -> BatchRequest | ShardError:
        """Read a batch until everybody in it is sound."""
        if self._quarantine is None:
            return request
        # Every reading meets damage that was not known, or comes to an end.
        for _ in range(len(self._damaged) + 1):
            try:
                request = self._quarantine.settled(request)
            except ShardError as error:
                return error
            met = self._damaged.intersection(request.samples.tolist())
            if not met:
                return request
            if self._random.random() < 0.5:
                # Whoever reads in parallel may hear of one before the others.
                met = frozenset([min(met)])
            self._quarantine.add({n: ShardError(f"sample {n} is cut.") for n in met})
        raise AssertionError(f"a damaged sample comes again and again: {request}")


class Rank:
    """One data-parallel rank: its loader, its workers, and how far its training program is.

    Args:
        case: what is simulated.
        leg: the start of the job it belongs to.
        course: where its loader stands.
        received: batches that the program has received.
        jumped: jumps it has made since the last of them.
        random: where chance comes from.
    """

    def __init__(
        self,
        case: Case,
        leg: Leg,
        course: Course,
        *,
        received: int,
        jumped: int,
        random: np.random.Generator,
    ) -> None:
        self.course, self.received, self.jumped = course, received, jumped
        self.owes_state = False
        self._case, self._leg, self._random = case, leg, random
        self._pending: deque[Made] = deque()
        self._start_makers()

    def _start_makers(self) -> None:
        """Start the processes that make batches; what others made is gone."""
        self._pending.clear()
        count = max(1, self._leg.workers)
        plan = self.course.plan
        self._makers = deque(Maker(plan, self._case, self._random) for _ in range(count))

    def jump(self) -> None:
        """Make the jumps of the program that are due, as `set_epoch` of a loader does."""
        due = self._case.jumps.get(self.received, ())
        for target in due[self.jumped :]:
            epoch = max(target, self.course.plan.first_epoch)
            if epoch != self.course.position.epoch:
                self.course.jump(Position(epoch, 0))
        self.jumped = len(due)

    def receive(self) -> BatchRequest:
        """Give the training loop its next batch, and make others ahead.

        Raises:
            ShardError: nobody is left to stand in for a damaged sample.
        """
        self.jump()
        if self._leg.workers and not self._random.integers(WORKER_DIES_ONCE_IN):
            self._start_makers()
        here = self.course.position
        if self._pending and self._pending[0].position != here:
            if self._leg.workers:
                self._start_makers()
            self._pending.clear()
        if not self._pending:
            self._make(here)
        made = self._pending.popleft()
        if isinstance(made.result, ShardError):
            raise made.result
        follows = self.course.after(here)
        # While the loop waits for its batch, or while it trains on it.
        if self._random.integers(2):
            self._make_ahead(here)
            self.course.advance(follows, made.result.substitutions)
        else:
            self.course.advance(follows, made.result.substitutions)
            self._make_ahead(here)
        self.received, self.jumped = self.received + 1, 0
        return made.result

    def _make_ahead(self, last: Position) -> None:
        """Make some of the batches that come next."""
        if self._pending:
            last = self._pending[-1].position
        for _ in range(int(self._random.integers(0, self._leg.ahead + 1)) - len(self._pending)):
            last = self.course.after(last)
            self._make(last)

    def _make(self, position: Position) -> None:
        """Let the process whose turn it is make a batch."""
        result = self._makers[0].make(self.course.request(position))
        self._makers.rotate(-1)
        self._pending.append(Made(position=position, result=result))
