"""Literal independent draws: torch's WeightedRandomSampler in distribution, at any position."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch.utils.data import WeightedRandomSampler

from streaming_balance.plan import independent
from streaming_balance.plan.epoch import BalancedPlan

REJECT = 1e-6
LABELS = np.array([0] * 12 + [1] * 36)


def iid(**options: object) -> BalancedPlan:
    settings = {"name": "class_balanced", "draw": "iid", **options}
    return BalancedPlan.from_labels(LABELS, global_batch_size=16, balance=settings, seed=9)


def delivered(plan: BalancedPlan, epochs: int) -> NDArray[np.int64]:
    batches = [
        plan.batch(epoch, step) for epoch in range(epochs) for step in range(plan.num_steps(epoch))
    ]
    return np.concatenate(batches)


def test_samples_are_drawn_in_proportion_to_their_weights() -> None:
    drawn = delivered(iid(num_samples=16_000), 2)
    assert len(drawn) == 32_000
    expected = np.where(LABELS == 0, 32_000 / 24, 32_000 / 72)
    assert stats.chisquare(np.bincount(drawn, minlength=48), expected).pvalue > REJECT


def test_draws_agree_in_distribution_with_torchs_weighted_random_sampler() -> None:
    weights = np.where(LABELS == 0, 36 / 12, 1.0)
    generator = torch.Generator().manual_seed(0)
    theirs = list(WeightedRandomSampler(weights.tolist(), 32_000, generator=generator))
    ours = delivered(iid(num_samples=16_000), 2)
    table = np.array([np.bincount(draws, minlength=48) for draws in (ours, theirs)])
    assert stats.chi2_contingency(table).pvalue > REJECT
    # And per batch: the number of rare samples in a batch of 16 is binomial for both.
    rare = [
        np.bincount((np.asarray(draws).reshape(-1, 16) < 12).sum(axis=1), minlength=17)
        for draws in (ours, theirs)
    ]
    pooled = np.array([np.r_[row[:4].sum(), row[4:13], row[13:].sum()] for row in rare])
    assert stats.chi2_contingency(pooled).pvalue > REJECT


def test_class_counts_of_a_batch_are_binomial() -> None:
    plan = iid(num_samples=32_000)
    counts = np.array([plan.quotas(0, step)[0] for step in range(2000)])
    expected = 2000 * stats.binom.pmf(np.arange(17), 16, 0.5)
    observed = np.bincount(counts, minlength=17)
    pool = slice(3, 14)
    pooled = np.r_[observed[:3].sum(), observed[pool], observed[14:].sum()]
    wanted = np.r_[expected[:3].sum(), expected[pool], expected[14:].sum()]
    assert stats.chisquare(pooled, wanted).pvalue > REJECT


def batch_counts(balance: Mapping[str, object], steps: int) -> NDArray[np.int64]:
    """Count three classes of sizes 2, 6 and 4 in batches of 5: `(steps, 3)`."""
    plan = BalancedPlan.from_class_sizes(
        {"a": 2, "b": 6, "c": 4},
        global_batch_size=5,
        balance={"num_samples": 5 * steps // 2, **balance},
        seed=4,
    )
    rows = [plan.quotas(epoch, step) for epoch in (0, 1) for step in range(steps // 2)]
    return np.array(rows)


def multinomial_pvalue(counts: NDArray[np.int64], shares: list[float]) -> float:
    """Compare how often each combination of counts came with the multinomial's probability."""
    size = int(counts[0].sum())
    cells = [(a, b, size - a - b) for a in range(size + 1) for b in range(size + 1 - a)]
    observed = np.array([(counts == cell).all(axis=1).sum() for cell in cells], dtype=np.float64)
    expected = len(counts) * stats.multinomial.pmf(cells, size, shares)
    rare = expected < 10
    if rare.any():
        observed = np.r_[observed[~rare], observed[rare].sum()]
        expected = np.r_[expected[~rare], expected[rare].sum()]
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize(
    ("balance", "shares"),
    [
        ({"name": "class_balanced"}, [1 / 3, 1 / 3, 1 / 3]),
        ({"name": "instance_balanced"}, [1 / 6, 1 / 2, 1 / 3]),
        ({"name": "target", "shares": {"a": 0.5, "b": 0.2, "c": 0.3}}, [0.5, 0.2, 0.3]),
        (
            {"name": "manual_weights", "weights": {"a": 6, "b": 1, "c": 1}},
            [12 / 22, 6 / 22, 4 / 22],
        ),
    ],
)
def test_class_counts_of_a_batch_are_multinomial(
    balance: Mapping[str, object], shares: list[float]
) -> None:
    assert multinomial_pvalue(batch_counts({**balance, "draw": "iid"}, 4000), shares) > REJECT


