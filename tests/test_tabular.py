"""Synthetic rows of feature tables: where they lie, whom they come from, what is refused."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from imblearn.over_sampling import SMOTE
from numpy.typing import NDArray

import streaming_balance
from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key, words
from streaming_balance.tabular import OversampledTable, smote

Rows = NDArray[np.float64]

# BraTS 2018 in a classifier's feature table: 210 high-grade, 75 low-grade, and a rarer third.
SIZES = {"HGG": 210, "LGG": 75, "mixed": 12}


def feature_table(sizes: dict[str, int] = SIZES, *, columns: int = 4) -> tuple[Rows, list[str]]:
    generator = np.random.default_rng(7)
    parts = [
        generator.normal(loc=3 * place, size=(size, columns))
        for place, size in enumerate(sizes.values())
    ]
    return np.concatenate(parts), [label for label, size in sizes.items() for _ in range(size)]


def counts(labels: NDArray[Any]) -> dict[Any, int]:
    names, found = np.unique(labels, return_counts=True)
    return dict(zip(names.tolist(), found.tolist(), strict=True))


def distance_to_nearest_segment(row: Rows, real: Rows, *, neighbours: int) -> float:
    """How far a row lies from all segments between a real row and one of its nearest others."""
    best = np.inf
    for start in real:
        far = np.linalg.norm(real - start, axis=1)
        for end in real[np.argsort(far, kind="stable")[1 : neighbours + 1]]:
            along = end - start
            part = np.clip((row - start) @ along / (along @ along), 0, 1)
            best = min(best, float(np.linalg.norm(start + part * along - row)))
    return best


def test_every_class_grows_to_its_ratio_and_no_real_row_is_changed_or_lost() -> None:
    features, labels = feature_table()
    grown = smote(features, labels, target_ratio=0.5)
    assert counts(grown.labels) == {"HGG": 210, "LGG": 105, "mixed": 105}
    real = ~grown.is_synthetic
    assert np.array_equal(grown.features[real], features)
    assert grown.labels[real].tolist() == labels
    assert grown.rows[real].tolist() == list(range(297))
    assert set(grown.rows[grown.is_synthetic].tolist()) == {-1}


def test_synthetic_rows_lie_between_a_row_and_its_nearest_neighbours_of_the_same_class() -> None:
    features, labels = feature_table({"HGG": 40, "LGG": 15})
    grown = smote(features, labels, k_neighbors=3)
    real = features[40:]
    synthetic = grown.features[grown.is_synthetic]
    assert len(synthetic) == 25
    far = [distance_to_nearest_segment(row, real, neighbours=3) for row in synthetic]
    assert max(far) < 1e-12
    # Were any pair joined, some rows would lie off the segments of the nearest ones.
    assert len(np.unique(synthetic, axis=0)) == 25


def test_a_class_gets_the_rows_that_imbalanced_learn_makes_over_the_whole_table() -> None:
    features, labels = feature_table({"HGG": 30, "LGG": 12})
    ours = smote(features, labels, seed=42)
    word = int(words(stream_key(42, "smote", "LGG"), 1)[0] >> np.uint64(32))
    theirs, names = SMOTE(random_state=word).fit_resample(features, labels)
    assert np.array_equal(ours.features, theirs)
    assert ours.labels.tolist() == list(names)


def test_rows_of_other_splits_neither_come_back_nor_shape_what_does() -> None:
    features, labels = feature_table()
    is_train = np.random.default_rng(1).random(len(labels)) < 0.7
    splits = np.where(is_train, "train", "val")
    expected = smote(features[is_train], np.array(labels)[is_train])
    changed = np.where(is_train[:, None], features, 1e6)
    for marks in (is_train, splits, splits.tolist(), is_train.astype(object)):
        grown = smote(changed, labels, train=marks)
        assert np.array_equal(grown.features, expected.features)
        assert grown.labels.tolist() == expected.labels.tolist()
        assert grown.rows[~grown.is_synthetic].tolist() == np.flatnonzero(is_train).tolist()


def test_equal_seeds_give_equal_rows_and_neighbouring_seeds_others() -> None:
    features, labels = feature_table()
    first, again, other = (smote(features, labels, seed=seed).features for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.isclose(first[297:], other[297:]).all(axis=1).any()


def test_adding_a_class_leaves_the_synthetic_rows_of_the_others_alone() -> None:
    features, labels = feature_table()
    without = smote(features[:285], labels[:285])
    together = smote(features, labels)
    low_grade = together.is_synthetic & (together.labels == "LGG")
    assert np.array_equal(together.features[low_grade], without.features[without.is_synthetic])


def test_a_table_unpacks_to_features_and_labels() -> None:
    features, labels = smote(*feature_table())
    assert features.shape == (630, 4)
    assert labels.shape == (630,)


def test_what_was_given_is_left_as_it_was() -> None:
    features, labels = feature_table()
    before = features.copy()
    grown = smote(features, labels)
    grown.features[:] = 0
    assert np.array_equal(features, before)


def test_no_global_generator_is_read_or_moved() -> None:
    features, labels = feature_table()
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator is what must not matter
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
        results.append(smote(features, labels).features)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])
    assert np.array_equal(results[0], results[1])


def test_loading_imbalanced_learn_moves_no_global_generator() -> None:
    program = """
