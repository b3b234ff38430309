"""Train on a packed cohort, on one process or many, and go on where the last run stopped.

torchrun --nproc-per-node 4 examples/train_ddp.py cohort --epochs 10

SIGTERM to any rank, as of a cluster that wants its machine back, lets all ranks save after the same
step. The same command goes on from there, on any number of ranks.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import streaming_balance as sb

SCALE = 500.0  # intensities are kept as packed; a network wants numbers around one


def network(channels: int, num_classes: int) -> nn.Module:
    """Make a small network, the same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv3d(channels, 16, 3, stride=2), nn.ReLU()),
        *(nn.Conv3d(16, 32, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(32, num_classes)),
    )


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any], pieces: int
) -> torch.Tensor:
    """Take one step of the optimizer for one global batch; give this rank's part of the loss."""
    total = torch.zeros(())
    for number, piece in enumerate(sb.micro_batches(batch, pieces), start=1):
        is_alone = not isinstance(model, DistributedDataParallel)
        # Ranks exchange gradients once per global batch, in the last piece's backward.
        with nullcontext() if is_alone or number == pieces else model.no_sync():
            loss = nn.functional.cross_entropy(model(piece["image"] / SCALE), piece["label"])
            # Pieces and ranks may differ by a sample; this makes it the mean over samples.
            scaled = loss * piece["loss_scale"]
            scaled.backward()
        total = total + scaled.detach().cpu()
    optimizer.step()
    optimizer.zero_grad()
    return total


def accuracy(model: nn.Module, val: sb.EvalLoader) -> float:
    """Evaluate every sample once; the plain model, since ranks may differ by a batch."""
    numbers: list[int] = []
    hits: list[bool] = []
    model.eval()
    with torch.inference_mode():
        for batch in val:
            numbers += batch["sample"].tolist()
            hits += (model(batch["image"] / SCALE).argmax(dim=1) == batch["label"]).tolist()
    model.train()
    everyone = [(numbers, hits)] * val.num_ranks
    if dist.is_initialized():
        dist.all_gather_object(everyone, (numbers, hits))
    val.check_complete([numbers for numbers, _ in everyone])
    return sum(sum(hits) for _, hits in everyone) / sum(len(hits) for _, hits in everyone)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that its name holds the old one or the new one, never half of one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--micro-batches", type=int, default=1, help="pieces of a rank's part")
    options = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    shards = sb.open_shards(options.cohort)
    # Rank and number of ranks are found; the same lines serve any number of processes.
    train = sb.train_loader(
        shards, global_batch_size=8, balance="class_balanced", seed=42, device=device
    )
    val = sb.eval_loader(shards, split="val", batch_size=4, device=device)
    channels = shards.read("train", 0)["image"].shape[0]
    plain = network(channels, len(shards.classes)).to(device)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, map_location=device, weights_only=True)
        plain.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train.load_state_dict(saved["data"])
    model = DistributedDataParallel(plain) if dist.is_initialized() else plain

    with sb.StopTogether() as stop:
        while train.epoch < options.epochs and stop.asked_by is None:
            for batch in train:
                loss = train_step(model, optimizer, batch, options.micro_batches)
                if stop.requested():
                    break
            if train.rank == 0:
                state = {
                    "model": plain.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "data": train.state_dict(),
                }
                save(options.checkpoint, state)
            if stop.asked_by is None:
                score = accuracy(plain, val)
                said = f"epoch {train.epoch} of {options.epochs}: "
                said += f"loss {loss.item():.3f}, accuracy {score:.3f}"
            else:
                said = f"rank {stop.asked_by} was told to stop: saved in epoch {train.epoch}"
            if train.rank == 0:
                print(said, flush=True)
    train.close()
    val.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
