"""Several loaders of one process, on the same shards: each gives what it gives alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import Seen, seen, take

# Loaders fork their workers; Python 3.12 warns of that wherever there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

STEPS = 9
Build = Callable[[ShardSet], Any]


def balanced(shards: ShardSet) -> Any:
    """Train on balanced batches."""
    return train_loader(shards, global_batch_size=4, balance="class_balanced", seed=1)


def natural(shards: ShardSet) -> Any:
    """Train on the same samples by another plan and seed, in worker processes."""
    return train_loader(shards, global_batch_size=5, seed=2, rank=1, num_ranks=2, workers=2)


def mixed(shards: ShardSet) -> Any:
    """Train on mixed batches in a small budget of memory."""
    return train_loader(
        shards, global_batch_size=3, balance="power", mixing={"name": "mixup"}, prefetch_bytes=1
    )


def evaluating(shards: ShardSet) -> Any:
    """Evaluate."""
    return eval_loader(shards, split="val", batch_size=2, rank=0, num_ranks=2)


BUILDERS: tuple[Build, ...] = (balanced, natural, mixed, evaluating)


def endless(loader: Any) -> Iterator[Seen]:
    """Go on from epoch to epoch."""
    while True:
        for batch in loader:
            yield seen(batch)


@pytest.fixture(scope="module")
def alone(small: ShardSet) -> list[tuple[list[Seen], str]]:
    """What each loader gives when there is no other, and where it then stands."""
    given = []
    for build in BUILDERS:
        with build(small) as loader:
            given.append((take(loader, STEPS), json.dumps(loader.state_dict())))
    return given


def test_interleaved_loaders_give_what_each_gives_alone(
    small: ShardSet, alone: list[tuple[list[Seen], str]]
) -> None:
    with ExitStack() as stack:
        loaders = [stack.enter_context(build(small)) for build in BUILDERS]
        passes = [endless(loader) for loader in loaders]
        given = [[next(one) for one in passes] for _ in range(STEPS)]
        states = [json.dumps(loader.state_dict()) for loader in loaders]
    for number, (batches, state) in enumerate(alone):
        assert [step[number] for step in given] == batches
        assert states[number] == state


def test_loaders_in_threads_of_their_own_give_what_each_gives_alone(
    small: ShardSet, alone: list[tuple[list[Seen], str]]
) -> None:
    given: dict[int, list[Seen]] = {}

    def work(number: int) -> None:
        with BUILDERS[number](small) as loader:
            given[number] = take(loader, STEPS)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 2, 3):
        assert given[number] == alone[number][0]


def test_moving_closing_or_resuming_one_leaves_the_others_alone(
    small: ShardSet, alone: list[tuple[list[Seen], str]]
) -> None:
    expected, state = alone[0]
    with balanced(small) as kept, balanced(small) as moved, evaluating(small) as val:
        first = take(kept, 2)
        take(moved, 1)
        moved.set_epoch(5)
        list(val)
        val.close()
        middle = take(kept, 3)
        moved.close()
        with balanced(small) as resumed:
            resumed.load_state_dict(kept.state_dict())
            assert take(resumed, STEPS - 5) == expected[5:]
        assert first + middle + take(kept, STEPS - 5) == expected
        assert json.dumps(kept.state_dict()) == state
        assert moved.state_dict()["position"] == {"epoch": 5, "step": 0}


def test_an_evaluation_within_an_epoch_leaves_training_where_it_was(small: ShardSet) -> None:
    with balanced(small) as train, evaluating(small) as val, balanced(small) as straight:
        interrupted = []
        for batch in train:
            interrupted.append(seen(batch))
            assert len(list(val)) == len(val)
            assert train.state_dict()["position"] == _place(train, len(interrupted))
        assert interrupted == take(straight, len(straight))


def _place(loader: Any, steps: int) -> dict[str, int]:
    """Say where a loader stands after some steps of its first epoch."""
    epoch, step = divmod(steps, loader.plan.num_steps(0))
    return {"epoch": epoch, "step": step}
