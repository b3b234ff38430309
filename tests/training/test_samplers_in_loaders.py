"""Samplers inside torch's loaders: with workers, persistent or not, saved and resumed mid-epoch."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.training.samplers import BalancedBatchSampler, BalancedSampler
from tests.training.sampler_cases import BATCH, LABELS, Numbers, plain

pytestmark = [
    # torchdata 0.11 calls what this torch would rather not have called.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # Loaders fork their workers; Python 3.12 warns of that wherever there are threads.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

KINDS = ("sampler", "batch_sampler")
WORKERS = (0, 2)


def planned(epochs: int) -> list[list[int]]:
    """What the plan says, epoch after epoch."""
    plan = BalancedPlan.from_labels(LABELS, global_batch_size=BATCH, seed=3)
    return [
        plan.rank_batch(epoch, step, rank=0, num_ranks=1).tolist()
        for epoch in range(epochs)
        for step in range(plan.num_steps(epoch))
    ]


def options(kind: str) -> dict[str, Any]:
    """Give the arguments of a loader that has the sampler in one place or the other."""
    if kind == "sampler":
        return {"batch_size": BATCH, "sampler": BalancedSampler(LABELS, batch_size=BATCH, seed=3)}
    return {"batch_sampler": BalancedBatchSampler(LABELS, batch_size=BATCH, seed=3)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_dataloader_delivers_the_plan_s_batches_epoch_after_epoch(
    kind: str, workers: int, persistent: bool
) -> None:
    loader = DataLoader(
        Numbers(), **options(kind), num_workers=workers, persistent_workers=persistent
    )
    assert len(loader) == len(planned(1))
    assert [*plain(loader), *plain(loader), *plain(loader)] == planned(3)


@pytest.mark.parametrize("kind", KINDS)
def test_calling_set_epoch_at_the_top_of_every_epoch_changes_nothing(kind: str) -> None:
    arguments = options(kind)
    loader = DataLoader(Numbers(), **arguments, num_workers=2)
    got = []
    for epoch in range(3):
        arguments[kind].set_epoch(epoch)
        got += plain(loader)
    assert got == planned(3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_was_left_goes_on_without_workers(kind: str) -> None:
    loader = DataLoader(Numbers(), **options(kind))
    first = plain(itertools.islice(loader, 2))
    assert first + plain(loader) == planned(1)


@pytest.mark.parametrize("kind", KINDS)
def test_with_workers_the_state_of_the_training_loop_s_place_resumes_exactly(kind: str) -> None:
    arguments = options(kind)
    loader = DataLoader(Numbers(), **arguments, num_workers=2)
    received = plain(itertools.islice(loader, 2))
    state = json.dumps(arguments[kind].state_dict(epoch=0, step=len(received)))
    again = options(kind)
    again[kind].load_state_dict(json.loads(state))
    rest = plain(DataLoader(Numbers(), **again, num_workers=2))
    assert received + rest == planned(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", WORKERS)
def test_a_stateful_loader_resumes_after_any_batch_with_the_next_one(
    kind: str, workers: int
) -> None:
    whole = planned(2)
    per_epoch = len(whole) // 2
    for done in range(1, per_epoch):
        loader = StatefulDataLoader(Numbers(), **options(kind), num_workers=workers)
        received = plain(itertools.islice(loader, done))
        state = json.loads(json.dumps(loader.state_dict(), default=str))
        # The state counts what was received: workers have been asked for four more by now.
        del loader
        resumed = StatefulDataLoader(Numbers(), **options(kind), num_workers=workers)
        resumed.load_state_dict(state)
        assert received + plain(resumed) + plain(resumed) == whole, done


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("noticed", [True, False])
def test_a_stateful_loader_saved_at_the_end_of_an_epoch_goes_on_with_the_next(
    kind: str, workers: int, noticed: bool
) -> None:
    per_epoch = len(planned(1))
    loader = StatefulDataLoader(Numbers(), **options(kind), num_workers=workers)
    # Either the loop has ended, or the last batch is there and nobody has asked for another.
    received = plain(loader) if noticed else plain(itertools.islice(loader, per_epoch))
    state = loader.state_dict()
    del loader
    resumed = StatefulDataLoader(Numbers(), **options(kind), num_workers=workers)
    resumed.load_state_dict(state)
    if not noticed:
        # As with any sampler in a StatefulDataLoader: what is left of that epoch is nothing.
        assert plain(resumed) == []
    assert received + plain(resumed) + plain(resumed) == planned(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", WORKERS)
def test_a_stateful_loader_saved_before_the_first_batch_starts_at_the_first(
    kind: str, workers: int
) -> None:
    loader = StatefulDataLoader(Numbers(), **options(kind), num_workers=workers)
    state = loader.state_dict()
    assert plain(loader) == planned(1)
    del loader
    resumed = StatefulDataLoader(Numbers(), **options(kind), num_workers=workers)
    resumed.load_state_dict(state)
    assert plain(resumed) == planned(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stateful_loader_resumes_in_a_later_epoch_and_from_a_resumed_state(kind: str) -> None:
    whole = planned(3)
    loader = StatefulDataLoader(Numbers(), **options(kind), num_workers=2)
    received = plain(loader) + plain(itertools.islice(loader, 1))
    for _ in range(2):
        state = loader.state_dict()
        loader = StatefulDataLoader(Numbers(), **options(kind), num_workers=2)
        loader.load_state_dict(state)
        received += plain(itertools.islice(loader, 1))
    state = loader.state_dict()
    loader = StatefulDataLoader(Numbers(), **options(kind), num_workers=2)
    loader.load_state_dict(state)
    received += plain(loader) + plain(loader)
    assert received == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_stateful_loader_that_snapshots_now_and_then_catches_up(kind: str) -> None:
    build = {"num_workers": 2, "snapshot_every_n_steps": 3}
    loader = StatefulDataLoader(Numbers(), **options(kind), **build)
    received = plain(itertools.islice(loader, 4))
    state = loader.state_dict()
    del loader
    resumed = StatefulDataLoader(Numbers(), **options(kind), **build)
    resumed.load_state_dict(state)
    assert received + plain(resumed) + plain(resumed) == planned(2)
