"""Schedules: shares that change from epoch to epoch, and totals that carry across the change."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.strategies import in_declared_order, parse_strategy
from streaming_balance.plan.walked_totals import WalkedTotals

BRATS = ["LGG"] * 75 + ["HGG"] * 210
RTOL = 1e-12


def plan_of(
    sizes: dict[str, int], balance: dict[str, Any], *, batch: int = 8, seed: int = 3
) -> BalancedPlan:
    return BalancedPlan.from_class_sizes(sizes, global_batch_size=batch, balance=balance, seed=seed)


def totals_of(plan: BalancedPlan, epoch: int) -> list[int]:
    steps = range(plan.num_steps(epoch))
    return [int(total) for total in np.sum([plan.quotas(epoch, step) for step in steps], axis=0)]


def times_in_epoch(plan: BalancedPlan, epoch: int) -> NDArray[np.int64]:
    drawn = [plan.batch(epoch, step) for step in range(plan.num_steps(epoch))]
    return np.bincount(np.concatenate(drawn), minlength=plan.num_samples)


def test_progressive_shares_meet_the_reference_in_every_epoch(vectors: dict[str, Any]) -> None:
    for case in vectors["progressively_balanced"]["cases"].values():
        strategy = parse_strategy({"name": "progressively_balanced", "num_epochs": case["T"]})
        sizes = {str(number): count for number, count in enumerate(case["counts"])}
        plan = plan_of(sizes, strategy.settings())
        for expected in case["epochs"]:
            got = strategy.target(sizes, expected["epoch"]).shares
            np.testing.assert_allclose([float(share) for share in got], expected["class_prob"],
                                       rtol=RTOL)  # fmt: skip
            planned = list(plan.shares_in(expected["epoch"]).values())
            np.testing.assert_allclose(planned, expected["class_prob"], rtol=RTOL)


def test_progressive_shares_worked_by_hand() -> None:
    # l = 1/2 in the middle of three epochs: LGG (75/285 + 1/2) / 2 = 5/38 + 1/4 = 29/76.
    strategy = parse_strategy({"name": "progressively_balanced", "num_epochs": 3})
    shares = [strategy.target({"LGG": 75, "HGG": 210}, epoch).shares[0] for epoch in (0, 1, 2, 9)]
    assert shares == [Fraction(5, 19), Fraction(29, 76), Fraction(1, 2), Fraction(1, 2)]


def test_a_line_of_one_epoch_is_natural_first_and_balanced_afterwards() -> None:
    plan = plan_of({"a": 30, "b": 10}, {"name": "progressively_balanced", "num_epochs": 1})
    assert plan.shares_in(0) == {"a": 0.75, "b": 0.25}
    assert plan.shares_in(1) == plan.shares_in(50) == plan.shares == {"a": 0.5, "b": 0.5}


def test_an_empty_class_gets_no_share_at_any_epoch_once_that_was_asked_for() -> None:
    balance = {"name": "progressively_balanced", "num_epochs": 3, "empty_class": "renormalize"}
    plan = plan_of({"a": 30, "b": 10, "c": 0}, balance)
    assert [plan.shares_in(epoch)["c"] for epoch in range(4)] == [0, 0, 0, 0]
    assert plan.shares_in(1) == {"a": 0.625, "b": 0.375, "c": 0}


@pytest.mark.parametrize(
    ("num_epochs", "change"), [(1, 0), (2, 1), (4, 3), (5, 4), (10, 8), (99, 79), (100, 80)]
)
def test_the_change_comes_at_eight_tenths_rounded_down(num_epochs: int, change: int) -> None:
    plan = plan_of({"a": 30, "b": 10}, {"name": "deferred", "num_epochs": num_epochs})
    assert plan.shares_in(change) == {"a": 0.5, "b": 0.5}
    if change:
        assert plan.shares_in(change - 1) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize(
    ("then", "after"),
    [
        ({"name": "class_balanced"}, [0.5, 0.5]),
        ({"name": "power", "alpha": 0.0}, [0.5, 0.5]),
        ({"name": "power", "temperature": 2}, [14**0.5, 5**0.5]),
        ({"name": "effective_number", "beta": 0.0}, [210, 75]),
        ({"name": "manual_weights", "weights": {"HGG": 1, "LGG": 2}}, [210, 150]),
        ({"name": "target", "shares": {"HGG": 1, "LGG": 3}}, [1, 3]),
        ({"name": "upsample", "target_ratio": 0.5}, [210, 105]),
        ({"name": "downsample", "target_ratio": 0.5}, [150, 75]),
        ({"name": "instance_balanced"}, [210, 75]),
    ],
)
def test_any_strategy_of_shares_may_follow(then: dict[str, Any], after: list[float]) -> None:
    balance = {"name": "deferred", "start_epoch": 2, "then": then}
    plan = BalancedPlan.from_labels(BRATS, global_batch_size=8, balance=balance)
    assert list(plan.shares_in(1).values()) == pytest.approx([14 / 19, 5 / 19], rel=1e-12)
    wanted = [part / sum(after) for part in after]
    assert list(plan.shares_in(2).values()) == pytest.approx(wanted, rel=1e-12)
    assert plan.shares == plan.shares_in(2)
    again = parse_strategy(plan.settings["balance"])
    assert again == plan.strategy
    assert parse_strategy(json.loads(json.dumps(again.settings()))) == again


def test_epochs_grow_and_shrink_as_the_strategy_that_follows_asks() -> None:
    up = plan_of({"a": 75, "b": 210}, {"name": "deferred", "start_epoch": 2, "then": "upsample"})
    # 285 draws fill 36 batches of 8, 2 * 210 draws fill 53.
    assert [up.num_steps(epoch) for epoch in range(4)] == [36, 36, 53, 53]
    down = plan_of(
        {"a": 75, "b": 210}, {"name": "deferred", "start_epoch": 2, "then": "downsample"}
    )
    assert [down.num_steps(epoch) for epoch in range(4)] == [36, 36, 19, 19]


def test_options_beside_then_hold_for_the_whole_run() -> None:
    sizes = {"a": 75, "b": 210}
    base = {"name": "deferred", "start_epoch": 1, "then": "class_balanced"}
    assert [plan_of(sizes, base | {"num_samples": 80}).num_steps(e) for e in (0, 1)] == [10, 10]
    # A length of its own goes first.
    own = base | {"num_samples": 80, "then": {"name": "class_balanced", "num_samples": 160}}
    assert [plan_of(sizes, own).num_steps(epoch) for epoch in (0, 1)] == [10, 20]
    # Balanced without repeats: 2 * 75 draws are 18 whole batches.
    once = plan_of(sizes, base | {"replacement": False})
    assert [once.num_steps(epoch) for epoch in (0, 1)] == [35, 18]
    short = plan_of(sizes, base | {"last": "short"})
    assert [short.batch_size(epoch, 35) for epoch in (0, 1)] == [5, 5]


def test_an_empty_class_is_judged_by_the_strategy_that_owes_it_a_share() -> None:
    sizes = {"a": 5, "b": 9, "c": 0}
    follow = {"name": "deferred", "start_epoch": 1, "then": "class_balanced"}
    with pytest.raises(ConfigError, match="'c' is declared but has no training sample"):
        plan_of(sizes, follow)
    renormalised = plan_of(sizes, follow | {"empty_class": "renormalize"})
    assert renormalised.shares == {"a": 0.5, "b": 0.5, "c": 0}
    none_owed = follow | {"then": {"name": "target", "shares": {"a": 1, "b": 3}}}
    assert plan_of(sizes, none_owed).shares == {"a": 0.25, "b": 0.75, "c": 0}


def test_a_ratio_that_is_reached_is_found_behind_the_change() -> None:
    then = {"name": "upsample", "target_ratio": 0.3}
    balance = {"name": "deferred", "start_epoch": 1, "then": then}
    assert "0.357 already" in plan_of({"a": 75, "b": 210}, balance).warnings[0]
    with pytest.raises(ConfigError, match=r"0\.357 already.*Lower target_ratio"):
        plan_of({"a": 75, "b": 210}, balance | {"on_exceeded": "error"})


def test_weights_listed_in_a_declared_order_are_named_behind_the_change() -> None:
    then = {"name": "manual_weights", "weights": [2.8, 1]}
    deferred = parse_strategy({"name": "deferred", "start_epoch": 1, "then": then})
    named = in_declared_order(deferred, ["LGG", "HGG"]).settings()["then"]["weights"]
    assert named == {"LGG": 2.8, "HGG": 1.0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs one of num_epochs .* and start_epoch"),
        ({"num_epochs": 5, "start_epoch": 4}, "needs one of"),
        ({"num_epochs": 0}, "num_epochs is 0; it must be an integer from 1"),
        ({"num_epochs": 2.5}, r"num_epochs is 2\.5"),
        ({"num_epochs": True}, "num_epochs is True"),
        ({"start_epoch": -1}, "start_epoch is -1; it must be an integer from 0"),
        ({"num_epochs": 10**6}, "to 65536"),
        ({"start_epoch": 1, "then": "repeat_factor"}, "then is repeat_factor; it must be a"),
        ({"start_epoch": 1, "then": {"name": "p_k", "P": 2, "M": 4}}, "then is p_k"),
        ({"start_epoch": 1, "then": {"name": "deferred", "start_epoch": 0}}, "then is deferred"),
        (
            {"start_epoch": 1, "then": {"name": "progressively_balanced", "num_epochs": 1}},
            "then is progressively_balanced",
        ),
        ({"start_epoch": 1, "then": {"name": "power", "last": "drop"}}, "write it beside then"),
        ({"start_epoch": 1, "then": {"name": "downsample", "rotate": False}}, "leave rotate out"),
    ],
)
def test_a_change_that_cannot_be_is_refused_with_what_can(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_strategy({"name": "deferred", **options})


@pytest.mark.parametrize("epochs", [None, 0, "10", 2.0, False, 65537])
def test_a_line_without_a_length_is_refused(epochs: object) -> None:
    with pytest.raises(ConfigError, match=r"num_epochs is .* an integer from 1 to 65536, such as"):
        parse_strategy({"name": "progressively_balanced", "num_epochs": epochs})


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, Any], int]:
    """Give class sizes, a schedule and a batch size."""
    size = st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 1000))
    sizes = draw(st.lists(size, min_size=2, max_size=20))
    then = st.sampled_from(
        [
            {"name": "class_balanced"},
            {"name": "power"},
            {"name": "upsample", "target_ratio": 0.3},
            {"name": "downsample", "target_ratio": 0.7},
        ]
    )
    epochs = draw(st.integers(1, 30))
    balance: dict[str, Any] = draw(
        st.one_of(
            st.just({"name": "progressively_balanced", "num_epochs": epochs}),
            st.fixed_dictionaries(
                {"name": st.just("deferred"), "num_epochs": st.just(epochs), "then": then}
            ),
        )
    )
    batch = draw(st.integers(1, 64))
    named = {str(number): count for number, count in enumerate(sizes)}
    return named, balance | {"last": draw(st.sampled_from(["full", "short"]))}, batch


@given(case=schedules())
@settings(max_examples=60)
def test_totals_stay_within_one_of_the_ideal_across_the_change(
    case: tuple[dict[str, int], dict[str, Any], int],
) -> None:
    sizes, balance, batch = case
    strategy = parse_strategy(balance)
    plan = plan_of(sizes, balance, batch=batch)
    owed, got = [Fraction(0)] * len(sizes), np.zeros(len(sizes), dtype=np.int64)
    bounds = np.cumsum([0, *sizes.values()])
    for epoch in range(strategy.settled_epoch + 12):
        target = strategy.target(sizes, epoch)
        draws = target.num_draws
        if balance["last"] == "full":
            draws = math.ceil(draws / batch) * batch
        ideal = [share * draws for share in target.shares]
        owed = [before + more for before, more in zip(owed, ideal, strict=True)]
        before, exposure = got, plan.exposure(epoch + 1, 0)
        got = np.add.reduceat(exposure, bounds[:-1])
        assert got.sum() - before.sum() == draws
        for number, (more, exact) in enumerate(zip(got - before, ideal, strict=True)):
            assert math.floor(exact) <= more <= math.ceil(exact)
            assert abs(int(got[number]) - owed[number]) < 1
            inside = exposure[bounds[number] : bounds[number + 1]]
            assert inside.max() - inside.min() <= 1


@st.composite
def changing_ideals(draw: st.DrawFn) -> list[list[Fraction]]:
    """Give 100 epochs of ideals, different in each and whole in sum."""
    classes = draw(st.integers(2, 20))
    least = draw(st.sampled_from([0, 50, 90]))
    numbers = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**32))))
    rows = numbers.integers(least, 100, size=(100, classes))
    rows[:, -1] = -rows[:, :-1].sum(axis=1) % 100
    return [[Fraction(int(part), 100) for part in row] for row in rows]


@given(rows=changing_ideals())
@settings(max_examples=60)
def test_ideals_that_change_in_every_epoch_are_followed_within_one(
    rows: list[list[Fraction]],
) -> None:
    totals = WalkedTotals(lambda epoch: rows[min(epoch, 99)], tie_order=range(len(rows[0])))
    owed = [Fraction(0)] * len(rows[0])
    for epoch, ideal in enumerate(rows):
        given_out = totals.of(epoch)
        assert sum(given_out) == sum(ideal)
        assert all(
            math.floor(exact) <= count <= math.ceil(exact)
            for exact, count in zip(ideal, given_out, strict=True)
        )
        owed = [before + more for before, more in zip(owed, ideal, strict=True)]
        for count, exact in zip(totals.before(epoch + 1), owed, strict=True):
            assert abs(count - exact) < 1


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        # Always serving whoever lags most leaves somebody more than a draw behind here.
        ([17, 8, 16, 18, 13, 12, 17, 19], 20),
        ([8, 6, 12, 14, 12, 13, 15], 16),
        ([59, 57, 59, 57, 59, 58, 11], 60),
    ],
)
def test_heavy_classes_are_followed_within_one_for_two_thousand_epochs(
    parts: list[int], whole: int
) -> None:
    ideal = [Fraction(part, whole) for part in parts]
    totals = WalkedTotals(lambda _: ideal, tie_order=range(len(parts)))
    for epoch in range(2000):
        for count, part in zip(totals.before(epoch), parts, strict=True):
            assert abs(count * whole - part * epoch) < whole


def test_totals_do_not_depend_on_the_order_in_which_epochs_are_asked_for() -> None:
    ideal = [[Fraction(number % 7, 7), Fraction(-number % 7, 7)] for number in range(700)]
    forwards = WalkedTotals(lambda epoch: ideal[epoch], tie_order=[0, 1])
    wanted = [forwards.before(epoch) for epoch in range(500)]
    backwards = WalkedTotals(lambda epoch: ideal[epoch], tie_order=[0, 1])
    assert [backwards.before(epoch) for epoch in reversed(range(500))] == wanted[::-1]


@pytest.mark.parametrize(
    "balance",
    [
        {"name": "progressively_balanced", "num_epochs": 4},
        {"name": "deferred", "start_epoch": 2, "then": {"name": "upsample", "target_ratio": 0.8}},
    ],
)
def test_exposure_is_fair_within_each_class_at_every_step_across_the_change(
    balance: dict[str, Any],
) -> None:
    plan = plan_of({"a": 9, "b": 31, "c": 1}, balance, batch=5)
    counted = np.zeros(41, dtype=np.int64)
    for epoch in range(6):
        for step in range(plan.num_steps(epoch)):
            np.testing.assert_array_equal(plan.exposure(epoch, step), counted)
            batch = plan.batch(epoch, step)
            np.add.at(counted, batch, 1)
            for inside in (counted[:9], counted[9:40]):
                assert inside.max() - inside.min() <= 1
            in_batch = [(batch < 9).sum(), ((batch >= 9) & (batch < 40)).sum(), (batch == 40).sum()]
            assert plan.quotas(epoch, step).tolist() == in_batch
            ideal = [share * 5 for share in plan.shares_in(epoch).values()]
            total = [part * plan.num_steps(epoch) for part in ideal]
            for count, exact in zip(in_batch, total, strict=True):
                # Floor or ceiling of the total's share, itself a floor or a ceiling.
                low = math.floor(math.floor(exact + 1e-9) / plan.num_steps(epoch))
                high = math.ceil(math.ceil(exact - 1e-9) / plan.num_steps(epoch))
                assert low <= count <= high


@pytest.mark.parametrize(
    "balance",
    [
        {"name": "progressively_balanced", "num_epochs": 10, "replacement": False},
        {"name": "deferred", "start_epoch": 3, "replacement": False},
        {"name": "deferred", "start_epoch": 3, "replacement": False, "then": {"name": "power"}},
    ],
)
def test_without_replacement_nobody_comes_twice_in_any_epoch_of_a_schedule(
    balance: dict[str, Any],
) -> None:
    for seed in range(3):
        plan = plan_of({"a": 75, "b": 210}, balance, seed=seed)
        assert [times_in_epoch(plan, epoch).max() for epoch in range(13)] == [1] * 13


def test_downsampling_behind_a_change_shows_nobody_twice_in_an_epoch() -> None:
    for seed in range(3):
        balance = {"name": "deferred", "start_epoch": 3, "then": "downsample"}
        plan = plan_of({"a": 75, "b": 210}, balance, seed=seed, batch=10)
        assert [times_in_epoch(plan, epoch).max() for epoch in range(3, 12)] == [1] * 9


def test_independent_draws_follow_a_schedule() -> None:
    balance = {"name": "deferred", "start_epoch": 1, "draw": "iid", "num_samples": 20_000}
    plan = plan_of({"a": 90, "b": 10}, balance, batch=100)
    rare = [totals_of(plan, epoch)[1] for epoch in (0, 1)]
    # Six standard deviations of a binomial of 20,000 draws.
    assert abs(rare[0] - 2000) < 6 * (20_000 * 0.1 * 0.9) ** 0.5
    assert abs(rare[1] - 10_000) < 6 * (20_000 * 0.25) ** 0.5


def test_priors_are_those_of_the_epoch_asked_for() -> None:
    plan = BalancedPlan.from_labels(
        BRATS, global_batch_size=8, balance={"name": "progressively_balanced", "num_epochs": 3}
    )
    assert plan.prior_shift(0) == pytest.approx({"HGG": 1.0, "LGG": 1.0})
    # Natural over sampled: 5/19 over 29/76 and 14/19 over 47/76.
    assert plan.prior_shift(1) == pytest.approx({"HGG": 56 / 47, "LGG": 20 / 29}, rel=1e-12)
    assert plan.prior_shift() == pytest.approx({"HGG": 28 / 19, "LGG": 10 / 19}, rel=1e-12)
    middle = plan.logit_adjustment(2.0, epoch=1)
    assert middle["LGG"] == pytest.approx(2 * math.log(29 / 76), rel=1e-12)
    assert plan.logit_adjustment()["LGG"] == pytest.approx(math.log(0.5), rel=1e-12)


def test_a_schedule_far_along_is_reached_in_seconds() -> None:
    balance = {"name": "deferred", "num_epochs": 100, "then": {"name": "power"}}
    plan = plan_of({"a": 75, "b": 210, "c": 7}, balance)
    assert sum(totals_of(plan, 5000)) == plan.num_steps(5000) * 8
