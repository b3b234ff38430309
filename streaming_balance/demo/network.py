"""A small 3-D network, and how well it knows each class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streaming_balance.plan.keys import stream_key

CHANNELS = (12, 24)
# Tumours differ from their brain by tenths of its mean; the network wants numbers around one.
DEVIATION_SCALE = 3.0


class SmallNetwork(nn.Module):
    """Two strided convolutions, then the maximum of every channel.

    Args:
        modalities: channels of a volume.
        num_classes: classes to tell apart.
        seed: names the random stream of the initial weights; the global generator is not touched.
    """

    def __init__(self, modalities: int, num_classes: int, *, seed: int) -> None:
        super().__init__()
        first, second = CHANNELS
        # Layers draw weights of their own as they are made, from the global generator.
        with torch.random.fork_rng(devices=[]):
            self.features = nn.Sequential(
                nn.Conv3d(modalities, first, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv3d(first, second, 3, stride=2, padding=1),
                nn.ReLU(),
            )
            self.head = nn.Linear(second, num_classes)
        generator = torch.Generator().manual_seed(stream_key(seed, "demo-weights") % 2**63)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.kaiming_normal_(parameter, generator=generator)
                else:
                    parameter.zero_()

    def forward(self, image: Tensor) -> Tensor:
        """Give class scores.

        Args:
            image: `(B, C, D, H, W)` stored intensities as float32.

        Returns:
            `(B, num_classes)` scores before softmax.
        """
        features = self.features(relative_intensity(image))
        scores: Tensor = self.head(features.amax((2, 3, 4)))
        return scores


def relative_intensity(image: Tensor) -> Tensor:
    """Give every voxel relative to the mean of its brain: scanners differ in gain.

    Args:
        image: `(B, C, D, H, W)` stored intensities, 0 outside the brain.

    Returns:
        `(B, C, D, H, W)` three times the relative deviation from the mean, 0 outside the brain.

    Examples:
        >>> relative_intensity(torch.tensor([0.0, 90.0, 110.0]).reshape(1, 1, 3, 1, 1)).flatten()
        tensor([ 0.0000, -0.3000,  0.3000])
    """
    is_brain = image > 0
    mean = image.sum((2, 3, 4), keepdim=True) / is_brain.sum((2, 3, 4), keepdim=True)
    return torch.where(is_brain, DEVIATION_SCALE * (image / mean - 1.0), 0.0)


@torch.no_grad()
def recall_by_class(
    network: SmallNetwork, batches: Iterable[Mapping[str, Any]], classes: Sequence[str]
) -> dict[str, float]:
    """Give, for every class, the part of its samples the network names right.

    Args:
        network: the network to judge.
        batches: each sample once, as `eval_loader` gives them.
        classes: labels in class order.

    Returns:
        label -> recall in [0, 1], in class order; NaN for a class without samples.
    """
    right = np.zeros(len(classes), dtype=np.int64)
    there = np.zeros(len(classes), dtype=np.int64)
    for batch in batches:
        labels = batch["label"]
        hits = labels[network(batch["image"]).argmax(dim=1) == labels]
        there += torch.bincount(labels, minlength=len(classes)).numpy()
        right += torch.bincount(hits, minlength=len(classes)).numpy()
    return {
        label: float(right[number] / there[number]) if there[number] else float("nan")
        for number, label in enumerate(classes)
    }
