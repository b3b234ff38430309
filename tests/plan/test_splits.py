"""Patient-level splits: exact counts per label, stable places, patients never divided."""

from __future__ import annotations

import csv
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError, SplitError
from streaming_balance.plan.splits import (
    check_patients_apart,
    order_splits,
    parse_fractions,
    split_patients,
)

THREE = {"train": 0.7, "val": 0.15, "test": 0.15}


def brats_names(shared_data: Path) -> tuple[list[str], list[str]]:
    with (shared_data / "tree/brats18_names/brats18_cases.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    return [row["case"] for row in rows], [row["grade"] for row in rows]


def test_text_and_mapping_mean_the_same_fractions() -> None:
    assert parse_fractions("train=0.7, val=0.15,test=0.15") == parse_fractions(THREE)
    assert parse_fractions(THREE)["train"] == Fraction(7, 10)


def test_thirds_written_as_decimals_are_scaled_to_exactly_one() -> None:
    assert sum(parse_fractions("a=0.333,b=0.333,c=0.334").values()) == 1
    assert sum(parse_fractions({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}).values()) == 1
    assert parse_fractions("a=0.333,b=0.333,c=0.333")["a"] == Fraction(1, 3)


@pytest.mark.parametrize(
    ("split", "named"),
    [
        ("train=0.7,val=0.2", "0.9"),
        ("train=0.7,val=-0.3", "'-0.3'"),
        ("train=0,val=1", "'train'"),
        ("train=nan,val=1", "'nan'"),
        ("train=1.5", "'1.5'"),
        ("train", "NAME=FRACTION"),
        ("", "NAME=FRACTION"),
        ("../x=1", "'../x'"),
        ("train=0.5,train=0.5", "twice"),
        ({}, "no split"),
        ({"train": float("inf")}, "inf"),
        ({"train": True}, "True"),
    ],
)
def test_a_fraction_that_cannot_be_used_is_named(split: str | dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_fractions(split)


def test_the_285_brats_names_get_the_counts_worked_out_by_hand(shared_data: Path) -> None:
    patients, labels = brats_names(shared_data)
    assigned = split_patients(patients, labels, fractions=THREE, seed=0)
    counts = Counter(
        (assigned[patient], label) for patient, label in zip(patients, labels, strict=True)
    )
    # 210 -> 147, 31.5, 31.5 and 75 -> 52.5, 11.25, 11.25; equal remainders go to the first named.
    assert counts == {
        ("train", "HGG"): 147,
        ("val", "HGG"): 32,
        ("test", "HGG"): 31,
        ("train", "LGG"): 53,
        ("val", "LGG"): 11,
        ("test", "LGG"): 11,
    }


def test_the_largest_remainder_gets_the_patient_left_over() -> None:
    # 7 patients at 0.5, 0.3, 0.2: 3.5, 2.1, 1.4 -> floors 3, 2, 1 and the last one to 0.5.
    names = [f"P{number}" for number in range(7)]
    assigned = split_patients(names, ["x"] * 7, fractions={"c": 0.2, "b": 0.3, "a": 0.5}, seed=1)
    assert Counter(assigned.values()) == {"a": 4, "b": 2, "c": 1}


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_label_gets_floor_or_ceiling_of_its_share_in_every_split(
    sizes: list[int], weights: list[int], seed: int
) -> None:
    fractions = {f"s{i}": Fraction(weight, sum(weights)) for i, weight in enumerate(weights)}
    labels = [f"L{c}" for c, size in enumerate(sizes) for _ in range(size)]
    patients = [f"P{i}" for i in range(len(labels))]
    assigned = split_patients(patients, labels, fractions=fractions, seed=seed)
    assert list(assigned) == patients
    for c, size in enumerate(sizes):
        got = Counter(
            assigned[p] for p, label in zip(patients, labels, strict=True) if label == f"L{c}"
        )
        for split, share in fractions.items():
            assert math.floor(share * size) <= got[split] <= math.ceil(share * size)


def test_the_order_patients_are_listed_in_does_not_matter() -> None:
    patients = [f"P{number}" for number in range(50)]
    labels = ["a" if number % 3 else "b" for number in range(50)]
    forwards = split_patients(patients, labels, fractions=THREE, seed=3)
    backwards = split_patients(patients[::-1], labels[::-1], fractions=THREE, seed=3)
    assert forwards == backwards


def test_another_label_leaves_the_places_of_the_others_alone() -> None:
    patients = [f"P{number}" for number in range(40)]
    alone = split_patients(patients, ["a"] * 40, fractions=THREE, seed=3)
    joined = split_patients(
        [*patients, "Q1", "Q2"], ["a"] * 40 + ["b"] * 2, fractions=THREE, seed=3
    )
    assert {name: joined[name] for name in patients} == alone


def test_another_patient_moves_at_most_one_patient_over_each_boundary() -> None:
    patients = [f"P{number}" for number in range(100)]
    before = split_patients(patients, ["a"] * 100, fractions=THREE, seed=3)
    after = split_patients([*patients, "P100"], ["a"] * 101, fractions=THREE, seed=3)
    assert sum(before[name] != after[name] for name in patients) <= 2


def test_neighbouring_seeds_give_different_splits() -> None:
    patients = [f"P{number}" for number in range(60)]
    splits = [
        tuple(split_patients(patients, ["a"] * 60, fractions=THREE, seed=seed).values())
        for seed in range(5)
    ]
    assert len(set(splits)) == 5


def test_a_patient_with_many_samples_is_assigned_once() -> None:
    assigned = split_patients(
        ["P1", "P2", "P1", "P1"], ["a", "a", "a", "a"], fractions={"x": 0.5, "y": 0.5}, seed=0
    )
    assert sorted(assigned) == ["P1", "P2"]
    assert sorted(assigned.values()) == ["x", "y"]


def test_a_patient_with_two_labels_is_divided_with_the_rarer_one() -> None:
    # "rare" belongs to P0 and P1 only, so one of them must land on each side.
    patients = ["P0", "P0", "P1", "P1", *(f"P{n}" for n in range(2, 20))]
    labels = ["common", "rare", "rare", "common", *["common"] * 18]
    for seed in range(8):
        assigned = split_patients(patients, labels, fractions={"x": 0.5, "y": 0.5}, seed=seed)
        assert {assigned["P0"], assigned["P1"]} == {"x", "y"}


def test_unequal_lengths_and_bad_seeds_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 patients and 1 labels"):
        split_patients(["a", "b"], ["x"], fractions=THREE, seed=0)
    with pytest.raises(ConfigError, match="seed is -1"):
        split_patients(["a"], ["x"], fractions=THREE, seed=-1)


def test_patients_in_two_splits_are_listed_with_their_splits() -> None:
    with pytest.raises(SplitError, match=r"2 patient\(s\).*'P1' \(train and val\).*'P3'"):
        check_patients_apart(["P1", "P1", "P2", "P3", "P3"], ["train", "val", "val", "val", "test"])
    check_patients_apart(["P1", "P1", "P2"], ["train", "train", "val"])


def test_a_long_intersection_is_cut_and_counted() -> None:
    patients = [f"P{n}" for n in range(9)] * 2
    with pytest.raises(SplitError, match=r"9 patient\(s\).*and 4 more"):
        check_patients_apart(patients, ["train"] * 9 + ["val"] * 9)


def test_customary_split_names_come_in_the_customary_order() -> None:
    assert order_splits(["b", "test", "val", "a", "train"]) == ("train", "val", "test", "a", "b")


def test_a_split_never_changes_between_releases() -> None:
    # Frozen: a cohort packed again by a later release must not move patients into validation.
    patients = [f"P{number}" for number in range(12)]
    fractions = {"train": 0.5, "val": 0.25, "test": 0.25}
    assigned = split_patients(patients, ["a"] * 8 + ["b"] * 4, fractions=fractions, seed=42)
    members = {split: [p for p in patients if assigned[p] == split] for split in fractions}
    assert members == {
        "train": ["P1", "P2", "P3", "P4", "P8", "P10"],
        "val": ["P0", "P5", "P11"],
        "test": ["P6", "P7", "P9"],
    }
