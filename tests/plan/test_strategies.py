"""Strategies: shares and epoch lengths against reference numbers, words that say what is wrong."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.strategies import (
    ALIASES,
    KINDS,
    ClassBalanced,
    Downsample,
    InstanceBalanced,
    Upsample,
    parse_strategy,
)
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.weights import effective_numbers

BRATS = {"LGG": 75, "HGG": 210}
RTOL = 1e-12


def shares(balance: object, counts: list[int]) -> list[float]:
    strategy = parse_strategy(balance)  # type: ignore[arg-type]
    target = strategy.target({str(number): count for number, count in enumerate(counts)})
    return [float(share) for share in target.shares]


def length(balance: object, sizes: dict[str, int]) -> int:
    return parse_strategy(balance).target(sizes).num_draws  # type: ignore[arg-type]


def test_hand_worked_shares_of_75_against_210() -> None:
    assert shares("instance_balanced", [75, 210]) == pytest.approx([5 / 19, 14 / 19], rel=1e-15)
    assert shares("class_balanced", [75, 210]) == [0.5, 0.5]
    # sqrt(75) : sqrt(210) = sqrt(5) : sqrt(14).
    root = 5**0.5 / (5**0.5 + 14**0.5)
    assert shares("power", [75, 210])[0] == pytest.approx(root, rel=1e-12)
    # 75 * 2.8 = 210: the weights of inverse frequency, written as decimals, give exact halves.
    halves = parse_strategy({"name": "manual_weights", "weights": {"a": 2.8, "b": 1}})
    assert halves.target({"a": 75, "b": 210}).shares == (Fraction(1, 2), Fraction(1, 2))
    tenths = parse_strategy({"name": "target", "shares": {"a": 0.3, "b": 0.7}})
    assert tenths.target({"a": 75, "b": 210}).shares == (Fraction(3, 10), Fraction(7, 10))
    assert shares({"name": "upsample", "target_ratio": 0.5}, [75, 210]) == [1 / 3, 2 / 3]
    assert shares({"name": "downsample", "target_ratio": 0.5}, [75, 210]) == [1 / 3, 2 / 3]


def test_power_meets_the_reference_shares(vectors: dict[str, Any]) -> None:
    for case in vectors["power_temperature"]["cases"].values():
        for alpha, expected in case["alpha"].items():
            got = shares({"name": "power", "alpha": float(alpha)}, case["counts"])
            np.testing.assert_allclose(got, expected["class_prob"], rtol=RTOL)
        got = shares({"name": "power", "temperature": 5}, case["counts"])
        np.testing.assert_allclose(got, case["temperature_5_class_prob"], rtol=RTOL)


def test_effective_number_meets_the_reference(vectors: dict[str, Any]) -> None:
    for case in vectors["effective_number"]["cases"].values():
        counts = case["counts"]
        for expected in case["beta"].values():
            if "beta" not in expected:
                continue
            beta = expected["beta"]
            numbers = effective_numbers(np.array(counts), beta=beta)
            np.testing.assert_allclose(numbers, expected["effective_number"], rtol=RTOL)
            got = shares({"name": "effective_number", "beta": beta}, counts)
            np.testing.assert_allclose(
                got, expected["class_prob_if_used_by_weighted_sampler"], rtol=RTOL
            )


@pytest.mark.parametrize("beta", [1 - 1e-15, 1 - 2**-53])
def test_overlap_next_to_one_tends_to_inverse_frequency_without_losing_digits(beta: float) -> None:
    assert shares({"name": "effective_number", "beta": beta}, [75, 210]) == pytest.approx(
        [0.5, 0.5], rel=1e-12
    )


def test_inverse_frequency_weights_per_sample_give_even_shares(vectors: dict[str, Any]) -> None:
    for case in vectors["inverse_frequency"]["cases"].values():
        weights = dict(enumerate(case["weight_balanced"]))
        got = shares({"name": "manual_weights", "weights": weights}, case["counts"])
        wanted = case["sampling_prob_per_class_if_used_as_sample_weight"]
        np.testing.assert_allclose(got, wanted, rtol=RTOL)


def test_down_and_upsampling_meet_the_reference_counts(vectors: dict[str, Any]) -> None:
    for case in vectors["down_up_sampling"]["cases"].values():
        sizes = {str(number): count for number, count in enumerate(case["counts"])}
        for expected in case["target_ratio"].values():
            ratio = expected["target_ratio"]
            down, up = Downsample(target_ratio=ratio), Upsample(target_ratio=ratio)
            assert list(down.resampled(sizes).values()) == expected["down_counts"]
            assert list(up.resampled(sizes).values()) == expected["up_counts"]
            assert down.target(sizes).num_draws == sum(expected["down_counts"])
            assert up.target(sizes).num_draws == sum(expected["up_counts"])


def test_hand_worked_counts_of_down_and_upsampling() -> None:
    assert Upsample(target_ratio=0.7).resampled(BRATS) == {"LGG": 147, "HGG": 210}
    assert Downsample(target_ratio=0.7).resampled(BRATS) == {"LGG": 75, "HGG": 107}
    # 75 / 210 as a float is a hair off; the classes are already there, so nothing changes.
    assert Downsample(target_ratio=75 / 210).resampled(BRATS) == BRATS
    assert Upsample(target_ratio=75 / 210).resampled(BRATS) == BRATS
    # 1/3 as a float is a hair less, 5/6 a hair more.
    assert Upsample(target_ratio=1 / 3).resampled({"a": 1, "b": 300}) == {"a": 100, "b": 300}
    assert Downsample(target_ratio=5 / 6).resampled({"a": 5, "b": 300}) == {"a": 5, "b": 6}
    three = {"a": 100, "b": 20, "c": 5}
    assert Upsample(target_ratio=0.1).resampled(three) == {"a": 100, "b": 20, "c": 10}
    assert Downsample(target_ratio=0.1).resampled(three) == {"a": 50, "b": 20, "c": 5}
    assert Upsample().resampled({"a": 3, "b": 0}) == {"a": 3}
    assert Downsample().resampled({"a": 3, "b": 0}) == {"a": 3}


@pytest.mark.parametrize(
    ("balance", "draws"),
    [
        ("class_balanced", 285),
        ({"name": "class_balanced", "num_samples": "dataset"}, 285),
        ({"name": "class_balanced", "num_samples": "oversample"}, 420),
        ({"name": "class_balanced", "num_samples": "undersample"}, 150),
        ({"name": "class_balanced", "num_samples": 400}, 400),
        ({"name": "class_balanced", "replacement": False}, 150),
        ({"name": "class_balanced", "replacement": False, "num_samples": 120}, 120),
        ({"name": "target", "shares": {"LGG": 0.3, "HGG": 0.7}, "replacement": False}, 250),
        ({"name": "upsample"}, 420),
        ({"name": "downsample"}, 150),
        ({"name": "downsample", "num_samples": 60}, 60),
    ],
)
def test_epoch_lengths_of_75_against_210_by_hand(balance: object, draws: int) -> None:
    assert length(balance, BRATS) == draws


def test_epoch_lengths_meet_the_reference(vectors: dict[str, Any]) -> None:
    for case in vectors["quota_epoch"]["cases"].values():
        sizes = {str(number): count for number, count in enumerate(case["counts"])}
        without = ClassBalanced(replacement=False).target(sizes)
        assert without.num_draws == case["replacement_false_max_epoch_length_uniform"]
        counts = [int(share * without.num_draws) for share in without.shares]
        assert counts == case["replacement_false_counts"]
        aware = length({"name": "class_balanced", "num_samples": "oversample"}, sizes)
        assert aware == case["class_aware_epoch_length_K_times_nmax"]


def test_decimal_shares_without_replacement_use_everybody() -> None:
    # 30 / 0.3 = 70 / 0.7 = 100; 0.3 as a binary float is a hair more and would leave 99.
    balance = {"name": "target", "shares": {"a": 0.3, "b": 0.7}, "replacement": False}
    assert length(balance, {"a": 30, "b": 70}) == 100


def test_empty_classes_do_not_count_towards_named_lengths() -> None:
    sizes = {"a": 4, "b": 0, "c": 10}
    for name, draws in (("oversample", 20), ("undersample", 8), ("dataset", 14)):
        balance = {"name": "power", "num_samples": name, "empty_class": "renormalize"}
        assert length(balance, sizes) == draws


@pytest.mark.parametrize(
    "balance",
    [
        "class_balanced",
        "power",
        "effective_number",
        "upsample",
        "downsample",
        {"name": "manual_weights", "weights": {"a": 1, "b": 1}},
        {"name": "target", "shares": {"a": 1, "b": 1}},
    ],
)
def test_a_declared_class_without_samples_is_named_unless_renormalised(balance: object) -> None:
    sizes = {"a": 4, "b": 0}
    with pytest.raises(ConfigError, match=r"'b'.*no training sample.*empty_class: renormalize"):
        length(balance, sizes)
    options = {"name": balance} if isinstance(balance, str) else dict(balance)  # type: ignore[call-overload]
    target = parse_strategy(options | {"empty_class": "renormalize"}).target(sizes)
    assert target.shares == (Fraction(1), Fraction(0))


def test_natural_order_owes_an_empty_class_nothing() -> None:
    assert InstanceBalanced().target({"a": 4, "b": 0}).shares == (Fraction(1), Fraction(0))


def test_an_empty_class_may_be_given_a_share_of_zero() -> None:
    strategy = parse_strategy({"name": "target", "shares": {"a": 1, "b": 0}})
    assert strategy.target({"a": 4, "b": 0}).shares == (Fraction(1), Fraction(0))


def test_a_class_left_out_of_the_target_gets_nothing() -> None:
    strategy = parse_strategy({"name": "target", "shares": {"a": 1, "c": 1}})
    assert strategy.target({"a": 4, "b": 9, "c": 4}).shares == (
        Fraction(1, 2),
        Fraction(0),
        Fraction(1, 2),
    )


@pytest.mark.parametrize(
    ("option", "values"),
    [("shares", {"LGG": 1, "HGB": 1}), ("weights", {"LGG": 1, "HGB": 1})],
)
def test_an_unknown_label_is_named_with_the_labels_there_and_the_nearest(
    option: str, values: dict[str, float]
) -> None:
    name = {"shares": "target", "weights": "manual_weights"}[option]
    message = (
        rf"{name}: {option} names 'HGB', .*Labels there: 'LGG' \(75\), 'HGG' \(210\)\. "
        r"Did you mean 'HGG'\?"
    )
    with pytest.raises(ConfigError, match=message):
        length({"name": name, option: values}, BRATS)


def test_weights_that_leave_a_class_out_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights leaves out 'HGG'. Labels there: 'LGG' \(75\)"):
        length({"name": "manual_weights", "weights": {"LGG": 1}}, BRATS)


def test_a_list_of_weights_for_text_labels_prints_the_mapping_to_write() -> None:
    balance = {"name": "manual_weights", "weights": [2.8, 1.0]}
    message = r"swapped list .*Write a mapping: \{LGG: 1\.0, HGG: 1\.0\}"
    with pytest.raises(ConfigError, match=message):
        length(balance, BRATS)
    assert shares(balance, [75, 210]) == [0.5, 0.5]


def test_a_list_of_weights_of_the_wrong_length_prints_the_mapping_to_write() -> None:
    with pytest.raises(ConfigError, match=r"3 entries for 2 classes .*\{LGG: 1\.0, HGG: 1\.0\}"):
        length({"name": "manual_weights", "weights": [1, 2, 3]}, BRATS)


@pytest.mark.parametrize("weights", [None, [], {}, "LGG=1"])
def test_weights_that_are_none_show_what_to_write(weights: object) -> None:
    with pytest.raises(ConfigError, match=r"weights is .*must map labels to numbers, such as"):
        parse_strategy({"name": "manual_weights", "weights": weights})


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "2"])
def test_a_weight_that_is_no_positive_number_is_named(weight: object) -> None:
    with pytest.raises(ConfigError, match=r"weights gives class 'LGG' .*; use numbers > 0"):
        parse_strategy({"name": "manual_weights", "weights": {"LGG": weight, "HGG": 1}})


@pytest.mark.parametrize("values", [None, [0.5, 0.5], {}])
def test_target_shares_must_be_a_mapping(values: object) -> None:
    with pytest.raises(ConfigError, match=r"target: shares is .*must map labels to"):
        parse_strategy({"name": "target", "shares": values})


def test_target_shares_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="shares are all 0; at least one class needs a share"):
        parse_strategy({"name": "target", "shares": {"LGG": 0, "HGG": 0}})


def test_shares_that_only_empty_classes_would_get_are_refused() -> None:
    balance = {"name": "target", "shares": {"b": 1}, "empty_class": "renormalize"}
    with pytest.raises(ConfigError, match="all 2 shares are 0"):
        length(balance, {"a": 3, "b": 0})


@pytest.mark.parametrize("name", ["upsample", "downsample"])
@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), float("inf"), True, "1", None])
def test_a_ratio_outside_zero_to_one_is_refused(name: str, ratio: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: target_ratio is .*number in \(0, 1\]"):
        parse_strategy({"name": name, "target_ratio": ratio})


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), True, "0.5"])
def test_an_exponent_outside_zero_to_one_is_refused(alpha: object) -> None:
    with pytest.raises(ConfigError, match=r"power: alpha is .*number in \[0, 1\]"):
        parse_strategy({"name": "power", "alpha": alpha})


@pytest.mark.parametrize("temperature", [0, 0.5, float("inf"), None])
def test_a_temperature_below_one_is_refused(temperature: object) -> None:
    with pytest.raises(ConfigError, match=r"power: temperature is .*number in \[1, 1e\+09\]"):
        parse_strategy({"name": "power", "temperature": temperature})


@pytest.mark.parametrize("beta", [1, 1.0, -0.1, float("nan"), True, "0.9"])
def test_an_overlap_outside_zero_to_one_is_refused(beta: object) -> None:
    with pytest.raises(ConfigError, match=r"effective_number: beta is .*number in \[0, 1\)"):
        parse_strategy({"name": "effective_number", "beta": beta})


def test_effective_numbers_need_a_sample_in_every_class() -> None:
    with pytest.raises(ConfigError, match=r"class sizes are \[3, 0\]; each must be at least 1"):
        effective_numbers(np.array([3, 0]), beta=0.9)


def test_rotation_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="downsample: rotate is 'no'; use true or false"):
        parse_strategy({"name": "downsample", "rotate": "no"})


def test_asking_for_more_than_there_is_without_replacement_says_how_many_there_are() -> None:
    balance = {"name": "class_balanced", "replacement": False, "num_samples": 152}
    with pytest.raises(ConfigError, match=r"num_samples is 152.*'LGG' has only 75; at most 150"):
        length(balance, BRATS)


@pytest.mark.parametrize(("alias", "name"), sorted(ALIASES.items()))
def test_an_alias_means_its_strategy(alias: str, name: str) -> None:
    options = {"weights": {"a": 1}} if name == "manual_weights" else {}
    assert parse_strategy({"name": alias, **options}).name == name


def test_every_strategy_is_found_under_its_own_name() -> None:
    extra: dict[str, dict[str, Any]] = {
        "manual_weights": {"weights": {"a": 1}},
        "target": {"shares": {"a": 1}},
        "progressively_balanced": {"num_epochs": 10},
        "deferred": {"num_epochs": 10, "then": {"name": "power", "alpha": 0.25}},
        "p_k": {"P": 2, "M": 4},
        "sample_weights": {"weights": "difficulty", "strata": None},
    }
    for name in KINDS:
        strategy = parse_strategy({"name": name, **extra.get(name, {})})
        assert strategy.name == name
        assert parse_strategy(strategy) is strategy
        assert parse_strategy(json.loads(json.dumps(strategy.settings()))) == strategy


def test_an_unknown_strategy_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'class_balance'; strategies are .*'class_balanced'\?"):
        parse_strategy("class_balance")


def test_an_unknown_option_names_those_there_are_and_the_nearest() -> None:
    message = r"power has no option 'alhpa'; it has unit, .*, alpha\. Did you mean 'alpha'\?"
    with pytest.raises(ConfigError, match=message):
        parse_strategy({"name": "power", "alhpa": 0.5})


@pytest.mark.parametrize("balance", [3, ["power"], {"alpha": 1}, {}])
def test_what_is_no_strategy_at_all_shows_the_three_ways_to_say_one(balance: object) -> None:
    with pytest.raises(ConfigError, match=r"use a name .*, a mapping with a name and options, or"):
        parse_strategy(balance)  # type: ignore[arg-type]


def test_strategies_are_frozen_and_only_kinds_of_them_can_be_built() -> None:
    with pytest.raises(AttributeError):
        ClassBalanced().unit = "sample"  # type: ignore[misc]
    with pytest.raises(TypeError, match="abstract"):
        Strategy()  # type: ignore[abstract]


def test_no_samples_at_all_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match="no training sample in any class"):
        length("instance_balanced", {"a": 0})


@given(
    counts=st.lists(st.integers(1, 500), min_size=1, max_size=8),
    ratio=st.integers(1, 100).map(lambda percent: percent / 100),
)
def test_resampled_counts_follow_the_formula_in_exact_arithmetic(
    counts: list[int], ratio: float
) -> None:
    exact = Fraction(round(ratio * 100), 100)
    sizes = {str(number): count for number, count in enumerate(counts)}
    up = [max(count, int(exact * max(counts))) for count in counts]
    down = [min(count, int(min(counts) / exact)) for count in counts]
    assert list(Upsample(target_ratio=ratio).resampled(sizes).values()) == up
    assert list(Downsample(target_ratio=ratio).resampled(sizes).values()) == down


def test_prior_shift_takes_even_training_back_to_nature() -> None:
    labels = ["LGG"] * 75 + ["HGG"] * 210
    shift = BalancedPlan.from_labels(labels, global_batch_size=8).prior_shift()
    # 0.5 after even training is 0.263 at natural prior: 75 / 285.
    assert shift == pytest.approx({"HGG": 28 / 19, "LGG": 10 / 19})
    posterior = {label: 0.5 * factor for label, factor in shift.items()}
    assert posterior["LGG"] / sum(posterior.values()) == pytest.approx(75 / 285)


def test_prior_shift_leaves_out_classes_that_are_never_drawn() -> None:
    balance = {"name": "target", "shares": {"a": 1, "b": 0}}
    plan = BalancedPlan.from_class_sizes({"a": 1, "b": 3}, global_batch_size=2, balance=balance)
    assert plan.prior_shift() == {"a": 0.25}


def test_the_threshold_of_repeat_factor_may_be_called_t_as_in_the_papers() -> None:
    short = parse_strategy({"name": "repeat_factor", "t": 0.25, "power": 0.5})
    assert short == parse_strategy({"name": "repeat_factor", "threshold": 0.25})
    with pytest.raises(ConfigError, match="no option 't'"):
        parse_strategy({"name": "repeat_factor", "t": 0.25, "threshold": 0.5})
    with pytest.raises(ConfigError, match="no option 't'"):
        parse_strategy({"name": "power", "t": 0.25})
