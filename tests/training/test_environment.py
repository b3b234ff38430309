"""What loaders make of the ranks they find, and how many threads a process gets."""

from __future__ import annotations

import os

import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.environment import default_num_threads
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_torchrun_s_variables_are_used(monkeypatch: pytest.MonkeyPatch, small: ShardSet) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    train = train_loader(small, global_batch_size=6)
    val = eval_loader(small, split="val", batch_size=2)
    assert (train.rank, train.num_ranks) == (val.rank, val.num_ranks) == (2, 3)


@pytest.mark.parametrize(("batch", "ranks"), [(4, 5), (2, 16)])
def test_more_ranks_than_samples_in_a_batch_name_the_nearest_that_work(
    small: ShardSet, batch: int, ranks: int
) -> None:
    wanted = f"global_batch_size >= {ranks}, or at most {batch} ranks"
    with pytest.raises(ConfigError, match=wanted):
        train_loader(small, global_batch_size=batch, rank=0, num_ranks=ranks)


def test_a_short_last_batch_smaller_than_the_ranks_is_refused_before_training(
    small: ShardSet,
) -> None:
    # 14 samples in batches of 4 leave 2.
    short = {"name": "instance_balanced", "last": "short"}
    with pytest.raises(ConfigError, match="at most 2 ranks"):
        train_loader(small, global_batch_size=4, balance=short, rank=0, num_ranks=3)


def test_processes_of_one_machine_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    processors = len(os.sched_getaffinity(0))
    assert default_num_threads() == min(8, processors)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_num_threads() == max(1, min(8, processors // 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert default_num_threads() == 1
