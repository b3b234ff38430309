"""Training by global batches gives the same network on any number of ranks, and after a pause."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from streaming_balance.demo.trainer import DeliveredSample, GlobalBatch, Trainer, global_batch
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader

STEPS = 7


def new_trainer() -> Trainer:
    return Trainer(4, 2, total_steps=STEPS, seed=1)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.network.parameters()])


def loaders(stack: ExitStack, shards: ShardSet, num_ranks: int) -> list[BalancedLoader]:
    return [
        stack.enter_context(
            train_loader(
                shards,
                global_batch_size=6,
                balance="class_balanced",
                rank=rank,
                num_ranks=num_ranks,
            )
        )
        for rank in range(num_ranks)
    ]


def trained(shards: ShardSet, num_ranks: int) -> tuple[Trainer, list[GlobalBatch]]:
    trainer = new_trainer()
    with ExitStack() as stack:
        return trainer, trainer.train(loaders(stack, shards, num_ranks), steps=STEPS)


def test_four_ranks_that_do_not_divide_the_batch_train_the_network_that_one_rank_trains(
    shards: ShardSet,
) -> None:
    alone, batches_alone = trained(shards, 1)
    shared, batches_shared = trained(shards, 4)
    assert batches_alone == batches_shared
    assert not torch.allclose(weights(alone), weights(new_trainer()), atol=1e-3)
    torch.testing.assert_close(weights(shared), weights(alone), atol=1e-4, rtol=0)


def test_gradients_of_ranks_add_up_to_the_mean_over_the_global_batch(shards: ShardSet) -> None:
    gradients = []
    for num_ranks in (1, 4):
        trainer = new_trainer()
        with ExitStack() as stack:
            trainer.train(loaders(stack, shards, num_ranks), steps=1)
        gradient = trainer.network.head.weight.grad
        assert gradient is not None
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_a_network_saved_and_read_back_goes_on_as_if_nothing_had_happened(
    shards: ShardSet, tmp_path: Path
) -> None:
    whole, _ = trained(shards, 1)
    first, second = new_trainer(), new_trainer()
    with ExitStack() as stack:
        ranks = loaders(stack, shards, 1)
        first.train(ranks, steps=3)
        first.save(tmp_path / "network.npz")
        second.load(tmp_path / "network.npz")
        second.train(ranks, steps=STEPS - 3)
    assert torch.equal(weights(second), weights(whole))


def test_a_checkpoint_is_arrays_of_numbers_and_nothing_that_could_run(
    shards: ShardSet, tmp_path: Path
) -> None:
    trainer, _ = trained(shards, 1)
    trainer.save(tmp_path / "network.npz")
    with np.load(tmp_path / "network.npz", allow_pickle=False) as stored:
        kinds = {stored[name].dtype.kind for name in stored.files}
        assert int(stored["steps_taken"]) == STEPS
        # Six tensors, and of each two moments and a step counter.
        assert len(stored.files) == 1 + 6 + 6 * 3
    assert kinds <= {"f", "i"}


def test_the_learning_rate_falls_to_nothing(shards: ShardSet) -> None:
    trainer = new_trainer()
    moved = []
    with ExitStack() as stack:
        ranks = loaders(stack, shards, 1)
        for _ in range(STEPS):
            before = weights(trainer)
            trainer.train(ranks, steps=1)
            moved.append(float((weights(trainer) - before).abs().max()))
    # Adam moves a weight by at most about its learning rate.
    assert moved[-1] < moved[0] / 4


def test_a_global_batch_is_put_together_by_slot_and_knows_its_voxels() -> None:
    image = torch.arange(24, dtype=torch.float32).reshape(3, 1, 2, 2, 2)
    left = {"slot": torch.tensor([2, 0]), "sample": torch.tensor([7, 5]), "image": image[:2]}
    right = {"slot": torch.tensor([1]), "sample": torch.tensor([9]), "image": image[2:]}
    found = global_batch([left, right])
    assert [(entry.slot, entry.sample) for entry in found] == [(0, 5), (1, 9), (2, 7)]
    assert len({entry.voxels for entry in found}) == 3
    assert all(isinstance(entry, DeliveredSample) for entry in found)
    changed = {**right, "image": image[2:] + 1e-5}
    assert global_batch([left, changed]) != found
    assert global_batch([right, left]) == found
