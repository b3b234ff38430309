"""carry_exposure=True: another plan goes on where a run was left, and nobody's turn is lost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.training.cohorts import cohort, packed, take


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """9 HGG and 5 LGG patients."""
    return packed(tmp_path_factory.mktemp("carry") / "cohort", cohort())


def loader_of(shards: ShardSet, **options: Any) -> BalancedLoader:
    """Make a loader."""
    settings: dict[str, Any] = {"global_batch_size": 4, "balance": "class_balanced", "seed": 7}
    return train_loader(shards, **(settings | options))


def left_at(shards: ShardSet, batches: int, **options: Any) -> dict[str, Any]:
    """Run for some batches, and give the state as JSON has it."""
    with loader_of(shards, **options) as loader:
        take(loader, batches)
        state: dict[str, Any] = json.loads(json.dumps(loader.state_dict()))
    return state


def keys_of(loader: BalancedLoader, batches: int) -> list[list[str]]:
    """Give the keys of some batches."""
    got: list[list[str]] = []
    while len(got) < batches:
        got += [batch["key"] for _, batch in zip(range(batches - len(got)), loader, strict=False)]
    return got


CHANGES: dict[str, dict[str, Any]] = {
    "another seed": {"seed": 8},
    "another strategy": {"balance": {"name": "power", "alpha": 0.25, "unit": "patient"}},
    "another batch": {"global_batch_size": 6},
    "somebody left out": {"exclude": ["H03", "L02"]},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("batches", [1, 5, 10])
def test_those_without_a_turn_come_first_and_totals_stay_within_one(
    shards: ShardSet, name: str, batches: int
) -> None:
    old = BalancedPlan.for_shards(shards, global_batch_size=4, seed=7)
    keys = shards.keys("train")
    epoch, step = divmod(batches, old.num_steps(0))
    before = old.exposure(epoch, step)
    state = left_at(shards, batches)
    left_out = set(CHANGES[name].get("exclude", ()))
    with loader_of(shards, **CHANGES[name]) as loader:
        loader.load_state_dict(state, carry_exposure=True)
        assert loader.epoch == epoch
        assert loader.state_dict()["position"] == {"epoch": epoch, "step": 0}
        delivered: Counter[str] = Counter()
        for batch in keys_of(loader, 40):
            delivered.update(batch)
            assert len(set(batch)) == len(batch)
            assert not left_out & delivered.keys()
            for letter in "HL":
                totals = {
                    before[number] + delivered[key]
                    for number, key in enumerate(keys.tolist())
                    if key[0] == letter and key not in left_out
                }
                assert max(totals) - min(totals) <= 1
        assert loader.exposure().tolist() == [delivered[key] for key in keys.tolist()]


def test_a_carried_run_resumes_without_being_asked_and_on_other_ranks(shards: ShardSet) -> None:
    state = left_at(shards, 5)
    with loader_of(shards, seed=8) as straight:
        straight.load_state_dict(state, carry_exposure=True)
        first = take(straight, 3)
        saved = json.loads(json.dumps(straight.state_dict()))
        rest = take(straight, 12)
    assert saved["carried_from"]["state"] == state
    assert saved["carried_from"]["ordinals"] == {"HGG": 10, "LGG": 10}
    with loader_of(shards, seed=8) as resumed:
        resumed.load_state_dict(saved)
        assert resumed.plan.digest == saved["plan_digest"]
        assert take(resumed, 12) == rest
    with loader_of(shards, seed=8) as again:
        # Asked once more, it is the same run still.
        again.load_state_dict(saved, carry_exposure=True)
        assert take(again, 12) == rest
    ranks = [loader_of(shards, seed=8, rank=rank, num_ranks=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(saved)
    united = [sorted(a + b) for a, b in zip(*(keys_of(rank, 12) for rank in ranks), strict=True)]
    assert united == [
        sorted(shards.keys("train")[list(members)].tolist()) for *_, members, _ in rest
    ]
    assert len(first) == 3


def test_the_same_plan_is_continued_exactly_although_carrying_was_allowed(shards: ShardSet) -> None:
    with loader_of(shards) as straight:
        take(straight, 5)
        state = straight.state_dict()
        rest = take(straight, 5)
    with loader_of(shards) as loader:
        loader.load_state_dict(state, carry_exposure=True)
        assert take(loader, 5) == rest
        assert loader.state_dict()["carried_from"] is None


def test_another_mixing_goes_on_from_a_run_too_and_each_has_its_own(shards: ShardSet) -> None:
    state = left_at(shards, 5)
    with (
        loader_of(shards, mixing={"name": "mixup"}) as loader,
        pytest.raises(ResumeError, match=r"mixing: state has None.*carry_exposure=True"),
    ):
        loader.load_state_dict(state)
    with loader_of(shards, mixing={"name": "mixup"}) as loader:
        loader.load_state_dict(state, carry_exposure=True)
        take(loader, 3)
        carried = loader.state_dict()
    assert carried["mixing"]["name"] == "mixup"
    assert carried["carried_from"]["state"] == state


def test_without_asking_another_plan_is_refused_and_the_way_out_named(shards: ShardSet) -> None:
    with (
        loader_of(shards, seed=8) as loader,
        pytest.raises(ResumeError, match=r"seed: state has 7, loader has 8.*carry_exposure=True"),
    ):
        loader.load_state_dict(left_at(shards, 5))


def test_it_is_refused_where_units_differ_and_nothing_moves(shards: ShardSet) -> None:
    with loader_of(shards, balance=None) as loader:
        before = loader.state_dict()
        with pytest.raises(ResumeError, match="unit"):
            loader.load_state_dict(left_at(shards, 5), carry_exposure=True)
        assert loader.state_dict() == before


def test_it_is_refused_where_somebody_s_class_changed(shards: ShardSet, tmp_path: Path) -> None:
    samples = cohort()
    relabelled = [
        sample if sample.key != "H03" else type(sample)(key="H03", image=sample.image, label="LGG")
        for sample in samples
    ]
    other = packed(tmp_path / "relabelled", relabelled)
    with loader_of(other) as loader, pytest.raises(ResumeError, match=r"H03"):
        loader.load_state_dict(left_at(shards, 5), carry_exposure=shards)


def test_newcomers_of_a_new_table_join_at_the_next_pass(shards: ShardSet, tmp_path: Path) -> None:
    grown = packed(tmp_path / "grown", cohort(hgg=12))
    state = left_at(shards, 5)
    with loader_of(grown) as loader:
        with pytest.raises(ResumeError, match=rf"data set {shards.digest}.*{grown.digest}"):
            loader.load_state_dict(state, carry_exposure=True)
        loader.load_state_dict(state, carry_exposure=shards)
        old = BalancedPlan.for_shards(shards, global_batch_size=4, seed=7)
        served = {str(shards.keys("train")[n]) for n in np.flatnonzero(old.exposure(1, 1))}
        # 10 turns of 9 HGG: one of the second pass is gone, eight are due, then come all twelve.
        came = [key for batch in keys_of(loader, 10) for key in batch if key[0] == "H"]
        assert len(set(came[:8])) == 8
        assert set(came[:8]) <= served
        assert {"H09", "H10", "H11"} <= set(came[8:20]) == {f"H{n:02d}" for n in range(12)}
        saved = loader.state_dict()
    with loader_of(grown) as resumed:
        with pytest.raises(ResumeError, match="Give the folder"):
            resumed.load_state_dict(saved)
        resumed.load_state_dict(saved, carry_exposure=shards)
        assert resumed.state_dict() == saved


def test_a_forged_ordinal_is_refused(shards: ShardSet) -> None:
    with loader_of(shards, seed=8) as loader:
        loader.load_state_dict(left_at(shards, 5), carry_exposure=True)
        saved = loader.state_dict()
    saved["carried_from"]["ordinals"]["HGG"] = 11
    with loader_of(shards, seed=8) as resumed, pytest.raises(ResumeError, match="ordinals"):
        resumed.load_state_dict(saved)


def test_epochs_before_the_change_belong_to_the_old_plan(shards: ShardSet) -> None:
    with loader_of(shards, seed=8) as loader:
        loader.load_state_dict(left_at(shards, 9), carry_exposure=True)
        assert loader.epoch == 2
        with pytest.raises(IndexError, match="carried over"):
            loader.set_epoch(1)
        loader.set_epoch(4)
        assert take(loader, 1)[0][:2] == (4, 0)


def test_an_evaluation_s_state_is_not_carried_over(shards: ShardSet) -> None:
    from streaming_balance.training.evaluation import eval_loader

    state = eval_loader(shards, split="val", batch_size=2).state_dict()
    with loader_of(shards) as loader, pytest.raises((ResumeError, ConfigError), match="evaluation"):
        loader.load_state_dict(state, carry_exposure=True)
