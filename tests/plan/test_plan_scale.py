"""A billion samples: what a step evaluates and keeps, not how fast this machine is today."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.plan import rotation
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.permutation import FeistelPermutation, shuffled
from streaming_balance.plan.rotation import BLOCK_PLACES

BILLION = {"common": 890_000_000, "rare": 100_000_000, "rarest": 10_000_000}
STARTS = np.cumsum([0, *BILLION.values()])
MIB = 2**20


def billion(**options: object) -> BalancedPlan:
    balance = {"name": "class_balanced", **options}
    return BalancedPlan.from_class_sizes(BILLION, global_batch_size=256, balance=balance, seed=1)


def check_batch(plan: BalancedPlan, epoch: int, step: int) -> None:
    batch = plan.batch(epoch, step)
    assert len(np.unique(batch)) == 256
    counts = np.histogram(batch, STARTS)[0]
    assert counts.tolist() == plan.quotas(epoch, step).tolist()
    assert counts.min() >= 85
    assert counts.max() <= 86


@pytest.fixture
def places_evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the places that Feistel networks are asked for; the answers are the real ones."""
    asked: list[int] = []
    real = FeistelPermutation.__call__

    def counting(self: FeistelPermutation, places: NDArray[np.int64]) -> NDArray[np.int64]:
        asked.append(len(places))
        return real(self, places)

    monkeypatch.setattr(FeistelPermutation, "__call__", counting)
    return asked


def test_any_step_of_a_billion_samples_evaluates_a_few_places(places_evaluated: list[int]) -> None:
    plan = billion()
    assert not places_evaluated
    random = np.random.default_rng(0)
    for epoch, step in zip(random.integers(0, 50, 20), random.integers(0, 3_900_000, 20),
                           strict=True):  # fmt: skip
        del places_evaluated[:]
        check_batch(plan, int(epoch), int(step))
        # Runs of 85 or 86 places in three classes, each through two networks at most; a cell of
        # the network's rectangle that is no place is asked again.
        assert sum(places_evaluated) <= 2 * 256 + 16


def test_neighbouring_steps_share_their_blocks(places_evaluated: list[int]) -> None:
    plan = billion()
    for step in range(1000, 1120):
        plan.batch(5, step)
    # 120 steps of 86 places are 10,320 per class, and hardly a block more at each end; the class
    # that an epoch does not use up has fixed groups, so two networks.
    assert sum(places_evaluated) <= 4 * (10_320 + 2 * BLOCK_PLACES)


def test_a_step_computes_hardly_more_places_than_it_draws(
    places_evaluated: list[int],
) -> None:
    sizes = {"a": 700_000_000, "b": 250_000_000, "c": 50_000_000}
    plan = BalancedPlan.from_class_sizes(sizes, global_batch_size=512, seed=1)
    plan.batch(0, 0)
    in_step = []
    for step in range(1, 400):
        del places_evaluated[:]
        plan.batch(0, step)
        in_step.append(sum(places_evaluated))
    # 512 draws: the blocks of three classes never fall due together.
    assert max(in_step) <= 1024
    assert sum(in_step) <= 399 * 512 + 3 * BLOCK_PLACES


