"""Resuming: whatever was saved where, the run goes on batch by batch as if never stopped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streaming_balance.errors import ResumeError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.iteration import ThreadEngine
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.training.cohorts import merged, take

STEPS = 3  # 14 patients in batches of 6, last one filled
STRATEGIES: dict[str, Any] = {
    "natural": None,
    "balanced": "class_balanced",
    "short": {"name": "power", "alpha": 0.5, "last": "short"},
    "downsample": {"name": "downsample", "rotate": True},
    "iid": {"name": "class_balanced", "draw": "iid"},
}
Merged = dict[int, tuple[int, bytes]]


def ranks_of(shards: ShardSet, balance: Any, num_ranks: int) -> list[BalancedLoader]:
    """Build the loaders of all ranks."""
    return [
        train_loader(
            shards,
            global_batch_size=6,
            balance=balance,
            seed=13,
            rank=rank,
            num_ranks=num_ranks,
            num_threads=1,
        )
        for rank in range(num_ranks)
    ]


def run(loaders: list[BalancedLoader], count: int) -> list[Merged]:
    """Take so many global batches, all ranks in step."""
    got: list[Merged] = []
    while len(got) < count:
        for parts in zip(*loaders, strict=True):
            assert len({(part["epoch"], part["step"]) for part in parts}) == 1
            assert sum(len(part["sample"]) for part in parts) == len(merged(list(parts)))
            got.append(merged(list(parts)))
            if len(got) == count:
                break
    return got


def close(loaders: list[BalancedLoader]) -> None:
    """Close all ranks."""
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("name", STRATEGIES)
def test_resuming_at_every_step_on_any_ranks_equals_the_uninterrupted_run(
    small: ShardSet, name: str
) -> None:
    balance = STRATEGIES[name]
    alone = ranks_of(small, balance, 1)
    total = 2 * len(alone[0]) + 1
    straight = run(alone, total)
    close(alone)
    for stop in range(total):
        before, after = 1 + stop % 2, (1, 2)[(stop // 2) % 2]
        first = ranks_of(small, balance, before)
        assert run(first, stop) == straight[:stop]
        states = {json.dumps(loader.state_dict()) for loader in first}
        assert len(states) == 1
        second = ranks_of(small, balance, after)
        for loader in second:
            loader.load_state_dict(json.loads(next(iter(states))))
        assert run(second, total - stop) == straight[stop:]
        close(first + second)


def test_a_chain_of_resumes_over_many_rank_counts_equals_the_uninterrupted_run(
    small: ShardSet,
) -> None:
    alone = ranks_of(small, "class_balanced", 1)
    straight = run(alone, 12)
    close(alone)
    state, got = None, list[Merged]()
    for num_ranks, count in ((1, 1), (6, 2), (4, 1), (5, 3), (2, 3), (3, 2)):
        loaders = ranks_of(small, "class_balanced", num_ranks)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        got += run(loaders, count)
        state = loaders[-1].state_dict()
        close(loaders)
    assert got == straight


def test_the_state_counts_what_was_received_not_what_was_read_ahead(small: ShardSet) -> None:
    (loader,) = ranks_of(small, "class_balanced", 1)
    with loader:
        for number, _ in enumerate(loader):
            assert isinstance(loader._engine, ThreadEngine)
            assert len(loader._engine.ahead._pending) > 3
            done = divmod(number + 1, STEPS)
            assert loader.state_dict()["position"] == {"epoch": done[0], "step": done[1]}


def test_a_state_saved_at_the_end_of_an_epoch_begins_the_next(small: ShardSet) -> None:
    (straight,) = ranks_of(small, "class_balanced", 1)
    expected = take(straight, 2 * STEPS)
    straight.close()
    (first,) = ranks_of(small, "class_balanced", 1)
    for _ in first:
        state = first.state_dict()  # the last one is taken inside the loop, at its last batch
    assert state == first.state_dict()
    assert state["position"] == {"epoch": 1, "step": 0}
    (second,) = ranks_of(small, "class_balanced", 1)
    second.load_state_dict(state)
    assert take(second, STEPS) == expected[STEPS:]
    close([first, second])


def test_a_loader_that_has_begun_takes_no_state_and_a_new_one_goes_back(small: ShardSet) -> None:
    (loader,) = ranks_of(small, "class_balanced", 1)
    with loader:
        beginning = loader.state_dict()
        # Elsewhere, but no batch was delivered yet.
        loader.set_epoch(3)
        loader.load_state_dict(beginning)
        first = take(loader, 5)
        with pytest.raises(ResumeError, match=r"iteration of this loader has begun.* new loader"):
            loader.load_state_dict(beginning)
        assert loader.state_dict()["position"] == {"epoch": 1, "step": 2}
    (again,) = ranks_of(small, "class_balanced", 1)
    with again:
        again.load_state_dict(beginning)
        assert take(again, 5) == first


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_rank_count_delivers_the_same_global_batches(small: ShardSet, name: str) -> None:
    alone = ranks_of(small, STRATEGIES[name], 1)
    total = 2 * len(alone[0])
    straight = run(alone, total)
    close(alone)
    most = min(len(batch) for batch in straight)
    for num_ranks in range(2, most + 1):
        loaders = ranks_of(small, STRATEGIES[name], num_ranks)
        assert {len(loader) for loader in loaders} == {len(alone[0])}
        assert run(loaders, total) == straight
        close(loaders)
