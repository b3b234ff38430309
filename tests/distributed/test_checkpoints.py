"""States in real checkpoint files: of torch.save, and of torch.distributed.checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from streaming_balance.storage.shards import ShardSet
from tests.distributed.checkpoint_program import AFTER, GLOBAL_BATCH, built, first_leg, load, steps
from tests.distributed.launching import launch
from tests.training.cohorts import cohort, packed

# Files of a process without a group; torch says so.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """14 patients to train on."""
    return packed(tmp_path_factory.mktemp("checkpoints") / "cohort", cohort())


def united(ranks: list[dict[str, Any]]) -> list[list[tuple[int, int, str]]]:
    """Unite the ranks' parts of each global batch, in the order of slots."""
    return [
        sorted(
            entry
            for part in parts
            for entry in zip(part["slot"], part["sample"], part["voxels"], strict=True)
        )
        for parts in zip(*(rank["train"] for rank in ranks), strict=True)
    ]


def test_a_distributed_checkpoint_of_two_ranks_goes_on_with_one_and_with_three(
    shards: ShardSet, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    two = launch("checkpoint_program", tmp_path / "two", 2, shards.path, checkpoint)
    with built(shards, rank=0, num_ranks=1) as straight:
        uninterrupted = [{"train": first_leg(straight) + steps(straight, AFTER)}]
    expected = united(uninterrupted)
    assert united(two) == expected[:-AFTER]
    saved = two[0]["state"]
    # What the run jumped over is in the state, and a fresh loader has nothing of the kind.
    assert len(saved["skipped"]) == 1

    three = launch("checkpoint_program", tmp_path / "three", 3, shards.path, checkpoint, "--load")
    with built(shards, rank=0, num_ranks=1) as fresh:
        assert fresh.state_dict()["skipped"] == []
        weight = load(checkpoint, fresh)
        one = {"weight": weight.tolist(), "state": fresh.state_dict(), "train": steps(fresh, AFTER)}
        # What they saw, over all legs and ranks.
        assert fresh.exposure().tolist() == straight.exposure().tolist()
    for ranks in ([one], three):
        assert united(ranks) == expected[-AFTER:]
        for rank in ranks:
            assert rank["state"] == saved
            assert rank["weight"] == [2.5] * 3


def test_a_distributed_checkpoint_of_the_bare_mapping_is_refused_rather_than_half_loaded(
    shards: ShardSet, tmp_path: Path
) -> None:
    with built(shards, rank=0, num_ranks=1) as loader:
        first_leg(loader)
        state_dict_saver.save({"data": loader.state_dict()}, checkpoint_id=tmp_path / "mapping")
        state_dict_saver.save({"data": loader}, checkpoint_id=tmp_path / "loader")
    with built(shards, rank=0, num_ranks=1) as fresh:
        before = fresh.state_dict()
        for name, given in (("mapping", fresh.state_dict()), ("loader", fresh)):
            with pytest.raises(CheckpointException, match=r"Missing key.*data\.skipped"):
                state_dict_loader.load({"data": given}, checkpoint_id=tmp_path / name)
        assert fresh.state_dict() == before


def test_torch_s_own_file_holds_the_state_as_plain_values(shards: ShardSet, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with built(shards, rank=0, num_ranks=2) as loader:
        first_leg(loader)
        state = loader.state_dict()
        torch.save({"model": {"weight": torch.ones(2)}, "data": state}, path)
        expected = [batch["sample"] for batch in steps(loader, AFTER)]
    # Nothing but numbers, texts, lists and dicts may be in such a file.
    saved = torch.load(path, weights_only=True)
    assert json.loads(json.dumps(saved["data"])) == saved["data"] == state
    with built(shards, rank=0, num_ranks=2) as fresh:
        fresh.load_state_dict(saved["data"])
        assert [batch["sample"] for batch in steps(fresh, AFTER)] == expected


def test_a_state_is_the_same_bytes_on_every_rank(shards: ShardSet) -> None:
    texts = set()
    for num_ranks in (1, 2, GLOBAL_BATCH):
        for rank in range(num_ranks):
            with built(shards, rank=rank, num_ranks=num_ranks) as loader:
                first_leg(loader)
                texts.add(json.dumps(loader.state_dict()))
    assert len(texts) == 1
