"""From what users hold (labels, patients, a packed split) to the class table of a plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.members import ClassTable, class_codes, class_table, complete_array
from streaming_balance.plan.options import listed
from streaming_balance.plan.strategies import InstanceBalanced, in_declared_order
from streaming_balance.plan.strategy import Strategy


class LabelledSplits(Protocol):
    """What a plan needs of a data set: class numbers, patients and keys per split."""

    @property
    def classes(self) -> list[str]:
        """Labels in class order."""
        ...

    @property
    def train_splits(self) -> tuple[str, ...]:
        """Names of the splits that may be balanced."""
        ...

    def labels(self, split: str) -> NDArray[np.int64]:
        """`(N,)` class number of every sample."""
        ...

    def patients(self, split: str) -> NDArray[np.str_]:
        """`(N,)` patient of every sample."""
        ...

    def keys(self, split: str) -> NDArray[np.str_]:
        """`(N,)` key of every sample."""
        ...


def labels_table(
    labels: ArrayLike, patients: ArrayLike | None, *, strategy: Strategy
) -> ClassTable:
    """Group a list of labels; sample numbers are positions in it.

    Args:
        labels: `(N,)` one label per sample.
        patients: `(N,)` patient of every sample, or None.
        strategy: says whether classes cycle over patients.

    Raises:
        ConfigError: labels or patients are missing or do not fit each other.

    Examples:
        >>> from streaming_balance.plan.strategies import ClassBalanced
        >>> labels_table(["a", "b", "a"], ["P1", "P2", "P1"], strategy=ClassBalanced()).sizes
        {'a': 1, 'b': 1}
    """
    codes, classes = class_codes(labels)
    check_patients_known(strategy, are_known=patients is not None)
    owners = None if patients is None else complete_array("patients", patients).astype(np.str_)
    if owners is not None and owners.shape != codes.shape:
        raise ConfigError(
            f"patients has shape {owners.shape} for {len(codes)} labels; give one per sample."
        )
    return class_table(
        codes,
        classes=classes,
        patients=owners,
        keys=None,
        excluded=None,
        by_patient=owners is not None and _wants_patients(strategy),
    )


def split_table(
    shards: LabelledSplits, split: str, *, left_out: list[str], strategy: Strategy
) -> ClassTable:
    """Group a split of a packed data set; sample numbers are rows of its sample table.

    Args:
        shards: an opened data set.
        split: name of the split.
        left_out: sample keys or patient ids to leave out.
        strategy: says whether classes cycle over patients.

    Raises:
        ConfigError: balancing on a split that is not for training, a name that is neither a key
            nor a patient, or a patient with two labels.
    """
    patients, keys = shards.patients(split), shards.keys(split)
    _check_for_training(split, shards.train_splits, strategy=strategy)
    return class_table(
        shards.labels(split),
        classes=shards.classes,
        patients=patients,
        keys=keys,
        excluded=_excluded(left_out, patients, keys) if left_out else None,
        by_patient=_wants_patients(strategy),
    )


def named_by_class(strategy: Strategy, shards: LabelledSplits) -> Strategy:
    """Name weights given as a list, where the data set's class order was declared."""
    if getattr(shards, "classes_declared", False):
        return in_declared_order(strategy, shards.classes)
    return strategy


def check_patients_known(strategy: Strategy, *, are_known: bool) -> None:
    """Refuse to cycle over patients that nobody named.

    Raises:
        ConfigError: the user wrote `unit: patient` and gave no patients.
    """
    if strategy.unit == "patient" and not are_known:
        raise ConfigError(
            f"{strategy.name}: unit is 'patient', but no patients are given. Name the patient of "
            f"every sample with patients=, or leave unit out."
        )


def _check_for_training(split: str, train_splits: tuple[str, ...], *, strategy: Strategy) -> None:
    """Refuse to balance what judges the training; its natural order may be planned."""
    # How the last batch ends concerns no share.
    if split in train_splits or replace(strategy, last="full") == InstanceBalanced():
        return
    raise ConfigError(
        f"balance is {strategy.name!r} on split {split!r}, which is not for training (only "
        f"{listed(train_splits)}): a score on balanced data says nothing about patients as they "
        f"come. Use eval_loader(shards, split={split!r}, ...) to evaluate, leave balance out to "
        f"plan the natural order, or name the split in --train-splits when packing."
    )


def _wants_patients(strategy: Strategy) -> bool:
    """Say whether classes cycle over patients under this strategy."""
    return (strategy.unit or strategy.default_unit) == "patient"


def _excluded(
    names: list[str], patients: NDArray[np.str_], keys: NDArray[np.str_]
) -> NDArray[np.bool_]:
    """Mark the samples a user named by key or by patient."""
    known = np.isin(names, keys) | np.isin(names, patients)
    if not known.all():
        unknown = [name for name, found in zip(names, known.tolist(), strict=True) if not found]
        raise ConfigError(
            f"exclude names {listed(unknown[:5])}, which is neither a sample key nor a patient of "
            f"the split.{did_you_mean(unknown[0], keys.tolist())}"
        )
    return np.asarray(np.isin(keys, names) | np.isin(patients, names))


def names_left_out(exclude: Iterable[str]) -> list[str]:
    """Give the names to exclude in order, each once; one text is not a list of its letters."""
    if isinstance(exclude, str | bytes):
        raise ConfigError(
            f"exclude is {exclude!r}; it must be a list of keys or patient ids, not text. "
            f"Write [{exclude!r}] to leave one out."
        )
    return sorted(set(exclude))
