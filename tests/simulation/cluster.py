"""A cluster in one thread: ranks, their workers, checkpoints, deaths and resumes, from one seed.

Courses, quarantines, states and plans are the package's own. Only what they stand between is
simulated: reading a sample says whether it is damaged, and the next move is somebody's by lot.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from streaming_balance.errors import ShardError
from streaming_balance.training.course import Course
from streaming_balance.training.legs import plan_of
from streaming_balance.training.state import LoaderState
from tests.simulation.cases import Case, Leg, Recipe
from tests.simulation.drawing import draw_case
from tests.simulation.rank import Rank
from tests.simulation.reference import Reference, expect
from tests.simulation.witness import Checkpoint, Witness

Tell = Callable[[str], None]
Tally = Counter[str]


def reference_of(case: Case, leg: Leg, checkpoint: Checkpoint | None) -> Reference:
    """Give the uninterrupted run that a leg is to be compared with."""
    recipe, start = case.recipe, (0, 0)
    if checkpoint is not None and leg.carry_to is None:
        return checkpoint.reference
    if checkpoint is None or leg.carry_to is None:
        plan = recipe.plan(case.table)
    else:
        recipe, start = leg.carry_to, (checkpoint.received, checkpoint.jumped)
        epoch, step = checkpoint.reference.place(*start)
        plan = recipe.plan(case.table).carried_from(
            checkpoint.reference.plan, epoch=epoch, step=step
        )
    return Reference(case.table, recipe, plan, damaged=case.damaged, jumps=case.jumps, start=start)


def courses_of(case: Case, leg: Leg, checkpoint: Checkpoint | None, recipe: Recipe) -> list[Course]:
    """Let every rank of a leg load the saved state, as a loader does."""
    plan = recipe.plan(case.table)
    courses = [
        Course(
            plan,
            shards_digest=case.table.digest,
            rank=rank,
            num_ranks=leg.num_ranks,
            substitutes=case.substitutes,
        )
        for rank in range(leg.num_ranks)
    ]
    if checkpoint is None:
        return courses
    saved = LoaderState.from_dict(json.loads(checkpoint.text))
    if leg.carry_to is not None or saved.carried_from is not None:
        plan = plan_of(saved, [case.table])  # type: ignore[list-item]
    for course in courses:
        if leg.carry_to is not None:
            course.carry_over(saved, old=plan)
        else:
            course.resume(saved, plan=plan)
    return courses


class Cluster:
    """The ranks of one leg, moved one at a time until they end or die.

    Args:
        case: what is simulated.
        leg: the start of the job.
        checkpoint: where the job starts; None: at the beginning.
        number: number of the leg.
        tell: is told what happens.
    """

    def __init__(
        self, case: Case, leg: Leg, checkpoint: Checkpoint | None, *, number: int, tell: Tell
    ) -> None:
        self._case, self._leg, self._tell = case, leg, tell
        self._random = np.random.default_rng([case.seed, 1, number])
        self.tally = Tally()
        """What happened how often."""
        self._reference = reference_of(case, leg, checkpoint)
        received = 0 if checkpoint is None else checkpoint.received
        jumped = 0 if checkpoint is None else checkpoint.jumped
        self._ranks = [
            Rank(case, leg, course, received=received, jumped=jumped, random=self._random)
            for course in courses_of(case, leg, checkpoint, self._reference.recipe)
        ]
        self._witness = Witness(case, leg, self._reference, checkpoint)
        self._alive = set(range(leg.num_ranks))
        self._states: dict[int, LoaderState] = {}
        self.is_stuck = False
        """Whether a batch came up that nobody is left for."""
        self.checkpoint = checkpoint
        """What was saved last."""

    def run(self) -> Checkpoint | None:
        """Move ranks until none can, and give what was saved last."""
        moves = 0
        while movable := [rank for rank in sorted(self._alive) if self._can_move(rank)]:
            if moves == self._leg.dies_after:
                died = int(self._random.choice(sorted(self._alive)))
                self._alive.remove(died)
                self.tally["ranks that died"] += 1
                self.tally["batches received in vain"] += self._in_vain()
                self._tell(f"  rank {died} dies, {self._ranks[died].received} batches received")
            else:
                self._move(movable[int(self._random.integers(len(movable)))])
            moves += 1
        if self._leg.dies_after is None and not self.is_stuck:
            ended_at = None if self.checkpoint is None else self.checkpoint.received
            expect(ended_at, self._case.num_batches, "batches after which the program ended")
        return self.checkpoint

    def _in_vain(self) -> int:
        """Count the batches that a rank received since the last checkpoint."""
        saved = 0 if self.checkpoint is None else self.checkpoint.received
        return max(rank.received for rank in self._ranks) - saved

    def _can_move(self, number: int) -> bool:
        """Say whether a rank has something to do that waits for nobody.

        The gradients of a step are reduced over all ranks: none gets to its end before all others
        have received their part of the batch.
        """
        rank = self._ranks[number]
        if rank.received > min(other.received for other in self._ranks):
            return False
        return rank.owes_state or (rank.received < self._case.num_batches and not self.is_stuck)

    def _move(self, number: int) -> None:
        """Let a rank do its next thing: give its state, or receive a batch."""
        rank = self._ranks[number]
        if rank.owes_state:
            self._give_state(number)
            return
        try:
            request = rank.receive()
        except ShardError as error:
            self._witness.check_nobody_is_left(number, rank.received)
            self._tell(f"  rank {number} stops: {error}")
            self.is_stuck = True
            return
        self.tally["parts of batches received"] += 1
        self.tally["substitutions"] += len(request.substitutions)
        if self._witness.receives(number, rank.received - 1, request):
            self._tell(f"  epoch {request.epoch}, step {request.step} received by all ranks")
        is_due = not rank.received % self._leg.checkpoint_every
        is_due |= rank.received == self._case.num_batches
        rank.owes_state = is_due and number in self._leg.savers

    def _give_state(self, number: int) -> None:
        """Let a rank give its state; the last one makes the checkpoint."""
        rank = self._ranks[number]
        if self._leg.saves_after_jumps:
            rank.jump()
        rank.owes_state = False
        self._states[number] = rank.course.state()
        if len(self._states) == len(self._leg.savers):
            self.checkpoint = self._witness.saves(self._states, rank.received, rank.jumped)
            self._states = {}
            self.tally["checkpoints"] += 1
            self._tell(f"  checkpoint after {rank.received} batches, {rank.jumped} jumps")


def simulate(case: Case, tell: Tell = lambda _line: None) -> Tally:
    """Run a case to its end, every check on the way, and count what happened.

    Raises:
        AssertionError: something was not as it should be.
        BalanceError: the package refused what is in order.
    """
    tell(f"seed {case.seed}: {case}")
    checkpoint, tally = None, Tally(cases=1)
    for number, leg in enumerate(case.legs):
        tell(f"start {number}, {'at the beginning' if checkpoint is None else checkpoint}: {leg}")
        if checkpoint is None and leg.carry_to is not None:
            # Nothing was saved that could be carried over.
            leg = replace(leg, carry_to=None)
        cluster = Cluster(case, leg, checkpoint, number=number, tell=tell)
        tally["resumes"] += checkpoint is not None
        tally["changes of plan"] += leg.carry_to is not None
        checkpoint = cluster.run()
        tally += cluster.tally
        if cluster.is_stuck:
            tally["ends with nobody left to stand in"] += 1
            break
    return tally


def check(seed: int, tell: Tell = lambda _line: None) -> Tally:
    """Simulate what a seed stands for; an error says which it was, and how to see it again."""
    try:
        return simulate(draw_case(seed), tell)
    except Exception as error:
        error.add_note(f"This is seed {seed}. See it again: python tools/simulate.py --seed {seed}")
        raise