import random
import numpy as np
from streaming_balance.tabular import smote

before = random.getstate(), np.random.get_state()[1].tolist()
smote(np.arange(40.0).reshape(20, 2), [0] * 13 + [1] * 7)
assert (random.getstate(), np.random.get_state()[1].tolist()) == before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("float32", "float32"), ("float64", "float64"), ("float16", "float64"), ("int16", "float64")],
)
def test_precision_is_kept_and_whole_numbers_are_not_rounded_between(given: str, kept: str) -> None:
    features, labels = feature_table()
    grown = smote((features * 10).astype(given), labels)
    assert grown.features.dtype == kept
    assert (grown.features[grown.is_synthetic] % 1 != 0).any()


def test_tensors_and_labels_of_any_dtype_are_welcome() -> None:
    features, labels = feature_table({"0": 20, "1": 8})
    for given in (
        np.array(labels, dtype=np.int8),
        np.array(labels),
        np.array(labels, dtype=object),
    ):
        grown = smote(torch.from_numpy(features), given)
        assert grown.labels.dtype == given.dtype
        assert [str(label) for label in grown.labels[20:]] == ["1"] * 20
    assert counts(smote(features, torch.tensor([0] * 20 + [1] * 8)).labels) == {0: 20, 1: 20}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"HGG": 20, "LGG": 20}, "target_ratio is 1, but smallest to largest is 1.000 already"),
        ({"HGG": 20}, "smallest to largest is 1.000 already"),
    ],
)
def test_a_table_that_needs_nothing_comes_back_as_it_was_with_a_warning(
    sizes: dict[str, int], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    features, labels = feature_table(sizes)
    with caplog.at_level(logging.WARNING):
        grown = smote(features, labels)
    assert np.array_equal(grown.features, features)
    assert not grown.is_synthetic.any()
    assert said in caplog.text


class Volumes:
    """A data set that must not be read."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int) -> NDArray[Any]:
        raise AssertionError("a volume was read")


@pytest.mark.parametrize(
    "volumes",
    [
        np.zeros((10, 4, 4, 4)),
        np.zeros((10, 1, 8, 8, 8), dtype=np.int16),
        torch.zeros(10, 32, 32),
        [np.zeros((3, 3, 3))] * 10,
        np.zeros((10, 64 * 64 * 64), dtype=np.float32),
        Volumes(),
    ],
    ids=["volumes", "channels", "slices", "list", "flattened", "data set"],
)
def test_volumes_are_refused_with_the_reason_and_what_to_use_instead(volumes: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        smote(volumes, [0] * 6 + [1] * 4)
    message = str(caught.value)
    assert "Half-way between two patients' volumes lies no patient" in message
    assert 'train_loader(..., balance="class_balanced")' in message


def test_a_table_as_wide_as_a_transcriptome_is_no_image() -> None:
    features = np.random.default_rng(0).normal(size=(10, 60_000)).astype(np.float32)
    assert smote(features, [0] * 6 + [1] * 4, k_neighbors=3).features.shape == (12, 60_000)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"features": np.arange(10.0)}, r"shape \(10,\); give \(N, F\)"),
        ({"features": np.zeros((10, 0))}, r"shape \(10, 0\)"),
        ({"features": [[1.0], [1.0, 2.0]]}, "cannot be read as one array"),
        ({"features": [["T1", 3.0]] * 10}, "features are <U.*; smote takes numbers.*upsample"),
        ({"features": np.zeros((10, 2), dtype=bool)}, "features are bool"),
        ({"labels": [0, 1]}, r"labels have shape \(2,\) for 10 rows"),
        ({"labels": np.zeros((10, 3), dtype=int)}, r"labels have shape \(10, 3\)"),
        ({"labels": ["a"] * 9 + [None]}, "1 labels are missing, the first at sample 9"),
        ({"train": [0, 1, 2]}, r"train is int64 of shape \(3,\) for 10 rows.*np.isin"),
        ({"train": np.arange(10)}, r"give a boolean or the name of its split"),
        ({"train": [True]}, r"train is bool of shape \(1,\)"),
        ({"train": ["Train"] * 9 + ["val"]}, r"none of 10 rows \(it holds 'Train', 'val'\)"),
        ({"train": [False] * 10}, "train marks none of 10 rows"),
        ({"target_ratio": 0}, r"target_ratio is 0; it must be a number in \(0, 1\]"),
        ({"target_ratio": 1.5}, r"target_ratio is 1.5"),
        ({"k_neighbors": 0}, "k_neighbors is 0; it must be an integer of at least 1"),
        ({"k_neighbors": True}, "k_neighbors is True"),
        ({"k_neighbors": 4}, r"few training rows.*'1' \(4\)\. Use k_neighbors <= 3, or repeat"),
        ({"labels": [0] * 9 + [1]}, r"'1' \(1\)\. One row has no neighbour; repeat rows"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_grown_is_refused(change: dict[str, Any], complaint: str) -> None:
    call: dict[str, Any] = {
        "features": np.arange(20.0).reshape(10, 2),
        "labels": [0] * 6 + [1] * 4,
        "k_neighbors": 3,
        **change,
    }
    with pytest.raises(ConfigError, match=complaint):
        smote(call.pop("features"), call.pop("labels"), **call)


def test_a_missing_value_is_named_by_its_row_in_the_table_that_was_given() -> None:
    features = np.arange(20.0).reshape(10, 2)
    features[7, 1] = np.nan
    labels, train = [0] * 6 + [1] * 4, [False] + [True] * 9
    with pytest.raises(ConfigError, match=r"hold 1 values .*\(nan\) in row 7, column 1"):
        smote(features, labels, train=train, k_neighbors=3)
    # In a row that is not for training it stands in nobody's way.
    train[7] = False
    assert smote(features, labels, train=train, k_neighbors=2).is_synthetic.sum() == 2


def test_a_table_is_frozen() -> None:
    table = smote(*feature_table())
    assert isinstance(table, OversampledTable)
    with pytest.raises(AttributeError):
        table.rows = table.rows[:1]  # type: ignore[misc]


def test_without_imbalanced_learn_the_error_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['imblearn'] = None\n"
        "import streaming_balance as sb\n"
        "try:\n"
        "    sb.smote([[1.0], [2.0], [3.0], [4.0], [5.0]], [0, 0, 0, 1, 1], k_neighbors=1)\n"
        "except sb.ConfigError as error:\n"
        "    print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install 'streaming-balance[tabular]'" in answer.stdout


def test_it_is_reached_from_the_root() -> None:
    assert streaming_balance.smote is smote
