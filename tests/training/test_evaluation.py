"""Evaluation: every sample exactly once over all ranks, as packed, never balanced."""

from __future__ import annotations

import inspect
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.errors import BalanceError, ConfigError, ResumeError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import EvalLoader, eval_loader
from streaming_balance.training.gathered import Gathered
from streaming_balance.training.iteration import ThreadEngine
from tests.building import Sample, by_key
from tests.training.cohorts import as_float, cohort, packed, take


def tiny(count: int) -> list[Sample]:
    """Make `count` validation patients of one voxel, packed in an order that is not theirs."""
    order = np.random.default_rng(0).permutation(count).tolist()
    return [Sample(key="T", image=np.zeros((1, 1), np.int16))] + [
        Sample(
            key=f"V{n:03d}",
            image=np.full((1, 1), n, np.int16),
            split="val",
            label="LGG" if n % 3 else "HGG",
        )
        for n in order
    ]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """285 validation patients."""
    return packed(tmp_path_factory.mktemp("many") / "cohort", tiny(285), shard_bytes=100_000)


def keys(loader: EvalLoader) -> list[str]:
    """List the keys one pass delivers."""
    return [key for batch in loader for key in batch["key"]]


def evaluator(
    shards: ShardSet, batch_size: int = 3, rank: int = 0, num_ranks: int = 1
) -> EvalLoader:
    """Build an evaluation loader of one rank."""
    return eval_loader(
        shards, split="val", batch_size=batch_size, rank=rank, num_ranks=num_ranks, num_threads=1
    )


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 8), (2, 7), (8, 4), (8, 36), (16, 5)])
def test_285_samples_come_exactly_once_over_all_ranks(
    many: ShardSet, ranks: int, batch_size: int
) -> None:
    order = [sample.key for sample in tiny(285)[1:]]
    for rank in range(ranks):
        with evaluator(many, batch_size, rank, ranks) as loader:
            found = keys(loader)
        # Rank r takes every R-th sample of the packed order from r: together all, none twice.
        assert found == order[rank::ranks]


def test_batches_are_full_but_the_last_and_nothing_is_padded(many: ShardSet) -> None:
    with evaluator(many, 8, 3, 8) as loader:
        sizes = [len(batch["image"]) for batch in loader]
        assert len(loader) == 5
    assert sizes == [8, 8, 8, 8, 4]


@pytest.mark.parametrize("ranks", [4, 7, 8, 20])
def test_ranks_without_a_sample_evaluate_nothing(small: ShardSet, ranks: int) -> None:
    found = []
    for rank in range(ranks):
        with evaluator(small, 2, rank, ranks) as loader:
            found += keys(loader)
            assert len(loader) == (rank < 7)
            again = evaluator(small, 2, rank, ranks)
            again.load_state_dict(loader.state_dict())
            assert len(keys(again)) == len(range(rank, 7, ranks))
            again.close()
    assert sorted(found) == [f"V{n:02d}" for n in range(7)]


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_slots_and_loss_scales_are_those_of_the_global_batch(many: ShardSet, ranks: int) -> None:
    loaders = [evaluator(many, 4, rank, ranks) for rank in range(ranks)]
    mean = 0.0
    for parts in itertools.zip_longest(*loaders):
        present = [part for part in parts if part is not None]
        slots = sorted(slot for part in present for slot in part["slot"].tolist())
        assert slots == list(range(len(slots)))
        scales = sum(part["loss_scale"] for part in present)
        assert scales == pytest.approx(ranks)
        scaled = sum(part["loss_scale"] * part["image"].mean().item() for part in present) / ranks
        mean += scaled * len(slots) / 285
    assert mean == pytest.approx(142.0)
    for loader in loaders:
        loader.close()


def test_voxels_and_names_are_those_packed(small: ShardSet) -> None:
    images = by_key(cohort())
    with evaluator(small) as loader:
        for batch in loader:
            wanted = as_float([images[key].image for key in batch["key"]])
            assert torch.equal(batch["image"], wanted)
            assert small.keys("val")[batch["sample"].numpy()].tolist() == batch["key"]


def test_every_pass_is_the_same(small: ShardSet) -> None:
    with evaluator(small) as loader:
        passes = [[entry[1:] for entry in take(loader, 3)] for _ in range(3)]
        assert passes[0] == passes[1] == passes[2]
        assert loader.epoch == 3


def test_there_is_no_way_to_balance_evaluation(small: ShardSet) -> None:
    settings = inspect.signature(eval_loader).parameters
    assert "balance" not in settings
    assert not any(p.kind is p.VAR_KEYWORD for p in settings.values())
    with pytest.raises(TypeError, match="balance"):
        eval_loader(small, split="val", batch_size=2, balance="class_balanced")  # type: ignore[call-arg]


