"""The evaluation loader: every sample exactly once over all ranks, in packed order, untouched."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.plan.options import whole_number
from streaming_balance.storage.reader import Verify
from streaming_balance.storage.shards import ShardSet
from streaming_balance.stream.ranks import find_ranks
from streaming_balance.training.delivery import Delivery, check_shards, delivery
from streaming_balance.training.gathered import Gathered, check_exactly_once
from streaming_balance.training.iteration import PlannedLoader
from streaming_balance.training.requests import Batch, BatchRequest
from streaming_balance.training.sharding import Dealt, ShardingWatch
from streaming_balance.training.state import LoaderState, Position
from streaming_balance.training.transforms import Transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedOrder:
    """Which samples one rank evaluates: rank r of R takes every R-th sample from r."""

    order: NDArray[np.int64]
    """`(N,)` sample numbers of the split in packed order."""
    batch_size: int
    """Samples in a batch of this rank."""
    rank: int
    """This rank, in [0, num_ranks)."""
    num_ranks: int
    """Number of ranks that share the split."""
    digest: str
    """Hash of the data, split, batch size and ranks."""

    def num_steps(self, epoch: int) -> int:
        """Count this rank's batches; they may differ by one between ranks."""
        operator.index(epoch)
        return self._steps_of(self.rank)

    @property
    def most_steps(self) -> int:
        """The largest number of batches of any rank: that of rank 0."""
        return self._steps_of(0)

    def places(self, step: int) -> NDArray[np.int64]:
        """List the packed places that a batch of this rank holds.

        Args:
            step: in [0, num_steps).

        Returns:
            `(b,)` places in packed order, b the batch size or, in the last batch, what is left.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < self.num_steps(0):
            raise IndexError(f"there are steps 0 to {self.num_steps(0) - 1}; step {step} is none.")
        first = self.rank + step * self.batch_size * self.num_ranks
        stop = min(len(self.order), first + self.batch_size * self.num_ranks)
        return np.arange(first, stop, self.num_ranks, dtype=np.int64)

    def global_size(self, step: int) -> int:
        """Count the samples that all ranks evaluate in a step together."""
        together = self.batch_size * self.num_ranks
        return min(len(self.order) - step * together, together)

    def _steps_of(self, rank: int) -> int:
        """Count the batches of a rank."""
        samples = len(range(rank, len(self.order), self.num_ranks))
        return -(-samples // self.batch_size)


class EvalLoader(PlannedLoader):
    """One rank's part of a split, in packed order. Build it with `eval_loader`.

    Nothing is padded, so ranks may have different numbers of batches, some none at all. Collectives
    belong after the loop, or into one of `most_steps` turns on every rank.

    Args:
        shards: the data set.
        plan: which samples are this rank's.
        split: name of the split.
        delivery: how batches are read and handed over.
    """

    def __init__(
        self, shards: ShardSet, plan: PackedOrder, *, split: str, delivery: Delivery
    ) -> None:
        super().__init__(shards, split, delivery=delivery, seed=0)
        self.plan = plan
        self.rank, self.num_ranks = plan.rank, plan.num_ranks
        self._watch = ShardingWatch(
            Dealt(rank=plan.rank, num_ranks=plan.num_ranks, is_sampler=False, trains=False)
        )

    def __iter__(self) -> Iterator[Batch]:
        """Evaluate the split, or the rest of it where a pass was left by `break` or resumed.

        A rank without samples gets no batch, and its epochs go up like everybody's. A continued
        pass is logged, since a score over it misses what came before. To start over instead, call
        `set_epoch(loader.epoch + 1)`.
        """
        if self._position.step:
            logger.warning(
                "evaluation continues at step %d of %d; earlier batches of this pass were already "
                "delivered. Call set_epoch(%d) first to evaluate the whole split.",
                self._position.step,
                len(self),
                self._position.epoch + 1,
            )
        if not len(self):
            self._refuse_if_closed()
            self._move_to(Position(self._position.epoch + 1, 0))
            return iter(())
        return super().__iter__()

    @property
    def most_steps(self) -> int:
        """The largest `len` of any rank's loader: turns of a loop in which all ranks meet."""
        return self.plan.most_steps

    def check_complete(self, gathered: Gathered) -> None:
        """Make sure that all ranks together evaluated every sample of the split exactly once.

        Args:
            gathered: `batch["sample"]` of every batch of every rank, in any order: a tensor, an
                array, or a list of these or of numbers, as `all_gather_object` gives them.

        Raises:
            BalanceError: says how many samples are missing, came more than once or are none of the
                split, and names the first of each.
            ConfigError: something gathered is no whole number.

        Examples:
            >>> from streaming_balance.storage.shards import open_shards
            >>> shards = open_shards("shards/demo")
            >>> parts = []
            >>> for rank in range(3):
            ...     val = eval_loader(shards, split="val", batch_size=1, rank=rank, num_ranks=3)
            ...     parts.append([batch["sample"] for batch in val])
            >>> [len(part) for part in parts]
            [2, 2, 1]
            >>> val.check_complete(parts)
            >>> val.check_complete(parts[:2])
            Traceback (most recent call last):
                ...
            streaming_balance.errors.BalanceError: split 'val' was not evaluated exactly once. ...
        """
        check_exactly_once(gathered, keys=self._shards.keys(self._split), split=self._split)

    def set_epoch(self, epoch: int) -> None:
        """Start another pass; the current one keeps its position. Every pass is the same.

        Raises:
            BalanceError: an iterator of this loader is in use.
            IndexError: a negative epoch.
        """
        target = Position(operator.index(epoch), 0)
        if target.epoch < 0:
            raise IndexError(f"epoch is {epoch}; epochs count from 0.")
        if target.epoch != self._position.epoch:
            self._move_to(target)

    def state_dict(self) -> dict[str, Any]:
        """Give the state: plain values; it belongs to this rank and number of ranks."""
        return self._state().to_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, carry_exposure: bool = False) -> None:
        """Continue a pass where its state says.

        Args:
            state: what `state_dict` of the same rank gave.
            carry_exposure: has no meaning in evaluation and must be False.

        Raises:
            ResumeError: the state belongs to other data, another rank or batch size, or iteration
                of this loader has begun.
        """
        if carry_exposure:
            raise ConfigError("carry_exposure has no meaning in evaluation; leave it False.")
        self._refuse_after_start()
        saved = LoaderState.from_dict(state)
        saved.check_continues(self._state())
        # A rank without samples has no steps; its state stands at step 0 all the same.
        if saved.position.step > 0 and saved.position.step >= len(self):
            raise ResumeError(
                f"the state stands at {saved.position}, but a pass of this rank has {len(self)} "
                f"steps; it is damaged. Use an earlier checkpoint."
            )
        self._move_to(saved.position)

    def _state(self) -> LoaderState:
        """Give the state as a value."""
        return LoaderState(
            plan_digest=self.plan.digest,
            settings={
                "split": self._split,
                "batch_size": self.plan.batch_size,
                "rank": self.plan.rank,
                "num_ranks": self.plan.num_ranks,
            },
            shards_digest=self._shards.digest,
            position=self._position,
            skipped=(),
        )

    def _num_steps(self, epoch: int) -> int:
        """Count this rank's batches."""
        return self.plan.num_steps(epoch)

    def _request(self, position: Position) -> BatchRequest:
        """Say what a batch of this rank holds."""
        places = self.plan.places(position.step)
        together = self.plan.batch_size * self.plan.num_ranks
        return BatchRequest(
            epoch=position.epoch,
            step=position.step,
            samples=self.plan.order[places],
            slots=places - position.step * together,
            global_size=self.plan.global_size(position.step),
            num_ranks=self.plan.num_ranks,
        )

    def _following(self, position: Position) -> Position | None:
        """Read ahead to the end of the pass only: the next one may be an hour away."""
        after = self._after(position)
        return after if after.epoch == position.epoch else None


