"""Three real processes evaluate seven samples, and then two: each sample once, nobody waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaming_balance.storage.shards import open_shards
from tests.building import Sample, by_key, pack
from tests.training.cohorts import PROJECT_ROOT, cohort, voxels

DEADLINE_SECONDS = 90
RANKS = 3
SAMPLES = [
    *cohort(),
    *(Sample(key=f"T{n:02d}", image=voxels(300 + n), split="test") for n in range(2)),
]
# Rank r takes every third sample from r; seven make 3 + 2 + 2, two make 1 + 1 + 0.
STEPS = {"val": [2, 1, 1], "test": [1, 1, 0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 7 validation and 2 test patients."""
    folder = tmp_path_factory.mktemp("evaluation") / "cohort"
    pack(folder, SAMPLES)
    return folder


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    """What each of three processes under torchrun wrote down."""
    out = folder.parent / "out"
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", "-m", "tests.distributed.evaluation_program"]
    ended = subprocess.run(
        [*command, str(folder), str(out)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT_ROOT)},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("split", STEPS)
def test_every_sample_comes_once_and_every_rank_knows_it(
    told: list[dict[str, Any]], folder: Path, split: str
) -> None:
    keys = open_shards(folder).keys(split).tolist()
    images = by_key(SAMPLES)
    ranks = [rank[split] for rank in told]
    assert [rank["steps"] for rank in ranks] == STEPS[split]
    assert {rank["most_steps"] for rank in ranks} == {max(STEPS[split])}
    assert [rank["own"] for rank in ranks] == [list(range(len(keys)))[r::RANKS] for r in range(3)]
    # A rank without samples has finished its pass like the others.
    assert [rank["position"] for rank in ranks] == [{"epoch": 1, "step": 0}] * RANKS
    for rank in ranks:
        numbers = [number for part in rank["everyone"] for number in part["numbers"]]
        means = np.array([mean for part in rank["everyone"] for mean in part["means"]])
        joined = means[np.argsort(numbers)]
        assert joined.tolist() == pytest.approx([images[key].image.mean() for key in keys])


@pytest.mark.parametrize("split", STEPS)
def test_what_is_missing_is_refused_alike_on_every_rank(
    told: list[dict[str, Any]], split: str
) -> None:
    complaints = {rank[split]["complaint"] for rank in told}
    assert len(complaints) == 1
    wanted = "missing: 3 of 7 samples" if split == "val" else "missing: 2 of 2 samples"
    assert wanted in complaints.pop()


@pytest.mark.parametrize("split", STEPS)
def test_ranks_meet_in_every_turn_and_add_up_to_the_whole_split(
    told: list[dict[str, Any]], folder: Path, split: str
) -> None:
    images = by_key(SAMPLES)
    whole = [images[key].image for key in open_shards(folder).keys(split).tolist()]
    for rank in told:
        assert rank[split]["count"] == len(whole)
        assert rank[split]["sum"] == pytest.approx(sum(float(image.sum()) for image in whole))
