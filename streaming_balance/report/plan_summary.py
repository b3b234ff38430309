"""What a plan will do to a data set, in numbers: before any training, from the plan alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.labelling import carriers, count_carriers
from streaming_balance.storage.shards import ShardSet

# Quotas of a class take at most a handful of values; so many steps show all of them.
STEPS_LOOKED_AT = 4096
# Findings are counted in the members of every batch, which takes longer than asking for quotas.
STEPS_COUNTED = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSummary:
    """One class under a plan."""

    patients: int
    """Distinct patients in the split."""
    before: int
    """Samples in the split: what an epoch in natural order delivers."""
    after: int
    """Samples the first epoch of the plan delivers."""
    share: float
    """Share of the draws that are of the class: the target, or what the first epoch comes to where
    the plan balances something else than the classes. Together 1 unless samples have several."""
    quota_least: int
    """Fewest samples in a global batch."""
    quota_most: int
    """Most samples in a global batch."""
    delivered: int
    """Samples delivered over all epochs asked about."""
    exposure_min: int
    """Deliveries of the patient seen least, over all epochs asked about."""
    exposure_max: int
    """Deliveries of the patient seen most, over all epochs asked about."""

    @property
    def repeats(self) -> float:
        """Mean deliveries of a patient over all epochs asked about."""
        return self.delivered / self.patients if self.patients else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinSummary:
    """Samples of one patient that meet in a global batch of the first epoch."""

    batches: int
    """Global batches looked at, from the first on."""
    batches_with_twins: int
    """Those in which some patient comes more than once."""
    twins: int
    """Samples in them beyond the first one of their patient, of whatever class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """A plan over a split of a data set."""

    split: str
    """The split planned over."""
    epochs: int
    """Epochs that `delivered` and the exposures count."""
    steps: int
    """Global batches of an epoch."""
    global_batch_size: int
    """Samples in a global batch, over all ranks."""
    rank_batch: tuple[int, int] | None
    """Fewest and most samples of one rank's part of a full batch; None if no ranks were named."""
    classes: Mapping[str, ClassSummary]
    """By label, in class order."""
    splits: Mapping[str, Mapping[str, int]]
    """Samples by split and label, over the whole data set."""
    guarantees: Mapping[str, bool]
    """Which promises the plan keeps."""
    twins: TwinSummary
    """How often a patient meets itself in a batch."""
    warnings: tuple[str, ...]
    """What works as asked and is probably not meant."""
    digest: str
    """The plan's digest."""


def summarise_plan(
    shards: ShardSet, plan: BalancedPlan, *, split: str, epochs: int, num_ranks: int | None = None
) -> PlanSummary:
    """Count what a plan delivers.

    Args:
        shards: the data set the plan was made for.
        plan: the plan.
        split: the split the plan was made for.
        epochs: how many epochs to count, at least 1.
        num_ranks: data-parallel ranks to deal to; None leaves ranks out.

    Returns:
        The numbers, by class and in all.

    Raises:
        ConfigError: `epochs` is below 1, or there are more ranks than samples in a batch.
    """
    if epochs < 1:
        raise ConfigError(f"epochs is {epochs}; it must be at least 1.")
    labels, patients = shards.labels(split), shards.patients(split)
    first_epoch, run = plan.exposure(1, 0), plan.exposure(epochs, 0)
    batches = _batch_counts(plan, shards, labels)
    classes = {}
    for number, label in enumerate(shards.classes):
        mine = carriers(labels, number)
        exposure = patient_exposure(patients[mine], run[mine])
        after = int(first_epoch[mine].sum())
        part = after / max(1, int(first_epoch.sum()))
        classes[label] = ClassSummary(
            patients=len(exposure),
            before=int(mine.sum()),
            after=after,
            share=plan.shares.get(label, 0.0) if _is_by_class(plan, shards) else part,
            quota_least=int(batches[:, number].min()),
            quota_most=int(batches[:, number].max()),
            delivered=int(run[mine].sum()),
            exposure_min=min(exposure.values(), default=0),
            exposure_max=max(exposure.values(), default=0),
        )
    return PlanSummary(
        split=split,
        epochs=epochs,
        steps=plan.num_steps(0),
        global_batch_size=plan.global_batch_size,
        rank_batch=None if num_ranks is None else _rank_batch(plan, num_ranks),
        classes=classes,
        splits={name: class_counts(shards, name) for name in shards.splits},
        guarantees=dict(plan.guarantees),
        twins=count_twins(plan, patients),
        warnings=plan.warnings,
        digest=plan.digest,
    )