def test_after_break_the_rest_of_the_pass_comes_and_a_log_says_so(
    small: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    with evaluator(small) as loader:
        for _ in loader:
            break
        with caplog.at_level(logging.WARNING):
            assert keys(loader) == [f"V{n:02d}" for n in range(3, 7)]
        assert "continues at step 1 of 3" in caplog.text
        assert "set_epoch(1)" in caplog.text
        for _ in loader:
            break
        loader.set_epoch(loader.epoch + 1)
        assert keys(loader) == [f"V{n:02d}" for n in range(7)]


def test_a_second_live_iterator_is_refused(small: ShardSet) -> None:
    with evaluator(small) as loader:
        iterator = iter(loader)
        next(iterator)
        with pytest.raises(BalanceError, match="iterator in use"):
            iter(loader)
        with pytest.raises(BalanceError, match="cannot change under it"):
            loader.set_epoch(4)


def test_a_resumed_pass_equals_the_uninterrupted_one(small: ShardSet) -> None:
    with evaluator(small, 2) as straight:
        expected = take(straight, 4)
    for stop in range(5):
        with evaluator(small, 2) as first, evaluator(small, 2) as second:
            if stop:
                take(first, stop)
            second.load_state_dict(first.state_dict())
            if stop < 4:
                assert take(second, 4 - stop) == expected[stop:]
            else:
                assert second.epoch == 1


@pytest.mark.parametrize("live", [True, False])
def test_a_state_is_not_loaded_once_a_pass_has_begun(small: ShardSet, live: bool) -> None:
    with evaluator(small) as loader, evaluator(small) as other:
        state = loader.state_dict()
        iterator = iter(loader)
        if not live:
            assert len(list(iterator)) == 3
        with pytest.raises(ResumeError, match=r"has begun.*Build a new loader"):
            loader.load_state_dict(state)
        assert loader.epoch == (not live)
        other.load_state_dict(state)
        assert keys(other) == [f"V{n:02d}" for n in range(7)]


@pytest.mark.parametrize(
    ("batch_size", "rank", "num_ranks", "named"),
    [
        (4, 0, 2, "batch_size: state has 3, loader has 4"),
        (3, 1, 2, "rank: state has 0, loader has 1"),
        (3, 0, 1, "num_ranks: state has 2, loader has 1"),
    ],
)
def test_a_state_of_another_rank_or_batch_size_is_refused_by_field(
    small: ShardSet, batch_size: int, rank: int, num_ranks: int, named: str
) -> None:
    state = evaluator(small, 3, 0, 2).state_dict()
    with pytest.raises(ResumeError, match=named):
        evaluator(small, batch_size, rank, num_ranks).load_state_dict(state)


@pytest.mark.parametrize("step", [3, 4, 10**20])
def test_a_state_past_the_pass_is_refused(small: ShardSet, step: int) -> None:
    loader = evaluator(small)
    state = loader.state_dict()
    state["position"]["step"] = step
    with pytest.raises(ResumeError, match="has 3 steps"):
        loader.load_state_dict(state)
    assert loader.epoch == 0


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_a_wrong_batch_size_is_refused(small: ShardSet, size: object) -> None:
    with pytest.raises(ConfigError, match="batch_size is"):
        eval_loader(small, split="val", batch_size=size)  # type: ignore[arg-type]


def test_an_unknown_split_is_refused_with_the_nearest(small: ShardSet) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'val'"):
        eval_loader(small, split="vall", batch_size=2)


def test_no_rank_reads_ahead_into_the_next_pass(small: ShardSet) -> None:
    with evaluator(small, 7) as loader:
        iterator = iter(loader)
        next(iterator)
        assert isinstance(loader._engine, ThreadEngine)
        assert not loader._engine.ahead._pending


def gathered(shards: ShardSet, ranks: int, batch_size: int = 4) -> list[list[torch.Tensor]]:
    """Give what `all_gather_object` gives after a pass: each rank's list of sample numbers."""
    parts = []
    for rank in range(ranks):
        with evaluator(shards, batch_size, rank, ranks) as loader:
            parts.append([batch["sample"] for batch in loader])
    return parts


FORMS: dict[str, Callable[[list[list[torch.Tensor]]], Gathered]] = {
    "lists of tensors": lambda parts: parts,
    "a tensor": lambda parts: torch.cat([torch.cat(part) for part in parts if part]),
    "an array": lambda parts: np.array([n for part in parts for t in part for n in t.tolist()]),
    "lists of numbers": lambda parts: [[n for t in part for n in t.tolist()] for part in parts],
    "arrays of small numbers": lambda parts: [
        np.concatenate([np.empty(0, np.uint16), *(t.numpy().astype(np.uint16) for t in part)])
        for part in parts
    ],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [1, 3, 8, 300])
def test_what_all_ranks_gathered_is_complete_in_any_form(
    many: ShardSet, ranks: int, form: str
) -> None:
    parts = gathered(many, ranks, batch_size=7)
    assert evaluator(many).check_complete(FORMS[form](parts)) is None  # type: ignore[func-returns-value]
    # Whoever comes last is missed, in whatever form it comes.
    most = max(range(ranks), key=lambda rank: sum(map(len, parts[rank])))
    del parts[most]
    with pytest.raises(BalanceError, match=r"missing: \d+ of 285 samples"):
        evaluator(many).check_complete(FORMS[form](parts) if parts else [])


def test_missing_doubled_and_foreign_numbers_are_counted_and_the_first_are_named(
    many: ShardSet,
) -> None:
    numbers = [n for n in range(285) if n not in (3, 250)] + [17, 17, 40, -1, 285, 285, 2**40]
    with pytest.raises(BalanceError) as caught:
        evaluator(many).check_complete(numbers)
    # The table has HGG first, every third patient: 95 of them, then the others.
    assert str(caught.value) == (
        "split 'val' was not evaluated exactly once. missing: 2 of 285 samples: 3 (V009), 250 "
        "(V233); more than once: 2 samples: 17 (V051) 3 times, 40 (V120) 2 times; numbers of no "
        "sample (there are 0..284): -1, 285, 1099511627776. Gather batch['sample'] of every batch "
        "of every rank, of one whole pass, without padding."
    )
    with pytest.raises(
        BalanceError, match=r"284 of 285 samples: 0 \(V000\), .*, 4 \(V012\), \.\.\.\."
    ):
        evaluator(many).check_complete([284])


@pytest.mark.parametrize(
    "wrong",
    [
        *(torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16), np.array([True]), [2**80]),
        *([0.0, 1.0], [True], ["V001"], [None], 2.5, None),
    ],
)
def test_what_is_no_sample_number_is_refused(small: ShardSet, wrong: Any) -> None:
    with pytest.raises(ConfigError, match="where sample numbers are expected"):
        evaluator(small).check_complete(wrong)


