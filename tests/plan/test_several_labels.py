"""Samples with several labels, and labels that are missing: how they are read and what they do."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.labels import read_labels

FINDINGS = [["Mass", "Hernia"], [], ["Mass"], ["Edema"], ["Mass", "Edema"], ["Mass"]] * 7
NAMES = ["Edema", "Hernia", "Mass"]
MATRIX = np.array([[name in several for name in NAMES] for several in FINDINGS], dtype=np.int64)
TOGETHER = {"name": "class_balanced", "strata": "label_set"}


def plan_of(labels: Any = FINDINGS, **options: Any) -> BalancedPlan:
    """Plan over the findings above."""
    return BalancedPlan.from_labels(labels, **{"global_batch_size": 6, "seed": 2, **options})


def drawn_in(plan: BalancedPlan, epoch: int) -> list[int]:
    """List the draws of an epoch."""
    steps = range(plan.num_steps(epoch))
    return [number for step in steps for number in plan.batch(epoch, step).tolist()]


class NAType:
    """Stands in for pandas' missing value, which is no float."""


@pytest.mark.parametrize(
    "labels",
    [
        FINDINGS,
        tuple(map(tuple, FINDINGS)),
        [set(several) for several in FINDINGS],
        [several[::-1] for several in FINDINGS],
        [[*several, *several] for several in FINDINGS],
        np.array(FINDINGS, dtype=object),
    ],
)
def test_lists_of_labels_are_read_in_class_order_whatever_holds_them(labels: Any) -> None:
    found = read_labels(labels)
    assert found.classes == ("Edema", "Hernia", "Mass")
    assert found.membership is not None
    assert found.membership.tolist() == MATRIX.astype(bool).tolist()


@pytest.mark.parametrize(
    "matrix",
    [
        MATRIX,
        MATRIX.astype(np.uint8),
        MATRIX.astype(np.float32),
        MATRIX.astype(bool),
        torch.tensor(MATRIX),
        torch.tensor(MATRIX, dtype=torch.float16),
        MATRIX.tolist(),
        tuple(map(tuple, MATRIX.astype(bool).tolist())),
    ],
)
def test_tables_of_zeros_and_ones_have_a_class_per_column(matrix: ArrayLike) -> None:
    found = read_labels(matrix)
    assert found.classes == (0, 1, 2)
    assert found.membership is not None
    assert found.membership.tolist() == MATRIX.astype(bool).tolist()
    plan = plan_of(matrix, balance="repeat_factor")
    named = plan_of(balance="repeat_factor")
    assert [plan.batch(1, step).tolist() for step in range(7)] == [
        named.batch(1, step).tolist() for step in range(7)
    ]


def test_lists_that_name_the_labels_0_and_1_are_no_table() -> None:
    found = read_labels([[0], [0, 1], []])
    assert found.membership is not None
    assert found.membership.tolist() == [[True, False], [True, True], [False, False]]
    assert read_labels([[0, 2], [2, 0]]).classes == (0, 2)


def test_text_and_numbers_that_read_alike_are_one_class() -> None:
    labels: list[Any] = [[1], ["1"], [2]]
    assert read_labels(labels).classes == ("1", "2")
    assert plan_of(labels, balance=None).sizes == {"1": 2, "2": 1}


@pytest.mark.parametrize("missing", [None, math.nan, np.float32("nan"), NAType()])
@pytest.mark.parametrize("container", [list, lambda labels: np.array(labels, dtype=object)])
def test_missing_labels_are_an_error_a_class_or_left_out(container: Any, missing: Any) -> None:
    labels = container(["LGG", missing, "HGG", "LGG", missing])
    with pytest.raises(ConfigError, match="2 labels are missing, the first at sample 1"):
        read_labels(labels)
    dropped = read_labels(labels, unknown="drop")
    assert (dropped.classes, dropped.codes.tolist()) == (("HGG", "LGG"), [1, -1, 0, 1, -1])
    own = read_labels(labels, unknown="own_class")
    assert (own.classes, own.codes.tolist()) == (("HGG", "LGG", "unknown"), [1, 2, 0, 1, 2])


