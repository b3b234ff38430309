"""Reading ahead: by bytes, in order, and never so far that the first batch is late."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.iteration import ThreadEngine
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.readahead import BEGUN_AT_ONCE, MOST_BATCHES, ReadAhead
from tests.building import Sample
from tests.training.cohorts import packed, take

VOLUME = (4, 128, 128, 252)
VOLUME_BYTES = 4 * 128 * 128 * 252 * 2  # 33 MB of int16


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Four volumes of 33 MB."""
    samples = [
        Sample(key=f"P{n}", image=np.full(VOLUME, n, np.int16), label=["HGG", "LGG"][n % 2])
        for n in range(4)
    ]
    return packed(tmp_path_factory.mktemp("volumes") / "cohort", samples, codec="blosc")


def ahead_of(loader: BalancedLoader) -> ReadAhead:
    """Look at what a loader has under way."""
    assert isinstance(loader._engine, ThreadEngine)
    return loader._engine.ahead


@pytest.mark.parametrize(
    ("budget", "batches"), [(0, 1), (VOLUME_BYTES - 1, 1), (10**8, 3), (67_000_000, 2)]
)
def test_bytes_under_way_stay_within_the_budget_with_volumes_of_33_megabytes(
    volumes: ShardSet, budget: int, batches: int
) -> None:
    with train_loader(
        volumes, global_batch_size=1, dtype=None, prefetch_bytes=budget, num_threads=2
    ) as loader:
        for number, batch in enumerate(loader):
            assert np.unique(batch["image"]).tolist() == [int(batch["key"][0][1])]
            if number == 2:
                break
            del batch
        # A budget below one batch cannot stop the batch that is asked for.
        expected = min(batches, max(1, budget // VOLUME_BYTES)) * VOLUME_BYTES
        assert ahead_of(loader).most_bytes == expected
        assert isinstance(loader._engine, ThreadEngine)
        # Memory: what is under way, and the one batch the loop holds, each rounded up by 1/8.
        assert loader._engine.pool.fresh_bytes <= (expected + 2 * VOLUME_BYTES) * 9 // 8


def test_many_small_batches_do_not_delay_the_first(small: ShardSet) -> None:
    with train_loader(small, global_batch_size=2, prefetch_bytes=1 << 40) as loader:
        next(iter(loader))
        assert len(ahead_of(loader)._pending) == BEGUN_AT_ONCE
        take(loader, MOST_BATCHES)
        assert len(ahead_of(loader)._pending) == MOST_BATCHES


def test_the_budget_changes_no_batch(small: ShardSet) -> None:
    runs = []
    for budget in (0, 1, 1000, 1 << 20, None):
        with train_loader(
            small, global_batch_size=3, balance="class_balanced", prefetch_bytes=budget
        ) as loader:
            runs.append(take(loader, 20))
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("budget", [0, 1000, 1 << 30])
def test_every_batch_is_planned_once_however_long_it_waits_for_room(
    small: ShardSet, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[tuple[int, int]] = []
    batch_of = BalancedPlan.batch

    def counting(plan: BalancedPlan, epoch: int, step: int) -> NDArray[np.int64]:
        planned.append((epoch, step))
        return batch_of(plan, epoch, step)

    monkeypatch.setattr(BalancedPlan, "batch", counting)
    with train_loader(small, global_batch_size=2, prefetch_bytes=budget) as loader:
        take(loader, 40)
    assert len(planned) >= 40
    assert len(set(planned)) == len(planned)


def test_reading_ahead_goes_on_into_the_next_epoch(small: ShardSet) -> None:
    with train_loader(small, global_batch_size=14, prefetch_bytes=1 << 30) as loader:
        assert len(loader) == 1
        next(iter(loader))
        places = [(place.epoch, place.step) for place, _ in ahead_of(loader)._pending]
        assert places == [(epoch, 0) for epoch in range(1, 1 + BEGUN_AT_ONCE)]


def test_a_jump_forgets_what_was_read_ahead_for_the_old_place(small: ShardSet) -> None:
    with (
        train_loader(small, global_batch_size=4, seed=3) as loader,
        train_loader(small, global_batch_size=4, seed=3) as straight,
    ):
        take(loader, 2)
        loader.set_epoch(5)
        after = take(loader, 4)
        straight.set_epoch(5)
        assert after == take(straight, 4)


def test_files_are_read_only_when_batches_are_asked_for(tmp_path: Path) -> None:
    samples = [Sample(key=f"P{n}", image=np.full((2, 2), n, np.int16)) for n in range(4)]
    shards = packed(tmp_path / "cohort", samples, classes=["HGG"])
    loader = train_loader(shards, global_batch_size=2)
    assert len(loader) == 2
    assert loader.state_dict()["position"] == {"epoch": 0, "step": 0}
    assert loader._engine is None