def test_the_comparison_with_the_multinomial_tells_quotas_and_other_shares_apart() -> None:
    even = [1 / 3, 1 / 3, 1 / 3]
    assert multinomial_pvalue(batch_counts({"name": "class_balanced"}, 4000), even) < REJECT
    other = {"name": "target", "shares": {"a": 0.36, "b": 0.32, "c": 0.32}, "draw": "iid"}
    assert multinomial_pvalue(batch_counts(other, 4000), even) < REJECT


def test_batches_next_to_each_other_are_independent_in_steps_and_in_epochs() -> None:
    plan = BalancedPlan.from_class_sizes(
        {"a": 1, "b": 3},
        global_batch_size=2,
        balance={"name": "class_balanced", "draw": "iid", "num_samples": 4000},
    )
    rare = np.array([[plan.quotas(epoch, step)[0] for step in range(2000)] for epoch in (0, 1)])
    for first, second in ((rare[:, :-1], rare[:, 1:]), (rare[0], rare[1])):
        table = np.zeros((3, 3))
        np.add.at(table, (first.ravel(), second.ravel()), 1)
        assert stats.chi2_contingency(table).pvalue > REJECT


def test_draws_agree_with_torchs_sampler_under_weights_of_three_classes() -> None:
    labels = np.repeat([0, 1, 2], [4, 10, 26])
    weights = np.array([5.0, 2.0, 0.5])
    generator = torch.Generator().manual_seed(1)
    theirs = list(WeightedRandomSampler(weights[labels].tolist(), 40_000, generator=generator))
    plan = BalancedPlan.from_labels(
        labels,
        global_batch_size=10,
        balance={
            "name": "manual_weights",
            "weights": dict(enumerate(weights.tolist())),
            "draw": "iid",
            "num_samples": 20_000,
        },
    )
    ours = delivered(plan, 2)
    table = np.array([np.bincount(draws, minlength=40) for draws in (ours, theirs)])
    assert stats.chi2_contingency(table).pvalue > REJECT
    # Nor do they differ in how often somebody comes twice within a batch.
    doubled = [
        sum(len(set(batch)) < 10 for batch in np.asarray(draws).reshape(-1, 10).tolist())
        for draws in (ours, theirs)
    ]
    assert stats.chi2_contingency([doubled, [4000 - n for n in doubled]]).pvalue > REJECT


def test_successive_draws_of_a_class_are_independent() -> None:
    # A batch lists a class's draws in the order they were drawn; nobody avoids or follows himself.
    plan = BalancedPlan.from_class_sizes(
        {"a": 6}, global_batch_size=2, balance={"name": "class_balanced", "draw": "iid"}
    )
    pairs = np.array([plan.batch(epoch, step) for epoch in range(2500) for step in range(3)])
    table = np.zeros((6, 6), dtype=np.int64)
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    assert stats.chisquare(table.ravel()).pvalue > REJECT


