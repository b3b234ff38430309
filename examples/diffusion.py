"""Train a small diffusion model to predict noise in volumes, each class weighted in the loss.

python examples/diffusion.py cohort --steps 200

The cohort is packed (`streaming-balance pack`); diffusion.yaml beside this file switches the class
weights on. Leave `enabled: false` there and the same lines train with `nn.MSELoss`.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import streaming_balance as sb

NOISE_LEVELS = 100
SCALE = 500.0  # intensities are kept as packed; a network wants numbers around one


class NoisePredictor(nn.Module):
    """Predict the noise in a volume from the volume, the noise level and the class."""

    def __init__(self, channels: int, num_classes: int, width: int = 12) -> None:
        super().__init__()
        self.condition = nn.Linear(2 + num_classes, width)
        self.enter = nn.Conv3d(channels, width, 3, padding=1)
        self.middle = nn.Conv3d(width, width, 3, padding=1)
        self.leave = nn.Conv3d(width, channels, 3, padding=1)
        self.num_classes = num_classes

    def forward(self, noisy: Tensor, level: Tensor, label: Tensor) -> Tensor:
        """Give the noise, `(B, C, D, H, W)` as the volumes."""
        angle = level / NOISE_LEVELS * math.pi / 2
        classes = nn.functional.one_hot(label, self.num_classes)
        told = self.condition(torch.cat([angle.sin()[:, None], angle.cos()[:, None], classes], 1))
        hidden = nn.functional.silu(self.enter(noisy) + told[:, :, None, None, None])
        return self.leave(nn.functional.silu(self.middle(hidden)))


def add_noise(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Mix every volume with noise at a level of its own; give mixture, noise and levels."""
    level = torch.randint(NOISE_LEVELS, (len(image),), generator=generator)
    angle = ((level + 0.5) / NOISE_LEVELS * math.pi / 2).reshape(-1, 1, 1, 1, 1)
    noise = torch.randn(image.shape, generator=generator)
    return angle.cos() * image + angle.sin() * noise, noise, level


def endless(loader: sb.BalancedLoader) -> Iterator[dict[str, Tensor]]:
    """Go on from epoch to epoch."""
    while True:
        yield from loader


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    shards = sb.open_shards(options.cohort)
    # One file drives the loader and the loss.
    train = sb.train_loader(shards, global_batch_size=4, balance=options.config)
    loss_of = sb.ClassWeightedMSELoss.from_config(
        options.config, train.plan, classes=shards.classes
    )
    generator = torch.Generator().manual_seed(train.plan.seed)
    torch.manual_seed(train.plan.seed)
    channels = shards.read("train", 0)["image"].shape[0]
    model = NoisePredictor(channels, len(shards.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    losses = []
    for batch in islice(endless(train), options.steps):
        noisy, noise, level = add_noise(batch["image"] / SCALE, generator)
        loss = loss_of(model(noisy, level, batch["label"]), noise, batch["label"])
        # With several ranks that get unequal parts, this makes their mean that of the batch.
        (loss * batch["loss_scale"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    train.close()
    part = max(1, len(losses) // 5)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    weights = dict(zip(shards.classes, loss_of.class_weights.tolist(), strict=True))
    print("weights:", ", ".join(f"{label} {weight:.4f}" for label, weight in weights.items()))
    print(f"loss: {first:.3f} at first, {last:.3f} after {len(losses)} steps")


if __name__ == "__main__":
    main()
