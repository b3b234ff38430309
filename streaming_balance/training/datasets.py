"""Functions over any map-style dataset: a balanced loader, and subsets with balanced classes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Subset

from streaming_balance.config import BalanceSetting
from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.strategies import Downsample, Upsample
from streaming_balance.training.announcement import announce
from streaming_balance.training.labels import Labels, labels_of, plain_labels
from streaming_balance.training.planned_sampler import worth_saying
from streaming_balance.training.samplers import BalancedBatchSampler
from streaming_balance.training.weighted import WEIGHTINGS

# Seeds of torch's generators that read the same in every release: 63 bits.
LARGEST_TORCH_SEED = 2**63 - 1


class LabelledSubset(Subset[Any]):
    """Some samples of a dataset, some of them perhaps several times, with their labels.

    Args:
        dataset: the whole dataset.
        indices: which of its samples, in order.
        labels: `(N,)` labels of the whole dataset.
    """

    def __init__(self, dataset: Dataset[Any], indices: list[int], labels: Labels) -> None:
        super().__init__(dataset, indices)
        self.targets: Any = _picked(labels, indices)
        """Label of every sample, as a list, array or tensor: what the labels were given as."""
        patients = getattr(dataset, "patients", None)
        if patients is not None:
            self.patients: Any = _picked(patients, indices)


def downsample_dataset(
    dataset: Dataset[Any], target_ratio: float = 1.0, seed: int = 0, labels: Labels | None = None
) -> LabelledSubset:
    """Leave out samples of large classes until the smallest has a ratio to them.

    Args:
        dataset: a map-style dataset; none of its samples is read.
        target_ratio: wanted smallest class : class, in (0, 1].
        seed: integer in [0, 2**64 - 1]; says which samples stay.
        labels: `(N,)` labels; None takes `dataset.targets`.

    Returns:
        A `torch.utils.data.Subset` with `.targets`, in the order of the dataset. Class c keeps
        min(n_c, floor(n_min / target_ratio)) samples.

    Raises:
        ConfigError: no labels, a wrong number of them, or a ratio out of range.

    Examples:
        >>> dataset = torch.utils.data.TensorDataset(torch.arange(100))
        >>> subset = downsample_dataset(dataset, labels=[0] * 90 + [1] * 10)
        >>> len(subset), sum(subset.targets)
        (20, 10)
    """
    strategy = Downsample(target_ratio=target_ratio, rotate=False)
    return _resampled(dataset, strategy, seed=seed, labels=labels, caller="downsample_dataset")


def upsample_dataset(
    dataset: Dataset[Any], target_ratio: float = 1.0, seed: int = 0, labels: Labels | None = None
) -> LabelledSubset:
    """Repeat samples of small classes until they reach a ratio to the largest.

    Args:
        dataset: a map-style dataset; none of its samples is read.
        target_ratio: wanted class : largest class, in (0, 1].
        seed: integer in [0, 2**64 - 1]; says which samples come once more than others.
        labels: `(N,)` labels; None takes `dataset.targets`.

    Returns:
        A `torch.utils.data.Subset` with `.targets`: the dataset in its order, then the copies.
        Class c has max(n_c, floor(target_ratio n_max)) samples, each as often as any other of its
        class, give or take one.

    Raises:
        ConfigError: no labels, a wrong number of them, or a ratio out of range.

    Examples:
        >>> dataset = torch.utils.data.TensorDataset(torch.arange(100))
        >>> subset = upsample_dataset(dataset, labels=[0] * 90 + [1] * 10)
        >>> len(subset), sum(subset.targets)
        (180, 90)
    """
    strategy = Upsample(target_ratio=target_ratio)
    return _resampled(dataset, strategy, seed=seed, labels=labels, caller="upsample_dataset")


def get_balanced_dataloader(
    dataset: Dataset[Any],
    labels: Labels | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    strategy: BalanceSetting = "inverse_freq",
    seed: int = 0,
    shuffle: bool | None = None,
) -> DataLoader[Any]:
    """Make a `DataLoader` whose batches hold every class in its share, exactly.

    Args:
        dataset: a map-style dataset. Where it has `.patients`, classes cycle over patients.
        labels: `(N,)` one label per sample; None: a plain `DataLoader`, nothing balanced.
        batch_size: samples in a batch, on each rank.
        num_workers: worker processes of the `DataLoader`.
        strategy: as for `get_weighted_sampler`.
        seed: integer in [0, 2**64 - 1]; it counts even where `strategy` is a file with another
            `compute.seed`.
        shuffle: of the plain loader; with labels it must not be True, since the order is the
            plan's.

    Returns:
        A `torch.utils.data.DataLoader`. With labels its `batch_sampler` is a
        `BalancedBatchSampler`, and it leaves torch's global generator alone.

    Raises:
        ConfigError: labels together with shuffle=True, or a setting out of range.

    Examples:
        >>> labels = torch.tensor([0] * 90 + [1] * 10)
        >>> dataset = torch.utils.data.TensorDataset(labels)
        >>> loader = get_balanced_dataloader(dataset, labels, batch_size=20)
        >>> [int(batch.sum()) for (batch,) in loader]
        [10, 10, 10, 10, 10]
    """
    if labels is None:
        return DataLoader(
            dataset, batch_size=batch_size, shuffle=bool(shuffle), num_workers=num_workers
        )
    if shuffle:
        raise ConfigError(
            "shuffle=True together with labels: balanced batches have an order of their own, a "
            "new one every epoch. Leave shuffle out."
        )
    found = labels_of(dataset, labels, caller="get_balanced_dataloader")
    _check_for_training(dataset, "get_balanced_dataloader")
    sampler = BalancedBatchSampler(
        found,
        batch_size=batch_size,
        balance=WEIGHTINGS.get(strategy, strategy) if isinstance(strategy, str) else strategy,
        seed=seed,
        patients=getattr(dataset, "patients", None),
    )
    # Without one of its own, a DataLoader takes the seeds of its workers from the global generator.
    generator = torch.Generator().manual_seed(stream_key(seed, "workers") & LARGEST_TORCH_SEED)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, generator=generator)


def _resampled(
    dataset: Dataset[Any],
    strategy: Downsample | Upsample,
    *,
    seed: int,
    labels: Labels | None,
    caller: str,
) -> LabelledSubset:
    """Give the samples of a strategy's first epoch, each as often as it comes there."""
    found = labels_of(dataset, labels, caller=caller)
    _check_for_training(dataset, caller)
    # Batches of one make an epoch of exactly the strategy's length.
    plan = BalancedPlan.from_labels(
        plain_labels(found), global_batch_size=1, balance=strategy, seed=seed
    )
    announce(worth_saying((logging.WARNING, warning) for warning in plan.warnings))
    copies = plan.exposure(1, 0)
    rounds: list[NDArray[np.intp]] = [
        np.flatnonzero(copies > number) for number in range(int(copies.max()))
    ]
    return LabelledSubset(dataset, np.concatenate(rounds).tolist(), found)


def _check_for_training(dataset: Dataset[Any], caller: str) -> None:
    """Refuse to balance a packed split that judges the training."""
    if not getattr(dataset, "is_for_training", True):
        raise ConfigError(
            f"{caller}: the dataset is split {getattr(dataset, 'split', '?')!r}, which is not for "
            f"training: a score on balanced data says nothing about patients as they come. Balance "
            f"a training split, and evaluate this one as it is."
        )


def _picked(values: Labels, indices: list[int]) -> Labels:
    """Give some entries of a list, array or tensor, as the same kind of thing."""
    if isinstance(values, torch.Tensor):
        return values[torch.tensor(indices, device=values.device)]
    if isinstance(values, np.ndarray):
        return values[np.array(indices, dtype=np.int64)]
    if isinstance(values, list | tuple):
        return [values[index] for index in indices]
    return np.asarray(values)[np.array(indices, dtype=np.int64)]