@pytest.mark.parametrize("size", [60_000, 1_000_000])
def test_a_class_known_by_its_size_alone_is_never_sorted_whole(
    places_evaluated: list[int], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    sorted_members: list[int] = []

    def counting(key: int, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        sorted_members.append(len(hashes))
        return shuffled(key, hashes)

    monkeypatch.setattr(rotation, "shuffled", counting)
    sizes = {"a": 899_000_000, "b": 100_000_000, "c": size, "d": 8_000}
    plan = BalancedPlan.from_class_sizes(
        sizes, global_batch_size=256, balance={"name": "class_balanced"}, seed=1
    )
    for step in range(100_003, 3_000_000, 100_003):
        del places_evaluated[:]
        assert len(np.unique(plan.batch(0, step))) == 256
        assert sum(places_evaluated) <= 2 * 256 + 16
    assert set(sorted_members) == {8_000}


def test_no_table_is_made_and_memory_does_not_grow_with_steps() -> None:
    tracemalloc.start()
    try:
        plan = billion()
        for epoch, step in ((0, 0), (0, 3_906_249), (7, 1_234_567), (1_000_000, 5)):
            check_batch(plan, epoch, step)
        _, peak = tracemalloc.get_traced_memory()
        kept, _ = tracemalloc.get_traced_memory()
        for step in range(200):
            plan.batch(3, step * 19_000)
        later, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB
    assert later - kept < MIB


def test_a_class_that_is_sorted_whole_keeps_a_few_passes_only() -> None:
    plan = BalancedPlan.from_labels(np.zeros(2**20, dtype=np.int8), global_batch_size=256)
    tracemalloc.start()
    try:
        for epoch in range(12):
            plan.batch(epoch, 4000)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Hashes and three passes of 8 MiB each; sorting needs about four such arrays more.
    assert kept < 33 * MIB
    assert peak < 96 * MIB


def test_planning_two_billion_large_samples_needs_hardly_any_memory() -> None:
    tracemalloc.start()
    try:
        plan = BalancedPlan.from_class_sizes(
            {"a": 10**9, "b": 10**9}, global_batch_size=512, seed=2
        )
        for epoch, step in ((0, 0), (3, 3_000_000), (10**6, 17)):
            assert len(np.unique(plan.batch(epoch, step))) == 512
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB


def test_the_members_of_an_early_and_a_late_step_are_the_same_when_asked_again() -> None:
    first, second = billion(), billion()
    late = first.batch(9, 3_000_000)
    first.batch(0, 0)
    np.testing.assert_array_equal(first.batch(9, 3_000_000), late)
    np.testing.assert_array_equal(second.batch(9, 3_000_000), late)


def test_passes_of_a_large_class_are_whole() -> None:
    size = 1_200_000
    plan = BalancedPlan.from_class_sizes({"a": size}, global_batch_size=200_000)
    passes = [np.concatenate([plan.batch(epoch, step) for step in range(6)]) for epoch in range(2)]
    for one in passes:
        assert np.bincount(one, minlength=size).max() == 1
    assert (passes[0] != passes[1]).mean() > 0.99
    assert plan.exposure(1, 3).sum() == size + 600_000
    np.testing.assert_array_equal(
        plan.exposure(1, 3), 1 + np.bincount(passes[1][:600_000], minlength=size)
    )


def test_a_thousand_classes_are_planned() -> None:
    sizes = {f"c{number:04}": 1 + number for number in range(1000)}
    plan = BalancedPlan.from_class_sizes(sizes, global_batch_size=64)
    counts = sum(plan.quotas(0, step) for step in range(50))
    assert int(np.sum(counts)) == 3200
    assert len(plan.batch(0, 7000)) == 64


@pytest.mark.slow
def test_how_long_a_billion_samples_take_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    plan = billion()
    plan.batch(0, 0)
    first = time.perf_counter() - start
    walking = []
    for step in range(1, 1000):
        start = time.perf_counter()
        plan.batch(0, step)
        walking.append(time.perf_counter() - start)
    jumping = []
    for step in np.random.default_rng(0).integers(0, 3_900_000, 100).tolist():
        start = time.perf_counter()
        plan.batch(0, step)
        jumping.append(time.perf_counter() - start)
    with capsys.disabled():
        print(  # noqa: T201
            f"\n1e9 samples, 3 classes, batch 256: first batch {first * 1e3:.0f} ms, next step "
            f"{np.median(walking) * 1e6:.0f} us (99 %: {np.quantile(walking, 0.99) * 1e6:.0f} us), "
            f"random step {np.median(jumping) * 1e6:.0f} us"
        )
