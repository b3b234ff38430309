"""67: a slow disk or a slow rank changes no order, is read around, and is named."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.storage.members import SplitMembers
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.training.cohorts import Seen, cohort, packed, seen, take

DEADLINE_SECONDS = 20
BATCHES = 8


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """14 patients."""
    return packed(tmp_path / "cohort", cohort())


def loader_of(shards: ShardSet, **options: Any) -> BalancedLoader:
    """Make a loader whose threads can read around each other."""
    return train_loader(shards, global_batch_size=2, num_threads=2, verify="never", **options)


class SlowDisk:
    """Holds up the first read of one sample until it is let go."""

    def __init__(self, shards: ShardSet, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
        member = SplitMembers(shards.table, "train", shards.arrays).stored_array(sample, "image")
        self._slow = range(member.offset, member.offset + member.bytes)
        self._read = os.preadv
        self.reached, self.let_go, self.others = threading.Event(), threading.Event(), 0
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        if offset in self._slow and not self.let_go.is_set():
            self.reached.set()
            assert self.let_go.wait(DEADLINE_SECONDS)
        elif self.reached.is_set():
            self.others += 1
        return self._read(descriptor, buffers, offset, *flags)


def test_67_a_slow_read_holds_up_its_own_batch_alone_and_is_named(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loader_of(shards) as loader:
        straight = take(loader, BATCHES)
    # Neighbours share a read, which starts at the first of them; it was in no batch before.
    slow = min(straight[3][2])
    assert all(slow not in batch[2] for batch in straight[:3])
    disk = SlowDisk(shards, slow, monkeypatch)
    got: list[Seen] = []
    with loader_of(shards) as loader:
        iterator = iter(loader)
        while len(got) < 3:
            got.append(seen(next(iterator)))
        assert disk.reached.wait(DEADLINE_SECONDS)
        # Batches after the slow one are read meanwhile; the one that waits for it does not return.
        slowest = loader.stats()["slowest_read"]["seconds"]
        releasing = threading.Thread(target=lambda: _release(disk, slower_than=slowest))
        releasing.start()
        got += [seen(batch) for batch in iterator]
        releasing.join()
        got += take(loader, BATCHES - len(got)) if len(got) < BATCHES else []
        stats = loader.stats()
    assert got == straight
    assert disk.others > 0
    assert shards.keys("train")[slow] in stats["slowest_read"]["keys"]
    assert (stats["slowest_read"]["epoch"], stats["slowest_read"]["step"]) == straight[3][:2]
    assert stats["slowest_read"]["seconds"] >= 0.2


def _release(disk: SlowDisk, *, slower_than: float) -> None:
    """Let the slow read go once another one went past it, and it is the slowest by far."""
    started = time.perf_counter()
    while not disk.others or time.perf_counter() - started < 2 * slower_than + 0.2:
        threading.Event().wait(0.001)
    disk.let_go.set()


def test_67_a_rank_that_falls_behind_gets_the_same_batches(shards: ShardSet) -> None:
    with (
        loader_of(shards, rank=0, num_ranks=2) as quick,
        loader_of(shards, rank=1, num_ranks=2) as slow,
    ):
        ahead = take(quick, BATCHES)
        behind = take(slow, BATCHES)
    with loader_of(shards, rank=0, num_ranks=1) as alone:
        together = take(alone, BATCHES)
    united = [sorted(a[2] + b[2]) for a, b in zip(ahead, behind, strict=True)]
    assert united == [sorted(batch[2]) for batch in together]
