"""From what users hold (labels, patients, a packed split) to the class table of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.cells import make_cells, settle_labels, strata_columns
from streaming_balance.plan.labels import Labels, complete_array, read_labels
from streaming_balance.plan.members import ClassTable, class_table
from streaming_balance.plan.options import listed
from streaming_balance.plan.strategies import InstanceBalanced, in_declared_order
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.unit_strategies import SampleWeights


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

    def labels(self, split: str) -> NDArray[Any]:
        """`(N,)` class number of every sample, int64, or `(N, K)` which labels it has."""
        ...

    def patients(self, split: str) -> NDArray[np.str_]:
        """`(N,)` patient of every sample."""
        ...

    def keys(self, split: str) -> NDArray[np.str_]:
        """`(N,)` key of every sample."""
        ...

    def column(self, split: str, name: str) -> NDArray[Any]:
        """`(N,)` values of a column of the sample table."""
        ...


def labels_table(
    labels: ArrayLike,
    patients: ArrayLike | None,
    *,
    strategy: Strategy,
    strata: ArrayLike | Mapping[str, ArrayLike] | None = None,
) -> ClassTable:
    """Group a list of labels; sample numbers are positions in it.

    Args:
        labels: `(N,)` one label per sample, or several (see `labels.read_labels`).
        patients: `(N,)` patient of every sample, or None.
        strategy: says whether classes cycle over patients, and what several labels mean.
        strata: `(N,)` or `(N, S)` values to balance jointly with the label, or name -> `(N,)`.

    Raises:
        ConfigError: labels, patients or strata are missing or do not fit each other.

    Examples:
        >>> from streaming_balance.plan.strategies import ClassBalanced
        >>> labels_table(["a", "b", "a"], ["P1", "P2", "P1"], strategy=ClassBalanced()).sizes
        {'a': 1, 'b': 1}
    """
    settled = settle_labels(read_labels(labels, unknown=strategy.unknown), strategy)
    check_patients_known(strategy, are_known=patients is not None)
    owners = None if patients is None else complete_array("patients", patients).astype(np.str_)
    if owners is not None and owners.shape != settled.codes.shape:
        raise ConfigError(
            f"patients has shape {owners.shape} for {len(settled.codes)} labels; give one per "
            f"sample."
        )
    columns = _given_columns(strata, strategy, num_samples=len(settled.codes))
    return _table(settled, columns, strategy, patients=owners, keys=None, left_out=None)


def split_table(
    shards: LabelledSplits, split: str, *, left_out: list[str], strategy: Strategy
) -> ClassTable:
    """Group a split of a packed data set; sample numbers are rows of its sample table.

    Args:
        shards: an opened data set.
        split: name of the split.
        left_out: sample keys or patient ids to leave out.
        strategy: says whether classes cycle over patients, and which columns are strata.

    Raises:
        ConfigError: balancing on a split that is not for training, a name that is neither a key
            nor a patient, a column that is not there, or a patient with two labels.
    """
    patients, keys = shards.patients(split), shards.keys(split)
    _check_for_training(split, shards.train_splits, strategy=strategy)
    numbers = shards.labels(split)
    several = numbers.ndim == 2
    labels = Labels(
        classes=tuple(shards.classes),
        codes=np.zeros(len(numbers), dtype=np.int64) if several else numbers,
        membership=numbers.astype(np.bool_) if several else None,
    )
    columns = {
        name: np.asarray(shards.column(split, name)).astype(np.str_)
        for name in strata_columns(strategy) or ()
    }
    return _table(
        settle_labels(labels, strategy),
        columns,
        strategy,
        patients=patients,
        keys=keys,
        left_out=_excluded(left_out, patients, keys) if left_out else None,
    )


def weights_column(
    shards: LabelledSplits, split: str, strategy: Strategy
) -> NDArray[np.float64] | None:
    """Read the column that `sample_weights` names; None for every other strategy.

    Raises:
        ConfigError: no such column, or a value in it is no number.
    """
    if not isinstance(strategy, SampleWeights) or not isinstance(strategy.weights, str):
        return None
    values = np.asarray(shards.column(split, strategy.weights))
    try:
        return values.astype(np.float64)
    except ValueError as error:
        raise ConfigError(
            f"sample_weights: column {strategy.weights!r} holds what is no number ({error})."
        ) from error


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


def check_sizes_suffice(strategy: Strategy) -> None:
    """Refuse what only samples can answer, where classes are known by their sizes alone.

    Raises:
        ConfigError: the strategy asks for patients, strata or one label of several.
    """
    check_patients_known(strategy, are_known=False)
    for option in ("strata", "target_label"):
        value = getattr(strategy, option)
        if value is not None:
            raise ConfigError(
                f"{strategy.name}: {option} is {value!r}, but classes are known "
                f"by their sizes alone. Use from_labels or for_shards, or leave {option} out."
            )


def _table(
    labels: Labels,
    columns: Mapping[str, NDArray[np.str_]],
    strategy: Strategy,
    *,
    patients: NDArray[np.str_] | None,
    keys: NDArray[np.str_] | None,
    left_out: NDArray[np.bool_] | None,
) -> ClassTable:
    """Group samples whose labels are settled."""
    cells = make_cells(labels, columns, strategy)
    without = cells.codes < 0
    if without.any():
        left_out = without if left_out is None else left_out | without
    return class_table(
        cells.codes,
        classes=labels.classes,
        patients=patients,
        keys=keys,
        excluded=left_out,
        by_patient=patients is not None and _wants_patients(strategy),
        cells=cells,
    )


def _given_columns(
    strata: ArrayLike | Mapping[str, ArrayLike] | None, strategy: Strategy, *, num_samples: int
) -> dict[str, NDArray[np.str_]]:
    """Give the strata columns of a list of labels by name, one value per sample."""
    names = strata_columns(strategy)
    if strata is None:
        if names:
            raise ConfigError(
                f"{strategy.name}: strata names {listed(names)}, but no values are given. Name the "
                f"value of every sample with strata={{{names[0]!r}: [...]}}."
            )
        return {}
    given = _named_columns(strata, names)
    for name in names or given:
        if name not in given:
            raise ConfigError(
                f"{strategy.name}: strata names {name!r}, but values are given for "
                f"{listed(given)}.{did_you_mean(name, given)}"
            )
    columns = {
        name: complete_array(f"strata {name!r}", given[name]).astype(np.str_)
        for name in names or given
    }
    for name, values in columns.items():
        if values.shape != (num_samples,):
            raise ConfigError(
                f"strata {name!r} has shape {values.shape} for {num_samples} samples; give one "
                f"value per sample."
            )
    return columns


def _named_columns(
    strata: ArrayLike | Mapping[str, ArrayLike], names: tuple[str, ...] | None
) -> dict[str, ArrayLike]:
    """Give strata by name; an array's columns are named as the strategy names them."""
    if isinstance(strata, Mapping):
        return {str(name): values for name, values in strata.items()}
    array = complete_array("strata", strata)
    columns = array[:, None] if array.ndim == 1 else array
    if columns.ndim != 2:
        raise ConfigError(
            f"strata has shape {array.shape}; give one value per sample, (N,), several, (N, S), or "
            f"a mapping from column name to values."
        )
    titles = names or tuple(f"stratum {number}" for number in range(columns.shape[1]))
    if len(titles) != columns.shape[1]:
        raise ConfigError(
            f"strata has {columns.shape[1]} columns, but the strategy names {listed(titles)} "
            f"beside the label. Give one column for each, or a mapping from column name to values."
        )
    return dict(zip(titles, columns.T, strict=True))


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
