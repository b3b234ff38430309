"""Data-parallel ranks of a real DeviceMesh: peers of one rank get one rank's batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import ShardSet
from tests.distributed.launching import launch
from tests.distributed.mesh_program import GLOBAL_BATCH, SHAPES, STEPS
from tests.training.cohorts import cohort, packed
from tests.training.sampler_cases import LABELS


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """14 patients to train on, 7 to evaluate."""
    return packed(tmp_path_factory.mktemp("mesh") / "cohort", cohort())


def by_place(processes: list[dict[str, Any]], shape: tuple[int, int]) -> dict[int, dict[str, Any]]:
    """Give what each data-parallel rank got, after comparing all its processes."""
    ranks: dict[int, list[dict[str, Any]]] = {}
    for process in processes:
        got = process[str(shape)]
        ranks.setdefault(got["place"][0], []).append(got)
    for peers in ranks.values():
        assert [peer["place"][1] for peer in peers] == list(range(shape[1]))
        for name in ("train", "val", "indices"):
            assert all(peer[name] == peers[0][name] for peer in peers)
    return {rank: peers[0] for rank, peers in ranks.items()}


def test_tensor_parallel_peers_get_the_same_batches_and_data_parallel_ranks_disjoint_ones(
    shards: ShardSet, tmp_path: Path
) -> None:
    processes = launch("mesh_program", tmp_path / "out", 4, shards.path)
    plan = BalancedPlan.for_shards(shards, global_batch_size=GLOBAL_BATCH, balance=None, seed=5)
    of_labels = BalancedPlan.from_labels(LABELS, global_batch_size=GLOBAL_BATCH, seed=5)
    for shape in SHAPES:
        ranks = by_place(processes, shape)
        assert sorted(ranks) == list(range(shape[0]))
        for number in range(STEPS):
            parts = [got["train"][number] for got in ranks.values()]
            epoch, step = parts[0]["place"]
            slots = sorted(slot for part in parts for slot in part["slot"])
            members = sorted(sample for part in parts for sample in part["sample"])
            assert slots == list(range(plan.batch_size(epoch, step)))
            assert members == sorted(plan.batch(epoch, step).tolist())
            indices = [index for got in ranks.values() for index in got["indices"][number]]
            assert sorted(indices) == sorted(of_labels.batch(0, number).tolist())
        evaluated = [key for got in ranks.values() for key in got["val"]]
        assert sorted(evaluated) == [f"V{number:02d}" for number in range(7)]
    # One data-parallel rank of four processes is right, and nobody says otherwise.
    said = [
        line for process in processes for shape in SHAPES for line in process[str(shape)]["said"]
    ]
    assert not [line for line in said if "every process" in line]
    (warning,) = processes[0]["without a mesh"]
    assert "num_replicas=1 in a process group of 4" in warning
    assert [process["without a mesh"] for process in processes[1:]] == [[], [], []]
