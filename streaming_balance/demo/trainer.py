"""Training by global batches, on however many ranks, and a checkpoint of it that holds no code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streaming_balance.demo.network import SmallNetwork
from streaming_balance.training.loader import BalancedLoader

LEARNING_RATE = 2e-3

Parts = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, order=True)
class DeliveredSample:
    """One place of a global batch, and what was delivered there."""

    slot: int
    """Position in the global batch."""
    sample: int
    """Sample number."""
    voxels: str
    """Checksum of the delivered voxels."""


GlobalBatch = tuple[DeliveredSample, ...]


class Trainer:
    """A network and its optimizer, on all ranks of a run at once.

    Args:
        modalities: channels of a volume.
        num_classes: classes to tell apart.
        total_steps: steps of the whole run; the learning rate falls to 0 over them, so that the
            last few batches do not decide the result.
        seed: names the random stream of the initial weights.
    """

    def __init__(self, modalities: int, num_classes: int, *, total_steps: int, seed: int) -> None:
        self.steps_taken, self._total_steps = 0, total_steps
        self.network = SmallNetwork(modalities, num_classes, seed=seed)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)

    def train(self, ranks: Sequence[BalancedLoader], *, steps: int) -> list[GlobalBatch]:
        """Take one step per global batch.

        Args:
            ranks: the loaders of all ranks, standing at the same batch.
            steps: how many global batches; epochs follow one another.

        Returns:
            What each global batch held.
        """
        delivered = []
        streams = [_endless(loader) for loader in ranks]
        for parts in islice(zip(*streams, strict=True), steps):
            self._step(parts)
            delivered.append(global_batch(parts))
        return delivered

    def save(self, path: Path) -> None:
        """Write network and optimizer as plain arrays: reading them back can run no code."""
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **self._arrays())

    def load(self, path: Path) -> None:
        """Read back what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            values = {name: torch.from_numpy(stored[name]) for name in stored.files}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name in values:
            if name.startswith("optimizer/"):
                _, number, moment = name.split("/")
                moments.setdefault(int(number), {})[moment] = values[name]
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.steps_taken = int(values["steps_taken"])
        network = {name: values[f"network/{name}"] for name in self.network.state_dict()}
        self.network.load_state_dict(network)

    def _step(self, parts: Parts) -> None:
        """Take one step of Adam on a global batch, as data-parallel ranks do."""
        for group in self._optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - self.steps_taken / self._total_steps)
        self._optimizer.zero_grad()
        for part in parts:
            loss = nn.functional.cross_entropy(self.network(part["image"]), part["label"])
            # Gradients are averaged over ranks; loss_scale makes that the mean over the samples,
            # also where one rank has 3 of them and another 2.
            (loss * part["loss_scale"] / len(parts)).backward()
        self._optimizer.step()
        self.steps_taken += 1

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """List every number the training depends on, by name."""
        arrays = {
            f"network/{name}": value.numpy() for name, value in self.network.state_dict().items()
        }
        for number, moments in self._optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                arrays[f"optimizer/{number}/{name}"] = value.numpy()
        return {"steps_taken": np.array(self.steps_taken), **arrays}


def global_batch(parts: Parts) -> GlobalBatch:
    """Put the parts of all ranks together, by their places in the global batch.

    Args:
        parts: one batch per rank, of the same step.

    Returns:
        What was delivered, sorted by slot.
    """
    return tuple(
        sorted(
            DeliveredSample(int(slot), int(sample), _checksum(image.numpy()))
            for part in parts
            for slot, sample, image in zip(part["slot"], part["sample"], part["image"], strict=True)
        )
    )


def _checksum(voxels: NDArray[Any]) -> str:
    """Hash voxels."""
    return hashlib.blake2b(np.ascontiguousarray(voxels).data, digest_size=16).hexdigest()


def _endless(loader: BalancedLoader) -> Iterator[dict[str, Any]]:
    """Go on from epoch to epoch."""
    while True:
        yield from loader
