"""Who belongs to a class: units, names, labels of every kind, digests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.labels import class_codes
from streaming_balance.plan.members import (
    ClassMembers,
    class_table,
    fixed_subset,
    sized_table,
)


def members_of(patients: list[str], samples: list[int] | None = None) -> ClassMembers:
    """One class of patients; `samples` marks the samples that belong to it."""
    codes = np.zeros(len(patients), dtype=np.int64)
    if samples is not None:
        codes[:] = 1
        codes[samples] = 0
    table = class_table(
        codes,
        classes=["a", "b"],
        patients=np.array(patients),
        keys=None,
        excluded=None,
        by_patient=True,
    )
    return table.members[0]


@pytest.mark.parametrize(
    ("labels", "codes", "classes"),
    [
        (["LGG", "HGG", "LGG"], [1, 0, 1], ["HGG", "LGG"]),
        ([2, 0, 2, 7], [1, 0, 1, 2], [0, 2, 7]),
        (["10", "9", "10"], [1, 0, 1], ["9", "10"]),
        ([1.5, -1.0], [1, 0], [-1.0, 1.5]),
        ([True, False, True], [1, 0, 1], [False, True]),
        (torch.tensor([3, 3, 1]), [1, 1, 0], [1, 3]),
        (np.array(["b", 1, "b"], dtype=object), [1, 0, 1], ["1", "b"]),
        (np.array([5, 4], dtype=np.uint8), [1, 0], [4, 5]),
    ],
)
def test_labels_of_every_kind_are_numbered_in_class_order(
    labels: ArrayLike, codes: list[int], classes: list[object]
) -> None:
    got, names = class_codes(labels)
    assert got.tolist() == codes
    assert got.dtype == np.int64
    assert names == classes


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], r"shape \(0,\); they must be one label per sample, \(N,\) with N >= 1"),
        ("LGG", r"shape \(\)"),
        ([[0, 1], [1, 0]], r"shape \(2, 2\)"),
        ([["a"], ["b", "c"]], r"different numbers of entries per sample; give one per sample"),
        (np.array([["a"], ["b", "c"]], dtype=object), r"several labels \(\['a'\]\); give one"),
        (["LGG", None, None], "2 labels are missing, the first at sample 1"),
        (["LGG", "HGG", float("nan")], "1 labels are missing, the first at sample 2"),
        (np.array(["LGG", float("nan")], dtype=object), "1 labels are missing, the first at"),
        ([0.0, float("nan"), 1.0], "1 labels are missing, the first at sample 1"),
        ([0.0, float("inf")], "1 labels are missing"),
    ],
)
def test_labels_that_are_missing_or_not_one_each_are_refused(
    labels: ArrayLike, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        class_codes(labels)


def test_a_class_may_be_called_nan() -> None:
    assert class_codes(["nan", "a"])[1] == ["a", "nan"]
    assert class_codes(np.array(["nan", "a"]))[1] == ["a", "nan"]


def test_sizes_are_whole_numbers_with_labels_that_differ_as_text() -> None:
    counted = dict(zip(["a", "b"], np.array([3, 0]), strict=True))
    assert sized_table(counted).sizes == {"a": 3, "b": 0}
    for size in (-1, 1.5, True, "3", None):
        with pytest.raises(ConfigError, match=r"class 'a' has size .*; sizes are whole numbers"):
            sized_table({"a": size})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="labels 1, '1' are not all different as text"):
        sized_table({1: 3, "1": 4})


def test_samples_of_a_patient_take_turns_in_their_order_from_a_start_of_its_own() -> None:
    patients = [f"P{number % 40}" for number in range(120)]
    members = members_of(patients)
    assert members.size == 40
    units = np.arange(40)
    rounds = np.array([members.pick(units, np.full(40, turn)) for turn in range(6)])
    np.testing.assert_array_equal(rounds[:3], rounds[3:])
    for unit in range(40):
        owner = {patients[sample] for sample in rounds[:, unit]}
        assert len(owner) == 1
        first, second, third = rounds[:3, unit].tolist()
        cycle = sorted([first, second, third])
        assert (cycle.index(second) - cycle.index(first)) % 3 == 1
        assert (cycle.index(third) - cycle.index(second)) % 3 == 1
    # Not everybody starts with the first image.
    assert len({sample // 40 for sample in rounds[0].tolist()}) == 3


@given(
    owners=st.lists(st.integers(0, 8), min_size=1, max_size=40),
    turns=st.lists(st.integers(0, 25), min_size=9, max_size=9),
)
def test_spreading_turns_counts_what_picking_would_deliver(
    owners: list[int], turns: list[int]
) -> None:
    members = members_of([f"P{owner}" for owner in owners])
    had = np.array(turns[: members.size])
    counted = np.full(len(owners), 100)
    members.spread(had, counted)
    expected = np.full(len(owners), 100)
    for unit, count in enumerate(had.tolist()):
        for turn in range(count):
            expected[members.pick(np.array([unit]), np.array([turn]))[0]] += 1
    np.testing.assert_array_equal(counted, expected)


def test_patients_without_names_start_by_sample_number_and_still_take_turns() -> None:
    # Names are not kept for classes too large to sort.
    members = ClassMembers(
        label="a",
        size=2,
        first=0,
        samples=np.array([7, 8, 9, 3, 4]),
        starts=np.array([0, 3, 5]),
        names=None,
    )
    shown = [members.pick(np.array([0, 1]), np.array([turn, turn])).tolist() for turn in range(6)]
    assert {row[0] for row in shown[:3]} == {7, 8, 9}
    assert {row[1] for row in shown[:2]} == {3, 4}
    counts = np.zeros(10, dtype=np.int64)
    members.spread(np.array([6, 6]), counts)
    assert counts.tolist() == [0, 0, 0, 3, 3, 0, 0, 2, 2, 2]


@given(
    owners=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    data=st.data(),
)
def test_a_subset_shows_the_same_samples_at_the_same_turns(
    owners: list[int], data: st.DataObject
) -> None:
    members = members_of([f"P{owner}" for owner in owners])
    kept = data.draw(st.lists(st.integers(0, members.size - 1), min_size=1, unique=True))
    units = np.sort(np.array(kept))
    part = members.subset(units)
    for turn in range(5):
        turns = np.full(len(units), turn)
        np.testing.assert_array_equal(
            part.pick(np.arange(len(units)), turns), members.pick(units, turns)
        )
    np.testing.assert_array_equal(part.hashes(), members.hashes()[units])


def test_a_fixed_subset_is_nested_and_keyed_by_name() -> None:
    members = members_of([f"P{number:03}" for number in range(200)])

    def kept(size: int, seed: int, source: ClassMembers) -> set[str]:
        part = fixed_subset(source, size, seed=seed)
        assert part.names is not None
        assert part.size == min(size, source.size)
        return set(part.names.tolist())

    assert kept(20, 0, members) < kept(50, 0, members) < kept(200, 0, members)
    assert kept(50, 0, members) != kept(50, 1, members)
    assert fixed_subset(members, 300, seed=0) is members
    fewer = members_of([f"P{number:03}" for number in range(200) if number != 7])
    assert len(kept(50, 0, fewer) & kept(50, 0, members)) >= 49


def test_a_fixed_subset_of_a_plain_range_keeps_its_sample_numbers() -> None:
    whole = sized_table({"a": 10, "b": 30}).members[1]
    part = fixed_subset(whole, 12, seed=0)
    assert part.samples is not None
    assert len(set(part.samples.tolist())) == 12
    assert part.samples.min() >= 10
    assert part.samples.max() < 40
    np.testing.assert_array_equal(part.hashes(), whole.hashes()[part.samples - 10])


def test_a_patient_with_two_labels_is_named_with_both_and_the_way_out() -> None:
    message = (
        r"2 patients have samples of more than one class \('P1', 'P3'; the first has 'x' and "
        r"'y'\)\. Set unit: sample"
    )
    with pytest.raises(ConfigError, match=message):
        class_table(
            np.array([0, 1, 0, 1, 0]),
            classes=["x", "y"],
            patients=np.array(["P1", "P1", "P3", "P3", "P2"]),
            keys=None,
            excluded=None,
            by_patient=True,
        )


def test_samples_in_class_order_and_out_of_it_have_the_same_members() -> None:
    def units(codes: list[int]) -> list[list[int]]:
        table = class_table(
            np.array(codes), classes=["x", "y", "z"], patients=None, keys=None, excluded=None,
            by_patient=False,
        )  # fmt: skip
        return [member.pick_first(np.arange(member.size)).tolist() for member in table.members]

    assert units([0, 0, 2, 2]) == [[0, 1], [], [2, 3]]
    assert units([2, 0, 2, 0]) == [[1, 3], [], [0, 2]]


def digest(
    codes: list[int],
    classes: list[str],
    patients: list[str] | None,
    keys: list[str] | None,
    excluded: list[bool] | None,
) -> str:
    def array(values: list[str] | None) -> NDArray[np.str_] | None:
        return None if values is None else np.array(values)

    return class_table(
        np.array(codes),
        classes=classes,
        patients=array(patients),
        keys=array(keys),
        excluded=None if excluded is None else np.array(excluded),
        by_patient=False,
    ).digest


def test_the_digest_covers_key_patient_label_and_exclusion_of_every_sample() -> None:
    base = digest([0, 1], ["x", "y"], ["P1", "P2"], ["k1", "k2"], None)
    assert base == digest([0, 1], ["x", "y"], ["P1", "P2"], ["k1", "k2"], None)
    others = {
        digest([0, 0], ["x", "y"], ["P1", "P2"], ["k1", "k2"], None),
        digest([0, 1], ["x", "z"], ["P1", "P2"], ["k1", "k2"], None),
        digest([0, 1], ["x", "y"], ["P1", "P3"], ["k1", "k2"], None),
        digest([0, 1], ["x", "y"], ["P1", "P2"], ["k1", "k3"], None),
        digest([0, 1], ["x", "y"], ["P1", "P2"], ["k1", "k2"], [False, True]),
        digest([0, 1], ["x", "y"], None, ["k1", "k2"], None),
        digest([0, 1], ["x", "y"], None, None, None),
    }
    assert len(others | {base}) == 8
    assert sized_table({"a": 1, "b": 2}).digest != sized_table({"a": 2, "b": 1}).digest
