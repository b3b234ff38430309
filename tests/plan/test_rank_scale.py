"""4,096 ranks on 10^8 samples: what a step computes and what a state holds, not how fast it is."""

from __future__ import annotations

import concurrent.futures
import json
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.plan.draws import QuotaDraws
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.permutation import FeistelPermutation
from streaming_balance.training.state import LoaderState, Position

RANKS = 4096
SIZES = {"common": 80_000_000, "rare": 19_000_000, "rarest": 1_000_000}
STARTS = np.cumsum([0, *SIZES.values()])
MIB = 2**20
PLACES = [(0, 0), (3, 7_001), (1_000, 8_138)]


def plan_of(batch: int) -> BalancedPlan:
    """Plan over 10^8 samples."""
    return BalancedPlan.from_class_sizes(SIZES, global_batch_size=batch, seed=7)


@pytest.fixture
def batches_computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Counts the global batches that plans compute; the answers are the real ones."""
    asked: list[tuple[int, int]] = []
    real = QuotaDraws.members_of

    def counting(self: QuotaDraws, epoch: int, step: int) -> list[NDArray[np.int64]]:
        asked.append((epoch, step))
        return real(self, epoch, step)

    monkeypatch.setattr(QuotaDraws, "members_of", counting)
    return asked


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


@pytest.mark.parametrize("batch", [4096, 4099, 12_288])
def test_4096_ranks_ask_for_a_step_and_it_is_computed_once(
    batch: int, batches_computed: list[tuple[int, int]]
) -> None:
    plan = plan_of(batch)
    for epoch, step in PLACES:
        del batches_computed[:]
        parts = [plan.rank_batch(epoch, step, rank=rank, num_ranks=RANKS) for rank in range(RANKS)]
        assert batches_computed == [(epoch, step)]
        sizes = {len(part) for part in parts}
        assert sizes == {batch // RANKS, -(-batch // RANKS)}
        together = np.concatenate(parts)
        # Everybody once, and every class by its quota: dealt out, the batch is whole.
        assert len(np.unique(together)) == batch
        assert np.array_equal(np.sort(together), np.sort(plan.batch(epoch, step)))
        counts = np.histogram(together, STARTS)[0]
        assert counts.tolist() == plan.quotas(epoch, step).tolist()
        assert counts.max() - counts.min() <= 1


def test_each_rank_s_own_plan_gives_what_the_shared_one_gives() -> None:
    shared = plan_of(8192)
    for rank in (0, 1, 2047, 4095):
        own = plan_of(8192)
        for epoch, step in PLACES:
            mine = own.rank_batch(epoch, step, rank=rank, num_ranks=RANKS)
            assert mine.tolist() == shared.rank_batch(
                epoch, step, rank=rank, num_ranks=RANKS
            ).tolist()  # fmt: skip


def test_walking_computes_every_step_once_and_hardly_more_than_it_draws(
    batches_computed: list[tuple[int, int]], places_evaluated: list[int]
) -> None:
    plan, batch, steps = plan_of(4096), 4096, 25
    for step in range(steps):
        for rank in range(0, RANKS, 256):
            plan.rank_batch(2, step, rank=rank, num_ranks=RANKS)
    assert batches_computed == [(2, step) for step in range(steps)]
    # Each draw is a place of one network or, where classes have fixed groups, of two.
    assert sum(places_evaluated) <= 3 * batch * steps


def test_nothing_as_long_as_an_epoch_is_kept() -> None:
    tracemalloc.start()
    try:
        plan = plan_of(8192)
        for epoch, step in PLACES:
            for rank in range(0, RANKS, 64):
                plan.rank_batch(epoch, step, rank=rank, num_ranks=RANKS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A list of the epoch's 10^8 samples would be 763 MiB, one of this rank's alone 0.2 MiB.
    assert peak < 8 * MIB


def test_a_batch_asked_for_again_is_the_callers_to_change() -> None:
    plan = plan_of(4096)
    first = plan.batch(1, 5)
    kept = first.copy()
    first[:] = -1
    part = plan.rank_batch(1, 5, rank=9, num_ranks=RANKS)
    part[:] = -2
    assert plan.batch(1, 5).tolist() == kept.tolist()


def test_threads_that_ask_for_different_steps_at_once_get_their_own() -> None:
    plan = plan_of(4096)
    places = [(epoch, step) for epoch in range(2) for step in range(6)] * 6
    expected = {place: plan_of(4096).batch(*place).tolist() for place in places[:12]}

    def ask(number: int) -> bool:
        place = places[number]
        got: list[int] = plan.rank_batch(*place, rank=number, num_ranks=RANKS).tolist()
        slots = plan.rank_slots(*place, rank=number, num_ranks=RANKS).tolist()
        return got == [expected[place][slot] for slot in slots]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, np.random.default_rng(0).permutation(72).tolist()))


def test_the_state_of_a_long_run_is_under_4_kib_beside_its_jumps() -> None:
    plan = plan_of(8192)
    jumps = tuple((Position(2 * n, 12_206), Position(2 * n + 1, 0)) for n in range(100))
    state = LoaderState(
        plan_digest=plan.digest,
        settings=plan.settings,
        shards_digest=plan.digest,
        position=Position(1_000_000, 12_206),
        skipped=jumps,
    ).to_dict()
    # The number of ranks is nowhere in it: any number of them may go on.
    assert "rank" not in json.dumps(state["settings"])
    spans = json.dumps(state.pop("skipped"))
    assert len(json.dumps(state).encode()) < 4096
    assert len(spans.encode()) < 100 * 64
