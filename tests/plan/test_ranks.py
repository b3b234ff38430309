"""Dealing a global batch to ranks: nothing lost, everything even, nobody favoured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.ranks import check_ranks, rank_slots

RANKS = (1, 2, 3, 4, 5, 7, 8, 16)
REJECT = 1e-6


@given(
    classes=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    num_ranks=st.integers(1, 20),
    key=st.integers(0, 2**128 - 1),
)
def test_every_rank_gets_floor_or_ceiling_of_the_batch_and_of_every_class(
    classes: list[int], num_ranks: int, key: int
) -> None:
    size = sum(classes)
    owner = np.repeat(np.arange(len(classes)), classes)
    parts = [rank_slots(size, rank=rank, num_ranks=num_ranks, key=key) for rank in range(num_ranks)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))
    for part in parts:
        assert size // num_ranks <= len(part) <= -(-size // num_ranks)
        counts = np.bincount(owner[part], minlength=len(classes))
        for got, whole in zip(counts.tolist(), classes, strict=True):
            assert whole // num_ranks <= got <= -(-whole // num_ranks)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_the_ranks_together_hold_the_global_batch(num_ranks: int) -> None:
    labels = ["LGG"] * 75 + ["HGG"] * 210
    plan = BalancedPlan.from_labels(labels, global_batch_size=17, seed=3)
    for epoch in range(2):
        for step in range(plan.num_steps(epoch)):
            whole = plan.batch(epoch, step)
            parts = [
                plan.rank_batch(epoch, step, rank=rank, num_ranks=num_ranks)
                for rank in range(num_ranks)
            ]
            assert sorted(np.concatenate(parts).tolist()) == sorted(whole.tolist())
            slots = [
                plan.rank_slots(epoch, step, rank=rank, num_ranks=num_ranks)
                for rank in range(num_ranks)
            ]
            for part, places in zip(parts, slots, strict=True):
                assert whole[places].tolist() == part.tolist()


def test_every_rank_sees_every_class_in_proportion_and_a_batch_size_in_its_turn() -> None:
    # Batch 9 on 4 ranks: one rank gets 3; class "rare" has 3 of 9, so one rank gets none of it.
    plan = BalancedPlan.from_class_sizes(
        {"rare": 300, "common": 600}, global_batch_size=9, balance=None, seed=5
    )
    steps, num_ranks = 100, 4
    sizes, rare = np.zeros(num_ranks), np.zeros(num_ranks)
    for epoch in range(10):
        for step in range(steps):
            for rank in range(num_ranks):
                part = plan.rank_batch(epoch, step, rank=rank, num_ranks=num_ranks)
                sizes[rank] += len(part)
                rare[rank] += (part < 300).sum()
    for totals, expected, spare in ((sizes, 2250, 0.25), (rare, 750, 0.75)):
        # A rank gets one more with probability `spare`, anew at each of 1000 steps.
        deviation = np.sqrt(1000 * spare * (1 - spare))
        assert np.abs(totals - expected).max() < 5 * deviation


def test_no_rank_is_favoured_in_the_long_run() -> None:
    for num_ranks in (2, 5, 16):
        starts = np.zeros(num_ranks, dtype=np.int64)
        for step in range(1600):
            key = stream_key(0, "ranks", 0, step)
            starts[[0 in rank_slots(1, rank=r, num_ranks=num_ranks, key=key) for r in
                    range(num_ranks)]] += 1  # fmt: skip
        assert starts.sum() == 1600
        assert stats.chisquare(starts).pvalue > REJECT


def test_ranks_do_not_repeat_each_others_class_sequence() -> None:
    plan = BalancedPlan.from_class_sizes({"a": 400, "b": 400}, global_batch_size=4, seed=1)
    sequences = {
        tuple(
            tuple((plan.rank_batch(0, step, rank=rank, num_ranks=2) < 400).tolist())
            for step in range(60)
        )
        for rank in range(2)
    }
    assert len(sequences) == 2


def test_slots_within_a_rank_batch_are_not_sorted_by_class() -> None:
    first_is_lower = [
        bool(np.all(np.diff(rank_slots(8, rank=0, num_ranks=1, key=stream_key(0, "k", n))) > 0))
        for n in range(200)
    ]
    assert sum(first_is_lower) == 0
    order = [
        rank_slots(4, rank=0, num_ranks=1, key=stream_key(0, "k", n)).tolist() for n in range(2400)
    ]
    observed = np.unique([int("".join(map(str, row))) for row in order], return_counts=True)[1]
    assert len(observed) == 24
    assert stats.chisquare(observed).pvalue > REJECT


@pytest.mark.parametrize(
    ("rank", "num_ranks"),
    [(-1, 2), (2, 2), (0, 0), (0, -1), (0.0, 2), (0, 2.0), (True, 2), ("0", 2), (0, None)],
)
def test_a_rank_that_does_not_exist_is_refused(rank: int, num_ranks: int) -> None:
    with pytest.raises(ConfigError, match=r"rank is .* num_ranks is .*0\.\.num_ranks-1"):
        check_ranks(rank, num_ranks, global_batch_size=8)


def test_ranks_of_numpy_are_ranks() -> None:
    plan = BalancedPlan.from_labels([0, 0, 1, 1], global_batch_size=4)
    got = plan.rank_batch(0, 0, rank=np.int64(1), num_ranks=np.int32(2))  # type: ignore[arg-type]
    assert got.tolist() == plan.rank_batch(0, 0, rank=1, num_ranks=2).tolist()


def test_more_ranks_than_samples_names_the_nearest_values_that_work() -> None:
    plan = BalancedPlan.from_labels([0, 0, 1, 1], global_batch_size=4)
    with pytest.raises(ConfigError, match=r"is 4 for 5 ranks.*>= 5, or at most 4 ranks"):
        plan.rank_batch(0, 0, rank=0, num_ranks=5)
    assert len(plan.rank_batch(0, 0, rank=0, num_ranks=4)) == 1


def test_a_short_last_batch_too_small_for_the_ranks_says_so() -> None:
    balance = {"name": "class_balanced", "last": "short"}
    plan = BalancedPlan.from_labels([0] * 5 + [1] * 5, global_batch_size=8, balance=balance)
    assert len(plan.rank_batch(0, 0, rank=7, num_ranks=8)) == 1
    with pytest.raises(ConfigError, match=r"last: short leaves 2 samples .* at most 2 ranks"):
        plan.rank_batch(0, 1, rank=0, num_ranks=3)
