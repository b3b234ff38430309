"""Counting labels of every kind, and describing how unequal the classes are."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.plan.distribution import (
    CLASSES_SAID,
    count_labels,
    distribution_sentence,
    get_class_distribution,
)

GLIOMA = [0] * 75 + [1] * 210


KINDS: dict[str, Any] = {
    "list": GLIOMA,
    "tuple": tuple(GLIOMA),
    "list of tensors": [torch.tensor(label) for label in GLIOMA],
    **{
        f"array of {dtype}": np.array(GLIOMA, dtype=dtype)
        for dtype in ("int64", "int8", "uint64", "float32", "bool", "object")
    },
    **{
        f"tensor of {dtype}": torch.tensor(GLIOMA, dtype=dtype)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16)
    },
    "tensor with a gradient": torch.tensor(GLIOMA, dtype=torch.float32, requires_grad=True),
}


@pytest.mark.parametrize("labels", KINDS.values(), ids=KINDS)
def test_labels_of_any_kind_are_counted_alike(labels: Any) -> None:
    counts = count_labels(labels)
    assert counts == {0: 75, 1: 210}
    assert [type(count) for count in counts.values()] == [int, int]
    assert not any(isinstance(label, np.generic) for label in counts)


@given(
    st.lists(
        st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3) | st.integers(2**16 - 2, 2**16 + 2),
        min_size=1,
    )
)
def test_whole_numbers_are_counted_as_python_counts_them(labels: list[int]) -> None:
    counts = count_labels(np.array(labels, dtype=np.int64))
    assert counts == collections.Counter(labels)
    assert list(counts) == sorted(counts)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint64])
def test_the_ends_of_a_dtype_are_counted_without_wrapping(dtype: type[np.integer[Any]]) -> None:
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    labels = np.array([lowest, highest, highest], dtype=dtype)
    assert count_labels(labels) == {int(lowest): 1, int(highest): 2}


def test_numbers_beyond_the_largest_signed_one_are_counted_as_they_are() -> None:
    labels = np.array([2**64 - 2, 2**64 - 1, 2**64 - 1], dtype=np.uint64)
    assert count_labels(labels) == {2**64 - 2: 1, 2**64 - 1: 2}


def test_more_labels_than_are_counted_at_once_are_all_counted() -> None:
    labels = np.zeros(3_000_001, dtype=np.int8)
    labels[::3] = 1
    assert count_labels(labels) == {0: 2_000_000, 1: 1_000_001}


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (["LGG", "HGG", "lgg"], ["HGG", "LGG", "lgg"]),
        ([10, 9, 1], [1, 9, 10]),
        (np.array(["b", "a"], dtype=object), ["a", "b"]),
    ],
)
def test_labels_come_by_number_where_all_are_numbers_else_as_text(
    labels: Any, order: list[Any]
) -> None:
    assert list(count_labels(labels)) == order


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([], r"labels have shape \(0,\); give one label per sample"),
        ([[0, 1], [1, 0]], r"labels have shape \(2, 2\)"),
        ([0, None], "1 labels are missing, the first at sample 1"),
        ([0.0, float("nan")], "1 labels are missing, the first at sample 1"),
        (np.array([["a"], ["b", "c"]], dtype=object), "a sample has several labels"),
    ],
)
def test_labels_that_cannot_be_counted_are_refused(labels: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        count_labels(labels)


def test_the_distribution_gives_counts_percentages_weights_and_the_ratio() -> None:
    found = get_class_distribution(GLIOMA, ["LGG", "HGG"])
    assert list(found) == ["LGG", "HGG", "ratio"]
    assert found["LGG"]["count"] == 75
    assert found["LGG"]["percentage"] == pytest.approx(26.31578947368421, rel=1e-12)
    assert found["LGG"]["weight"] == pytest.approx(1.9, rel=1e-12)
    assert found["HGG"]["percentage"] == pytest.approx(73.6842105263158, rel=1e-12)
    assert found["HGG"]["weight"] == pytest.approx(0.6785714285714286, rel=1e-12)
    assert f"{found['ratio']:.3f}" == "2.800"


def test_three_classes_and_a_long_tail_are_described_to_twelve_digits() -> None:
    three = get_class_distribution([0] * 100 + [1] * 20 + [2] * 5)
    assert three["ratio"] == 20.0
    assert [three[label]["percentage"] for label in range(3)] == [80.0, 16.0, 4.0]
    tail = get_class_distribution([0] * 921 + [1] * 103)
    assert tail["ratio"] == pytest.approx(8.941747572815533, rel=1e-12)
    assert tail[0]["percentage"] == pytest.approx(89.94140625, rel=1e-12)
    assert tail[1]["weight"] == pytest.approx(4.970873786407767, rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "names", "order"),
    [
        (["LGG", "HGG"], None, ["HGG", "LGG"]),
        (["LGG", "HGG"], ["LGG", "HGG"], ["LGG", "HGG"]),
        ([1, 0], {0: "LGG", 1: "HGG"}, ["LGG", "HGG"]),
        ([7, 3], None, [3, 7]),
        ([1], ["LGG", "HGG", "none yet"], ["LGG", "HGG", "none yet"]),
    ],
)
def test_classes_are_called_by_their_names_in_the_order_of_the_names(
    labels: list[Any], names: Any, order: list[Any]
) -> None:
    assert list(get_class_distribution(labels, names)) == [*order, "ratio"]


def test_a_named_class_without_a_sample_is_there_with_nothing() -> None:
    found = get_class_distribution(GLIOMA, ["LGG", "HGG", "none yet"])
    assert found["none yet"] == {"count": 0, "percentage": 0.0, "weight": 0.0}
    assert found["ratio"] == 2.8
    assert found["LGG"]["weight"] == 1.9


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        ([0, 2], ["LGG", "HGG"], "no name for label 2; it names 0, 1, and the labels are 0, 2"),
        ([0, 1], {0: "LGG"}, "no name for label 1"),
        ([0, 1], ["LGG", "LGG"], "gives two classes one name: 'LGG', 'LGG'"),
        ([0, 1], "LGG", "class_names is 'LGG', one text; give a list"),
        (["ratio", "b"], None, "a class is called 'ratio'"),
    ],
)
def test_names_that_do_not_fit_the_labels_are_refused(
    labels: list[Any], names: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        get_class_distribution(labels, names)


def test_a_sentence_says_counts_percentages_and_ratio() -> None:
    said = distribution_sentence({"LGG": 75, "HGG": 210}, noun="samples")
    assert "LGG: 75 samples (26.3%)" in said
    assert "HGG: 210 samples (73.7%)" in said
    assert said.endswith("largest to smallest 2.800")
    assert "142.5 draws" in distribution_sentence({"LGG": 142.5}, noun="draws")


def test_a_sentence_about_many_classes_stays_short() -> None:
    said = distribution_sentence(dict.fromkeys(range(1000), 3), noun="samples")
    assert said.count("samples") == CLASSES_SAID
    assert "and 980 classes more" in said
