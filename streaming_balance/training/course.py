"""Where one rank stands in a run, and what it has to tell: bookkeeping without any I/O.

A training loader reads what a course asks for, and a simulator of a cluster does not; both follow
the same plan, write the same states and keep the same records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from streaming_balance.errors import ResumeError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.training.pairing import Mixing
from streaming_balance.training.records import Recorders, Substitution
from streaming_balance.training.requests import BatchRequest
from streaming_balance.training.state import CarriedFrom, LoaderState, Position


class Standing:
    """Where iteration stands."""

    def __init__(self) -> None:
        self.position = Position(0, 0)
        """The batch that comes next."""

    def advance(self, position: Position, substitutions: Iterable[Substitution] = ()) -> None:
        """Count a batch as delivered, and go on."""
        assert not tuple(substitutions), "only training delivers others than it was asked for"
        self.position = position


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a run brought with it when its state was loaded."""

    substitutions: tuple[Substitution, ...] = ()
    """Records of the time before."""
    complete: bool = True
    """Whether these are the records of all ranks."""
    carried_from: CarriedFrom | None = None
    """The run under another plan that this one goes on from."""


class Course(Standing):
    """One rank's way through a plan.

    Args:
        plan: which samples make each global batch.
        shards_digest: digest of the data set's content.
        rank: data-parallel rank.
        num_ranks: number of data-parallel ranks.
        substitutes: whether others may stand in for damaged samples, which a rank alone knows of.
        mixing: how batches are mixed, or None.
        batch_transform: whether the user's own function gets whole batches.
    """

    def __init__(
        self,
        plan: BalancedPlan,
        *,
        shards_digest: str,
        rank: int = 0,
        num_ranks: int = 1,
        substitutes: bool = False,
        mixing: Mixing | None = None,
        batch_transform: bool = False,
    ) -> None:
        super().__init__()
        self.plan, self.rank, self.num_ranks = plan, rank, num_ranks
        self._shards_digest, self._mixing = shards_digest, mixing
        self._substitutes, self._batch_transform = substitutes, batch_transform
        self._skipped: tuple[tuple[Position, Position], ...] = ()
        self._past = Past()
        self._records: list[Substitution] = []

    def request(self, position: Position) -> BatchRequest:
        """Say what this rank's part of a global batch holds."""
        epoch, step = position.epoch, position.step
        members = self.plan.batch(epoch, step)
        slots = self.plan.rank_slots(epoch, step, rank=self.rank, num_ranks=self.num_ranks)
        return BatchRequest(
            epoch=epoch,
            step=step,
            samples=members[slots],
            slots=slots,
            global_size=len(members),
            num_ranks=self.num_ranks,
        )

    def after(self, position: Position) -> Position:
        """Give the position after a batch: the next step, or the start of the next epoch."""
        if position.step + 1 < self.plan.num_steps(position.epoch):
            return Position(position.epoch, position.step + 1)
        return Position(position.epoch + 1, 0)

    def advance(self, position: Position, substitutions: Iterable[Substitution] = ()) -> None:
        """Count a batch as delivered, and go on.

        Args:
            position: what comes next.
            substitutions: who stood in for whom in the batch.
        """
        self._records.extend(substitutions)
        self.position = position

    def jump(self, target: Position) -> None:
        """Go elsewhere, and remember what lies between as skipped."""
        start, jumps = self.position, self._skipped
        self.position = target
        # Jumps without a batch between them are one.
        if jumps and jumps[-1][1] == start:
            start, jumps = jumps[-1][0], jumps[:-1]
        self._skipped = jumps if start == target else (*jumps, (start, target))

    @property
    def num_substituted(self) -> int:
        """Samples this rank delivered in the place of damaged ones, since a state was loaded."""
        return len(self._records)

    def state(self) -> LoaderState:
        """Give the state as a value."""
        recorders = None
        if self._substitutes:
            recorders = Recorders.of([self.rank], num_ranks=self.num_ranks)
        return LoaderState(
            plan_digest=self.plan.digest,
            settings=self.plan.settings,
            shards_digest=self._shards_digest,
            position=self.position,
            skipped=self._skipped,
            substitutions=(*self._past.substitutions, *self._records),
            recorders=recorders,
            complete_before=self._past.complete,
            mixing=self._mixing,
            batch_transform=self._batch_transform,
            carried_from=self._past.carried_from,
        )

    def resume(self, saved: LoaderState, *, plan: BalancedPlan) -> None:
        """Go on where a state says.

        Args:
            saved: the state.
            plan: the plan it belongs to: this course's own, or the one it was carried over to.

        Raises:
            ResumeError: it belongs to another plan or other data, or names what the plan lacks.
        """
        saved.check_continues(
            replace(self.state(), plan_digest=plan.digest, settings=plan.settings),
            way_out=" To go on under the loader's plan instead, each patient's turns kept, load "
            "the state with carry_exposure=True.",
        )
        try:
            for place in (saved.position, *(end for jump in saved.skipped for end in jump)):
                plan.batch_size(place.epoch, place.step)
            plan.batch(saved.position.epoch, saved.position.step)
            _check_records(plan, saved.substitutions)
        except (IndexError, OverflowError) as error:
            raise ResumeError(
                f"the state stands at {saved.position} and jumped {saved.skipped}, and something "
                f"in it names a place that the plan does not have ({error}); it is damaged. Use an "
                f"earlier checkpoint."
            ) from error
        plan.rank_slots(
            saved.position.epoch, saved.position.step, rank=self.rank, num_ranks=self.num_ranks
        )
        self.plan, self.position, self._skipped = plan, saved.position, saved.skipped
        self._past = Past(
            substitutions=saved.substitutions,
            complete=saved.complete_before and saved.recorders is None,
            carried_from=saved.carried_from,
        )
        self._records = []
        # Once a run had one, what it saw is not known for sure any more.
        self._batch_transform |= saved.batch_transform

    def carry_over(self, saved: LoaderState, *, old: BalancedPlan) -> None:
        """Go on, under this course's own plan, from a run under another one.

        Args:
            saved: where the other run stood.
            old: its plan.

        Raises:
            ResumeError: what a class cycles over, or somebody's class, is not what it was.
        """
        where = saved.position
        plan = self.plan.carried_from(old, epoch=where.epoch, step=where.step)
        plan.rank_slots(where.epoch, 0, rank=self.rank, num_ranks=self.num_ranks)
        ordinals = old.ordinals(where.epoch, where.step)
        self.plan, self.position, self._skipped = plan, Position(where.epoch, 0), ()
        self._past = Past(carried_from=CarriedFrom(state=saved, ordinals=ordinals))
        self._records = []


def _check_records(plan: BalancedPlan, records: Iterable[Substitution]) -> None:
    """Refuse records of samples that the plan does not have where they say.

    Raises:
        IndexError: names the first place that is not the plan's.
    """
    for record in records:
        planned = int(plan.batch(record.epoch, record.step)[record.slot])
        if record.sample != planned:
            raise IndexError(
                f"a substitution names sample {record.sample} at epoch {record.epoch}, step "
                f"{record.step}, slot {record.slot}, where the plan has {planned}"
            )
        if record.substitute >= plan.num_samples:
            raise IndexError(
                f"sample {record.substitute} stood in at epoch {record.epoch}, step {record.step}, "
                f"but there are {plan.num_samples}"
            )
