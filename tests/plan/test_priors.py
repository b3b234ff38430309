"""What balancing does to priors, and how to undo it: reference numbers and Bayes by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan

RTOL = 1e-12
SIZES = {
    "HGG_LGG": [75, 210],
    "three_class": [100, 20, 5],
    "long_tail_921_103": [921, 103],
}


@pytest.fixture
def adjustment(vectors: dict[str, Any]) -> dict[str, Any]:
    cases: dict[str, Any] = vectors["logit_adjustment"]["cases"]
    return cases


def plan_of(sizes: list[int], balance: Any) -> BalancedPlan:
    return BalancedPlan.from_class_sizes(
        dict(enumerate(sizes)), global_batch_size=len(sizes), balance=balance
    )


@pytest.mark.parametrize("name", SIZES)
def test_natural_training_is_adjusted_by_the_log_of_the_natural_prior(
    adjustment: dict[str, Any], name: str
) -> None:
    plan = plan_of(SIZES[name], None)
    got = list(plan.logit_adjustment().values())
    np.testing.assert_allclose(got, adjustment[name]["log_prior"], rtol=RTOL)
    np.testing.assert_allclose(got, adjustment[name]["posthoc_subtract_tau1"], rtol=RTOL)
    assert list(plan.prior_shift().values()) == pytest.approx([1.0] * len(SIZES[name]), rel=RTOL)
    # Balanced softmax adds ln n: the same up to ln N, which no softmax sees.
    counts = adjustment[name]["balanced_softmax_add_log_counts"]
    np.testing.assert_allclose(
        np.array(counts) - math.log(sum(SIZES[name])), got, rtol=RTOL, atol=1e-14
    )


@pytest.mark.parametrize("name", SIZES)
def test_uniform_training_is_shifted_back_as_the_reference_says(
    adjustment: dict[str, Any], name: str
) -> None:
    plan = plan_of(SIZES[name], "class_balanced")
    shifts = [math.log(factor) for factor in plan.prior_shift().values()]
    wanted = adjustment[name]["prior_shift_add_to_logits_after_uniform_sampling"]
    np.testing.assert_allclose(shifts, wanted, rtol=RTOL)
    # The model saw classes evenly: the sampled prior has nothing to adjust between them.
    assert set(plan.logit_adjustment().values()) == {math.log(1 / len(SIZES[name]))}


def test_scores_after_even_training_are_corrected_as_the_reference_says(
    adjustment: dict[str, Any],
) -> None:
    example = adjustment["prior_shift_binary_example"]
    shift = plan_of([75, 210], "class_balanced").prior_shift()
    for score, wanted in zip(
        example["model_prob_LGG_trained_50_50"],
        example["corrected_prob_LGG_at_natural_prior_75_210"],
        strict=True,
    ):
        lgg, hgg = score * shift[0], (1 - score) * shift[1]
        assert lgg / (lgg + hgg) == pytest.approx(wanted, rel=RTOL)


@pytest.mark.parametrize(
    "balance",
    [
        {"name": "power", "alpha": 0.5},
        {"name": "target", "shares": {0: 0.3, 1: 0.7}},
        {"name": "downsample", "target_ratio": 0.8},
        {"name": "deferred", "start_epoch": 3, "then": "power"},
        {"name": "progressively_balanced", "num_epochs": 5},
        {"name": "repeat_factor", "threshold": 0.6},
        {"name": "p_k", "P": 2, "M": 1},
    ],
)
def test_shift_and_adjustment_are_bayes_rule_on_shares(balance: dict[str, Any]) -> None:
    plan = plan_of([75, 210], balance)
    natural = {0: 75 / 285, 1: 210 / 285}
    for epoch in (None, 0, 2, 9):
        shares = plan.shares if epoch is None else plan.shares_in(epoch)
        assert sum(shares.values()) == pytest.approx(1, rel=RTOL)
        shift, adjusted = plan.prior_shift(epoch), plan.logit_adjustment(0.5, epoch)
        for label, share in shares.items():
            assert shift[label] * share == pytest.approx(natural[label], rel=RTOL)
            assert adjusted[label] == pytest.approx(0.5 * math.log(share), rel=RTOL)


def test_shares_say_what_long_runs_deliver() -> None:
    balances: list[dict[str, Any]] = [
        {"name": "repeat_factor", "threshold": 0.6, "last": "short"},
        {"name": "sample_weights", "weights": list(range(1, 41))},
        {"name": "p_k", "P": 2, "M": 4},
        {"name": "power", "alpha": 0.3},
        {"name": "deferred", "start_epoch": 5, "then": "power"},
    ]
    labels = np.array([0] * 10 + [1] * 30)
    for balance in balances:
        plan = BalancedPlan.from_labels(labels, global_batch_size=8, balance=balance)
        first, last = plan.exposure(10, 0), plan.exposure(210, 0)
        drawn = np.bincount(labels, weights=last - first)
        np.testing.assert_allclose(
            drawn / drawn.sum(), list(plan.shares_in(10).values()), atol=2e-3
        )


@pytest.mark.parametrize("tau", [math.nan, math.inf, "1", None, True])
def test_a_strength_that_is_no_number_is_refused(tau: Any) -> None:
    with pytest.raises(ConfigError, match=r"tau is .*; it must be a number"):
        plan_of([75, 210], None).logit_adjustment(tau)


@pytest.mark.parametrize("epoch", [-1, -(10**9)])
def test_an_epoch_before_the_first_is_refused(epoch: int) -> None:
    plan = plan_of([75, 210], None)
    for ask in (plan.shares_in, plan.prior_shift, lambda at: plan.logit_adjustment(1.0, at)):
        with pytest.raises(IndexError, match=f"epoch is {epoch}; epochs count from 0"):
            ask(epoch)


@pytest.mark.parametrize(
    ("name", "ratio"), [("upsample", 0.3), ("upsample", 75 / 210), ("downsample", 0.3)]
)
def test_a_ratio_that_is_reached_already_warns_with_both_or_is_an_error(
    name: str, ratio: float
) -> None:
    balance = {"name": name, "target_ratio": ratio}
    (said,) = plan_of([75, 210], balance).warnings
    assert f"target_ratio is {ratio:g}" in said
    assert "0.357 already" in said
    with pytest.raises(ConfigError, match=r"0\.357 already .* Lower target_ratio, or set on_exc"):
        plan_of([75, 210], balance | {"on_exceeded": "error"})
    for option in ("warn", "error"):
        reachable = plan_of([75, 210], {"name": name, "target_ratio": 0.7, "on_exceeded": option})
        assert reachable.warnings == ()


def test_one_class_of_several_above_the_ratio_exceeds_nothing() -> None:
    # Of 10, 90 and 100 only the smallest is below half of the largest: still resampled.
    balance = {"name": "upsample", "target_ratio": 0.5, "on_exceeded": "error"}
    assert plan_of([10, 90, 100], balance).shares[0] == pytest.approx(50 / 240, rel=RTOL)


def test_a_ratio_other_than_warn_and_error_is_refused() -> None:
    with pytest.raises(ConfigError, match="on_exceeded is 'raise'; allowed: 'warn', 'error'"):
        plan_of([75, 210], {"name": "upsample", "on_exceeded": "raise"})
