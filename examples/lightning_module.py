"""Train with Lightning on a packed cohort; its checkpoints go on in the middle of an epoch.

python examples/lightning_module.py cohort --max-steps 100 --checkpoint last.ckpt

Run again with more steps, on any number of devices, it goes on where the checkpoint stands.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import streaming_balance as sb

SCALE = 500.0  # intensities are kept as packed; a network wants numbers around one


class WholePasses:
    """Evaluates the whole split whenever it is asked.

    Lightning looks at two batches before training and leaves the rest; a loader would go on there.
    """

    def __init__(self, build: Callable[[], sb.EvalLoader]) -> None:
        self.build, self.length = build, len(build())

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.build())


class BalancedData(pl.LightningDataModule):
    """Balanced batches to train on, and every validation sample once.

    Args:
        cohort: folder of a packed data set.
        global_batch_size: samples in a batch, over all devices.
        seed: seed of the order.
    """

    def __init__(self, cohort: Path, *, global_batch_size: int = 8, seed: int = 42) -> None:
        super().__init__()
        self.shards = sb.open_shards(cohort)
        self.global_batch_size, self.seed = global_batch_size, seed
        self.train: sb.BalancedLoader | None = None

    def setup(self, stage: str) -> None:
        """Build the loader where the process group is there: rank and number of ranks are found."""
        if stage == "fit" and self.train is None:
            self.train = sb.train_loader(
                self.shards,
                global_batch_size=self.global_batch_size,
                balance="class_balanced",
                seed=self.seed,
            )

    def train_dataloader(self) -> sb.BalancedLoader | None:
        """Give this device's part of every global batch."""
        return self.train

    def val_dataloader(self) -> WholePasses:
        """Give this device's part of the validation split, in packed order."""
        return WholePasses(partial(sb.eval_loader, self.shards, split="val", batch_size=4))

    def state_dict(self) -> dict[str, Any]:
        """Say where training stands: after the last batch that `training_step` received."""
        return {} if self.train is None else self.train.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stands; Lightning asks after `setup`, before the first batch."""
        if self.train is not None:
            self.train.load_state_dict(state_dict)


class Classifier(pl.LightningModule):
    """A small network that tells classes of volumes apart."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv3d(channels, 16, 3, stride=2), nn.ReLU()),
            *(nn.Conv3d(16, 32, 3, stride=2), nn.ReLU()),
            *(nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(32, num_classes)),
        )

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        """Give the loss; devices may differ by a sample, and the scale makes up for it."""
        predicted = self.layers(batch["image"] / SCALE)
        return nn.functional.cross_entropy(predicted, batch["label"]) * batch["loss_scale"]

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        """Count hits; without a collective, since devices may differ by a batch."""
        hits = self.layers(batch["image"] / SCALE).argmax(dim=1) == batch["label"]
        size = len(batch["key"])
        self.log("accuracy", hits.float().mean(), batch_size=size, on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, default=Path("last.ckpt"))
    options = parser.parse_args()
    data = BalancedData(options.cohort)
    channels = data.shards.read("train", 0)["image"].shape[0]
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_steps=options.max_steps,
        use_distributed_sampler=False,  # the loader deals already
        enable_checkpointing=False,
        logger=False,
    )
    going_on = options.checkpoint if options.checkpoint.exists() else None
    model = Classifier(channels, len(data.shards.classes))
    trainer.fit(model, datamodule=data, ckpt_path=going_on)
    trainer.save_checkpoint(options.checkpoint)
    if trainer.is_global_zero:
        place = data.state_dict()["position"]
        print(f"step {trainer.global_step}: epoch {place['epoch']}, step {place['step']}")


if __name__ == "__main__":
    main()
