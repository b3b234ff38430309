"""One to eight real processes: every step's union is the plan's global batch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import ShardSet
from tests.distributed.launching import launch
from tests.distributed.union_program import GLOBAL_BATCH, STEPS
from tests.training.cohorts import cohort, packed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """14 patients to train on: an epoch is two steps."""
    return packed(tmp_path_factory.mktemp("counts") / "cohort", cohort())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_the_union_of_every_step_is_the_plan_s_global_batch(
    shards: ShardSet, num_ranks: int, tmp_path: Path
) -> None:
    ranks = launch("union_program", tmp_path / "out", num_ranks, shards.path)
    assert [document["rank"] for document in ranks] == [[n, num_ranks] for n in range(num_ranks)]
    plan = BalancedPlan.for_shards(
        shards, global_batch_size=GLOBAL_BATCH, balance="class_balanced", seed=5
    )
    places = [(epoch, step) for epoch in range(3) for step in range(plan.num_steps(epoch))]
    for number, (epoch, step) in enumerate(places[:STEPS]):
        parts = [document["train"][number] for document in ranks]
        together = sorted(
            entry
            for part in parts
            for entry in zip(part["slot"], part["sample"], part["voxels"], strict=True)
        )
        assert {tuple(part["place"]) for part in parts} == {(epoch, step)}
        assert [slot for slot, *_ in together] == list(range(GLOBAL_BATCH))
        assert [sample for _, sample, _ in together] == plan.batch(epoch, step).tolist()
        for _, sample, found in together:
            voxels = shards.read("train", sample)["image"].astype(np.float32)
            assert found == hashlib.sha256(voxels.tobytes()).hexdigest()
        sizes = [len(part["slot"]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    states = [document["state"] for document in ranks]
    assert all(state == states[0] for state in states)
    warned = [said for document in ranks for said in document["said"]]
    # Nobody is taken for one who deals the batches again, or for one whom nobody deals to.
    assert not [said for said in warned if "once more" in said or "every process" in said]
    assert sum("do not divide" in said for said in warned) == (num_ranks > 1)
