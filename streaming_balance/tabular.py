"""SMOTE for feature tables: synthetic rows for rare classes, made from training rows alone.

Only rows of measurements have a meaningful "in between". Volumes do not, so they are refused.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import check_seed, stream_key, words
from streaming_balance.plan.labels import class_codes, complete_array
from streaming_balance.plan.options import check_number, listed, whole_number
from streaming_balance.plan.strategies import Upsample

logger = logging.getLogger(__name__)

# More columns than any table of measurements has (a whole transcriptome is about 60,000 genes),
# and the voxels of one 256 x 256 slice: from here on a row is a flattened image.
IMAGE_FEATURES = 256 * 256
TRAIN = "train"
NAMES_SHOWN = 5

INSTEAD_OF_VOLUMES = (
    "SMOTE draws straight lines between samples. Half-way between two patients' volumes lies no "
    "patient: anatomy at two places at once, and neighbours picked by voxel distance are alike in "
    'position, not in disease. For volumes use train_loader(..., balance="class_balanced"), '
    "transforms that augment (transform=), or mixing=."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OversampledTable:
    """A feature table with synthetic rows; unpacks to `features, labels`."""

    features: NDArray[Any]
    """`(M, F)` the training rows in their order, then the synthetic rows, class by class."""
    labels: NDArray[Any]
    """`(M,)` labels, of the dtype they were given in."""
    rows: NDArray[np.int64]
    """`(M,)` row of the table that was given; -1 for a synthetic row."""

    @property
    def is_synthetic(self) -> NDArray[np.bool_]:
        """`(M,)` True for rows that are no patient's."""
        return np.asarray(self.rows < 0)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Give features and labels, as imbalanced-learn's `fit_resample` does."""
        return iter((self.features, self.labels))


def smote(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    train: ArrayLike | None = None,
    target_ratio: float = 1.0,
    k_neighbors: int = 5,
    seed: int = 0,
) -> OversampledTable:
    """Grow the small classes of a feature table with synthetic rows between real ones.

    Split by patient first, and bring the columns to one scale (by the training rows' mean and
    deviation): neighbours are found by Euclidean distance. The result holds training rows only, so
    that nothing synthetic can reach validation, and nothing of validation a synthetic row.

    Args:
        features: `(N, F)` numbers, a row per sample; whole numbers become float64.
        labels: `(N,)` one label per row.
        train: which rows are for training: `(N,)` booleans, or `(N,)` names of splits, where
            `"train"` is. None if all rows given are.
        target_ratio: a class smaller than this ratio to the largest grows until it has it, in
            (0, 1].
        k_neighbors: how many nearest rows of its class a row is joined with, at least 1.
        seed: integer in [0, 2**64 - 1]. Each class has a random stream of its own; no global
            generator is read or moved.

    Returns:
        The training rows and the synthetic ones, of float32 if the features are, else float64.

    Raises:
        ConfigError: volumes or flattened images; features that are no finite numbers; no training
            row; a class too small for `k_neighbors`; a setting out of range; imbalanced-learn is
            not installed.

    Source:
        Chawla et al., "SMOTE: Synthetic Minority Over-sampling Technique", JAIR 2002.

    Examples:
        >>> features = np.arange(20.0).reshape(10, 2)
        >>> grown = smote(features, ["HGG"] * 7 + ["LGG"] * 3, k_neighbors=2)
        >>> dict(zip(*np.unique(grown.labels, return_counts=True)))
        {np.str_('HGG'): np.int64(7), np.str_('LGG'): np.int64(7)}
        >>> grown.rows.tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -1, -1, -1]
    """
    seed = check_seed(seed)
    check_number(target_ratio, setting="target_ratio", least=0, most=1, open_below=True)
    neighbours = _checked_neighbours(k_neighbors)
    table, names = _feature_table(features), complete_array("labels", labels)
    rows = _training_rows(train, len(table))
    _check_labels_fit(names, table)
    table, names = table[rows], names[rows]
    _check_finite(table, rows)
    codes, classes = class_codes(names)
    sizes = dict(zip(map(str, classes), np.bincount(codes).tolist(), strict=True))
    wanted = _growth(sizes, target_ratio)
    _check_neighbours_exist(wanted, sizes, neighbours)
    grown_features, grown_labels = [table], [names]
    for number, label in enumerate(sizes):
        if wanted[label]:
            mine = codes == number
            key = stream_key(seed, "smote", label)
            grown_features.append(_synthesised(table, mine, wanted[label], neighbours, key))
            grown_labels.append(np.repeat(names[mine][:1], wanted[label]))
    num_synthetic = sum(wanted.values())
    return OversampledTable(
        features=np.concatenate(grown_features),
        labels=np.concatenate(grown_labels),
        rows=np.concatenate([rows, np.full(num_synthetic, -1, dtype=np.int64)]),
    )


def _synthesised(
    table: NDArray[Any], mine: NDArray[np.bool_], count: int, neighbours: int, key: int
) -> NDArray[Any]:
    """Make `count` rows between the rows of one class: `(count, F)`."""
    own = table[mine]
    # The library refuses a table of one class, so one row stands by as another; it is joined with
    # none, and what it holds does not matter.
    other = own[:1]
    maker = _smote_class()(
        sampling_strategy={1: len(own) + count},
        k_neighbors=neighbours,
        random_state=int(words(key, 1)[0] >> np.uint64(32)),
    )
    rows, _ = maker.fit_resample(np.concatenate([own, other]), [1] * len(own) + [0])
    return np.asarray(rows[len(own) + 1 :], dtype=table.dtype)


