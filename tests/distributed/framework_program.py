"""What each of two processes runs inside Lightning and Accelerate: right set-ups and wrong ones."""

from __future__ import annotations

import argparse
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from accelerate import Accelerator
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.samplers import BalancedBatchSampler, BalancedSampler
from tests.distributed.launching import Listener, begin, write_down
from tests.training.sampler_cases import LABELS, Numbers

GLOBAL_BATCH = 6
Batches = list[list[int]]


class Module(pl.LightningModule):  # type: ignore[misc]
    """Writes down what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.received: Batches = []

    def training_step(self, batch: Any, _: int) -> Any:
        numbers = batch["sample"] if isinstance(batch, dict) else torch.as_tensor(batch)
        self.received.append(numbers.tolist())
        return self.layer(numbers[:, None].float()).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Iterated(IterableDataset[Any]):
    """Puts a loader where Accelerate wants a dataset."""

    def __init__(self, loader: BalancedLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch["sample"]


def samples(ranks: dict[str, Any], size: int) -> BalancedBatchSampler:
    """Make a sampler of batches."""
    return BalancedBatchSampler(LABELS, batch_size=size, seed=3, **ranks)


def indices(ranks: dict[str, Any], size: int) -> BalancedSampler:
    """Make a sampler of indices."""
    return BalancedSampler(LABELS, batch_size=size, seed=3, **ranks)


def loader_of(shards: ShardSet, **ranks: int) -> BalancedLoader:
    """Make a loader of half a global batch, or of a whole one."""
    rank, num_ranks = ranks.get("rank"), ranks.get("num_ranks")
    return train_loader(
        shards, global_batch_size=GLOBAL_BATCH, seed=3, rank=rank, num_ranks=num_ranks
    )


def fitted(loader: Any, **options: Any) -> Batches:
    """Train an epoch with Lightning on two processes."""
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = Module()
    trainer.fit(module, loader)
    return module.received


def in_lightning(shards: ShardSet) -> dict[str, Callable[[], Batches]]:
    """Give what is tried with Lightning, by name."""
    half = GLOBAL_BATCH // 2
    one: dict[str, Any] = {"num_replicas": 1, "rank": 0}

    def with_batches(**options: Any) -> Batches:
        return fitted(DataLoader(Numbers(), batch_sampler=samples({}, half)), **options)

    return {
        "sampler": lambda: fitted(
            DataLoader(Numbers(), sampler=indices({}, half), batch_size=half)
        ),
        "sampler of one replica": lambda: fitted(
            DataLoader(Numbers(), sampler=indices(one, half), batch_size=half)
        ),
        "batch sampler": lambda: with_batches(use_distributed_sampler=False),
        "batch sampler, dealt again": lambda: with_batches(),
        "batch sampler as sampler, dealt again": lambda: fitted(
            DataLoader(Numbers(), sampler=samples({}, half), batch_size=None)
        ),
        "loader": lambda: fitted(loader_of(shards), use_distributed_sampler=False),
    }


def in_accelerate(shards: ShardSet) -> dict[str, Callable[[], Batches]]:
    """Give what is tried with Accelerate, by name."""
    accelerator = Accelerator(cpu=True)
    half = GLOBAL_BATCH // 2
    one: dict[str, Any] = {"num_replicas": 1, "rank": 0}

    def sampled(ranks: dict[str, Any], *, prepared: bool) -> Batches:
        loader = DataLoader(Numbers(), batch_sampler=samples(ranks, half))
        return listed(accelerator.prepare(loader) if prepared else loader)

    def iterated(**ranks: int) -> Batches:
        with loader_of(shards, **ranks) as loader:
            return listed(accelerator.prepare(DataLoader(Iterated(loader), batch_size=None)))

    def left_alone() -> Batches:
        with loader_of(shards) as loader:
            assert accelerator.prepare(loader) is loader
            return [batch["sample"].tolist() for batch in loader]

    return {
        "batch sampler, left out": lambda: sampled({}, prepared=False),
        "batch sampler, prepared": lambda: sampled({}, prepared=True),
        "batch sampler of one replica, left out": lambda: sampled(one, prepared=False),
        "batch sampler of one replica, prepared": lambda: sampled(one, prepared=True),
        "loader, prepared": left_alone,
        "loader in a dataset, dispatched": lambda: iterated(),
        "loader of one rank in a dataset, dispatched": lambda: iterated(rank=0, num_ranks=1),
    }


def listed(loader: Any) -> Batches:
    """Iterate an epoch."""
    return [batch.tolist() for batch in loader]


def built_early(shards: ShardSet) -> dict[str, Callable[[], Batches]]:
    """Build a loader and a sampler as if nothing told of ranks yet; iterate them later."""
    names = ("RANK", "WORLD_SIZE")
    before = {name: os.environ.pop(name) for name in names}
    loader, sampler = loader_of(shards), samples({}, GLOBAL_BATCH)
    os.environ.update(before)
    return {
        "loader built early": lambda: [batch["sample"].tolist() for batch in loader],
        "batch sampler built early": lambda: list(itertools.islice(sampler, 3)),
    }


def main() -> None:
    """Run one process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    shards = open_shards(options.folder)
    tried = {f"early: {name}": act for name, act in built_early(shards).items()}
    begin()
    heard = Listener()
    tried |= {f"Accelerate: {name}": act for name, act in in_accelerate(shards).items()}
    tried |= {f"Lightning: {name}": act for name, act in in_lightning(shards).items()}
    document: dict[str, Any] = {}
    for name, act in tried.items():
        got: Batches | str
        try:
            got = act()
        except (MisconfigurationException, TypeError) as error:
            got = str(error)
        document[name] = {"got": got, "said": heard.take()}
    write_down(options.out, document)


if __name__ == "__main__":
    main()
