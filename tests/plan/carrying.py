"""Cohorts whose plan changes, and an onlooker's ways to count what two plans deliver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from streaming_balance.plan.epoch import BalancedPlan

Options = dict[str, Any]
Place = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Patients by name, with what an onlooker knows of their samples."""

    labels: tuple[str, ...]
    """`(N,)` class of every sample."""
    owners: tuple[str, ...]
    """`(N,)` patient of every sample."""
    images: tuple[str, ...] = field(default=())
    """`(N,)` what stays a sample's own name when the table changes."""
    sites: tuple[str, ...] = field(default=())
    """`(N,)` stratum of every sample; empty without strata."""

    def plan(self, *, batch: int, balance: Any, seed: int = 0) -> BalancedPlan:
        """Plan over the samples in the order they stand in."""
        return BalancedPlan.from_labels(
            list(self.labels),
            patients=list(self.owners),
            global_batch_size=batch,
            balance=balance,
            seed=seed,
            strata={"site": list(self.sites)} if self.sites else None,
        )

    def without(self, gone: Sequence[str]) -> Cohort:
        """Leave some patients out; the rows of the others move up."""
        kept = [row for row, owner in enumerate(self.owners) if owner not in gone]
        columns = (self.labels, self.owners, self.images, self.sites)
        labels, owners, images, sites = (
            tuple(column[row] for row in kept) if column else () for column in columns
        )
        return Cohort(labels=labels, owners=owners, images=images, sites=sites)


def one_each(sizes: dict[str, int]) -> Cohort:
    """Give patients of one sample each: a0, a1, ..., b0, ..."""
    names = [(label, f"{label}{number}") for label, size in sizes.items() for number in range(size)]
    return Cohort(
        labels=tuple(label for label, _ in names),
        owners=tuple(name for _, name in names),
        images=tuple(name for _, name in names),
    )


def patients_of(cohort: Cohort, plan: BalancedPlan, label: str, place: Place) -> list[str]:
    """List the patients of a class in one batch, in the order of their slots."""
    batch = plan.batch(*place).tolist()
    return [cohort.owners[row] for row in batch if cohort.labels[row] == label]


def draws(
    cohort: Cohort, plan: BalancedPlan, label: str, count: int, *, start: Place = (0, 0)
) -> list[str]:
    """List the first `count` draws of a class from a step on, by asking for batch after batch."""
    drawn: list[str] = []
    epoch, step = start
    while len(drawn) < count:
        if step == plan.num_steps(epoch):
            epoch, step = epoch + 1, 0
            continue
        drawn += patients_of(cohort, plan, label, (epoch, step))
        step += 1
    return drawn[:count]


def turns_before(cohort: Cohort, plan: BalancedPlan, label: str, place: Place) -> int:
    """Count the draws of a class before a step of an ordinary plan, batch by batch."""
    return sum(
        len(patients_of(cohort, plan, label, (epoch, step)))
        for epoch in range(place[0] + 1)
        for step in range(place[1] if epoch == place[0] else plan.num_steps(epoch))
    )


def remaining(cohort: Cohort, plan: BalancedPlan, label: str, place: Place) -> list[str]:
    """List who had no turn in the pass that an ordinary plan began, in its order."""
    size = len({o for o, c in zip(cohort.owners, cohort.labels, strict=True) if c == label})
    drawn = turns_before(cohort, plan, label, place)
    rest = -drawn % size
    return draws(cohort, plan, label, drawn + rest)[drawn:]


def used_by(cohort: Cohort, plan: BalancedPlan) -> set[str]:
    """Give the patients that a plan uses, by a look at many epochs."""
    seen = plan.exposure(plan.first_epoch + 60, 0)
    return {owner for owner, count in zip(cohort.owners, seen.tolist(), strict=True) if count}


def following(plan: BalancedPlan, start: Place, steps: int) -> list[Place]:
    """List the steps from a place on; one more than asked for, where the next leg begins."""
    places: list[Place] = []
    epoch, step = start
    while len(places) <= steps:
        if step == plan.num_steps(epoch):
            epoch, step = epoch + 1, 0
            continue
        places.append((epoch, step))
        step += 1
    return places
