"""Samplers in real processes under torchrun: together they make the same global batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from streaming_balance.plan.epoch import BalancedPlan
from tests.training.cohorts import PROJECT_ROOT
from tests.training.sampler_cases import BATCH, LABELS

DEADLINE_SECONDS = 90
BATCHES = 4
KINDS = ("sampler", "batch_sampler")


def launch(out: Path, num_ranks: int, *arguments: object) -> list[dict[str, Any]]:
    """Run the program on so many ranks of this machine, and read what each wrote down."""
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", "-m", "tests.distributed.sampler_program"]
    ended = subprocess.run(
        [*command, str(out), "--batches", str(BATCHES), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT_ROOT)},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def united(ranks: list[dict[str, Any]], kind: str) -> list[list[int]]:
    """Unite the ranks' parts of each global batch."""
    together = zip(*(rank[kind]["batches"] for rank in ranks), strict=True)
    return [sorted(index for part in parts for index in part) for parts in together]


def test_two_processes_and_then_three_make_the_global_batches_of_the_plan(tmp_path: Path) -> None:
    plan = BalancedPlan.from_labels(LABELS, global_batch_size=BATCH, seed=3)
    expected = [
        sorted(plan.batch(epoch, step).tolist())
        for epoch in range(2)
        for step in range(plan.num_steps(epoch))
    ]
    two = launch(tmp_path / "two", 2, "--batch-size", BATCH // 2)
    states = {rank[kind]["state"] for rank in two for kind in KINDS}
    # Both kinds stand at the same place of the same plan, on every rank.
    assert len(states) == 1
    state = tmp_path / "state.json"
    state.write_text(states.pop())
    three = launch(tmp_path / "three", 3, "--batch-size", BATCH // 3, "--state", state)
    for kind in KINDS:
        assert united(two, kind) == expected[:BATCHES]
        assert united(three, kind) == expected[BATCHES : 2 * BATCHES]
