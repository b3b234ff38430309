"""Streams as torch knows datasets: an IterableDataset, a node of torchdata, and a loader.

Ranks and workers are readers of one stream. Shards are dealt to them; where there are fewer shards
than readers, samples are. What a reader thins out or repeats nobody knows beforehand, so readers
end their passes at different steps: whoever trains on several ranks says how many steps an epoch
has, and every reader goes on into its next pass until it has given its part of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.nodes import BaseNode
from torchdata.stateful_dataloader import StatefulDataLoader

from streaming_balance.errors import BalanceError, ConfigError
from streaming_balance.plan.options import whole_number
from streaming_balance.stream.dealing import chunks
from streaming_balance.stream.pipeline import Stream


class StreamDataset(IterableDataset[Any]):
    """A stream as a dataset: right under ranks and under the workers of a DataLoader.

    Args:
        stream: what to read; give the whole of it, it is dealt here.
        rank: data-parallel rank.
        num_ranks: number of data-parallel ranks.
        steps: what this rank gives in an epoch, over all its workers; None: whatever a pass holds.
    """

    def __init__(
        self, stream: Stream, *, rank: int = 0, num_ranks: int = 1, steps: int | None = None
    ) -> None:
        super().__init__()
        self._stream, self._rank, self._num_ranks, self._steps = stream, rank, num_ranks, steps
        self._mine: Stream | None = None

    def __iter__(self) -> _Epoch:
        """Give the rest of the epoch, or the next one."""
        return _Epoch(self._reader(), steps=self._my_steps(), whose=self._rank)

    def _reader(self) -> Stream:
        """Give this process's part of the stream, cut when it is first asked for."""
        if self._mine is None:
            worker, workers = _worker()
            self._mine = self._stream.share(
                self._rank * workers + worker, self._num_ranks * workers
            )
        return self._mine

    def _my_steps(self) -> int | None:
        """Give how many steps of an epoch fall to this worker."""
        worker, workers = _worker()
        return None if self._steps is None else list(chunks(self._steps, workers))[worker]


class _Epoch(Iterator[Any]):
    """What one reader gives in an epoch; StatefulDataLoader saves it in the worker.

    Args:
        stream: this reader's part.
        steps: what it gives in an epoch; None: one pass, whatever that holds.
        whose: the rank, for messages.
    """

    def __init__(self, stream: Stream, *, steps: int | None, whose: int) -> None:
        self._stream, self._steps, self._whose = stream, steps, whose
        self._given, self._ended = 0, False
        self._pass = iter(stream)
        self._empty_passes = 0

    def __next__(self) -> Any:  # noqa: ANN401 - a sample or a batch
        if self._ended or (self._steps is not None and self._given >= self._steps):
            self._ended = True
            raise StopIteration
        for item in self._pass:
            self._given, self._empty_passes = self._given + 1, 0
            return item
        if self._steps is None:
            self._ended = True
            raise StopIteration
        self._empty_passes += 1
        if self._empty_passes > 1:
            raise BalanceError(
                f"rank {self._whose} read its part of the stream and nothing went on, so that it "
                f"cannot give {self._steps} steps. Use fewer ranks or workers, or more shards."
            )
        self._pass = iter(self._stream)
        return next(self)

    def state_dict(self) -> dict[str, Any]:
        """Give the state of this reader."""
        return {"given": self._given, "ended": self._ended, "stream": self._stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state of the same reader says."""
        self._given, self._ended = int(state["given"]), bool(state["ended"])
        self._stream.load_state_dict(state["stream"])
        self._pass = iter(self._stream)


class StreamNode(BaseNode[Any]):  # type: ignore[misc]  # torchdata has no types
    """A stream as a node of torchdata; one pass is one epoch.

    Args:
        stream: what to read.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream
        self._iterator: Iterator[Any] | None = None

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Begin the next pass, or go on where a state says."""
        super().reset(initial_state)
        if initial_state is not None:
            self._stream.load_state_dict(initial_state["stream"])
        elif self._iterator is not None:
            self._stream.set_epoch(self._stream.epoch + self._stream.is_under_way)
        self._iterator = iter(self._stream)

    def next(self) -> Any:  # noqa: ANN401 - a sample or a batch
        """Give the next sample or batch."""
        assert self._iterator is not None, "torchdata resets a node before it asks"
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Give the state of the stream."""
        return {"stream": self._stream.state_dict()}


def stream_loader(
    stream: Stream,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    rank: int | None = None,
    num_ranks: int | None = None,
    steps: int | None = None,
) -> StatefulDataLoader[Any]:
    """Give a StatefulDataLoader over a stream: on ranks, in workers, saved and resumed.

    Args:
        stream: the whole stream.
        batch_size: samples in a batch; None where the stream gives batches, or for samples.
        num_workers: worker processes.
        rank: data-parallel rank; None looks at torch.distributed, then at `RANK`.
        num_ranks: number of data-parallel ranks; None looks there, too.
        steps: batches (or samples, without any) of an epoch on each rank; needed on several ranks.

    Raises:
        ConfigError: several ranks and no `steps`, or a setting is wrong.
    """
    found_rank, found_ranks = _ranks(rank, num_ranks)
    if found_ranks > 1 and steps is None:
        raise ConfigError(
            f"{found_ranks} ranks read a stream, and nobody knows beforehand how many batches each "
            f"part gives: ranks would end at different steps, and collectives would hang. Say how "
            f"many steps an epoch has with steps=: samples / ({found_ranks} x batch size), say."
        )
    count = None if steps is None else whole_number(steps)
    if steps is not None and (count is None or count < 1):
        raise ConfigError(f"steps is {steps!r}; it must be an integer of at least 1, or None.")
    chain = stream if batch_size is None else stream.batch(batch_size)
    dataset = StreamDataset(chain, rank=found_rank, num_ranks=found_ranks, steps=count)
    return StatefulDataLoader(dataset, batch_size=None, num_workers=num_workers)


def _worker() -> tuple[int, int]:
    """Give the number of this worker process, and how many there are."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _ranks(rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    """Give rank and number of ranks: as given, of torch.distributed, of the environment."""
    if rank is None and num_ranks is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank is None or num_ranks is None or not 0 <= rank < num_ranks:
        raise ConfigError(
            f"rank is {rank} and num_ranks is {num_ranks}; give both, with rank in "
            f"0..num_ranks-1, or neither to have them looked up."
        )
    return rank, num_ranks
