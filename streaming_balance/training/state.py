"""What a loader's saved state holds, and when it may be continued.

A state is a handful of plain values: which plan it belongs to, how far the training loop came, and
what was left out on the way. It is JSON-able, the same on every rank, and as large at step ten
million as at step ten. Only the records of samples that stood in for damaged ones are a rank's own,
and `merging.merge_states` unites them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ResumeError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.training.pairing import Mixing, mixed_steps, parse_mixing
from streaming_balance.training.records import Recorders, Substitution

STATE_VERSION = 1
# A run changes its plan a few times; a document nested deeper than this is no state.
MOST_CARRIES = 64


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a run: the batch that comes next."""

    epoch: int
    """Number of the epoch, from 0."""
    step: int
    """Number of the global batch in the epoch, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderState:
    """Everything needed to continue a run, or to say who was seen in it."""

    plan_digest: str
    """Digest of the plan: samples, patients, labels and settings."""
    settings: Mapping[str, Any]
    """The plan's settings in clear."""
    shards_digest: str
    """Digest of the data set's content."""
    position: Position
    """The batch that the training loop gets next."""
    skipped: tuple[tuple[Position, Position], ...]
    """Jumps by `set_epoch`: from the batch that would have come next, to the one that did."""
    substitutions: tuple[Substitution, ...] = ()
    """Records of samples that stood in for damaged ones."""
    recorders: Recorders | None = None
    """Whose records since the last load these are; None: everybody's."""
    complete_before: bool = True
    """Whether all records of the time before the last load are here."""
    carried_from: CarriedFrom | None = None
    """The run under another plan that this one goes on from."""
    mixing: Mixing | None = None
    """How batches are mixed, the same for the whole run; None: not at all."""
    batch_transform: bool = False
    """Whether the user's own function had batches of this run: what it did is not known here."""

    @property
    def complete(self) -> bool:
        """Whether every substitution of the run, on whatever rank, is recorded here."""
        before = self.carried_from is None or self.carried_from.state.complete
        return before and self.complete_before and self.recorders is None

    def to_dict(self) -> dict[str, Any]:
        """Give the state as plain values.

        Examples:
            >>> state = LoaderState(plan_digest="a", settings={"seed": 1}, shards_digest="b",
            ...     position=Position(2, 5), skipped=((Position(0, 9), Position(2, 0)),))
            >>> LoaderState.from_dict(state.to_dict()) == state
            True
        """
        return {
            "version": STATE_VERSION,
            "plan_digest": self.plan_digest,
            "settings": dict(self.settings),
            "shards_digest": self.shards_digest,
            "position": {"epoch": self.position.epoch, "step": self.position.step},
            "skipped": [
                {"from": [start.epoch, start.step], "to": [stop.epoch, stop.step]}
                for start, stop in self.skipped
            ],
            "substitutions": [record.to_dict() for record in self.substitutions],
            "recorders": None if self.recorders is None else self.recorders.to_dict(),
            "complete_before": self.complete_before,
            "mixing": _settings_of(self.mixing),
            "batch_transform": self.batch_transform,
            "carried_from": None if self.carried_from is None else self.carried_from.to_dict(),
        }

    @classmethod
    def from_dict(cls, state: object) -> LoaderState:
        """Read a state, as saved by `state_dict` and perhaps passed through JSON.

        Raises:
            ResumeError: something is missing, of another type, or from another version.
        """
        if not isinstance(state, Mapping):
            raise ResumeError(
                f"the state is a {type(state).__name__}; it must be what state_dict() gave."
            )
        version = state.get("version")
        if version != STATE_VERSION:
            raise ResumeError(
                f"the state has version {version!r}; this release reads version {STATE_VERSION}. "
                f"Continue with the release that wrote it, or start a new run."
            )
        try:
            return _read(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ResumeError(
                f"the state is damaged ({type(error).__name__}: {error}); it must be what "
                f"state_dict() gave. Use an earlier checkpoint."
            ) from error

    def check_continues(self, other: LoaderState, *, way_out: str = "") -> None:
        """Refuse to continue a run of another plan or other data.

        Args:
            other: the state of the loader that is asked to continue this one.
            way_out: what else could be done, a sentence.

        Raises:
            ResumeError: lists every field with what the state has and what the loader has.
        """
        mine, theirs = self.settings, other.settings
        differences = [
            f"{name}: state has {mine.get(name)!r}, loader has {theirs.get(name)!r}"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]
        if self.plan_digest != other.plan_digest and not differences:
            differences.append(
                f"samples, patients or labels: state has plan digest {self.plan_digest}, "
                f"loader has {other.plan_digest}"
            )
        if self.shards_digest != other.shards_digest:
            differences.append(
                f"shards_digest: state has {self.shards_digest}, loader has {other.shards_digest}"
            )
        if self.mixing != other.mixing:
            differences.append(
                f"mixing: state has {_settings_of(self.mixing)}, loader has "
                f"{_settings_of(other.mixing)}"
            )
        if differences:
            raise ResumeError(
                "the state belongs to another run. "
                + "; ".join(differences)
                + ". Build the loader with the state's values, or start a new run."
                + way_out
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedFrom:
    """The run that another one, under a new plan, goes on from."""

    state: LoaderState
    """Where the run before stood."""
    ordinals: Mapping[str, int]
    """Class, or stratum of one -> its draws under the plan before: whose turn it was."""

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain values."""
        return {"state": self.state.to_dict(), "ordinals": dict(self.ordinals)}


def delivered(plan: BalancedPlan, state: LoaderState) -> NDArray[np.int64]:
    """Count how often each sample was delivered in a run, over all ranks.

    Args:
        plan: the plan the state belongs to.
        state: how far the run came, what it jumped over, and who stood in for whom.

    Returns:
        `(N,)` deliveries per sample number.

    Raises:
        IndexError: the state names a place that the plan does not have.
    """
    counts = plan.exposure(state.position.epoch, state.position.step).copy()
    for start, stop in state.skipped:
        # A jump forward skips what lies between; one back delivers it again.
        counts -= plan.exposure(stop.epoch, stop.step)
        counts += plan.exposure(start.epoch, start.step)
    for record in state.substitutions:
        counts[record.sample] -= 1
        counts[record.substitute] += 1
    return counts


def mixed_in(plan: BalancedPlan, state: LoaderState) -> NDArray[np.int64]:
    """Count how often each sample was what another one was mixed with, over all ranks.

    In a mixed batch every sample is the partner of exactly one, whatever the number of ranks.

    Args:
        plan: the plan the state belongs to.
        state: how far the run came, and how its batches were mixed.

    Returns:
        `(N,)` times as a partner per sample number; all 0 without mixing.

    Raises:
        IndexError: the state names a place that the plan does not have.
    """
    mixing = state.mixing
    if mixing is not None and mixing.probability == 1:
        return delivered(plan, state)
    counts = np.zeros(plan.num_samples, dtype=np.int64)
    if mixing is None or not mixing.probability:
        return counts
    for epoch, first, stop in stretches(plan, state):
        mixed = mixed_steps(mixing, seed=plan.seed, epoch=epoch, first=first, stop=stop)
        for step in (first + np.flatnonzero(mixed)).tolist():
            np.add.at(counts, plan.batch(epoch, step), 1)
    for record in state.substitutions:
        step = record.step
        if mixed_steps(mixing, seed=plan.seed, epoch=record.epoch, first=step, stop=step + 1)[0]:
            counts[record.sample] -= 1
            counts[record.substitute] += 1
    return counts


def stretches(plan: BalancedPlan, state: LoaderState) -> Iterator[tuple[int, int, int]]:
    """Give what was delivered, in order, as (epoch, first step, step after the last)."""
    starts = (
        Position(plan.first_epoch, 0),
        *(landed for _, landed in state.skipped),
    )
    stops = (*(left for left, _ in state.skipped), state.position)
    for start, stop in zip(starts, stops, strict=True):
        for epoch in range(start.epoch, stop.epoch + 1):
            first = start.step if epoch == start.epoch else 0
            end = stop.step if epoch == stop.epoch else plan.num_steps(epoch)
            yield epoch, first, end


def _settings_of(mixing: Mixing | None) -> dict[str, Any] | None:
    """Write how batches are mixed as plain values."""
    return None if mixing is None else mixing.settings()


def _read(state: Mapping[str, Any], *, carries: int = 0) -> LoaderState:
    """Pick a state apart, type by type."""
    recorders = state.get("recorders")
    skipped = [
        (_position(*jump["from"]), _position(*jump["to"])) for jump in list(state["skipped"])
    ]
    return LoaderState(
        plan_digest=_text(state["plan_digest"]),
        settings=dict(state["settings"].items()),
        shards_digest=_text(state["shards_digest"]),
        position=_position(state["position"]["epoch"], state["position"]["step"]),
        skipped=tuple(skipped),
        substitutions=tuple(map(Substitution.from_dict, list(state["substitutions"]))),
        recorders=None if recorders is None else Recorders.from_dict(recorders),
        complete_before=_flag(state.get("complete_before", True)),
        mixing=parse_mixing(state.get("mixing")),
        batch_transform=_flag(state.get("batch_transform", False)),
        carried_from=_carried(state.get("carried_from"), carries=carries),
    )


def _carried(entry: Mapping[str, Any] | None, *, carries: int) -> CarriedFrom | None:
    """Read the state of the run before, if there was one."""
    if entry is None:
        return None
    if carries == MOST_CARRIES:
        raise ValueError(f"it is carried over more than {MOST_CARRIES} times")
    if entry["state"].get("version") != STATE_VERSION:
        raise ValueError(f"the run before has version {entry['state'].get('version')!r}")
    ordinals = {str(name): _count(count) for name, count in entry["ordinals"].items()}
    return CarriedFrom(state=_read(entry["state"], carries=carries + 1), ordinals=ordinals)


def _position(epoch: object, step: object) -> Position:
    """Check that a position is two whole numbers from 0."""
    return Position(_count(epoch), _count(step))


def _count(number: object) -> int:
    """Check that a count is a whole number from 0."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is no whole number from 0")
    return number


def _flag(value: object) -> bool:
    """Check that a flag is one."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _text(value: object) -> str:
    """Check that a digest is text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a digest")
    return value
