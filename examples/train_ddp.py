"""Train on a packed cohort, on one process or many, and go on where the last run stopped.

torchrun --nproc-per-node 4 examples/train_ddp.py cohort --epochs 10
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import streaming_balance as sb

SCALE = 500.0  # intensities are kept as packed; a network wants numbers around one


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    options = parser.parse_args()

    is_distributed = "RANK" in os.environ
    if is_distributed:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    shards = sb.open_shards(options.cohort)
    # Rank and number of ranks are found; the same lines serve any number of processes.
    train = sb.train_loader(shards, global_batch_size=8, balance="class_balanced", seed=42)
    model: nn.Module = nn.Sequential(
        nn.LazyConv3d(16, 3, stride=2),
        nn.ReLU(),
        nn.LazyConv3d(32, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(32, len(shards.classes)),
    )
    model(next(iter(sb.eval_loader(shards, split="val", batch_size=1)))["image"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train.load_state_dict(saved["data"])
    plain = model
    if is_distributed:
        model = DistributedDataParallel(model)

    while train.epoch < options.epochs:
        for batch in train:
            loss = nn.functional.cross_entropy(model(batch["image"] / SCALE), batch["label"])
            # Ranks may differ by a sample; this makes the mean over ranks the mean over samples.
            (loss * batch["loss_scale"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        if train.rank == 0:
            saved = {
                "model": plain.state_dict(),
                "optimizer": optimizer.state_dict(),
                "data": train.state_dict(),
            }
            torch.save(saved, options.checkpoint)
            print(f"epoch {train.epoch} of {options.epochs}: loss {loss.detach().item():.3f}")
    if is_distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
