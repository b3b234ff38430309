"""What a simulated run consists of: a table without volumes, plans, damage, a program, deaths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """A data set of which only the sample table exists."""

    train_splits: ClassVar[tuple[str, ...]] = ("train",)
    path: ClassVar[str] = "a simulated data set"
    digest: ClassVar[str] = "digest of a simulated data set"

    classes: list[str]
    """Labels in class order."""
    numbers: NDArray[np.int64]
    """`(N,)` class number of every sample."""
    owners: NDArray[np.str_]
    """`(N,)` patient of every sample."""
    columns: Mapping[str, NDArray[Any]]
    """`site` of every sample's patient, and a `weight` of the sample."""

    def labels(self, _split: str) -> NDArray[np.int64]:
        """`(N,)` class number of every sample."""
        return self.numbers

    def patients(self, _split: str) -> NDArray[np.str_]:
        """`(N,)` patient of every sample."""
        return self.owners

    def keys(self, _split: str) -> NDArray[np.str_]:
        """`(N,)` key of every sample."""
        return np.array([f"sample-{number:04d}" for number in range(len(self.numbers))])

    def column(self, _split: str, name: str) -> NDArray[Any]:
        """`(N,)` values of a column."""
        return self.columns[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a plan is made from, beside the table."""

    balance: Mapping[str, Any]
    """Strategy and options."""
    global_batch_size: int
    """Samples in a global batch."""
    seed: int
    """The run's seed."""
    exclude: tuple[str, ...] = ()
    """Patients left out."""

    def __str__(self) -> str:
        balance = " ".join(f"{name}={value}" for name, value in self.balance.items())
        return f"{balance}, global batches of {self.global_batch_size}, without {self.exclude}"

    def plan(self, table: Table) -> BalancedPlan:
        """Build the plan."""
        return BalancedPlan.for_shards(
            table,
            global_batch_size=self.global_batch_size,
            balance=self.balance,
            seed=self.seed,
            exclude=self.exclude,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What happens between two starts of the job."""

    num_ranks: int
    """Ranks of this leg."""
    workers: int
    """Worker processes of each rank; 0: the rank reads by itself."""
    ahead: int
    """Most batches made before the training loop asks."""
    checkpoint_every: int
    """Batches from one checkpoint to the next."""
    savers: tuple[int, ...]
    """Ranks whose states are united in a checkpoint."""
    saves_after_jumps: bool
    """Whether a checkpoint is taken after the jumps that are due, or before."""
    dies_after: int | None
    """Moves of the cluster after which a rank dies; None: the leg ends with the program."""
    carry_to: Recipe | None = None
    """Another plan, which the run is carried over to when this leg starts."""

    def __str__(self) -> str:
        return (
            f"{self.num_ranks} ranks with {self.workers} workers each, up to {self.ahead} batches "
            f"ahead, the states of ranks {list(self.savers)} every {self.checkpoint_every} batches"
            + ("" if self.carry_to is None else f", carried over to {self.carry_to}")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything one seed stands for."""

    seed: int
    """The seed."""
    table: Table
    """The data set."""
    recipe: Recipe
    """The plan of the first leg."""
    substitutes: bool
    """Whether others may stand in for damaged samples."""
    damaged: frozenset[int]
    """Sample numbers of those that cannot be read."""
    num_batches: int
    """Batches after which the training program ends."""
    jumps: Mapping[int, tuple[int, ...]]
    """Batches received -> epochs that the program then jumps to, one call after the other."""
    legs: tuple[Leg, ...]
    """Starts of the job, in order."""

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{label}: {count}"
            for label, count in zip(
                self.table.classes, np.bincount(self.table.numbers).tolist(), strict=True
            )
        )
        return (
            f"{{{sizes}}} of {len(np.unique(self.table.owners))} patients, {self.recipe}, "
            f"{len(self.damaged)} samples damaged, {self.num_batches} batches, "
            f"jumps {dict(self.jumps)}"
        )


def cells_of(table: Table, recipe: Recipe) -> list[str]:
    """Name the quota cell of every sample: its label, or its stratum of the joint table."""
    labels = [table.classes[number] for number in table.numbers.tolist()]
    if recipe.balance.get("strata") is None:
        return labels
    sites = table.columns["site"].tolist()
    return [f"{label} of {site}" for label, site in zip(labels, sites, strict=True)]