def test_missing_numbers_keep_the_numbers_of_the_others() -> None:
    labels = [2.0, math.nan, 10.0, 2.0]
    assert read_labels(labels, unknown="drop").codes.tolist() == [0, -1, 1, 0]
    assert read_labels(labels, unknown="own_class").classes == (2.0, 10.0, "unknown")
    assert read_labels(["a", "b"], unknown="own_class").classes == ("a", "b")
    assert read_labels([3, 1], unknown="drop").codes.tolist() == [1, 0]


@pytest.mark.parametrize("missing", [None, math.nan, ["Mass", None], {"Edema", math.nan}])
def test_missing_lists_are_an_error_a_class_or_left_out(missing: Any) -> None:
    labels = [["Mass"], missing, ["Edema", "Mass"], []]
    with pytest.raises(
        ConfigError, match=r"1 labels are missing, the first at sample 1: .* unknown"
    ):
        read_labels(labels)
    dropped = read_labels(labels, unknown="drop")
    assert dropped.classes == ("Edema", "Mass")
    assert dropped.codes.tolist() == [0, -1, 0, 0]
    own = read_labels(labels, unknown="own_class")
    assert own.classes == ("Edema", "Mass", "unknown")
    assert own.membership is not None
    known = [
        label for label in (missing if isinstance(missing, list | set) else []) if label in NAMES
    ]
    assert [own.classes[place] for place in np.flatnonzero(own.membership[1])] == [
        *known,
        "unknown",
    ]


def test_a_label_that_only_dropped_samples_have_is_no_class() -> None:
    labels: list[Any] = [["Mass"], ["Rare", None], []]
    assert read_labels(labels, unknown="drop").classes == ("Mass",)


def test_samples_without_labels_that_are_dropped_never_come() -> None:
    labels = [None if number % 5 == 0 else several for number, several in enumerate(FINDINGS)]
    gone = [number for number, several in enumerate(labels) if several is None]
    for balance in ("repeat_factor", "none", TOGETHER, {"name": "power", "target_label": "Mass"}):
        options = {"name": balance} if isinstance(balance, str) else balance
        plan = plan_of(labels, balance={**options, "unknown": "drop"})
        exposure = plan.exposure(6, 0)
        assert exposure[gone].sum() == 0
        assert (np.delete(exposure, gone) > 0).all()
        assert (
            exposure.tolist()
            == np.bincount(
                [number for epoch in range(6) for number in drawn_in(plan, epoch)],
                minlength=len(labels),
            ).tolist()
        )


