"""Draws by weight per sample: repeat factors and weights, met by floor or ceiling in each epoch."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan import systematic
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.strategies import parse_strategy
from streaming_balance.plan.systematic import _marks_reached, exact_weights
from streaming_balance.plan.unit_strategies import RepeatFactor, SampleWeights

BRATS = ["LGG"] * 75 + ["HGG"] * 210
RTOL = 1e-12


class Shards:
    """A data set as a plan sees it, with numeric columns."""

    train_splits = ("train",)

    def __init__(self, labels: list[str], **columns: Any) -> None:
        self.classes = sorted(set(labels))
        self._labels, self._columns = labels, columns

    def labels(self, split: str) -> NDArray[np.int64]:
        assert split == "train"
        return np.array([self.classes.index(label) for label in self._labels], dtype=np.int64)

    def patients(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return np.array([f"P{number // 2}" for number in range(len(self._labels))])

    def keys(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return np.array([f"P{number // 2}__{number % 2}" for number in range(len(self._labels))])

    def column(self, split: str, name: str) -> NDArray[Any]:
        if name not in self._columns:
            raise ConfigError(f"split {split!r} has no column {name!r}")
        return np.array(self._columns[name])


def weighted(weights: Any, *, batch: int = 8, labels: Any = None, **options: Any) -> BalancedPlan:
    seed = options.pop("seed", 5)
    return BalancedPlan.from_labels(
        [0] * len(weights) if labels is None else labels,
        global_batch_size=batch,
        balance={"name": "sample_weights", "weights": weights, **options},
        seed=seed,
    )


def repeated(labels: Any, *, batch: int = 8, seed: int = 5, **options: Any) -> BalancedPlan:
    return BalancedPlan.from_labels(
        labels, global_batch_size=batch, balance={"name": "repeat_factor", **options}, seed=seed
    )


def batches_of(plan: BalancedPlan, epoch: int) -> list[NDArray[np.int64]]:
    return [plan.batch(epoch, step) for step in range(plan.num_steps(epoch))]


def times_in_epoch(plan: BalancedPlan, epoch: int) -> NDArray[np.int64]:
    return np.bincount(np.concatenate(batches_of(plan, epoch)), minlength=plan.num_samples)


def assert_floor_or_ceiling(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    assert (counts >= np.floor(expected - 1e-9)).all()
    assert (counts <= np.ceil(expected + 1e-9)).all()


def test_repeat_factors_meet_the_reference(vectors: dict[str, Any]) -> None:
    for name, case in vectors["repeat_factor"]["cases"].items():
        if name == "multilabel_toy":
            continue
        counts = np.array(case["counts"], dtype=np.float64)
        for threshold, expected in case["threshold"].items():
            limit = 1 / len(counts) if threshold == "1/K" else float(threshold)
            for power, wanted in ((0.5, "repeat_factor"), (1.0, "repeat_factor_sqrt_false")):
                factors = RepeatFactor(threshold=limit, power=power)
                np.testing.assert_allclose(
                    factors.factors(counts / counts.sum()), expected[wanted], rtol=RTOL
                )
            labels = np.repeat(np.arange(len(counts)), case["counts"])
            plan = repeated(labels, threshold=limit, last="short")
            ideal = np.array(expected["expected_epoch_count_per_class"])
            shares = list(plan.shares.values())
            np.testing.assert_allclose(shares, ideal / ideal.sum(), rtol=RTOL)
            per_class = np.bincount(labels, weights=times_in_epoch(plan, 0))
            assert_floor_or_ceiling(per_class.astype(np.int64), ideal)
            drawn = sum(map(len, batches_of(plan, 1)))
            assert abs(drawn - expected["expected_epoch_size"]) < 1


def test_a_sample_with_several_labels_repeats_as_its_rarest_asks(vectors: dict[str, Any]) -> None:
    toy = vectors["repeat_factor"]["cases"]["multilabel_toy"]
    plan = repeated(toy["images"], threshold=toy["threshold"], last="short", batch=4)
    expected = np.array(toy["image_repeat"])
    times = np.array([times_in_epoch(plan, epoch) for epoch in range(600)])
    for counts in times:
        assert_floor_or_ceiling(counts, expected)
    # Images 3 comes exactly twice; the mean of a fraction f over 600 epochs strays by
    # sqrt(f (1 - f) / 600) < 0.021.
    assert (times[:, 3] == 2).all()
    np.testing.assert_allclose(times.mean(axis=0), expected, atol=6 * 0.021)
    has = {name: np.array([name in labels for labels in toy["images"]]) for name in "abc"}
    wanted = {name: float(expected[mask].sum() / expected.sum()) for name, mask in has.items()}
    assert plan.shares == pytest.approx(wanted, rel=RTOL)
    counted = {name: int(times[0][mask].sum()) for name, mask in has.items()}
    steps = range(plan.num_steps(0))
    assert np.sum([plan.quotas(0, step) for step in steps], axis=0).tolist() == [
        counted[name] for name in "abc"
    ]


def test_repeats_are_exact_in_the_long_run_and_never_off_by_one_in_an_epoch() -> None:
    # r = sqrt(0.5 / (75/285)) = sqrt(1.9) for LGG, 1 for HGG: no copy more, none fewer.
    plan = repeated(BRATS, threshold=0.5, last="short")
    times = np.array([times_in_epoch(plan, epoch) for epoch in range(300)])
    assert (times[:, 75:] == 1).all()
    assert set(np.unique(times[:, :75]).tolist()) == {1, 2}
    # 300 epochs x 75 samples: every epoch's sum is within 1 of 75 sqrt(1.9).
    np.testing.assert_allclose(times[:, :75].sum(axis=1), 75 * 1.9**0.5, atol=1)
    fraction = 1.9**0.5 - 1
    spread = (fraction * (1 - fraction) / 300) ** 0.5
    np.testing.assert_allclose(times[:, :75].mean(axis=0), 1.9**0.5, atol=6 * spread)
    sizes = {sum(map(len, batches_of(plan, epoch))) for epoch in range(40)}
    assert sizes == {313, 314}


def test_full_and_dropped_last_batches_round_an_epoch_of_repeats_to_whole_batches() -> None:
    # 75 sqrt(1.9) + 210 = 313.38 draws: 40 batches of 8 hold 320, 39 hold 312.
    for last, steps in (("full", 40), ("drop", 39)):
        plan = repeated(BRATS, threshold=0.5, last=last)
        ideal = np.where(np.arange(285) < 75, 1.9**0.5, 1.0)
        for epoch in range(3):
            assert [len(batch) for batch in batches_of(plan, epoch)] == [8] * steps
            assert_floor_or_ceiling(times_in_epoch(plan, epoch), ideal * 8 * steps / ideal.sum())


@st.composite
def weight_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Give weights over many magnitudes, some of them 0, labels, and the shape of an epoch."""
    weight = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(1, 3).map(float))
    weights = draw(st.lists(weight, min_size=1, max_size=40).filter(any))
    batch = draw(st.integers(1, 17))
    return {
        "weights": weights,
        "labels": draw(st.lists(st.integers(0, 2), min_size=len(weights), max_size=len(weights))),
        "batch": batch,
        "last": draw(st.sampled_from(["full", "short", "drop"])),
        "num_samples": draw(st.integers(batch, 150)),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }


