"""Micro-batches under DDP: the gradients of the global batch, on ranks of unequal size."""

from __future__ import annotations

from pathlib import Path

import pytest

from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import train_loader
from tests.distributed.accumulation_program import (
    COUNTS,
    GLOBAL_BATCH,
    gradients,
    loss_of,
    network,
)
from tests.distributed.launching import launch
from tests.training.cohorts import cohort, packed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """14 patients to train on."""
    return packed(tmp_path_factory.mktemp("accumulation") / "cohort", cohort())


def test_micro_batches_of_two_ranks_give_the_gradient_of_the_global_batch(
    shards: ShardSet, tmp_path: Path
) -> None:
    ranks = launch("accumulation_program", tmp_path / "out", 2, shards.path)
    assert sorted(rank["samples"] for rank in ranks) == [3, 4]
    with train_loader(
        shards, global_batch_size=GLOBAL_BATCH, balance="class_balanced", rank=0, num_ranks=1
    ) as loader:
        model = network()
        whole = loss_of(model, next(iter(loader)))
    whole.backward()  # type: ignore[no-untyped-call]
    expected = gradients(model)
    for count in COUNTS:
        for rank in ranks:
            assert rank[str(count)] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        # Before the last piece, nothing had been exchanged.
        first = [rank[f"first of {count}"] for rank in ranks]
        assert (first[0] == first[1]) == (count == 1)
