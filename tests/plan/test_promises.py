"""What a plan warns of: everything that works as asked and is probably not meant."""

from __future__ import annotations

import pytest

from streaming_balance.plan.epoch import BalancedPlan


def planned(sizes: dict[str, int], batch: int, balance: object = "class_balanced") -> BalancedPlan:
    return BalancedPlan.from_class_sizes(sizes, global_batch_size=batch, balance=balance)  # type: ignore[arg-type]


def test_a_plan_as_it_should_be_warns_of_nothing() -> None:
    assert planned({"HGG": 210, "LGG": 75}, 8).warnings == ()


def test_a_single_class_is_an_identity_plan_with_a_warning() -> None:
    plan = planned({"HGG": 20}, 4)
    assert [plan.quotas(0, step).tolist() for step in range(5)] == [[4]] * 5
    assert sorted(plan.exposure(1, 0).tolist()) == [1] * 20
    assert plan.warnings == ("there is one class only, 'HGG': balancing changes nothing.",)


def test_a_class_of_one_works_and_is_warned_of() -> None:
    plan = planned({"HGG": 210, "LGG": 1}, 8)
    assert plan.quotas(0, 0).tolist() == [4, 4]
    (warning,) = plan.warnings
    assert "class 'LGG' has 1, fewer than the 4" in warning
    assert "up to 4 times in one batch" in warning


def test_a_batch_smaller_than_the_number_of_classes_works_and_is_warned_of() -> None:
    plan = planned({"a": 9, "b": 9, "c": 9}, 2)
    (warning,) = plan.warnings
    assert "a batch of 2 cannot hold all 3 classes" in warning
    assert "global_batch_size >= 3" in warning
    # 27 draws fill 14 batches of 2: 28 draws over three classes of 9.
    totals = [sum(int(plan.quotas(0, step)[c]) for step in range(14)) for c in range(3)]
    assert sorted(totals) == [9, 9, 10]


@pytest.mark.parametrize("name", ["upsample", "downsample"])
def test_a_target_ratio_that_is_exceeded_already_changes_nothing_and_names_both(name: str) -> None:
    plan = planned({"LGG": 75, "HGG": 210}, 8, {"name": name, "target_ratio": 0.3})
    (warning,) = plan.warnings
    assert "target_ratio is 0.3" in warning
    assert "0.357 already" in warning
    assert plan.shares["LGG"] == 75 / 285


@pytest.mark.parametrize("name", ["upsample", "downsample"])
def test_a_target_ratio_that_is_not_reached_yet_warns_of_nothing(name: str) -> None:
    assert planned({"LGG": 75, "HGG": 210}, 8, {"name": name, "target_ratio": 0.5}).warnings == ()