@pytest.mark.parametrize("last", ["full", "short", "drop"])
@pytest.mark.parametrize("draws_at_once", [1, 40, 1 << 20])
def test_exposure_counts_every_draw(
    last: str, draws_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(independent, "DRAWS_AT_ONCE", draws_at_once)
    plan = iid(last=last, num_samples=41)
    counted = np.zeros(48, dtype=np.int64)
    for epoch in range(3):
        for step in range(plan.num_steps(epoch)):
            np.testing.assert_array_equal(plan.exposure(epoch, step), counted)
            batch = plan.batch(epoch, step)
            np.add.at(counted, batch, 1)
            assert np.bincount(LABELS[batch], minlength=2).tolist() == (
                plan.quotas(epoch, step).tolist()
            )
        np.testing.assert_array_equal(plan.exposure(epoch, plan.num_steps(epoch)), counted)
    assert len(plan.batch(0, plan.num_steps(0) - 1)) == {"full": 16, "short": 9, "drop": 16}[last]


def test_patients_are_drawn_alike_and_their_samples_at_random() -> None:
    patients = ["P0"] * 6 + [f"P{number}" for number in range(1, 7)]
    plan = BalancedPlan.from_labels(
        [0] * 12,
        patients=patients,
        global_batch_size=16,
        balance={"name": "class_balanced", "draw": "iid", "num_samples": 14_000},
    )
    drawn = np.bincount(delivered(plan, 1), minlength=12)
    expected = np.array([drawn.sum() / 42] * 6 + [drawn.sum() / 7] * 6)
    assert stats.chisquare(drawn, expected).pvalue > REJECT
    exposure = plan.exposure(1, 0)
    np.testing.assert_array_equal(exposure, drawn)


def test_a_class_without_a_share_is_never_drawn() -> None:
    for shares in ({"a": 0, "b": 1, "c": 1}, {"a": 1, "b": 0, "c": 1}, {"a": 1, "b": 1, "c": 0}):
        plan = BalancedPlan.from_labels(
            ["a"] * 5 + ["b"] * 5 + ["c"] * 5,
            global_batch_size=15,
            balance={"name": "target", "shares": shares, "draw": "iid", "num_samples": 3000},
        )
        counts = np.bincount(delivered(plan, 1) // 5, minlength=3)
        assert [count > 0 for count in counts] == [share > 0 for share in shares.values()]


def test_shares_that_do_not_quite_sum_to_one_in_floats_still_cover_every_draw() -> None:
    sizes = {str(number): 3 for number in range(10)}
    balance = {
        "name": "target",
        "shares": dict.fromkeys(sizes, 0.1) | {"9": 0.3},
        "draw": "iid",
        "num_samples": 5000,
    }
    plan = BalancedPlan.from_class_sizes(sizes, global_batch_size=50, balance=balance)
    drawn = np.bincount(delivered(plan, 1) // 3, minlength=10)
    assert stats.chisquare(drawn, np.array([5000 / 12] * 9 + [1250])).pvalue > REJECT


def test_a_fixed_subset_bounds_independent_draws_too() -> None:
    plan = iid(name="downsample", rotate=False, num_samples=2000)
    seen = np.unique(delivered(plan, 1))
    assert len(seen) == 24
    assert (seen < 12).sum() == 12


def test_independent_draws_promise_neither_quotas_nor_fairness() -> None:
    kept = iid().guarantees
    assert [name for name in kept if not kept[name]] == [
        "exact_quotas",
        "fair_exposure",
        "no_twin_in_a_batch",
    ]


def test_a_billion_samples_can_be_drawn_independently() -> None:
    plan = BalancedPlan.from_class_sizes(
        {"a": 10**9, "b": 10}, global_batch_size=64,
        balance={"name": "class_balanced", "draw": "iid"},
    )  # fmt: skip
    batch = plan.batch(3, 12_345_678)
    assert len(batch) == 64
    assert batch.max() < 10**9 + 10
    assert len(np.unique(batch[batch < 10**9])) == (batch < 10**9).sum()
