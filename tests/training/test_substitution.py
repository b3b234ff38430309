"""on_error="substitute": a damaged sample is replaced by the rule and recorded; no other moves."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import ConfigError, ResumeError, ShardError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.members import SplitMembers
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.merging import merge_states
from tests.building import Sample
from tests.training.cohorts import SHAPE, cohort, merged, packed, voxels

BATCH = 5
HGG, LGG = 14, 12
STEPS = 15
KEYS = [*(f"H{n:02d}" for n in range(HGG)), *(f"L{n:02d}" for n in range(LGG))]


def damage(shards: ShardSet, key: str, field: str = "image") -> None:
    """Flip one bit in the middle of what is stored of a sample."""
    number = shards.keys("train").tolist().index(key)
    member = SplitMembers(shards.table, "train", shards.arrays).stored_array(number, field)
    path = shards.path / shards.manifest.shards[member.shard].name
    descriptor = os.open(path, os.O_RDWR)
    place = member.offset + member.bytes - 3
    (byte,) = os.pread(descriptor, 1, place)
    os.pwrite(descriptor, bytes([byte ^ 4]), place)
    os.close(descriptor)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """14 HGG and 12 LGG patients, two of each damaged."""
    packed_shards = packed(tmp_path / "cohort", cohort(hgg=HGG, lgg=LGG))
    for key in ("H01", "H04", "L00", "L03"):
        damage(packed_shards, key)
    return packed_shards


def loader_of(shards: ShardSet, **options: Any) -> BalancedLoader:
    """Make a loader that lets others stand in."""
    settings: dict[str, Any] = {"balance": "class_balanced", "seed": 7, "num_threads": 2}
    return train_loader(
        shards, global_batch_size=BATCH, on_error="substitute", **(settings | options)
    )


def expected(plan: BalancedPlan, damaged: set[int], steps: int) -> list[dict[int, tuple[int, int]]]:
    """Work out who comes at each slot, and whom the plan asked for, from the rule alone."""
    batches = []
    for number in range(steps):
        epoch, step = divmod(number, plan.num_steps(0))
        slots = {}
        for slot, sample in enumerate(plan.batch(epoch, step).tolist()):
            sound = sample
            if sample in damaged:
                candidates = plan.substitutes(epoch, step, slot).tolist()
                sound = next(other for other in candidates if other not in damaged)
            slots[slot] = sound, sample
        batches.append(slots)
    return batches


def run(loaders: list[BalancedLoader], steps: int) -> list[dict[int, tuple[int, bytes]]]:
    """Take steps on all ranks together."""
    parts = [stream(loader) for loader in loaders]
    return [merged([next(part) for part in parts]) for _ in range(steps)]


def stream(loader: BalancedLoader) -> Iterator[dict[str, Any]]:
    """Give batch after batch, epoch after epoch."""
    while True:
        yield from loader


def check(
    got: list[dict[int, tuple[int, bytes]]], wanted: list[dict[int, tuple[int, int]]]
) -> None:
    """Compare what came with what the rule says, voxel by voxel."""
    for batch, slots in zip(got, wanted, strict=True):
        assert {slot: sample for slot, (sample, _) in batch.items()} == {
            slot: sound for slot, (sound, _) in slots.items()
        }
        for sample, image in batch.values():
            assert image == voxels(sample).astype(np.float32).tobytes()


def records_of(wanted: list[dict[int, tuple[int, int]]], steps: int) -> list[tuple[int, ...]]:
    """List (epoch, step, slot, sample, substitute) of whatever was replaced."""
    return [
        (*divmod(number, steps), slot, sample, sound)
        for number, slots in enumerate(wanted)
        for slot, (sound, sample) in sorted(slots.items())
        if sound != sample
    ]


DAMAGED = {1, 4, HGG, HGG + 3}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"transform": lambda sample: sample}, {"workers": 1}],
    ids=["threads", "transform", "workers"],
)
def test_whoever_stands_in_follows_from_the_damage_alone(
    shards: ShardSet, num_ranks: int, options: dict[str, Any]
) -> None:
    if options.get("workers") and num_ranks > 2:
        pytest.skip("processes are slow to start; two ranks show it")
    loaders = [
        loader_of(shards, rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)
    ]
    wanted = expected(loaders[0].plan, DAMAGED, STEPS)
    check(run(loaders, STEPS), wanted)
    state = merge_states([loader.state_dict() for loader in loaders])
    found = [
        tuple(record[name] for name in ("epoch", "step", "slot", "sample", "substitute"))
        for record in state["substitutions"]
    ]
    assert found == records_of(wanted, len(loaders[0]))
    assert all("xxh3-64" in record["reason"] for record in state["substitutions"])
    assert sum(loader.stats()["substituted"] for loader in loaders) == len(found) > 4
    for loader in loaders:
        loader.close()


def test_quotas_hold_and_the_exposure_moves_to_who_was_delivered(shards: ShardSet) -> None:
    with loader_of(shards) as loader:
        counts = np.zeros(HGG + LGG, dtype=np.int64)
        for batch in (batch for _, batch in zip(range(STEPS), stream(loader), strict=False)):
            assert len(batch["image"]) == BATCH
            quotas = loader.plan.quotas(batch["epoch"], batch["step"]).tolist()
            assert np.bincount(batch["label"], minlength=2).tolist() == quotas
            assert batch["key"] == [KEYS[number] for number in batch["sample"].tolist()]
            np.add.at(counts, batch["sample"].numpy(), 1)
        assert loader.exposure().tolist() == counts.tolist()
        assert not counts[list(DAMAGED)].any()


def test_damage_is_an_error_unless_asked_otherwise(shards: ShardSet) -> None:
    with (
        train_loader(shards, global_batch_size=HGG + LGG, balance=None) as loader,
        pytest.raises(ShardError, match=r"H01.*damaged"),
    ):
        next(iter(loader))


def test_a_damaged_mask_makes_the_sample_damaged(tmp_path: Path) -> None:
    samples = [
        Sample(key=key, image=voxels(n), seg=voxels(n)[0], label="HGG" if n < HGG else "LGG")
        for n, key in enumerate(KEYS)
    ]
    shards = packed(tmp_path / "cohort", samples)
    damage(shards, "L01", "seg")
    with loader_of(shards) as loader:
        wanted = expected(loader.plan, {HGG + 1}, STEPS)
        for slots, batch in zip(wanted, stream(loader), strict=False):
            assert batch["sample"].tolist() == [slots[s][0] for s in batch["slot"].tolist()]
            for sample, image, seg in zip(
                batch["sample"].tolist(), batch["image"], batch["seg"], strict=True
            ):
                assert image.numpy().tobytes() == voxels(sample).astype(np.float32).tobytes()
                assert seg.numpy().tobytes() == voxels(sample)[:1].tobytes()


def test_a_shard_that_is_gone_is_many_damaged_samples(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort(hgg=HGG, lgg=LGG), shard_bytes=8192)
    names = [shard.name for shard in shards.manifest.shards]
    members = SplitMembers(shards.table, "train", shards.arrays)
    lost = {
        n for n in range(HGG + LGG) if names[members.stored_array(n, "image").shard] == names[1]
    }
    assert 1 < len(lost) < 7
    (shards.path / names[1]).unlink()
    with loader_of(shards) as loader:
        check(run([loader], STEPS), expected(loader.plan, lost, STEPS))


def test_a_hiccup_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = packed(tmp_path / "cohort", cohort())
    real, calls = os.preadv, itertools.count()

    def flaky(*arguments: Any) -> int:
        if next(calls) in (0, 10, 20):
            raise OSError(5, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    with loader_of(shards, num_threads=1) as loader:
        check(run([loader], STEPS), expected(loader.plan, set(), STEPS))
        assert loader.state_dict()["substitutions"] == []
    assert next(calls) > 20


def test_an_error_of_a_transform_is_not_damage(shards: ShardSet) -> None:
    def failing(sample: dict[str, Any]) -> dict[str, Any]:
        raise ShardError(f"cannot find the atlas of {sample['key']}")

    with loader_of(shards, transform=failing) as loader, pytest.raises(ShardError, match="atlas"):
        next(iter(loader))


def test_nobody_left_is_an_error_that_names_the_damage(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort(lgg=3))
    for key in ("L00", "L01", "L02"):
        damage(shards, key)
    with loader_of(shards) as loader, pytest.raises(ShardError, match=r"(?s)L0.*Nobody is left"):
        next(iter(loader))


def test_one_sample_that_comes_twice_is_replaced_by_two_others(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort(hgg=HGG, lgg=LGG))
    damage(shards, "L01")
    balance = {"name": "class_balanced", "draw": "iid"}
    with loader_of(shards, balance=balance, seed=1) as loader:
        plan = loader.plan
        epoch, step = next(
            (epoch, step)
            for epoch in range(500)
            for step in range(len(loader))
            if plan.batch(epoch, step).tolist().count(HGG + 1) == 2
        )
        loader.set_epoch(epoch)
        wanted = expected(plan, {HGG + 1}, epoch * len(loader) + step + 1)[-1]
        batch = next(batch for batch in loader if batch["step"] == step)
        got = dict(zip(batch["slot"].tolist(), batch["sample"].tolist(), strict=True))
        assert got == {slot: sound for slot, (sound, _) in wanted.items()}
        assert len({sound for sound, sample in wanted.values() if sample == HGG + 1}) == 2


@pytest.mark.parametrize("size", [None, (4, 4, 4)])
def test_one_of_another_shape_stands_in_as_in_any_batch_of_unequal_shapes(
    tmp_path: Path, size: tuple[int, ...] | None
) -> None:
    other = (2, 5, 4, 6)
    images = [voxels(n, other if n == 4 else SHAPE) for n in range(12)]
    shards = packed(
        tmp_path / "cohort",
        [Sample(key=f"P{n:02d}", image=image) for n, image in enumerate(images)],
    )
    damage(shards, "P00")
    stood_in = 0
    with loader_of(shards, balance=None, size=size) as loader:
        for batch in (batch for _, batch in zip(range(100), stream(loader), strict=False)):
            planned = loader.plan.batch(batch["epoch"], batch["step"]).tolist()
            if 4 in batch["sample"].tolist() and 4 not in planned:
                stood_in += 1
            if size is not None:
                assert batch["image"].shape == (BATCH, 2, *size)
                continue
            assert isinstance(batch["image"], list) == (4 in batch["sample"].tolist())
            for number, image in zip(batch["sample"].tolist(), batch["image"], strict=True):
                assert image.numpy().tobytes() == images[number].astype(np.float32).tobytes()
    assert stood_in


def test_every_substitution_is_named_in_the_log(
    shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    with loader_of(shards) as loader, caplog.at_level(logging.WARNING):
        run([loader], 8)
        records = loader.state_dict()["substitutions"]
    assert len(records) == len(caplog.records) > 0
    for record, line in zip(records, caplog.messages, strict=True):
        assert f"epoch {record['epoch']}, step {record['step']}, slot {record['slot']}" in line
        assert f"{KEYS[record['sample']]} is damaged" in line
        assert f"{KEYS[record['substitute']]} stands in" in line


def reloaded(state: dict[str, Any]) -> Any:
    """Pass a state through JSON."""
    return json.loads(json.dumps(state))


def test_a_run_resumed_on_other_ranks_keeps_and_continues_the_records(shards: ShardSet) -> None:
    two = [loader_of(shards, rank=rank, num_ranks=2) for rank in range(2)]
    plan, steps = two[0].plan, len(two[0])
    wanted = expected(plan, DAMAGED, STEPS)
    check(run(two, 4), wanted[:4])
    state = reloaded(merge_states([loader.state_dict() for loader in two]))
    three = [loader_of(open_shards(shards.path), rank=r, num_ranks=3) for r in range(3)]
    for loader in three:
        loader.load_state_dict(state)
    check(run(three, STEPS - 4), wanted[4:])
    end = merge_states([loader.state_dict() for loader in three])
    found = [
        (r["epoch"], r["step"], r["slot"], r["sample"], r["substitute"])
        for r in end["substitutions"]
    ]
    assert found == records_of(wanted, steps)
    assert (end["recorders"], end["complete_before"]) == (None, True)
    for loader in (*two, *three):
        loader.close()


def test_a_state_of_one_rank_alone_says_so_and_so_does_every_later_one(
    shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    two = [loader_of(shards, rank=rank, num_ranks=2) for rank in range(2)]
    run(two, 4)
    alone = two[1].state_dict()
    assert (alone["recorders"], alone["complete_before"]) == ({"num_ranks": 2, "ranks": [1]}, True)
    with loader_of(shards) as one:
        with caplog.at_level(logging.WARNING):
            one.load_state_dict(reloaded(alone))
        assert "substitutions of all ranks" in caplog.text
        later = one.state_dict()
    assert (later["recorders"], later["complete_before"]) == (None, False)
    for loader in two:
        loader.close()


def test_states_differ_between_ranks_in_their_records_alone(shards: ShardSet) -> None:
    loaders = [loader_of(shards, rank=rank, num_ranks=3) for rank in range(3)]
    run(loaders, STEPS)
    states = [loader.state_dict() for loader in loaders]
    common = [
        {name: entry for name, entry in state.items() if name not in ("substitutions", "recorders")}
        for state in states
    ]
    assert common[0] == common[1] == common[2]
    assert len(json.dumps(common[0])) - len(json.dumps(common[0]["settings"])) < 4096
    for loader in loaders:
        loader.close()


def test_without_substitution_states_are_the_same_bytes_on_every_rank(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort())
    texts = set()
    for rank in range(3):
        with train_loader(shards, global_batch_size=6, rank=rank, num_ranks=3) as loader:
            next(iter(loader))
            texts.add(json.dumps(loader.state_dict()))
    assert len(texts) == 1


def test_a_batch_delivered_again_after_a_jump_back_is_recorded_again(shards: ShardSet) -> None:
    with loader_of(shards) as loader:
        counts = np.zeros(HGG + LGG, dtype=np.int64)
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            for batch in loader:
                np.add.at(counts, batch["sample"].numpy(), 1)
        assert loader.exposure().tolist() == counts.tolist()
        state = loader.state_dict()
    records = [json.dumps(record) for record in state["substitutions"]]
    assert len(set(records)) < len(records)
    with loader_of(shards) as resumed:
        resumed.load_state_dict(merge_states([state]))
        assert resumed.exposure().tolist() == counts.tolist()


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "a record without slot": lambda state: state["substitutions"][0].pop("slot"),
    "a negative sample": lambda state: state["substitutions"][0].update(sample=-1),
    "a slot beyond the batch": lambda state: state["substitutions"][0].update(slot=BATCH),
    "no reason": lambda state: state["substitutions"][0].update(reason=None),
    "epoch true": lambda state: state["substitutions"][0].update(epoch=True),
    "a rank that is none": lambda state: state.update(recorders={"num_ranks": 2, "ranks": [2]}),
    "recorders cut": lambda state: state.update(recorders={"num_ranks": 2}),
    "no flag": lambda state: state.update(complete_before=1),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_records_are_refused(shards: ShardSet, name: str) -> None:
    with loader_of(shards) as loader:
        run([loader], 4)
        state = reloaded(loader.state_dict())
    WRONG[name](state)
    with loader_of(shards) as resumed, pytest.raises(ResumeError, match="damaged"):
        resumed.load_state_dict(state)


def states_of(shards: ShardSet, steps: int = 4) -> list[dict[str, Any]]:
    """Give the states of two ranks after some steps."""
    loaders = [loader_of(shards, rank=rank, num_ranks=2) for rank in range(2)]
    run(loaders, steps)
    for loader in loaders:
        loader.close()
    return [loader.state_dict() for loader in loaders]


def test_states_of_some_ranks_merge_and_say_who_is_missing(shards: ShardSet) -> None:
    first, second = states_of(shards)
    assert merge_states([second])["recorders"] == {"num_ranks": 2, "ranks": [1]}
    whole = merge_states([first, second])
    assert merge_states([second, first]) == merge_states([first, second, first]) == whole
    assert merge_states([whole, first]) == whole


def test_states_that_are_not_of_one_run_and_step_do_not_merge(shards: ShardSet) -> None:
    first, second = states_of(shards)
    later = states_of(shards, steps=5)[1]
    with pytest.raises(ResumeError, match=r"differ in position.*step=4.*step=5"):
        merge_states([first, later])
    with pytest.raises(ResumeError, match="differ in plan_digest"):
        merge_states([first, second | {"plan_digest": "0"}])
    with pytest.raises(ResumeError, match="2 and 3 ranks"):
        merge_states([first, second | {"recorders": {"num_ranks": 3, "ranks": [1]}}])
    with pytest.raises(ConfigError, match="states is empty"):
        merge_states([])
    with pytest.raises(ConfigError, match="one state"):
        merge_states(first)  # type: ignore[arg-type]
