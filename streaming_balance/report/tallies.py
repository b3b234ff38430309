"""What became of every sample of a run, and of every patient: counted, not yet reported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming_balance.report.runs import Leg, Run
from streaming_balance.training.state import delivered, mixed_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What became of every sample of a leg's split; all fields are `(N,)` by sample number."""

    delivered: NDArray[np.int64]
    """Times delivered."""
    as_partner: NDArray[np.int64]
    """Times mixed into another one that was delivered."""
    as_substitute: NDArray[np.int64]
    """Times delivered in the place of a damaged one."""
    substituted: NDArray[np.int64]
    """Times another was delivered in its place."""
    left_out: NDArray[np.bool_]
    """Whether the plan leaves it out by name."""

    @property
    def exposure(self) -> NDArray[np.int64]:
        """Times seen, alone or as the partner of another."""
        return self.delivered + self.as_partner


@dataclass(frozen=True, slots=True, kw_only=True)
class Tallies:
    """What became of everybody in a run."""

    run: Run
    """The run."""
    legs: tuple[Tally, ...]
    """By leg."""
    names: tuple[str, ...]
    """Patients in the training splits of all legs, sorted; the place is a patient's number."""
    owners: tuple[NDArray[np.int64], ...]
    """Per leg `(N,)` the number of every sample's patient."""

    def by_patient(self, field: str) -> NDArray[np.int64]:
        """Add up a field of all legs by patient.

        Args:
            field: name of a field of `Tally`, or `exposure`.

        Returns:
            `(patients,)` sums.
        """
        totals = np.zeros(len(self.names), dtype=np.int64)
        for tally, owner in zip(self.legs, self.owners, strict=True):
            np.add.at(totals, owner, getattr(tally, field))
        return totals


def tally_run(run: Run) -> Tallies:
    """Count what became of every sample of a run.

    Args:
        run: a run, built again from its state.

    Returns:
        Counts by sample, and whom samples belong to: the same patient has one number in all legs.
    """
    owned = [leg.shards.patients(leg.split).tolist() for leg in run.legs]
    names = tuple(sorted(set().union(*owned)))
    numbers = {name: number for number, name in enumerate(names)}
    owners = tuple(
        np.fromiter(map(numbers.__getitem__, owner), dtype=np.int64, count=len(owner))
        for owner in owned
    )
    return Tallies(run=run, legs=tuple(map(tally_leg, run.legs)), names=names, owners=owners)


def tally_leg(leg: Leg) -> Tally:
    """Count what became of every sample of a leg."""
    plan, records = leg.plan, leg.state.substitutions
    return Tally(
        delivered=delivered(plan, leg.state),
        as_partner=mixed_in(plan, leg.state),
        as_substitute=_occurrences((one.substitute for one in records), plan.num_samples),
        substituted=_occurrences((one.sample for one in records), plan.num_samples),
        left_out=_left_out(leg),
    )


def _left_out(leg: Leg) -> NDArray[np.bool_]:
    """Mark the samples that a leg's plan leaves out by key or by patient."""
    excluded: list[str] = leg.plan.settings["exclude"]
    if not excluded:
        return np.zeros(leg.plan.num_samples, dtype=np.bool_)
    by_key = np.isin(leg.shards.keys(leg.split), excluded)
    return np.asarray(by_key | np.isin(leg.shards.patients(leg.split), excluded))


def _occurrences(samples: Iterable[int], num_samples: int) -> NDArray[np.int64]:
    """Count how often each sample number comes."""
    numbers = np.fromiter(samples, dtype=np.int64)
    return np.asarray(np.bincount(numbers, minlength=num_samples), dtype=np.int64)
