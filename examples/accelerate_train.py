"""Train with Accelerate on a packed cohort, and go on where the last run stopped.

accelerate launch --num_processes 4 examples/accelerate_train.py cohort --epochs 10

The loaders stay out of `accelerator.prepare`: they deal batches to processes already.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

import streaming_balance as sb

SCALE = 500.0  # intensities are kept as packed; a network wants numbers around one


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint"))
    options = parser.parse_args()

    accelerator = Accelerator()  # first: the loaders ask its process group for their rank
    shards = sb.open_shards(options.cohort)
    device = accelerator.device
    train = sb.train_loader(
        shards, global_batch_size=8, balance="class_balanced", seed=42, device=device
    )
    val = sb.eval_loader(shards, split="val", batch_size=4, device=device)
    model: nn.Module = nn.Sequential(
        *(nn.Conv3d(shards.read("train", 0)["image"].shape[0], 16, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(16, len(shards.classes))),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(train)  # its state is saved and loaded with the rest
    if options.checkpoint.exists():
        accelerator.load_state(str(options.checkpoint))

    while train.epoch < options.epochs:
        for batch in train:
            loss = nn.functional.cross_entropy(model(batch["image"] / SCALE), batch["label"])
            # Processes may differ by a sample; this makes it the mean over samples.
            accelerator.backward(loss * batch["loss_scale"])
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state(str(options.checkpoint))
        plain = accelerator.unwrap_model(model)  # processes may differ by a batch, too
        hits = []
        with torch.inference_mode():
            for batch in val:
                is_hit = plain(batch["image"] / SCALE).argmax(dim=1) == batch["label"]
                hits += zip(batch["sample"].tolist(), is_hit.tolist(), strict=True)
        hits = gather_object(hits)
        val.check_complete([number for number, _ in hits])
        accuracy = sum(is_hit for _, is_hit in hits) / len(hits)
        accelerator.print(f"epoch {train.epoch} of {options.epochs}: accuracy {accuracy:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
