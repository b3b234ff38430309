"""Weights for a loss from a plan, and the warning where sampling and weights are too much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.loss_weights import (
    double_correction,
    expected_draws,
    plan_loss_weights,
)
from streaming_balance.plan.section import ClassWeights

GLIOMA = ["LGG"] * 75 + ["HGG"] * 210


def plan(balance: Any, **options: Any) -> BalancedPlan:
    """A plan over the gliomas, batches of 8."""
    return BalancedPlan.from_labels(GLIOMA, global_batch_size=8, balance=balance, **options)


def test_weights_that_are_not_enabled_are_all_one() -> None:
    assert plan_loss_weights(plan(None), ClassWeights()) == {"HGG": 1.0, "LGG": 1.0}


def test_natural_weights_come_from_the_samples_there_are() -> None:
    for balance in (None, "class_balanced", "power"):
        weights = plan_loss_weights(plan(balance), ClassWeights(enabled=True))
        assert list(weights) == ["HGG", "LGG"]
        assert weights["LGG"] == pytest.approx(1.4736842105263157, rel=1e-12)
        assert weights["HGG"] == pytest.approx(0.5263157894736842, rel=1e-12)
    raw = plan_loss_weights(plan(None), ClassWeights(enabled=True, normalize=False))
    assert raw["LGG"] == pytest.approx(1.9, rel=1e-12)


def test_patients_are_counted_where_classes_cycle_over_patients() -> None:
    labels = ["LGG"] * 4 + ["HGG"] * 4
    patients = ["L1"] * 4 + ["H1", "H2", "H3", "H4"]
    by_patient = BalancedPlan.from_labels(labels, global_batch_size=2, patients=patients)
    weights = plan_loss_weights(by_patient, ClassWeights(enabled=True, normalize=False))
    assert weights == {"HGG": 5 / 8, "LGG": 5 / 2}


@pytest.mark.parametrize("balance", [None, "class_balanced", "power", {"name": "upsample"}])
def test_sampled_weights_even_out_what_batches_hold(balance: Any) -> None:
    planned = plan(balance)
    weights = plan_loss_weights(planned, ClassWeights(enabled=True, basis="sampled"))
    # Independent: count the members of all batches of ten epochs, in which fractions even out.
    drawn = np.concatenate(
        [planned.batch(epoch, step) for epoch in range(10) for step in range(planned.num_steps(0))]
    )
    counts = np.bincount(np.asarray(GLIOMA)[drawn] == "LGG", minlength=2)
    masses = counts * [weights["HGG"], weights["LGG"]]
    assert masses[0] == pytest.approx(masses[1], rel=2e-3)
    assert sum(weights.values()) == pytest.approx(2)


def test_sampled_effective_numbers_count_the_draws_of_an_epoch() -> None:
    planned = plan({"name": "target", "shares": {"LGG": 0.25, "HGG": 0.75}, "num_samples": 400})
    assert expected_draws(planned) == {"HGG": 300.0, "LGG": 100.0}
    settings = ClassWeights(enabled=True, method="effective_num", basis="sampled", normalize=False)
    weights = plan_loss_weights(planned, settings)
    for label, draws in (("HGG", 300), ("LGG", 100)):
        assert weights[label] == pytest.approx(0.001 / (1 - 0.999**draws), rel=1e-10)


@pytest.mark.parametrize(("last", "draws"), [("full", 288), ("short", 285), ("drop", 280)])
def test_expected_draws_add_up_to_the_epoch(last: str, draws: int) -> None:
    found = expected_draws(plan({"name": "class_balanced", "last": last}))
    assert sum(found.values()) == draws
    assert found["LGG"] == found["HGG"]


def test_a_schedule_is_weighed_where_it_has_settled_unless_an_epoch_is_named() -> None:
    planned = plan({"name": "progressively_balanced", "num_epochs": 5})
    sampled = ClassWeights(enabled=True, basis="sampled")
    assert plan_loss_weights(planned, sampled) == {"HGG": 1.0, "LGG": 1.0}
    first = plan_loss_weights(planned, sampled, epoch=0)
    assert first == pytest.approx({"HGG": 0.5263157894736842, "LGG": 1.4736842105263157})
    assert double_correction(planned, first) is not None


def test_findings_that_share_samples_are_not_taken_for_resampled() -> None:
    table = np.array([[1, 1, 0]] * 30 + [[1, 0, 0]] * 60 + [[0, 0, 1]] * 10)
    planned = BalancedPlan.from_labels(table, global_batch_size=10, balance=None)
    assert (
        double_correction(planned, dict(zip(planned.classes, [1.0, 9.0, 40.0], strict=True)))
        is None
    )


def test_manual_weights_need_names_unless_the_class_order_was_declared() -> None:
    settings = ClassWeights(enabled=True, method="manual", manual_weights=(1.0, 3.0))
    with pytest.raises(ConfigError, match=r"class_weights: .*Write a mapping: \{HGG: 1\.0, LGG"):
        plan_loss_weights(plan(None), settings)
    declared = plan_loss_weights(plan(None), settings, is_ordered=True)
    assert declared == {"HGG": 0.5, "LGG": 1.5}


def test_balanced_sampling_and_inverse_frequency_together_are_warned_about_with_both_shares() -> (
    None
):
    planned = plan("class_balanced")
    said = double_correction(planned, plan_loss_weights(planned, ClassWeights(enabled=True)))
    assert said is not None
    assert "0.737 from LGG" in said
    assert "0.263 from HGG" in said
    assert "basis: sampled" in said


@pytest.mark.parametrize(
    ("balance", "settings"),
    [
        (None, {}),
        ("class_balanced", {"basis": "sampled"}),
        ("class_balanced", {"enabled": False}),
        ("power", {"basis": "sampled"}),
        ("class_balanced", {"method": "effective_num", "beta": 0.9}),
        ({"name": "target", "shares": {"LGG": 0.1, "HGG": 0.9}}, {}),
    ],
)
def test_what_turns_nothing_round_is_not_warned_about(
    balance: Any, settings: dict[str, Any]
) -> None:
    planned = plan(balance)
    weights = plan_loss_weights(planned, ClassWeights(**({"enabled": True} | settings)))
    assert double_correction(planned, weights) is None


def test_weights_somebody_wrote_are_not_doubted_under_natural_sampling() -> None:
    assert double_correction(plan(None), {"LGG": 100.0, "HGG": 1.0}) is None


def test_weights_of_nothing_but_classes_never_drawn_are_no_reason_to_divide_by_zero() -> None:
    planned = plan({"name": "target", "shares": {"HGG": 1}})
    assert double_correction(planned, {"LGG": 1.0, "HGG": 0.0}) is None


def test_a_warning_about_many_classes_stays_short() -> None:
    labels = np.repeat(np.arange(100), np.arange(1, 101))
    planned = BalancedPlan.from_labels(labels, global_batch_size=100)
    said = double_correction(planned, plan_loss_weights(planned, ClassWeights(enabled=True)))
    assert said is not None
    assert said.count(" from ") == 20
    assert ", ..., so that" in said
