"""What each process of the accumulation test runs: DDP over micro-batches of one global batch."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import train_loader
from streaming_balance.training.micro_batches import micro_batches
from tests.distributed.launching import begin, write_down

GLOBAL_BATCH = 7
COUNTS = (1, 2, 3)


def network() -> torch.nn.Module:
    """Make a small network, always the same."""
    torch.manual_seed(1)
    layers = [torch.nn.Conv3d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(18, 2)]
    return torch.nn.Sequential(*layers).double()


def loss_of(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Give the mean loss over the samples of a batch."""
    predicted = model(batch["image"].double() / 1000)
    return torch.nn.functional.cross_entropy(predicted, batch["label"])


def gradients(model: torch.nn.Module) -> list[float]:
    """List all gradients, one number after the other."""
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return torch.cat([gradient.reshape(-1) for gradient in found]).tolist()


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    begin()
    with train_loader(
        open_shards(options.folder), global_batch_size=GLOBAL_BATCH, balance="class_balanced"
    ) as loader:
        batch = next(iter(loader))
    document: dict[str, Any] = {"samples": len(batch["sample"])}
    for count in COUNTS:
        model = DistributedDataParallel(network())
        for number, piece in enumerate(micro_batches(batch, count), start=1):
            # Only the last piece's backward exchanges what all of them added up.
            with nullcontext() if number == count else model.no_sync():
                scaled = loss_of(model, piece) * piece["loss_scale"]
                scaled.backward()
            if number == 1:
                document[f"first of {count}"] = gradients(model)
        document[str(count)] = gradients(model)
    write_down(options.out, document)


if __name__ == "__main__":
    main()
