"""Fault 66: samples that neither ranks nor batches divide; every N up to 300 on up to 16 ranks."""

from __future__ import annotations

import numpy as np
import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.training.evaluation import PackedOrder

# A line tracer makes thousands of cases three times as slow; smaller tests run the same lines.
pytestmark = pytest.mark.no_cover

MOST_SAMPLES = 300
WORLDS = range(1, 17)


def planned(num_samples: int, batch: int, *, name: str, last: str) -> BalancedPlan:
    """Plan over samples of two classes, every third of the smaller one."""
    labels = np.arange(num_samples) % 3 == 0
    return BalancedPlan.from_labels(
        labels.astype(np.int64),
        global_batch_size=batch,
        balance={"name": name, "last": last},
        seed=num_samples,
    )


def sizes_dealt(plan: BalancedPlan, step: int, world: int) -> list[int]:
    """Deal a global batch to all ranks; together they have every slot once."""
    slots = [plan.rank_slots(0, step, rank=rank, num_ranks=world) for rank in range(world)]
    together = np.sort(np.concatenate(slots))
    assert np.array_equal(together, np.arange(plan.batch_size(0, step)))
    return [len(part) for part in slots]


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_has_a_part_of_every_training_step_and_the_filling_is_counted(
    world: int,
) -> None:
    for num_samples in range(1, MOST_SAMPLES + 1):
        # Three to six a rank and some that do not divide: tails of every length come by.
        batch = world * (3 + num_samples % 4) + (num_samples * 7) % world
        plan = planned(num_samples, batch, name="instance_balanced", last="full")
        steps = plan.num_steps(0)
        assert steps == -(-num_samples // batch)
        for step in range(steps):
            sizes = sizes_dealt(plan, step, world)
            # No rank lacks a step that another one has.
            assert min(sizes) >= batch // world >= 3
            assert max(sizes) <= -(-batch // world)
        # What fills the last batch is in the count: everyone once, the fillers once more.
        exposure = plan.exposure(0, steps)
        assert exposure.sum() == steps * batch
        rounds = steps * batch // num_samples
        assert exposure.min() >= rounds - 1
        assert exposure.tolist() == _counted(plan, steps)


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_dropped_or_short_is_explicit_and_counted(world: int) -> None:
    for num_samples in range(1, MOST_SAMPLES + 1):
        batch = world * (3 + num_samples % 4) + (num_samples * 7) % world
        whole, tail = divmod(num_samples, batch)
        if whole:
            plan = planned(num_samples, batch, name="instance_balanced", last="drop")
            assert plan.num_steps(0) == whole
            assert plan.exposure(0, whole).sum() == num_samples - tail
            assert len(sizes_dealt(plan, whole - 1, world)) == world
        else:
            with pytest.raises(ConfigError, match="last"):
                planned(num_samples, batch, name="instance_balanced", last="drop").num_steps(0)
        plan = planned(num_samples, batch, name="instance_balanced", last="short")
        steps = plan.num_steps(0)
        assert steps == whole + (tail > 0)
        assert plan.exposure(0, steps).tolist() == [1] * num_samples
        if 0 < tail < world:
            # A rank without a sample in the last step would hang the others: all ranks refuse.
            for rank in range(world):
                with pytest.raises(ConfigError, match=f"leaves {tail} samples for the last batch"):
                    plan.rank_slots(0, steps - 1, rank=rank, num_ranks=world)
        else:
            assert min(sizes_dealt(plan, steps - 1, world)) >= 1


@pytest.mark.parametrize("world", WORLDS)
def test_evaluation_has_every_sample_exactly_once_and_no_padding(world: int) -> None:
    random = np.random.default_rng(world)
    for num_samples in range(1, MOST_SAMPLES + 1):
        batch = 1 + (num_samples + world) % 5
        packed = random.permutation(num_samples)
        ranks = [
            PackedOrder(order=packed, batch_size=batch, rank=rank, num_ranks=world, digest="")
            for rank in range(world)
        ]
        found = [packed[rank.places(step)] for rank in ranks for step in range(rank.num_steps(0))]
        counts = np.bincount(np.concatenate(found), minlength=num_samples)
        assert counts.tolist() == [1] * num_samples
        steps = [rank.num_steps(0) for rank in ranks]
        assert {rank.most_steps for rank in ranks} == {max(steps)}
        assert max(steps) - min(steps) <= 1
        assert sum(rank.global_size(step) for rank in ranks[:1] for step in range(max(steps))) == (
            num_samples
        )


def _counted(plan: BalancedPlan, steps: int) -> list[int]:
    """Count deliveries of an epoch batch by batch."""
    batches = [plan.batch(0, step) for step in range(steps)]
    counts: list[int] = np.bincount(np.concatenate(batches), minlength=plan.num_samples).tolist()
    return counts