def eval_loader(
    shards: ShardSet,
    *,
    split: str,
    batch_size: int,
    rank: int | None = None,
    num_ranks: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    size: tuple[int, ...] | None = None,
    transform: Transform | None = None,
    device: str | torch.device | None = None,
    num_threads: int | None = None,
    prefetch_bytes: int | None = None,
    verify: Verify = "first",
) -> EvalLoader:
    """Stream a split for validation or testing: as packed, nothing balanced, nothing padded.

    Args:
        shards: from `open_shards`.
        split: name of the split.
        batch_size: samples in a batch of this rank; the last one may be smaller.
        rank: rank that evaluates; None looks at torch.distributed, then at `RANK`.
        num_ranks: number of ranks; each takes every `num_ranks`-th sample.
        dtype: dtype of the images; None keeps the stored one.
        size: as for `train_loader`.
        transform: as for `train_loader`; its generator is the same in every run.
        device: as for `train_loader`.
        num_threads: as for `train_loader`.
        prefetch_bytes: as for `train_loader`.
        verify: as for `train_loader`.

    Returns:
        An iterable of batches, dicts as `train_loader` gives them.

    Raises:
        ConfigError: a setting is wrong.

    Examples:
        >>> from streaming_balance.storage.shards import open_shards
        >>> shards = open_shards("shards/demo")
        >>> with eval_loader(shards, split="val", batch_size=4) as val:
        ...     [len(batch["key"]) for batch in val]
        [4, 1]
    """
    check_shards(shards)
    size_of_batch = whole_number(batch_size)
    if size_of_batch is None or size_of_batch < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it must be an integer of at least 1.")
    found_rank, found_num_ranks = find_ranks(rank, num_ranks)
    text = json.dumps([shards.digest, split, size_of_batch, found_rank, found_num_ranks])
    plan = PackedOrder(
        order=shards.packed_order(split),
        batch_size=size_of_batch,
        rank=found_rank,
        num_ranks=found_num_ranks,
        digest=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
    )
    how = delivery(
        dtype=dtype,
        size=size,
        transform=transform,
        batch_transform=None,
        device=device,
        num_threads=num_threads,
        prefetch_bytes=prefetch_bytes,
        verify=verify,
    )
    return EvalLoader(shards, plan, split=split, delivery=how)