def test_a_class_of_unknown_samples_is_drawn_as_any_other() -> None:
    labels = ["a"] * 9 + [None] * 3
    plan = plan_of(labels, balance={"name": "class_balanced", "unknown": "own_class"})
    assert plan.sizes == {"a": 9, "unknown": 3}
    assert plan.quotas(0, 0).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("labels", "unknown", "message"),
    [
        ([None, None], "drop", "all 2 labels are missing"),
        ([[], []], "error", "no sample has any label"),
        ([None, []], "drop", "no sample has any label"),
        (
            [["a"], "b"],
            "error",
            r"1 of 2 samples have no list of labels, the first is sample 1: 'b'",
        ),
        ([["a"], [["b"]]], "error", r"sample 1 has the label \['b'\]; a label is text or a number"),
        (["unknown", None], "own_class", "there is one of that name; use unknown: drop"),
        ([["unknown"], None], "own_class", "there is one of that name; use unknown: drop"),
        (np.array([[0, 2], [1, 0]]), "error", r"shape \(2, 2\) and other values than 0 and 1"),
        (np.array([[0, math.nan], [1, 0]]), "error", r"shape \(2, 2\) and other values"),
        (np.array([["a", "b"]]), "error", r"shape \(1, 2\)"),
        ("LGG", "drop", r"shape \(\)"),
        (np.empty((0, 3)), "error", r"shape \(0, 3\)"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(
    labels: ArrayLike, unknown: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_labels(labels, unknown=unknown)


@pytest.mark.parametrize(
    "balance",
    [
        "class_balanced",
        "power",
        "effective_number",
        "upsample",
        "downsample",
        {"name": "p_k", "P": 2, "M": 3},
        {"name": "deferred", "num_epochs": 5},
        {"name": "progressively_balanced", "num_epochs": 5},
        {"name": "target", "shares": {"Mass": 1}},
        {"name": "manual_weights", "weights": {"Mass": 1, "Edema": 2, "Hernia": 1}},
    ],
)
def test_strategies_that_need_one_label_say_three_ways_out(balance: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(balance=balance)
    text = str(caught.value)
    for way in ("repeat_factor", "strata: label_set", "target_label: Edema"):
        assert way in text


def test_two_ways_at_once_and_strata_of_several_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="keep one"):
        plan_of(balance={**TOGETHER, "target_label": "Mass"})
    site = ["x", "y"] * 21
    with pytest.raises(ConfigError, match="Add label_set to the strata, or target_label: Edema"):
        plan_of(balance=None, strata=site)
    with pytest.raises(ConfigError, match="leave strata out"):
        plan_of(balance="repeat_factor", strata=site)
    with pytest.raises(ConfigError, match=r"no sample has that label.*Did you mean 'Hernia'"):
        plan_of(balance={"name": "class_balanced", "target_label": "Hernias"})


def test_every_set_of_labels_is_a_class_under_label_set() -> None:
    plan = plan_of(balance=TOGETHER, global_batch_size=10)
    sets = ["|".join(sorted(several)) or "none" for several in FINDINGS]
    assert plan.classes == sorted(set(sets))
    assert plan.sizes == Counter(sets)
    for step in range(plan.num_steps(0)):
        counts = Counter(sets[number] for number in plan.batch(0, step).tolist())
        assert counts == dict.fromkeys(plan.classes, 2)
        assert plan.quotas(0, step).tolist() == [2] * 5


def test_sets_of_many_labels_are_told_apart_beyond_a_byte() -> None:
    generator = np.random.default_rng(0)
    matrix = generator.integers(0, 2, (60, 19))
    matrix[30:] = matrix[:30]
    plan = plan_of(matrix, balance=TOGETHER)
    names = ["|".join(str(n) for n in np.flatnonzero(row)) or "none" for row in matrix]
    assert plan.sizes == Counter(names)


def test_sets_that_would_be_written_alike_are_refused() -> None:
    for labels in ([["none"], [], ["a"]], [["a|b"], ["a", "b"]]):
        with pytest.raises(ConfigError, match=r"two sets are both written '(none|a\|b)'"):
            plan_of(labels, balance=TOGETHER, global_batch_size=2)


def test_a_target_label_makes_classes_of_having_it_and_not() -> None:
    plan = plan_of(balance={"name": "class_balanced", "target_label": "Hernia"})
    assert plan.classes == ["no Hernia", "Hernia"]
    assert plan.sizes == {"no Hernia": 35, "Hernia": 7}
    for step in range(plan.num_steps(0)):
        batch = plan.batch(0, step).tolist()
        assert sum("Hernia" in FINDINGS[number] for number in batch) == 3
    one_each = ["b", "a", "c", "b"]
    single = plan_of(one_each, balance={"name": "class_balanced", "target_label": "b"})
    assert single.sizes == {"no b": 2, "b": 2}
    numbered = plan_of(MATRIX, balance={"name": "class_balanced", "target_label": 1})
    assert numbered.sizes == {"no 1": 35, "1": 7}


def test_a_target_label_and_a_site_are_balanced_jointly() -> None:
    site = np.array(["x", "y", "y"] * 14)
    plan = plan_of(
        balance={"name": "class_balanced", "target_label": "Mass", "strata_shares": "uniform"},
        strata={"site": site},
        global_batch_size=8,
    )
    for step in range(plan.num_steps(0)):
        batch = plan.batch(0, step).tolist()
        cells = Counter(("Mass" in FINDINGS[number], site[number]) for number in batch)
        assert sorted(cells.values()) == [2, 2, 2, 2]


def test_natural_order_takes_every_sample_once_and_counts_all_its_labels() -> None:
    plan = plan_of(balance=None)
    assert sorted(drawn_in(plan, 0)) == list(range(42))
    assert plan.sizes == {"Edema": 14, "Hernia": 7, "Mass": 28}
    assert plan.shares == pytest.approx({"Edema": 14 / 42, "Hernia": 7 / 42, "Mass": 28 / 42})
    for epoch, step in ((0, 0), (2, 6)):
        counts = MATRIX[plan.batch(epoch, step)].sum(axis=0)
        assert plan.quotas(epoch, step).tolist() == counts.tolist()


def test_natural_order_by_patient_counts_patients_by_all_their_samples() -> None:
    labels = [["a"], ["b"], ["a"], ["b"], ["b"], []]
    owners = ["P1", "P1", "P2", "P2", "P2", "P3"]
    plan = plan_of(
        labels,
        patients=owners,
        balance={"name": "instance_balanced", "unit": "patient"},
        global_batch_size=3,
    )
    assert plan.sizes == {"a": 2, "b": 2}
    assert plan.shares == pytest.approx({"a": (1 / 2 + 1 / 3) / 3, "b": (1 / 2 + 2 / 3) / 3})
    exposure = plan.exposure(12, 0)
    assert exposure.tolist() == [6, 6, 4, 4, 4, 12]


def test_repeat_factors_follow_the_rarest_label_of_a_sample() -> None:
    plan = plan_of(balance={"name": "repeat_factor", "threshold": 0.5, "power": 0.5})
    frequency = dict(zip(NAMES, (MATRIX.sum(axis=0) / 42).tolist(), strict=True))
    factors = [
        max([1.0, *(math.sqrt(0.5 / frequency[name]) for name in several)]) for several in FINDINGS
    ]
    epochs = 200
    exposure = plan.exposure(epochs, 0)
    length = plan.num_steps(0) * 6
    scale = length / sum(factors)
    assert np.abs(exposure / epochs - np.array(factors) * scale).max() < 0.1
    assert int(exposure.sum()) == epochs * length
    total = sum(factors)
    for column, name in enumerate(NAMES):
        having = sum(f for f, several in zip(factors, FINDINGS, strict=True) if name in several)
        assert plan.shares[NAMES[column]] == pytest.approx(having / total)
    counted = np.bincount([n for e in range(5) for n in drawn_in(plan, e)], minlength=42)
    assert plan.exposure(5, 0).tolist() == counted.tolist()


class Findings:
    """A packed data set of findings, as a plan sees it; one more class than anybody has."""

    classes = ["Edema", "Fibrosis", "Hernia", "Mass"]  # noqa: RUF012
    train_splits = ("train",)

    def labels(self, split: str) -> NDArray[np.uint8]:
        assert split == "train"
        return np.insert(MATRIX, 1, 0, axis=1).astype(np.uint8)

    def patients(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return np.array([f"P{number // 2:02}" for number in range(42)])

    def keys(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return np.array([f"k{number:02}" for number in range(42)])

    def column(self, split: str, name: str) -> NDArray[np.str_]:
        raise KeyError(split, name)


def test_packed_findings_are_planned_with_classes_that_nobody_has() -> None:
    plan = BalancedPlan.for_shards(Findings(), balance="repeat_factor", global_batch_size=6)
    assert plan.sizes == {"Edema": 14, "Fibrosis": 0, "Hernia": 7, "Mass": 28}
    assert plan.shares["Fibrosis"] == 0
    batch = plan.batch(0, 3)
    assert plan.quotas(0, 3).tolist() == np.insert(MATRIX, 1, 0, axis=1)[batch].sum(axis=0).tolist()


def test_excluded_findings_are_neither_counted_nor_drawn() -> None:
    for balance in ("repeat_factor", None, {**TOGETHER, "unit": "sample"}):
        plan = BalancedPlan.for_shards(
            Findings(), balance=balance, global_batch_size=5, exclude=["P00", "k41"]
        )
        exposure = plan.exposure(4, 0)
        assert exposure[[0, 1, 41]].tolist() == [0, 0, 0]
        assert (np.delete(exposure, [0, 1, 41]) > 0).all()
    natural = BalancedPlan.for_shards(
        Findings(), balance=None, global_batch_size=5, exclude=["P00"]
    )
    assert natural.sizes["Hernia"] == 6


def test_who_has_which_label_enters_the_digest() -> None:
    changed = MATRIX.copy()
    changed[5] = [1, 0, 0]
    assert plan_of(MATRIX, balance=None).digest != plan_of(changed, balance=None).digest
    assert plan_of(MATRIX, balance=None).digest == plan_of(MATRIX.copy(), balance=None).digest
