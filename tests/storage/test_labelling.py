"""How labels are written, worked by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.storage.labelling import Labelling, carriers, count_carriers

CHEST = Labelling(classes=("Effusion", "Mass", "Nodule"), multi_label=True)
GRADES = Labelling(classes=("LGG", "HGG"), multi_label=False)


def test_sets_are_ordered_by_their_class_numbers_with_the_empty_set_first() -> None:
    # (), (0,), (0, 1), (0, 1, 2), (0, 2), (1,), (2,)
    ordered = (
        *("", "Effusion", "Effusion|Mass", "Effusion|Mass|Nodule", "Effusion|Nodule"),
        *("Mass", "Nodule"),
    )
    assert CHEST.words([*reversed(ordered), "Mass", ""]) == ordered


def test_single_labels_keep_the_order_of_the_classes_whether_a_sample_has_them_or_not() -> None:
    assert GRADES.words(["HGG"]) == ("LGG", "HGG")
    assert [GRADES.numbers(label) for label in ("LGG", "HGG")] == [(0,), (1,)]


def test_indicators_have_a_one_in_the_column_of_each_finding() -> None:
    found = CHEST.indicators(["", "Effusion|Nodule", "Mass"])
    assert found.tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert found.dtype == np.uint8
    assert CHEST.indicators([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("Mass|Effusion", "in class order, each once: 'Effusion|Mass'"),
        ("Mass|Mass", "in class order, each once: 'Mass'"),
        ("Effusion|Masse", "label 'Masse' is no class.*Did you mean 'Mass'"),
        ("Effusion|", "label '' is no class"),
    ],
)
def test_a_set_that_is_not_written_in_the_one_way_is_refused(label: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CHEST.numbers(label)


def test_a_class_whose_name_holds_the_separator_is_refused_under_multi_label_alone() -> None:
    with pytest.raises(ConfigError, match=r"classes name 'A\|B'.*name each finding alone"):
        Labelling(classes=("A|B", "C"), multi_label=True)
    assert Labelling(classes=("A|B", "C"), multi_label=False).numbers("A|B") == (0,)


def test_the_member_of_a_set_is_an_array_that_numpy_reads() -> None:
    stored = np.load(io.BytesIO(CHEST.payload("Effusion|Nodule")), allow_pickle=False)
    assert (stored.dtype, stored.tolist()) == (np.uint8, [1, 0, 1])
    assert CHEST.member_name("P1") == "P1.cls.npy"
    assert (GRADES.payload("HGG"), GRADES.member_name("P1")) == (b"1", "P1.cls")


def test_counting_adds_a_sample_to_each_of_its_findings() -> None:
    labels = CHEST.indicators(["Effusion|Mass", "Mass", "", "Mass"])
    assert count_carriers(labels, 3).tolist() == [1, 3, 0]
    assert [carriers(labels, number).sum() for number in range(3)] == [1, 3, 0]
    assert count_carriers(np.array([1, 1, 0]), 3).tolist() == [1, 2, 0]


def test_counts_of_more_samples_than_a_byte_holds_are_right() -> None:
    assert count_carriers(np.ones((1000, 2), dtype=np.uint8), 2).tolist() == [1000, 1000]