def _smote_class() -> Callable[..., Any]:
    """Load imbalanced-learn, which takes a second or two."""
    # Loading it draws from Python's generator: its progress bars number their styles at random.
    state = random.getstate()
    try:
        from imblearn.over_sampling import SMOTE
    except ImportError as error:
        raise ConfigError(
            "smote needs imbalanced-learn, which is not installed. Install it with "
            "pip install 'streaming-balance[tabular]'."
        ) from error
    finally:
        random.setstate(state)
    smote_class: Callable[..., Any] = SMOTE
    return smote_class


def _growth(sizes: Mapping[str, int], target_ratio: float) -> dict[str, int]:
    """Count the synthetic rows each class needs; say so if none does."""
    wanted = Upsample(target_ratio=target_ratio).resampled(sizes)
    if wanted == sizes:
        smallest = min(sizes, key=sizes.__getitem__)
        logger.warning(
            "smote: target_ratio is %g, but smallest to largest is %.3f already (%r): no "
            "synthetic row is made.",
            target_ratio,
            sizes[smallest] / max(sizes.values()),
            smallest,
        )
    return {label: wanted[label] - size for label, size in sizes.items()}


def _feature_table(features: ArrayLike) -> NDArray[Any]:
    """Give the features as `(N, F)` float32 or float64; refuse images and what has no numbers."""
    # A data set of volumes would be read from end to end by asking numpy for its array.
    if not isinstance(features, list | tuple) and not hasattr(features, "__array__"):
        raise ConfigError(
            f"features is a {type(features).__name__}; smote takes a feature table, (N, F) "
            f"numbers. {INSTEAD_OF_VOLUMES}"
        )
    try:
        table = np.asarray(features)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"features cannot be read as one array ({error}); give (N, F) numbers in main memory, "
            f"every row with the same columns."
        ) from error
    if table.ndim > 2 or (table.ndim == 2 and table.shape[1] >= IMAGE_FEATURES):
        raise ConfigError(
            f"features have shape {table.shape}: these are images, not a feature table of (N, F) "
            f"with F below {IMAGE_FEATURES}. {INSTEAD_OF_VOLUMES}"
        )
    if table.ndim != 2 or 0 in table.shape:
        raise ConfigError(
            f"features have shape {table.shape}; give (N, F) with N >= 1 rows and F >= 1 columns."
        )
    if table.dtype.kind not in "fiu":
        raise ConfigError(
            f"features are {table.dtype}; smote takes numbers that measure something. Between two "
            f'categories lies none: leave such columns out, or repeat rows with balance="upsample".'
        )
    return table if table.dtype in (np.float32, np.float64) else table.astype(np.float64)


def _training_rows(train: ArrayLike | None, num_rows: int) -> NDArray[np.int64]:
    """List the rows that are for training, in order."""
    if train is None:
        return np.arange(num_rows, dtype=np.int64)
    marks = np.asarray(train)
    if marks.shape != (num_rows,) or marks.dtype.kind not in "bUOT":
        raise ConfigError(
            f"train is {marks.dtype} of shape {marks.shape} for {num_rows} rows; give a boolean "
            f"or the name of its split for every row. From row numbers: "
            f"np.isin(np.arange({num_rows}), rows)."
        )
    is_mask = marks.dtype == np.bool_ or {type(mark) for mark in marks.tolist()} == {bool}
    chosen = marks.astype(np.bool_) if is_mask else marks == TRAIN
    rows = np.flatnonzero(chosen).astype(np.int64)
    if not rows.size:
        found = listed(sorted(set(map(str, marks.tolist())))[:NAMES_SHOWN])
        raise ConfigError(
            f"train marks none of {num_rows} rows (it holds {found}); rows for training are True "
            f"or {TRAIN!r}."
        )
    return rows


def _check_labels_fit(names: NDArray[Any], table: NDArray[Any]) -> None:
    """Refuse labels that are not one per row."""
    if names.shape != (len(table),):
        raise ConfigError(
            f"labels have shape {names.shape} for {len(table)} rows of features; give one label "
            f"per row, ({len(table)},)."
        )


def _check_finite(table: NDArray[Any], rows: NDArray[np.int64]) -> None:
    """Refuse missing and infinite values: they have no distance to anything."""
    broken = ~np.isfinite(table)
    if broken.any():
        row, column = np.argwhere(broken)[0].tolist()
        raise ConfigError(
            f"features hold {int(broken.sum())} values that are no finite number, the first "
            f"({table[row, column]}) in row {rows[row]}, column {column}. Fill them in from the "
            f"training rows, or leave these rows out."
        )


def _checked_neighbours(k_neighbors: int) -> int:
    """Give `k_neighbors` as a plain integer of at least 1."""
    number = whole_number(k_neighbors)
    if number is None or number < 1:
        raise ConfigError(f"k_neighbors is {k_neighbors!r}; it must be an integer of at least 1.")
    return number


def _check_neighbours_exist(
    wanted: Mapping[str, int], sizes: Mapping[str, int], neighbours: int
) -> None:
    """Refuse to grow a class in which a row has too few others to be joined with."""
    small = {label: sizes[label] for label, count in wanted.items() if count}
    small = {label: size for label, size in small.items() if size <= neighbours}
    if not small:
        return
    fewest = min(small.values())
    shown = ", ".join(f"{label!r} ({size})" for label, size in list(small.items())[:NAMES_SHOWN])
    use = f"Use k_neighbors <= {fewest - 1}, or" if fewest > 1 else "One row has no neighbour;"
    raise ConfigError(
        f"k_neighbors is {neighbours}, but {len(small)} classes have too few training rows for so "
        f'many neighbours: {shown}. {use} repeat rows instead (balance="upsample"), or weigh the '
        f"loss (compute_class_weights)."
    )
