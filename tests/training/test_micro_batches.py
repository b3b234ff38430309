"""Micro-batches: pieces of one global batch whose gradients add up to its own."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import train_loader
from streaming_balance.training.micro_batches import micro_batches
from tests.distributed.accumulation_program import loss_of, network
from tests.training.cohorts import cohort, packed


def first_batch(shards: ShardSet, **options: Any) -> dict[str, Any]:
    """Give the first batch of a balanced run."""
    settings = {"global_batch_size": 7, "balance": "class_balanced", "seed": 5, **options}
    with train_loader(shards, **settings) as loader:
        return next(iter(loader))


def hand_made(size: int, **entries: Any) -> dict[str, Any]:
    """Make a batch of one rank without a loader."""
    return {"sample": torch.arange(size), "loss_scale": 1.0, **entries}


@pytest.mark.parametrize("count", range(1, 8))
def test_pieces_are_views_that_together_are_the_batch(small: ShardSet, count: int) -> None:
    batch = first_batch(small)
    pieces = list(micro_batches(batch, count))
    memory = batch["image"].untyped_storage().data_ptr()
    assert {piece["image"].untyped_storage().data_ptr() for piece in pieces} == {memory}
    for name in ("image", "label", "sample", "slot"):
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), batch[name])
    for name in ("key", "patient"):
        assert [value for piece in pieces for value in piece[name]] == batch[name]
    assert {(piece["epoch"], piece["step"]) for piece in pieces} == {(0, 0)}
    assert all(piece.keys() == batch.keys() for piece in pieces)
    # numpy's own way to cut an array into nearly equal parts.
    expected = [len(part) for part in np.array_split(np.arange(7), count)]
    assert [len(piece["image"]) for piece in pieces] == expected


def test_volumes_of_unequal_shape_and_masks_and_inner_dicts_are_cut_alike(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    samples = [*cohort(hgg=2, lgg=1), *cohort(hgg=2, lgg=1, shape=(2, 6, 5, 4))]
    named = [replace(sample, key=f"{number}{sample.key}") for number, sample in enumerate(samples)]
    folder = tmp_path_factory.mktemp("unequal") / "cohort"
    batch = first_batch(packed(folder, named), global_batch_size=5)
    assert isinstance(batch["image"], list)
    batch["extra"] = {"age": np.arange(5.0), "site": "A", "spacing": torch.tensor(1.0)}
    first, second = micro_batches(batch, 2)
    assert [*first["image"], *second["image"]] == batch["image"]
    assert len(first["image"]) == 3
    assert first["extra"]["age"].tolist() == [0.0, 1.0, 2.0]
    assert np.shares_memory(second["extra"]["age"], batch["extra"]["age"])
    assert {piece["extra"]["site"] for piece in (first, second)} == {"A"}
    assert second["extra"]["spacing"] is batch["extra"]["spacing"]


def test_a_mixed_batch_is_cut_too(small: ShardSet) -> None:
    batch = first_batch(small, mixing={"name": "mixup"})
    pieces = list(micro_batches(batch, 3))
    for name in ("label", "label_a", "label_b", "lam", "partner"):
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), batch[name])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_gradients_add_up_to_those_of_the_whole_batch(small: ShardSet, count: int) -> None:
    batch = first_batch(small, dtype=torch.float64)
    whole, accumulated = network(), network()
    loss_of(whole, batch).backward()  # type: ignore[no-untyped-call]
    for piece in micro_batches(batch, count):
        (loss_of(accumulated, piece) * piece["loss_scale"]).backward()
    for mine, theirs in zip(accumulated.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("global_size", [4, 7, 10])
def test_scaled_means_averaged_over_ranks_are_the_mean_of_the_global_batch(
    small: ShardSet, num_ranks: int, global_size: int
) -> None:
    parts = [
        first_batch(small, global_batch_size=global_size, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    # A loss per sample that is a whole number, so that sums can be told exactly.
    losses = [[1 + 10 ** int(slot % 5) for slot in part["slot"]] for part in parts]
    expected = Fraction(sum(map(sum, losses)), global_size)
    for count in range(1, global_size // num_ranks + 1):
        total = 0.0
        for part, own in zip(parts, losses, strict=True):
            batch = part | {"loss": torch.tensor(own, dtype=torch.float64)}
            scaled = [
                piece["loss"].mean().item() * piece["loss_scale"]
                for piece in micro_batches(batch, count)
            ]
            total += sum(scaled)
        assert total / num_ranks == pytest.approx(float(expected), rel=1e-12)


def test_all_ranks_refuse_more_pieces_than_the_smallest_of_them_has_samples(
    small: ShardSet,
) -> None:
    parts = [first_batch(small, rank=rank, num_ranks=3) for rank in range(3)]
    assert sorted(len(part["image"]) for part in parts) == [2, 2, 3]
    for part in parts:
        assert len(list(micro_batches(part, 2))) == 2
        with pytest.raises(ConfigError, match=r"count is 3, but .* has 2 samples.* 1\.\.2"):
            micro_batches(part, 3)


@pytest.mark.parametrize("count", [0, -1, 6, 2.5, True, "2", None])
def test_a_count_that_is_no_number_of_pieces_is_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match=r"integer in 1\.\.5"):
        micro_batches(hand_made(5), count)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"weights": torch.ones(2)}, r"weights of the batch is a Tensor of shape \(2,\)"),
        ({"names": ["a", "b"]}, r"names of the batch is a list of shape \(2,\)"),
        ({"inner": {"odd": np.ones((6, 2))}}, r"inner\.odd of the batch is a ndarray"),
        ({"pair": (1, 2)}, "pair of the batch is a tuple"),
    ],
)
def test_an_entry_that_cannot_be_cut_is_named(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        micro_batches(hand_made(5, **entry), 2)


@pytest.mark.parametrize(
    "batch",
    [
        {"sample": torch.arange(3)},
        {"loss_scale": 1.0},
        hand_made(3, loss_scale=None),
        hand_made(3, loss_scale=0.0),
        hand_made(0),
    ],
)
def test_what_is_no_batch_of_a_loader_is_refused(batch: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be what a loader gives"):
        micro_batches(batch, 1)