def test_the_rest_of_a_pass_is_not_taken_for_a_whole_one(small: ShardSet) -> None:
    with evaluator(small) as loader:
        for _ in loader:
            break
        rest = [batch["sample"] for batch in loader]
        with pytest.raises(BalanceError, match="missing: 3 of 7 samples"):
            loader.check_complete(rest)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7, 8, 16])
def test_most_steps_is_the_largest_number_of_batches_of_any_rank(
    small: ShardSet, ranks: int
) -> None:
    for batch_size in (1, 2, 3, 8):
        loaders = [evaluator(small, batch_size, rank, ranks) for rank in range(ranks)]
        steps = [sum(1 for _ in loader) for loader in loaders]
        assert {loader.most_steps for loader in loaders} == {max(steps)}
        assert steps == [len(loader) for loader in loaders]
        for loader in loaders:
            loader.close()


def test_metrics_gathered_in_any_order_are_joined_by_the_sample_numbers(many: ShardSet) -> None:
    numbers, scores = [], []
    for rank in reversed(range(8)):
        with evaluator(many, 7, rank, 8) as loader:
            for batch in loader:
                numbers.append(batch["sample"])
                scores.append(batch["image"].mean(dim=(1, 2, 3)))
    joined = torch.cat(scores).numpy()[np.argsort(torch.cat(numbers).numpy())]
    # The voxel of V007 is 7.
    assert [f"V{int(score):03d}" for score in joined] == many.keys("val").tolist()


def test_a_rank_without_samples_stands_where_the_others_stand(small: ShardSet) -> None:
    with evaluator(small, 2, 7, 8) as empty, evaluator(small, 2, 6, 8) as other:
        for epoch in range(3):
            assert (len(empty), empty.epoch) == (0, epoch)
            assert list(empty) == []
            assert len(list(other)) == 1
            assert empty.epoch == other.epoch == epoch + 1
            assert empty.state_dict()["position"] == other.state_dict()["position"]
        empty.set_epoch(9)
        assert empty.epoch == 9
        assert empty.stats()["samples"] == 0
        again = evaluator(small, 2, 7, 8)
        again.load_state_dict(json.loads(json.dumps(empty.state_dict())))
        assert (again.epoch, list(again)) == (9, [])
    with pytest.raises(BalanceError, match="closed"):
        iter(empty)


def test_training_patients_are_never_evaluated(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort())
    with evaluator(shards) as loader:
        assert set(keys(loader)).isdisjoint(shards.keys("train").tolist())
