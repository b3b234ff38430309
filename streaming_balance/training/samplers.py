"""Samplers for any map-style dataset: this rank's part of each global batch of a plan.

For those who keep their `DataLoader`. The batches are those of `BalancedPlan.from_labels`, whatever
the number of ranks and workers; the position is saved and resumed as a loader's is.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from streaming_balance.config import BalanceSetting
from streaming_balance.training.cursors import BatchCursor, IndexCursor
from streaming_balance.training.labels import Labels, Strata
from streaming_balance.training.planned_sampler import PlannedSampler


class BalancedSampler(PlannedSampler, DistributedSampler[int]):
    """Yields this rank's indices of a plan, step after step: `DataLoader(..., sampler=...)`.

    Give the `DataLoader` the same `batch_size`, and its batches are exactly the plan's: each holds
    its share of every class, on one rank or many. It is a `DistributedSampler`, so frameworks that
    shard a sampler among ranks leave this one alone.

    Args:
        labels: `(N,)` one label per sample of the dataset: a list, a numpy array, a torch tensor;
            or several per sample: a list of labels for each, or `(N, K)` zeros and ones.
        batch_size: samples in a batch of this rank, as given to the `DataLoader`.
        balance: a strategy's name; a mapping with `name` and options; a `data.balancing` section;
            the path of a YAML file; a strategy value; None for the natural order.
        seed: integer in [0, 2**64 - 1]; None takes `compute.seed` of the YAML file, else 0.
        patients: `(N,)` patient of every sample; a class then cycles over patients.
        num_replicas: number of data-parallel ranks; None looks at torch.distributed, then at
            `WORLD_SIZE`.
        rank: data-parallel rank; None looks at torch.distributed, then at `RANK`.
        strata: name -> `(N,)` values, for a `balance` with `strata: [label, NAME]`.

    Raises:
        ConfigError: a value above is out of its range, or does not fit the labels.

    Examples:
        >>> labels = ["LGG"] * 75 + ["HGG"] * 210
        >>> sampler = BalancedSampler(labels, batch_size=8, seed=42)
        >>> len(sampler), [labels[i] for i in list(sampler)[:8]].count("LGG")
        (288, 4)
    """

    def __init__(
        self,
        labels: Labels,
        *,
        batch_size: int = 1,
        balance: BalanceSetting = "class_balanced",
        seed: int | None = None,
        patients: Labels | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        strata: Strata | None = None,
    ) -> None:
        PlannedSampler.__init__(
            self,
            labels,
            batch_size=batch_size,
            balance=balance,
            seed=seed,
            patients=patients,
            strata=strata,
            num_replicas=num_replicas,
            rank=rank,
        )
        # What a DistributedSampler has; its own __init__ would want a dataset to count.
        self.shuffle, self.drop_last, self.seed = True, False, self.plan.seed

    @property
    def epoch(self) -> int:  # type: ignore[override]  # set_epoch sets it
        """The epoch of the next batch."""
        return self._position.next.epoch

    @property
    def num_samples(self) -> int:  # type: ignore[override]  # follows from the plan
        """Samples that this rank gets in an epoch."""
        return len(self)

    def __len__(self) -> int:
        """Count this rank's samples in a whole epoch."""
        last = self.plan.num_steps(self.epoch) - 1
        slots = self.plan.rank_slots(self.epoch, last, rank=self.rank, num_ranks=self.num_replicas)
        return last * self._batch_size + len(slots)

    def __iter__(self) -> Iterator[int]:
        """Go on with the rest of the epoch, or with the next one.

        A `DataLoader` with workers asks for batches ahead of the training loop. Where such a loop
        is left by `break`, the next one goes on after those; to go on exactly, load
        `state_dict(epoch=..., step=...)` of the loop's own place, or use a `StatefulDataLoader`.
        """
        self._watch.look()
        return IndexCursor(self, self._position)


class BalancedBatchSampler(PlannedSampler, Sampler[list[int]]):
    """Yields lists of indices, a batch of this rank each: `DataLoader(..., batch_sampler=...)`.

    The batches are those of `BalancedSampler`; here nobody can give the `DataLoader` another batch
    size by mistake.

    Args:
        labels: as for `BalancedSampler`.
        batch_size: samples in a batch of this rank.
        balance: as for `BalancedSampler`.
        seed: as for `BalancedSampler`.
        patients: as for `BalancedSampler`.
        num_replicas: as for `BalancedSampler`.
        rank: as for `BalancedSampler`.
        strata: as for `BalancedSampler`.

    Raises:
        ConfigError: a value above is out of its range, or does not fit the labels.

    Examples:
        >>> labels = [0] * 90 + [1] * 10
        >>> batches = list(BalancedBatchSampler(labels, batch_size=10))
        >>> [sum(labels[i] for i in batch) for batch in batches]
        [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    """

    def __init__(
        self,
        labels: Labels,
        *,
        batch_size: int = 1,
        balance: BalanceSetting = "class_balanced",
        seed: int | None = None,
        patients: Labels | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        strata: Strata | None = None,
    ) -> None:
        super().__init__(
            labels,
            batch_size=batch_size,
            balance=balance,
            seed=seed,
            patients=patients,
            strata=strata,
            num_replicas=num_replicas,
            rank=rank,
        )

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._position.next.epoch

    def __len__(self) -> int:
        """Count the batches of a whole epoch."""
        return self.plan.num_steps(self.epoch)

    def __iter__(self) -> Iterator[list[int]]:
        """Go on with the rest of the epoch, or with the next one, as `BalancedSampler` does."""
        self._watch.look()
        return BatchCursor(self, self._position)