def patient_exposure(patients: NDArray[np.str_], exposure: NDArray[np.int64]) -> dict[str, int]:
    """Add up the deliveries of each patient's samples.

    Args:
        patients: `(n,)` patient of every sample.
        exposure: `(n,)` deliveries of every sample.

    Returns:
        patient -> deliveries, sorted by patient.

    Examples:
        >>> patient_exposure(np.array(["P2", "P1", "P2"]), np.array([1, 5, 2]))
        {'P1': 5, 'P2': 3}
    """
    names, owners = np.unique(patients, return_inverse=True)
    totals = np.zeros(len(names), dtype=np.int64)
    np.add.at(totals, owners, exposure)
    return dict(zip(names.tolist(), totals.tolist(), strict=True))


def count_twins(plan: BalancedPlan, patients: NDArray[np.str_]) -> TwinSummary:
    """Count how often samples of one patient meet in a global batch of the first epoch.

    Args:
        plan: the plan.
        patients: `(N,)` patient of every sample number.

    Returns:
        Counts over the first batches.

    Examples:
        >>> plan = BalancedPlan.from_labels([0, 0, 0, 0], balance="none", global_batch_size=2)
        >>> count_twins(plan, np.array(["P1", "P1", "P1", "P1"])).twins
        2
    """
    steps = min(plan.num_steps(0), STEPS_COUNTED)
    owners = np.unique(patients, return_inverse=True)[1]
    extra = [
        len(batch) - len(np.unique(owners[batch]))
        for batch in (plan.batch(0, step) for step in range(steps))
    ]
    return TwinSummary(batches=steps, batches_with_twins=sum(map(bool, extra)), twins=sum(extra))


def class_counts(shards: ShardSet, split: str) -> dict[str, int]:
    """Count the samples of each class in a split, empty classes included.

    Returns:
        label -> samples, in class order.
    """
    counts = count_carriers(shards.labels(split), len(shards.classes))
    return dict(zip(shards.classes, counts.tolist(), strict=True))


def _batch_counts(plan: BalancedPlan, shards: ShardSet, labels: NDArray[Any]) -> NDArray[np.int64]:
    """Count the classes of the data set in the first global batches: `(steps, K)`."""
    classes, steps = shards.classes, plan.num_steps(0)
    if shards.multi_label or not _is_by_class(plan, shards):
        members = [plan.batch(0, step) for step in range(min(steps, STEPS_COUNTED))]
        return np.stack([count_carriers(labels[batch], len(classes)) for batch in members])
    quotas = np.stack([plan.quotas(0, step) for step in range(min(steps, STEPS_LOOKED_AT))])
    counts = np.zeros((len(quotas), len(classes)), dtype=np.int64)
    counts[:, [classes.index(label) for label in plan.classes]] = quotas
    return counts


def _is_by_class(plan: BalancedPlan, shards: ShardSet) -> bool:
    """Say whether the plan's classes are the data set's: not so for `target_label`, say."""
    return set(plan.classes) <= set(shards.classes)


def _rank_batch(plan: BalancedPlan, num_ranks: int) -> tuple[int, int]:
    """Give the fewest and most samples a rank gets of a full batch.

    Dealing is round-robin, so that a rank gets the floor or the ceiling of an equal share.
    """
    steps = plan.num_steps(0)
    for step in {0, steps - 1}:  # the last batch may be shorter, and too short for the ranks
        plan.rank_slots(0, step, rank=0, num_ranks=num_ranks)
    size = plan.batch_size(0, 0)
    return size // num_ranks, -(-size // num_ranks)
