"""Samplers hand out a plan's rank batches, know where they stand, and go on from there."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from streaming_balance.errors import BalanceError, ConfigError, ResumeError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.training.samplers import BalancedBatchSampler, BalancedSampler
from tests.training.sampler_cases import BATCH, LABELS, global_states_untouched, pieces


def batches(**options: Any) -> BalancedBatchSampler:
    return BalancedBatchSampler(LABELS, **{"batch_size": BATCH, "seed": 3} | options)


def indices(**options: Any) -> BalancedSampler:
    return BalancedSampler(LABELS, **{"batch_size": BATCH, "seed": 3} | options)


def planned(epochs: int, *, size: int = BATCH, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """What the plan says, epoch after epoch."""
    plan = BalancedPlan.from_labels(LABELS, global_batch_size=size * ranks, seed=3)
    return [
        plan.rank_batch(epoch, step, rank=rank, num_ranks=ranks).tolist()
        for epoch in range(epochs)
        for step in range(plan.num_steps(epoch))
    ]


def test_batches_are_the_plan_s_epoch_after_epoch() -> None:
    sampler = batches()
    assert [*sampler, *sampler, *sampler] == planned(3)


def test_indices_are_the_plan_s_batches_one_after_another() -> None:
    sampler = indices()
    assert pieces([*sampler, *sampler]) == planned(2)


def test_every_batch_holds_half_of_each_class() -> None:
    for batch in batches():
        assert Counter(LABELS[i] for i in batch) == {"HGG": 3, "LGG": 3}


@pytest.mark.parametrize("kind", [BalancedSampler, BalancedBatchSampler])
def test_both_are_torch_samplers_of_plain_integers(kind: type) -> None:
    sampler = kind(LABELS, batch_size=BATCH)
    assert isinstance(sampler, Sampler)
    first = next(iter(sampler))
    assert {type(i) for i in (first if isinstance(first, list) else [first])} == {int}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_make_the_global_batches_of_one_rank(ranks: int) -> None:
    alone = batches(num_replicas=1, rank=0)
    parts = [batches(batch_size=BATCH // ranks, num_replicas=ranks, rank=r) for r in range(ranks)]
    for epoch in range(2):
        together = [sorted(itertools.chain(*rank)) for rank in zip(*parts, strict=True)]
        assert together == [sorted(batch) for batch in alone], epoch


def test_every_rank_gets_its_share_of_every_class() -> None:
    for rank in range(2):
        for batch in batches(num_replicas=2, rank=rank):
            assert Counter(LABELS[i] for i in batch) == {"HGG": 3, "LGG": 3}


@pytest.mark.parametrize("last", ["full", "short", "drop"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_length_is_what_an_epoch_yields(last: str, ranks: int) -> None:
    balance = {"name": "class_balanced", "last": last}
    for rank in range(ranks):
        options = {"balance": balance, "num_replicas": ranks, "rank": rank, "batch_size": 4}
        for sampler in (indices(**options), batches(**options)):
            for _ in range(3):
                assert len(sampler) == len(list(sampler))


def test_iteration_goes_on_where_it_was_left() -> None:
    sampler = batches()
    for _ in zip(range(2), sampler, strict=False):
        pass
    # zip asks for its third item only after range has ended.
    assert [*sampler, *sampler] == planned(2)[2:]
    flat = indices()
    first = list(itertools.islice(flat, 8))
    assert [*first, *flat] == list(itertools.chain(*planned(1)))


def test_set_epoch_keeps_the_current_place_and_jumps_to_another_epoch() -> None:
    sampler, per_epoch = batches(), len(planned(1))
    next(iter(sampler))
    sampler.set_epoch(0)
    assert list(sampler) == planned(1)[1:]
    assert sampler.epoch == 1
    sampler.set_epoch(1)
    sampler.set_epoch(4)
    assert list(sampler) == planned(5)[4 * per_epoch :]
    sampler.set_epoch(0)
    assert list(sampler) == planned(1)
    with pytest.raises(IndexError):
        sampler.set_epoch(-1)


def test_jumps_without_a_batch_between_them_are_one_and_back_again_is_none() -> None:
    sampler = batches()
    next(iter(sampler))
    sampler.set_epoch(3)
    sampler.set_epoch(5)
    assert sampler.state_dict()["skipped"] == [{"from": [0, 1], "to": [5, 0]}]
    fresh = batches()
    fresh.set_epoch(2)
    fresh.set_epoch(0)
    assert fresh.state_dict() == batches().state_dict()


def test_exposure_counts_what_was_handed_out_and_not_what_was_jumped_over() -> None:
    sampler = batches()
    seen = list(sampler)
    sampler.set_epoch(3)
    seen += itertools.islice(sampler, 2)
    expected = np.bincount(list(itertools.chain(*seen)), minlength=len(LABELS))
    assert sampler.exposure().tolist() == expected.tolist()
    resumed = batches()
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.exposure().tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["batches", "indices"])
def test_resuming_after_any_number_of_batches_yields_the_rest(kind: str) -> None:
    build = batches if kind == "batches" else indices
    whole = planned(3)
    per_batch = 1 if kind == "batches" else BATCH
    sampler = build()
    for done in range(len(whole)):
        resumed = build()
        resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        assert resumed.state_dict() == sampler.state_dict()
        rest: list[Any] = []
        while len(rest) < (len(whole) - done) * per_batch:
            rest += resumed
        assert (rest if kind == "batches" else pieces(rest)) == whole[done:]
        list(itertools.islice(sampler, per_batch))


def test_the_state_after_the_last_batch_is_the_start_of_the_next_epoch() -> None:
    sampler = batches()
    iterator = iter(sampler)
    for _ in range(len(sampler)):
        next(iterator)
    assert sampler.state_dict()["position"] == {"epoch": 1, "step": 0}
    assert sampler.epoch == 1


@pytest.mark.parametrize("kind", [BalancedSampler, BalancedBatchSampler])
def test_a_state_goes_on_with_another_number_of_ranks(kind: type) -> None:
    two = [kind(LABELS, batch_size=3, seed=3, num_replicas=2, rank=rank) for rank in range(2)]
    for sampler in two:
        list(itertools.islice(sampler, 2 if kind is BalancedBatchSampler else 6))
    states = [json.dumps(sampler.state_dict()) for sampler in two]
    assert states[0] == states[1]
    three = [kind(LABELS, batch_size=2, seed=3, num_replicas=3, rank=rank) for rank in range(3)]
    for sampler in three:
        sampler.load_state_dict(json.loads(states[0]))
    parts = [list(sampler) for sampler in three]
    if kind is BalancedSampler:
        parts = [pieces(part, 2) for part in parts]
    together = [sorted(itertools.chain(*ranks)) for ranks in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in planned(1)[2:]]


def test_a_state_inside_a_batch_is_continued_on_as_many_ranks_and_refused_on_others() -> None:
    sampler = BalancedSampler(LABELS, batch_size=3, seed=3, num_replicas=2, rank=0)
    first = list(itertools.islice(sampler, 4))
    state = sampler.state_dict()
    same = BalancedSampler(LABELS, batch_size=3, seed=3, num_replicas=2, rank=0)
    same.load_state_dict(state)
    assert [*first, *same] == list(itertools.chain(*planned(1, size=3, ranks=2)))
    whole = BalancedBatchSampler(LABELS, batch_size=3, seed=3, num_replicas=2, rank=0)
    whole.load_state_dict(state)
    assert [*itertools.chain(*whole)] == [*itertools.chain(*planned(1, size=3, ranks=2))][4:]
    other = BalancedSampler(LABELS, batch_size=6, seed=3, num_replicas=1, rank=0)
    with pytest.raises(ResumeError, match=r"num_replicas 2, this sampler has 1.*whole batch"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 4}, "seed: state has 3, loader has 4"),
        ({"balance": "none"}, "balance: state has .*class_balanced.* loader has"),
        ({"batch_size": 5}, r"global_batch_size 6, but batch_size 5 x num_replicas 1 is 5"),
        ({"num_replicas": 2, "rank": 0}, r"batch_size 6 x num_replicas 2 is 12.*same product"),
    ],
)
def test_a_state_of_another_run_is_refused_by_name(changed: dict[str, Any], said: str) -> None:
    sampler = batches(**changed)
    with pytest.raises(ResumeError, match=said):
        sampler.load_state_dict(batches().state_dict())


def test_a_state_of_other_labels_is_refused() -> None:
    other = BalancedBatchSampler(LABELS[::-1], batch_size=BATCH, seed=3)
    with pytest.raises(ResumeError, match="samples, patients or labels"):
        other.load_state_dict(batches().state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 99},
        {"position": {"epoch": 0, "step": 77}},
        {"position": {"epoch": 0, "step": -1}},
        {"taken": "half"},
        {"taken": 6, "num_replicas": 1},
        {"taken": -1, "num_replicas": 1},
        {"settings": None},
        {"skipped": [{"from": [0, 99], "to": [1, 0]}]},
    ],
)
def test_a_damaged_state_is_refused_and_nothing_moves(damage: dict[str, Any]) -> None:
    sampler = batches()
    next(iter(sampler))
    before = sampler.state_dict()
    with pytest.raises(ResumeError):
        sampler.load_state_dict(before | damage)
    assert sampler.state_dict() == before


def test_the_place_of_the_training_loop_can_be_said() -> None:
    sampler = batches()
    list(itertools.islice(sampler, 4))
    resumed = batches()
    resumed.load_state_dict(sampler.state_dict(epoch=0, step=1))
    assert list(resumed) == planned(1)[1:]
    last = len(sampler)
    assert sampler.state_dict(epoch=0, step=last)["position"] == {"epoch": 1, "step": 0}
    with pytest.raises(ConfigError, match="give both"):
        sampler.state_dict(step=1)
    with pytest.raises(IndexError):
        sampler.state_dict(epoch=0, step=last + 1)


def test_an_overtaken_iterator_says_so() -> None:
    sampler = batches()
    old = iter(sampler)
    next(old)
    assert next(iter(sampler)) == planned(1)[1]
    with pytest.raises(BalanceError, match="overtaken"):
        next(old)
    old = iter(sampler)
    sampler.set_epoch(2)
    with pytest.raises(BalanceError, match="overtaken"):
        next(old)
    flat = indices()
    within = iter(flat)
    next(within)
    flat.load_state_dict(flat.state_dict())
    with pytest.raises(BalanceError, match="overtaken"):
        next(within)


def test_iterators_that_nobody_asks_change_nothing() -> None:
    sampler = batches()
    iter(sampler)
    iter(sampler)
    assert list(sampler) == planned(1)


def test_an_iterator_s_own_state_is_checked() -> None:
    iterator: Any = iter(batches())
    for wrong in ({"epoch": 0}, {"epoch": 0, "step": -1, "taken": 0}, {"step": "1"}):
        with pytest.raises(ResumeError, match="no place"):
            iterator.load_state_dict(wrong)
    with pytest.raises(ResumeError, match="beyond the 5 steps"):
        iterator.load_state_dict({"epoch": 0, "step": 6, "taken": 0})


@pytest.mark.parametrize(
    "labels",
    [
        tuple([0] * 21 + [1] * 8),
        np.array([0] * 21 + [1] * 8, dtype=np.int8),
        np.array([0] * 21 + [1] * 8, dtype=np.uint64),
        np.array([False] * 21 + [True] * 8),
        np.array(["a"] * 21 + ["b"] * 8),
        np.array(["a"] * 21 + ["b"] * 8, dtype=object),
        torch.tensor([0] * 21 + [1] * 8),
        torch.tensor([0.0] * 21 + [1.0] * 8, requires_grad=True),
        torch.tensor([0] * 21 + [1] * 8, dtype=torch.uint8),
        [torch.tensor(0)] * 21 + [torch.tensor(1)] * 8,
        [np.int16(0)] * 21 + [np.int16(1)] * 8,
    ],
    ids=lambda labels: f"{type(labels).__name__} of {getattr(labels, 'dtype', type(labels[0]))}",
)
def test_labels_of_any_kind_balance_alike(labels: Any) -> None:
    for batch in BalancedBatchSampler(labels, batch_size=BATCH):
        assert sum(i < 21 for i in batch) == 3


def test_anything_numpy_can_read_is_labels() -> None:
    class Column:
        """What a table library gives: no list, but numpy reads it."""

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return np.array(LABELS, dtype=dtype)

    assert list(BalancedBatchSampler(Column(), batch_size=BATCH, seed=3)) == planned(1)


def test_classes_cycle_over_patients_where_they_are_known() -> None:
    patients = [f"P{number % 10}" for number in range(21)] + [f"Q{n % 4}" for n in range(8)]
    sampler = BalancedBatchSampler(LABELS, batch_size=BATCH, patients=np.array(patients))
    counts: Counter[str] = Counter()
    for batch in itertools.chain(*itertools.repeat(sampler, 7)):
        counts.update(patients[i] for i in batch)
        for group in ("P", "Q"):
            spread = [counts[p] for p in set(patients) if p[0] == group]
            assert max(spread) - min(spread) <= 1


def test_the_yaml_file_of_a_run_gives_strategy_and_seed(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("compute: {seed: 3}\ndata: {balancing: {weighted_sampler: {enabled: true}}}\n")
    assert list(batches(balance=str(file), seed=None)) == planned(1)
    assert list(batches(balance=file, seed=None)) == planned(1)
    assert list(batches(balance=file, seed=4)) != planned(1)


def test_rank_and_number_of_ranks_come_from_the_environment_each_on_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for given, expected in (
        ({}, (1, 3)),
        ({"rank": 2}, (2, 3)),
        ({"num_replicas": 2}, (1, 2)),
        ({"num_replicas": 1, "rank": 0}, (0, 1)),
    ):
        sampler = batches(**given)
        assert (sampler.rank, sampler.num_replicas) == expected
        assert sampler.plan.global_batch_size == BATCH * expected[1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 0}, "^batch_size is 0; it must be an integer of at least 1"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0"),
        ({"rank": 2, "num_replicas": 2}, "rank is 2 and num_replicas is 2; .*0..num_replicas-1"),
        ({"rank": "0", "num_replicas": 1}, "rank is '0'"),
        ({"balance": "class_balance"}, "Did you mean 'class_balanced'"),
        ({"patients": ["P1"]}, "patients has shape"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        batches(**wrong)


def test_frameworks_see_a_distributed_sampler_and_leave_it_alone() -> None:
    sampler = indices(num_replicas=2, rank=1)
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.num_replicas, sampler.rank, sampler.epoch, sampler.seed) == (2, 1, 0, 3)
    assert sampler.num_samples == len(sampler)
    assert sampler.batch_size == BATCH
    assert (sampler.shuffle, sampler.drop_last) == (True, False)


def test_rank_0_logs_the_distribution_before_and_after(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    batches(num_replicas=2, rank=1)
    assert not caplog.records
    batches(num_replicas=2, rank=0, batch_size=3)
    assert "balancing with class_balanced; seed 3" in caplog.text
    assert "before: HGG: 21 samples (72.4%), LGG: 8 samples (27.6%)" in caplog.text
    assert "after: HGG: 15 draws (50.0%), LGG: 15 draws (50.0%)" in caplog.text


def test_a_file_whose_loss_weights_correct_twice_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run.yaml"
    both = "{weighted_sampler: {enabled: true}, class_weights: {enabled: true}}"
    file.write_text(f"data: {{balancing: {both}}}")
    batches(balance=file)
    assert "basis: sampled" in caplog.text


def test_strata_are_balanced_jointly_with_the_label() -> None:
    site = torch.tensor([0, 1, 2] * 9 + [0, 1])
    sampler = BalancedBatchSampler(
        LABELS,
        batch_size=6,
        balance={"name": "class_balanced", "strata": ["label", "site"], "strata_shares": "uniform"},
        strata={"site": site},
    )
    for batch in sampler:
        assert len({(LABELS[i], int(site[i])) for i in batch}) == 6
    with pytest.raises(ConfigError, match="strata names 'site', but no values are given"):
        batches(balance={"name": "class_balanced", "strata": ["label", "site"]})


@pytest.mark.parametrize(
    "labels",
    [
        [["mass"]] * 20 + [["mass", "hernia"]] * 5 + [[]] * 15,
        np.array([[0, 1]] * 20 + [[1, 1]] * 5 + [[0, 0]] * 15),
        torch.tensor([[0, 1]] * 20 + [[1, 1]] * 5 + [[0, 0]] * 15),
    ],
)
def test_samples_may_have_several_labels(labels: Any) -> None:
    sampler = BalancedBatchSampler(
        labels, batch_size=8, balance={"name": "repeat_factor", "threshold": 0.5}
    )
    counts: Counter[int] = Counter()
    for _ in range(20):
        counts.update(itertools.chain(*sampler))
    # r = sqrt(0.5 / f): hernia is in 1 of 8 samples, mass in 5 of 8.
    with_hernia = sum(counts[i] for i in range(20, 25)) / 5
    without = sum(counts[i] for i in range(20)) / 20
    assert with_hernia / without == pytest.approx(2, rel=0.05)


def test_a_sampler_travels_with_its_place() -> None:
    sampler = indices()
    list(itertools.islice(sampler, 2 * BATCH))
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert pieces(list(twin)) == planned(1)[2:]
    assert pieces(list(sampler)) == planned(1)[2:]


def test_nothing_touches_the_global_generators() -> None:
    with global_states_untouched():
        sampler = batches()
        list(sampler)
        sampler.set_epoch(5)
        list(indices(balance={"name": "class_balanced", "draw": "iid"}))
        batches().load_state_dict(sampler.state_dict())
