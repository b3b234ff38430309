"""Real processes under torchrun: the same global batches whatever their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import train_loader
from tests.distributed.rank_program import told
from tests.training.cohorts import PROJECT_ROOT, cohort, packed

DEADLINE_SECONDS = 90
BATCHES = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """14 patients to train on, 7 to evaluate."""
    return packed(tmp_path_factory.mktemp("ranks") / "cohort", cohort())


def launch(shards: ShardSet, out: Path, num_ranks: int, *arguments: object) -> list[dict[str, Any]]:
    """Run the program on so many ranks of this machine, and read what each wrote down."""
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", "-m", "tests.distributed.rank_program"]
    ended = subprocess.run(
        [*command, str(shards.path), str(out), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT_ROOT)},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def united(ranks: list[dict[str, Any]]) -> list[list[tuple[int, int, str]]]:
    """Unite the ranks' parts of each global batch, in the order of slots."""
    batches = []
    for parts in zip(*(rank["train"] for rank in ranks), strict=True):
        assert len({tuple(part["place"]) for part in parts}) == 1
        batches.append(
            sorted(
                entry
                for part in parts
                for entry in zip(part["slot"], part["sample"], part["voxels"], strict=True)
            )
        )
        assert [slot for slot, *_ in batches[-1]] == list(range(7))
    return batches


@pytest.fixture(scope="module")
def alone(shards: ShardSet) -> list[dict[str, Any]]:
    """What one process without torchrun gets: twice as many batches."""
    got: list[dict[str, Any]] = []
    with train_loader(
        shards, global_batch_size=7, balance="class_balanced", seed=5, rank=0, num_ranks=1
    ) as loader:
        while len(got) < 2 * BATCHES:
            got += [told(batch) for batch in loader]
    return [{"train": got[: 2 * BATCHES]}]


def test_two_ranks_and_then_three_give_what_one_uninterrupted_process_gets(
    shards: ShardSet, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    two = launch(shards, tmp_path / "two", 2, "--batches", BATCHES)
    straight = united(alone)
    assert united(two) == straight[:BATCHES]
    assert [(rank["rank"], rank["num_ranks"]) for rank in two] == [(0, 2), (1, 2)]
    assert len({rank["state"] for rank in two}) == 1
    assert len({rank["steps"] for rank in two}) == 1

    state = tmp_path / "state.json"
    state.write_text(two[1]["state"])
    three = launch(shards, tmp_path / "three", 3, "--batches", BATCHES, "--state", state)
    assert united(three) == straight[BATCHES:]
    assert len({rank["state"] for rank in three}) == 1

    for ranks in (two, three):
        offset = 0 if ranks is two else BATCHES
        for step in range(BATCHES):
            parts = [rank["train"][step] for rank in ranks]
            for label in (0, 1):
                counts = [part["label"].count(label) for part in parts]
                assert max(counts) - min(counts) <= 1
            # The mean of scaled losses over ranks is the mean over the whole global batch.
            whole = alone[0]["train"][offset + step]["scaled_loss"]
            assert parts[0]["mean_loss"] == pytest.approx(whole, rel=1e-6)
        evaluated = [key for rank in ranks for key in rank["val"]]
        assert sorted(evaluated) == [f"V{n:02d}" for n in range(7)]


def test_ranks_are_found_in_torchrun_s_environment_without_a_process_group(
    shards: ShardSet, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    ranks = launch(shards, tmp_path / "out", 2, "--batches", 2, "--without-group")
    assert [(rank["rank"], rank["num_ranks"]) for rank in ranks] == [(0, 2), (1, 2)]
    assert united(ranks) == united(alone)[:2]
