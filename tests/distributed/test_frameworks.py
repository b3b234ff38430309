"""Two processes inside Lightning and Accelerate: right set-ups are silent, wrong ones named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.plan.epoch import BalancedPlan
from tests.distributed.launching import launch
from tests.training.cohorts import cohort, packed
from tests.training.sampler_cases import LABELS

GLOBAL_BATCH = 6

# Each rank has its part of each batch, and nothing is to be said.
RIGHT = (
    "Accelerate: batch sampler, left out",
    "Accelerate: loader, prepared",
    "Lightning: sampler",
    "Lightning: batch sampler",
    "Lightning: loader",
)
EARLY = "Build it after torch.distributed.init_process_group"
NOBODY = "nobody deals out what it gives: every process trains on all of each batch"
# Every rank gets all of each batch.
REPEATED = {
    "early: loader built early": EARLY,
    "early: batch sampler built early": EARLY,
    "Accelerate: batch sampler of one replica, left out": NOBODY,
    "Lightning: sampler of one replica": NOBODY,
}
# Something of every batch is lost.
LOST = {
    "Accelerate: batch sampler, prepared": "accelerate.data_loader.BatchSamplerShard",
    "Accelerate: loader in a dataset, dispatched": "accelerate.data_loader.DataLoaderDispatcher",
    "Lightning: batch sampler as sampler, dealt again": "Set use_distributed_sampler=False",
}
# The framework deals what nobody has dealt before.
DEALT_BY_OTHERS = (
    "Accelerate: batch sampler of one replica, prepared",
    "Accelerate: loader of one rank in a dataset, dispatched",
)


def united(got: Sequence[Any]) -> list[list[int]]:
    """Unite the ranks' parts of each step."""
    return [sorted(number for part in parts for number in part) for parts in zip(*got, strict=True)]


def global_batches(plan: BalancedPlan) -> list[list[int]]:
    """List the members of every step of an epoch, in order of their numbers."""
    return [sorted(plan.batch(0, step).tolist()) for step in range(plan.num_steps(0))]


def test_double_and_missing_sharding_is_named_and_right_set_ups_hear_nothing(
    tmp_path: Path,
) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed here")
    pytest.importorskip("accelerate", reason="Accelerate is not installed here")
    shards = packed(tmp_path / "cohort", cohort())
    first, second = launch("framework_program", tmp_path / "out", 2, shards.path)
    assert all(result["said"] == [] for result in second.values())
    got = {name: [first[name]["got"], second[name]["got"]] for name in first}
    said = {name: first[name]["said"] for name in first}
    settings: dict[str, Any] = {"global_batch_size": GLOBAL_BATCH, "seed": 3}
    # The global batches of an epoch: of samplers, and of loaders.
    whole = [
        global_batches(BalancedPlan.from_labels(LABELS, **settings)),
        global_batches(BalancedPlan.for_shards(shards, balance=None, **settings)),
    ]

    for name in RIGHT:
        assert united(got[name]) == whole["loader" in name], name
        assert said[name] == [], name
    for name, words in REPEATED.items():
        assert got[name][0] == got[name][1], name
        (line,) = said[name]
        assert words in line, name
        assert NOBODY in line, name
    for name, words in LOST.items():
        assert united(got[name])[0] != whole["loader" in name][0], name
        (line,) = said[name]
        assert words in line, name
        assert "deals that out once more to 2 processes" in line, name
    for name in DEALT_BY_OTHERS:
        assert said[name] == [], name
    # Lightning itself refuses a sampler of batches that it is to deal out.
    refused = got["Lightning: batch sampler, dealt again"]
    assert refused[0] == refused[1]
    assert "use_distributed_sampler=False" in str(refused[0])
    tried = {*RIGHT, *REPEATED, *LOST, *DEALT_BY_OTHERS, "Lightning: batch sampler, dealt again"}
    assert tried == set(first)