@given(case=weight_cases())
@settings(max_examples=120)
def test_every_epoch_meets_every_expectation_by_floor_or_ceiling(case: dict[str, Any]) -> None:
    plan = weighted(**case)
    weights, batch, length = np.array(case["weights"]), case["batch"], case["num_samples"]
    draws = {
        "full": -(-length // batch) * batch,
        "short": length,
        "drop": length // batch * batch,
    }[case["last"]]
    for epoch in (0, 1, 7):
        drawn = batches_of(plan, epoch)
        sizes = [len(members) for members in drawn]
        assert sum(sizes) == draws
        assert sizes[:-1] == [batch] * (len(sizes) - 1)
        times = np.bincount(np.concatenate(drawn), minlength=len(weights))
        assert_floor_or_ceiling(times, draws * weights / weights.sum())
        assert not times[weights == 0].any()
        # Nobody comes twice in a batch who could come once in each of the whole ones.
        whole = len(sizes) - (sizes[-1] < batch)
        for members in drawn:
            here = np.bincount(members, minlength=len(weights))
            assert (here[times <= whole] <= 1).all()
            assert (here <= -(-times // max(1, whole))).all()


@given(case=weight_cases(), place=st.tuples(st.integers(0, 3), st.integers(0, 1000)))
@settings(max_examples=60)
def test_exposure_is_what_batches_counted(case: dict[str, Any], place: tuple[int, int]) -> None:
    plan = weighted(**case)
    epoch, step = place[0], place[1] % (plan.num_steps(place[0]) + 1)
    counted = np.zeros(len(case["weights"]), dtype=np.int64)
    for earlier in range(epoch):
        counted += times_in_epoch(plan, earlier)
    for number in range(step):
        counted += np.bincount(plan.batch(epoch, number), minlength=len(counted))
    np.testing.assert_array_equal(plan.exposure(epoch, step), counted)
    assert counted.sum() == 0 or plan.exposure(epoch, step).dtype == np.int64


def test_exposure_of_repeats_counts_epochs_of_different_lengths() -> None:
    plan = repeated(BRATS, threshold=0.5, last="short")
    counted = np.zeros(285, dtype=np.int64)
    for epoch in range(4):
        for step in range(plan.num_steps(epoch)):
            np.testing.assert_array_equal(plan.exposure(epoch, step), counted)
            counted += np.bincount(plan.batch(epoch, step), minlength=285)
        np.testing.assert_array_equal(plan.exposure(epoch, plan.num_steps(epoch)), counted)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_parts_of_all_ranks_are_the_global_batch(ranks: int) -> None:
    plan = weighted(np.arange(40.0), labels=[0] * 13 + [1] * 27, last="short", num_samples=101)
    for step in range(plan.num_steps(2)):
        parts = [plan.rank_batch(2, step, rank=rank, num_ranks=ranks) for rank in range(ranks)]
        assert sorted(np.concatenate(parts).tolist()) == sorted(plan.batch(2, step).tolist())


def test_quotas_count_the_classes_of_a_batch() -> None:
    labels = np.arange(40) % 3
    plan = weighted(np.arange(40.0), labels=labels)
    for step in range(plan.num_steps(0)):
        counts = np.bincount(labels[plan.batch(0, step)], minlength=3)
        assert plan.quotas(0, step).tolist() == counts.tolist()


def test_every_batch_crosses_all_classes() -> None:
    # Classes stand side by side: a batch of 10 strays from its share of each by less than 2.
    labels = np.arange(300) % 4
    weights = np.where(labels == 0, 5.0, 1.0)
    plan = weighted(weights, labels=labels, batch=10)
    ideal = 10 * np.array([5 / 8, 1 / 8, 1 / 8, 1 / 8])
    for step in range(plan.num_steps(0)):
        assert (np.abs(plan.quotas(0, step) - ideal) < 2).all()


def test_equal_weights_show_everybody_once_an_epoch_in_an_order_that_changes() -> None:
    plan = weighted(np.ones(64))
    for epoch in range(3):
        assert times_in_epoch(plan, epoch).tolist() == [1] * 64
    together = {
        frozenset(batch.tolist()) for epoch in range(3) for batch in batches_of(plan, epoch)
    }
    assert len(together) > 20


def test_an_epoch_is_no_rotation_of_the_one_before() -> None:
    plan = weighted(np.ones(64), batch=1)
    first, second = (np.concatenate(batches_of(plan, epoch)) for epoch in (0, 1))
    # Who followed whom: hardly anybody is followed by the same one again.
    followed = {(a, b) for a, b in zip(first, np.roll(first, -1), strict=True)}
    again = {(a, b) for a, b in zip(second, np.roll(second, -1), strict=True)}
    assert len(followed & again) < 10


def test_weights_of_different_epochs_and_seeds_round_differently() -> None:
    weights = np.linspace(0.5, 1.5, 30)
    drawn = {
        (seed, epoch): tuple(times_in_epoch(weighted(weights, seed=seed), epoch).tolist())
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(drawn.values())) == 4


def test_very_many_steps_are_permuted_without_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systematic, "SORTED_STEPS", 4)
    weights = np.linspace(0.1, 3, 50)
    for last in ("full", "short"):
        plan = weighted(weights, batch=4, last=last, num_samples=99)
        times = times_in_epoch(plan, 0)
        assert_floor_or_ceiling(times, times.sum() * weights / weights.sum())
        assert all(len(set(batch.tolist())) == len(batch) for batch in batches_of(plan, 0))
        counted = sum(np.bincount(plan.batch(0, step), minlength=50) for step in range(11))
        np.testing.assert_array_equal(plan.exposure(0, 11), counted)


@given(
    lengths=st.lists(st.integers(0, 2**46), min_size=1, max_size=50).filter(any),
    marks=st.one_of(st.integers(1, 2**40), st.integers(2**50, 2**55)),
    start=st.floats(0, 1, exclude_max=True),
    stretch=st.integers(1, 60),
)
@settings(max_examples=400)
def test_marks_are_counted_as_whole_numbers_of_any_size_count_them(
    lengths: list[int], marks: int, start: float, stretch: int
) -> None:
    sums = np.cumsum(np.array(lengths, dtype=np.int64))
    for distance in (int(sums[-1]), max(1, int(sums[-1]) // stretch)):
        begin = int(start * distance) % distance
        wanted = [(int(reached) * marks + begin) // distance for reached in sums]
        got = _marks_reached(sums, marks, begin, distance)
        assert got.tolist() == wanted


@given(
    weights=st.lists(
        st.one_of(st.just(0.0), st.floats(1e-300, 1e300)), min_size=1, max_size=60
    ).filter(any)
)
@settings(max_examples=200)
def test_weights_as_whole_numbers_keep_52_bits_of_their_sum(weights: list[float]) -> None:
    numbers, exponent = exact_weights(weights)
    for weight, number in zip(weights, numbers.tolist(), strict=True):
        # Compared as exact ratios: half a unit at most.
        numerator, denominator = weight.as_integer_ratio()
        scaled = numerator * 2 ** max(exponent, 0) * 2, denominator * 2 ** max(-exponent, 0)
        assert abs(scaled[0] - 2 * number * scaled[1]) <= scaled[1]
    assert 2**50 < int(numbers.sum()) <= 2**52 + len(weights)


def test_weights_by_the_name_of_a_column_are_those_of_the_column() -> None:
    labels, numbers = ["b", "a"] * 20, np.linspace(0, 2, 40)
    balance = {"name": "sample_weights", "weights": "difficulty"}
    shards = Shards(labels, difficulty=numbers, site=["x"] * 40)
    plan = BalancedPlan.for_shards(shards, global_batch_size=8, balance=balance)
    assert plan.settings["balance"] == balance
    assert parse_strategy(plan.settings["balance"]) == plan.strategy
    assert_floor_or_ceiling(times_in_epoch(plan, 0), 40 * numbers / numbers.sum())
    assert pickle.loads(pickle.dumps(plan)).batch(1, 2).tolist() == plan.batch(1, 2).tolist()
    as_text = Shards(labels, difficulty=[str(number) for number in numbers])
    assert BalancedPlan.for_shards(as_text, global_batch_size=8, balance=balance) == plan
    # Other numbers under the same name make other batches: that is another plan.
    other = Shards(labels, difficulty=numbers[::-1])
    assert BalancedPlan.for_shards(other, global_batch_size=8, balance=balance) != plan
    for name, said in (
        ("site", "column 'site' holds what is no number"),
        ("age", "no column 'age'"),
    ):
        wrong = balance | {"weights": name}
        with pytest.raises(ConfigError, match=said):
            BalancedPlan.for_shards(shards, global_batch_size=8, balance=wrong)
    with pytest.raises(
        ConfigError, match=r"'difficulty', the name of a column, and a list .*\(N,\)"
    ):
        BalancedPlan.from_labels(labels, global_batch_size=8, balance=balance)


def test_samples_left_out_are_never_drawn_whatever_they_weigh() -> None:
    shards = Shards(["a"] * 10, w=[1.0] * 8 + [50.0, 50.0])
    plan = BalancedPlan.for_shards(
        shards,
        global_batch_size=4,
        balance={"name": "sample_weights", "weights": "w"},
        exclude=["P4"],
    )
    assert times_in_epoch(plan, 0).tolist() == [1] * 8 + [0, 0]
    with pytest.raises(ConfigError, match="all weights are 0"):
        BalancedPlan.for_shards(
            Shards(["a"] * 4, w=[0.0, 0.0, 1.0, 1.0]),
            global_batch_size=2,
            balance={"name": "sample_weights", "weights": "w"},
            exclude=["P1"],
        )


def test_an_array_of_weights_is_kept_by_its_digest_alone() -> None:
    plan = weighted(np.arange(1.0, 41.0))
    settings_kept = plan.settings["balance"]
    assert settings_kept["weights"].startswith("blake2b:")
    assert len(json.dumps(settings_kept)) < 120
    assert weighted(list(range(1, 41))) == plan
    assert weighted(np.arange(2.0, 42.0)) != plan
    with pytest.raises(ConfigError, match=r"digest of an array .* Pack the weights as a column"):
        parse_strategy(settings_kept)
    strategy = plan.strategy
    assert isinstance(strategy, SampleWeights)
    with pytest.raises(ValueError, match="read-only"):
        strategy.weights[0] = 5
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert hash(strategy) == hash(weighted(list(range(1, 41))).strategy)


def test_later_changes_of_a_users_array_do_not_reach_the_plan() -> None:
    mine = np.ones(16)
    plan = weighted(mine)
    mine[:] = 0
    mine[3] = 1
    assert times_in_epoch(plan, 0).tolist() == [1] * 16


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, "give one number per sample"),
        ({"a": 1.0}, "For a weight per class use manual_weights"),
        ("", "the name of a numeric column"),
        ([], r"shape \(0,\)"),
        ([[1.0, 2.0]], r"shape \(1, 2\); give one per sample"),
        ([1.0, "x"], "weights are no numbers"),
        ([1.0, -2.0], r"1 weights are no finite numbers >= 0, the first at sample 1: .*-2\.0"),
        ([1.0, math.nan], "first at sample 1: .*nan"),
        ([math.inf, 1.0], "first at sample 0: .*inf"),
        ([0.0, 0.0], "all weights are 0"),
        ([1e308] * 10, "add up to more than a float holds; divide"),
        ([1.0, 2.0, 3.0], "3 numbers for 2 samples; give one per sample"),
    ],
)
def test_weights_that_cannot_be_are_refused_with_what_can(weights: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BalancedPlan.from_labels(
            ["a", "b"],
            global_batch_size=1,
            balance={"name": "sample_weights", "weights": weights},
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0}, r"threshold is 0; it must be a number in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold is 1\.5"),
        ({"threshold": "0.1"}, "threshold is '0.1'"),
        ({"power": -0.1}, r"power is -0\.1; it must be a number in \[0, 1\]"),
        ({"power": 2}, "power is 2"),
        ({"num_samples": 10}, "num_samples is 10, but the repeats say how long an epoch is"),
        ({"unit": "patient"}, "it counts samples; leave unit out"),
        ({"draw": "iid"}, "draw: iid is for strategies that give classes a share"),
        ({"replacement": False}, "replacement: false is for strategies"),
        ({"strata": ["site"]}, "leave strata out"),
    ],
)
def test_repeats_that_cannot_be_are_refused_with_the_way_out(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        repeated(BRATS, **options)


def test_weights_of_nothing_are_refused_before_there_are_samples() -> None:
    with pytest.raises(ConfigError, match="all weights are 0; nothing could be drawn"):
        SampleWeights(weights=np.zeros(3))


def test_weighted_draws_promise_neither_quotas_nor_fairness() -> None:
    kept = weighted(np.ones(8)).guarantees
    assert [name for name in kept if not kept[name]] == [
        "exact_quotas",
        "fair_exposure",
        "no_twin_in_a_batch",
    ]


def test_priors_of_weighted_draws_are_those_of_the_weights() -> None:
    plan = weighted([1.0, 1.0, 2.0, 12.0], labels=["a", "a", "a", "b"], batch=2)
    assert plan.shares == {"a": 0.25, "b": 0.75}
    assert plan.prior_shift() == {"a": 3.0, "b": 1 / 3}
    assert plan.logit_adjustment()["a"] == pytest.approx(math.log(0.25), rel=RTOL)
