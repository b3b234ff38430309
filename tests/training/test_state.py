"""The saved state: small, plain, the same on every rank, and refused where it does not belong."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.errors import ResumeError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.training.cohorts import cohort, packed, take


def loader_of(shards: ShardSet, **options: Any) -> BalancedLoader:
    """Build the loader most tests use."""
    settings: dict[str, Any] = {
        "global_batch_size": 4,
        "balance": "class_balanced",
        "seed": 7,
        "num_threads": 1,
    }
    return train_loader(shards, **settings | options)


def test_it_is_the_same_small_json_on_every_rank(small: ShardSet) -> None:
    texts = set()
    for rank in range(4):
        with loader_of(small, rank=rank, num_ranks=4) as loader:
            take(loader, 9)
            loader.set_epoch(20)
            take(loader, 2)
            texts.add(json.dumps(loader.state_dict()))
    assert len(texts) == 1
    assert len(texts.pop().encode()) < 4096


def test_it_is_as_large_at_step_ten_million_as_at_step_ten(small: ShardSet) -> None:
    loader = loader_of(small)
    loader.set_epoch(3)
    early = len(json.dumps(loader.state_dict()))
    loader.set_epoch(10_000_000)
    assert len(json.dumps(loader.state_dict())) <= early + 2 * len("10000000")


def test_jumps_without_a_batch_between_them_are_kept_as_one(small: ShardSet) -> None:
    loader = loader_of(small)
    take(loader, 2)
    for epoch in (4, 2, 9, 1, 6):
        loader.set_epoch(epoch)
    assert loader.state_dict()["skipped"] == [{"from": [0, 2], "to": [6, 0]}]


@pytest.mark.parametrize("way", ["json", "torch", "none"])
def test_it_survives_json_and_torch_save_without_pickle(small: ShardSet, way: str) -> None:
    with loader_of(small) as loader:
        take(loader, 5)
        loader.set_epoch(np.int64(4))  # type: ignore[arg-type]
        state = loader.state_dict()
    if way == "json":
        state = json.loads(json.dumps(state))
    if way == "torch":
        file = io.BytesIO()
        torch.save({"data": state}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)["data"]
    with loader_of(small) as resumed:
        resumed.load_state_dict(state)
        assert resumed.epoch == 4
        assert resumed.state_dict() == loader.state_dict()


def test_changing_a_saved_state_changes_no_loader(small: ShardSet) -> None:
    loader = loader_of(small)
    state = loader.state_dict()
    state["position"]["epoch"] = 5
    state["settings"]["seed"] = 8
    state["settings"]["balance"]["name"] = "power"
    state["skipped"].append(1)
    again = loader.state_dict()
    assert again["position"] == {"epoch": 0, "step": 0}
    assert (again["settings"]["seed"], again["skipped"]) == (7, [])
    assert again["settings"]["balance"]["name"] == "class_balanced"


@pytest.mark.parametrize(
    ("changed", "named", "found"),
    [
        ({"seed": 8}, "seed", "state has 7, loader has 8"),
        ({"global_batch_size": 6}, "global_batch_size", "state has 4, loader has 6"),
        ({"balance": "power"}, "balance", "class_balanced"),
        ({"balance": None}, "balance", "instance_balanced"),
        ({"balance": {"name": "class_balanced", "last": "drop"}}, "balance", "'last': 'drop'"),
        ({"exclude": ["H01"]}, "exclude", r"state has \[\], loader has \['H01'\]"),
        ({"split": "val", "balance": None}, "split", "state has 'train', loader has 'val'"),
    ],
)
def test_a_state_of_other_settings_is_refused_and_the_field_named(
    small: ShardSet, changed: dict[str, Any], named: str, found: str
) -> None:
    state = loader_of(small).state_dict()
    other = loader_of(small, **changed)
    before = other.state_dict()
    with pytest.raises(ResumeError, match=f"{named}: .*{found}"):
        other.load_state_dict(state)
    assert other.state_dict() == before


def test_every_difference_is_listed_and_nothing_else(small: ShardSet) -> None:
    state = loader_of(small).state_dict()
    with pytest.raises(ResumeError) as refusal:
        loader_of(small, seed=8, global_batch_size=6).load_state_dict(state)
    text = str(refusal.value)
    assert "seed: state has 7, loader has 8" in text
    assert "global_batch_size: state has 4, loader has 6" in text
    assert "exclude" not in text
    assert "shards_digest" not in text


def test_a_state_of_other_voxels_is_refused(small: ShardSet, tmp_path: Path) -> None:
    samples = cohort()
    samples[3].image[0, 0, 0, 0] += 1
    other = packed(tmp_path / "cohort", samples)
    with pytest.raises(ResumeError, match=f"shards_digest: state has {small.digest}, loader has"):
        loader_of(other).load_state_dict(loader_of(small).state_dict())


def test_a_state_of_other_patients_is_refused(small: ShardSet, tmp_path: Path) -> None:
    other = packed(tmp_path / "cohort", cohort(hgg=8))
    with pytest.raises(ResumeError, match="samples, patients or labels"):
        loader_of(other).load_state_dict(loader_of(small).state_dict())


@pytest.mark.parametrize("codec", ["npy", "blosc"])
def test_packing_again_with_another_codec_and_shard_size_keeps_the_state_valid(
    small: ShardSet, tmp_path: Path, codec: str
) -> None:
    again = packed(tmp_path / "cohort", cohort(), codec=codec, shard_bytes=1 << 20)
    with loader_of(small) as straight, loader_of(small) as first, loader_of(again) as second:
        expected = take(straight, 14)
        assert take(first, 5) == expected[:5]
        second.load_state_dict(first.state_dict())
        assert take(second, 9) == expected[5:]


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], Any]:
    """Apply a change in place and give the state."""

    def apply(state: dict[str, Any]) -> Any:
        change(state)
        return state

    return apply


def record(**changes: int) -> dict[str, Any]:
    """Give a sound record of the first slot of the first batch, but for some entries."""
    sound = {"epoch": 0, "step": 0, "slot": 0, "sample": 9, "substitute": 5}
    return sound | changes | {"reason": "cut"}


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"without {name}": damaged(lambda s, name=name: s.pop(name))  # type: ignore[misc]
        for name in (
            *("version", "plan_digest", "settings", "shards_digest"),
            *("position", "skipped", "substitutions"),
        )
    },
    "no mapping": lambda state: [state],
    "nothing": lambda _: None,
    "newer": damaged(lambda s: s.update(version=2)),
    "older": damaged(lambda s: s.update(version=0)),
    "negative step": damaged(lambda s: s["position"].update(step=-1)),
    "step of text": damaged(lambda s: s["position"].update(step="3")),
    "step of a fraction": damaged(lambda s: s["position"].update(step=1.0)),
    "step true": damaged(lambda s: s["position"].update(step=True)),
    "step past the epoch": damaged(lambda s: s["position"].update(step=4)),
    "huge step": damaged(lambda s: s["position"].update(step=10**30)),
    "epoch beyond counting": damaged(lambda s: s["position"].update(epoch=2**70)),
    "position a list": damaged(lambda s: s.update(position=[0, 0])),
    "skipped a number": damaged(lambda s: s.update(skipped=3)),
    "skipped cut": damaged(lambda s: s.update(skipped=[{"from": [0, 1]}])),
    "skipped past the epoch": damaged(lambda s: s.update(skipped=[{"from": [0, 4], "to": [1, 0]}])),
    "a record of another sample": damaged(lambda s: s.update(substitutions=[record(sample=10**6)])),
    "a record of nobody standing in": damaged(
        lambda s: s.update(substitutions=[record(substitute=10**6)])
    ),
    "settings a list": damaged(lambda s: s.update(settings=[])),
    "digest a number": damaged(lambda s: s.update(plan_digest=3)),
    "digest flipped": damaged(lambda s: s.update(plan_digest="0" * 32)),
}


def test_a_record_of_what_the_plan_has_is_taken_over(small: ShardSet) -> None:
    loader = loader_of(small)
    state = loader.state_dict() | {"substitutions": [record()]}
    loader.load_state_dict(state)
    assert loader.state_dict() == state


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_refused_and_moves_nothing(small: ShardSet, name: str) -> None:
    loader = loader_of(small)
    assert len(loader) == 4
    before = loader.state_dict()
    with pytest.raises(ResumeError):
        loader.load_state_dict(DAMAGE[name](loader.state_dict()))
    assert loader.state_dict() == before


def test_a_state_far_in_the_future_is_continued_exactly(small: ShardSet) -> None:
    loader = loader_of(small)
    state = loader.state_dict()
    state["position"] = {"epoch": 10**12, "step": 3}
    with loader:
        loader.load_state_dict(state)
        batch = next(iter(loader))
    assert (batch["epoch"], batch["step"]) == (10**12, 3)
    assert sorted(batch["sample"].tolist()) == sorted(loader.plan.batch(10**12, 3).tolist())


@pytest.mark.parametrize("batches", [0, 1])
def test_loading_after_iteration_began_is_refused(small: ShardSet, batches: int) -> None:
    with loader_of(small) as loader:
        state = loader.state_dict()
        iterator = iter(loader)
        for _ in range(batches):
            next(iterator)
        with pytest.raises(ResumeError, match="has begun"):
            loader.load_state_dict(state)
        assert next(iterator)["step"] == batches
