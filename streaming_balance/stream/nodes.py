"""Streams under PyTorch: an IterableDataset, a StatefulDataLoader over it, and a node.

    loader = stream.to_loader(batch_size=8, num_workers=4, steps=500)     right under torchrun, too
    node = stream.to_node()                                               for torchdata.nodes.Loader

Ranks and worker processes share the shards: with at least as many shards as readers, shards are
dealt; with fewer, samples are, and every reader walks all headers, but reads no payload twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from torch.utils.data import IterableDataset, get_worker_info
from torchdata.nodes import BaseNode
from torchdata.stateful_dataloader import StatefulDataLoader

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.plan.options import whole_number
from streaming_balance.stream.loader_stats import summed
from streaming_balance.stream.ranks import find_ranks

if TYPE_CHECKING:
    from streaming_balance.stream.pipeline import Stream

Fields = dict[str, Any]


class StreamDataset(IterableDataset[Fields]):
    """A stream whose shards are shared by ranks and by the workers of a DataLoader.

    Every iteration is one pass over this reader's part, or `steps` outputs. The next one goes on
    where it ended. A DataLoader whose workers are not persistent starts them anew every epoch: call
    `set_epoch` before each, as with torch's DistributedSampler; `Stream.to_loader` needs no call.

    Args:
        stream: what to give; it is copied, never moved.
        rank: this rank; None: found in torch.distributed, or in RANK of the environment.
        num_ranks: how many there are; None: found likewise, in WORLD_SIZE.
        steps: outputs of this rank in an epoch, all workers together; None: one pass.

    Raises:
        ConfigError: rank and num_ranks contradict each other, or steps is no positive number.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        rank: int | None = None,
        num_ranks: int | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        self._rank, self._num_ranks = find_ranks(rank, num_ranks)
        self._steps = None if steps is None else _checked_steps(steps)
        shared = stream.share(self._rank, self._num_ranks)
        self._stream = shared if steps is None else shared.endless()
        self._stream.set_epoch(stream.epoch)
        self._epoch = 0
        self._reader: _Reader | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say which pass comes next: workers started from now on begin with it.

        Args:
            epoch: at least 0.
        """
        self._stream.set_epoch(epoch)
        if self._reader is not None:
            self._reader.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Fields]:
        """Go on with this process's part."""
        if self._reader is None:
            self._reader = self._begin()
        return _Outputs(self._reader)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a worker process without what was opened."""
        return {**self.__dict__, "_reader": None}

    def part(self, number: int, count: int) -> Stream:
        """Give what one of this rank's workers reads, from the beginning."""
        part = self._stream.share(number, count)
        part.set_epoch(self._stream.epoch)
        return part

    def _begin(self) -> _Reader:
        """Give this process's part of the stream."""
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        steps = self._steps
        _check_workers(steps, count)
        part = self.part(number, count)
        # The first workers take one more each, in the order in which a DataLoader asks them.
        quota = None if steps is None else steps // count + (number < steps % count)
        return _Reader(part, quota)


class _Reader:
    """One process's part of a stream, and how far its epoch is.

    Args:
        stream: the part.
        quota: outputs in an epoch; None: one pass.
    """

    def __init__(self, stream: Stream, quota: int | None) -> None:
        self.stream, self.quota = stream, quota
        self.given = 0


class _Outputs:
    """Iterates over one epoch of a reader; StatefulDataLoader saves and restores it."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._rest: Iterator[Fields] | None = None
        self._has_ended = False

    def __iter__(self) -> Iterator[Fields]:
        return self

    def __next__(self) -> Fields:
        reader = self._reader
        output = None
        if not self._has_ended and reader.given != reader.quota:
            rest = self._rest or iter(reader.stream)
            # An iterator that raised is over; the stream is not.
            self._rest = None
            output = next(rest, None)
            self._rest = rest
        if output is None:
            self._has_ended, reader.given = True, 0
            raise StopIteration
        reader.given += 1
        return output

    def state_dict(self) -> dict[str, Any]:
        """Give where the reader stands."""
        return {
            "given": self._reader.given,
            "quota": self._reader.quota,
            "has_ended": self._has_ended,
            "stream": self._reader.stream.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state says.

        Raises:
            ResumeError: it was taken with another number of steps, ranks or workers.
        """
        reader = self._reader
        if state["quota"] != reader.quota:
            raise ResumeError(
                f"the state gives this reader {state['quota']} steps in an epoch, the loader "
                f"{reader.quota}. Build the loader with the state's steps and num_workers."
            )
        reader.stream.load_state_dict(state["stream"])
        reader.given, self._has_ended = int(state["given"]), bool(state["has_ended"])
        self._rest = None


class StreamLoader(StatefulDataLoader[Fields]):  # type: ignore[misc]  # torchdata has no types
    """A StatefulDataLoader over a stream; build with `Stream.to_loader`.

    Iterating again goes on where the training loop stopped: with the rest of an epoch that was left
    by `break`, what workers had read ahead included, else with the next one.

    A context manager that ends its workers. Without it they end with the loader, and after an error
    torch may wait for each of them for five seconds.
    """

    def __iter__(self) -> Any:  # noqa: ANN401 - torch's iterator
        """Go on with the epoch under way, or with the next one."""
        under_way = self._iterator
        if (
            under_way is not None
            and self.num_workers > 0
            and not self._initial_iter_for_state_dict
            and not under_way._finished
        ):
            # Workers are ahead of the loop: begin them anew where the loop stands.
            self.load_state_dict(self.state_dict())
        return super().__iter__()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state says; what differs in the stream is named once iterated.

        Raises:
            ResumeError: it is no state of a loader, or of one with another number of workers.
        """
        found = _workers_of(state_dict)
        if found != self.num_workers:
            raise ResumeError(
                f"the state is of a loader with {found} workers, this one has {self.num_workers}. "
                f"Build the loader with num_workers={found}, or start anew."
            )
        if self.num_workers > 0 and self._iterator is not None:
            self._iterator._shutdown_workers()
        super().load_state_dict(state_dict)

    def stats(self) -> dict[str, Any]:
        """Give what this rank's readers read, delivered, rejected and hold.

        Of workers, it is what stands in `state_dict`: where the training loop is, not what they
        have read ahead. What they hold is looked up again, so ask at the end of an epoch rather
        than at every step.

        Returns:
            `readers`, `Stream.stats` of every worker; `totals`, their sums; and `classes`, label ->
            `read`, `delivered`, `copies`, `rejected`, `wanted_share` and `realised_share` of the
            last stage over all of them.
        """
        state = self.next_iter_state if self._iterator is None else self.state_dict()
        count = max(1, self.num_workers)
        saved = [None] * count if state is None else _reader_states(state)
        return summed([self._stats_of(number, one) for number, one in enumerate(saved)])

    def _stats_of(self, number: int, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """Give what one reader counted until a state was taken; None: before it began."""
        dataset: StreamDataset = self.dataset
        with dataset.part(number, max(1, self.num_workers)) as part:
            if state is not None:
                part.load_state_dict(state)
            return part.stats()

    def close(self) -> None:
        """End the workers. Iterating again begins new ones, which go on where the loop stopped."""
        if self.num_workers > 0 and self._iterator is not None:
            self.load_state_dict(self.state_dict())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class StreamNode(BaseNode[Fields]):  # type: ignore[misc]  # torchdata has no types
    """A stream as a source for `torchdata.nodes`.

    As with all nodes, `reset()` begins: the next pass, or the same one again where it was left
    early. `reset(state)` goes on where the state was taken.

    Args:
        stream: what to give; the node moves it.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream
        self._beginning: dict[str, Any] | None = None
        self._is_within = False
        self._rest: Iterator[Fields] | None = None

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Stand at the beginning of a pass, or where a state was taken.

        Args:
            initial_state: what `state_dict` gave.
        """
        super().reset(initial_state)
        if initial_state is not None:
            self._stream.load_state_dict(initial_state["stream"])
            self._beginning = initial_state["beginning"]
            self._is_within = bool(initial_state["is_within"])
        elif self._is_within:
            assert self._beginning is not None
            self._stream.load_state_dict(self._beginning)
            self._is_within = False
        self._rest = None

    def next(self) -> Fields:
        """Give the next output of the pass."""
        if not self._is_within:
            self._beginning, self._is_within = self._stream.state_dict(), True
        rest = self._rest or iter(self._stream)
        self._rest = None
        output = next(rest, None)
        if output is None:
            self._is_within = False
            raise StopIteration
        self._rest = rest
        return output

    def get_state(self) -> dict[str, Any]:
        """Give where the stream stands, and where its pass began."""
        return {
            "stream": self._stream.state_dict(),
            "beginning": self._beginning,
            "is_within": self._is_within,
        }


def stream_loader(
    stream: Stream,
    batch_size: int | None = None,
    *,
    num_workers: int = 0,
    rank: int | None = None,
    num_ranks: int | None = None,
    steps: int | None = None,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
    snapshot_every_n_steps: int = 1,
) -> StreamLoader:
    """Give a loader of tensors; its `state_dict` is exact, with any number of workers.

    Args:
        stream: what to give.
        batch_size: samples in a batch; None where the stream gives batches, or samples are wanted.
        num_workers: processes that read, decode and change samples; each has its own stages.
        rank: this rank; None: found in torch.distributed, or in RANK of the environment.
        num_ranks: how many there are; None: found likewise, in WORLD_SIZE.
        steps: batches of every rank in an epoch, all of full size; readers go on into their next
            pass as needed. None: an epoch is one pass; for a single rank only.
        prefetch_factor: batches every worker reads ahead; None: as torch does.
        pin_memory: whether batches come in pinned memory.
        snapshot_every_n_steps: how often workers send their state; where they hold many samples,
            make it rarer: resuming reads that many batches again.

    Raises:
        ConfigError: several ranks and no steps, or settings that contradict each other.
    """
    rank, num_ranks = find_ranks(rank, num_ranks)
    if num_ranks > 1 and steps is None:
        raise ConfigError(
            f"{num_ranks} ranks share the stream, and steps is not given. Each gets another number "
            f"of batches from a pass, nobody knows which beforehand, and collectives would hang "
            f"where the first one ends. Give steps=, the batches of each rank in an epoch: samples "
            f"that go on in a pass, divided by batch_size x num_ranks."
        )
    if batch_size is not None:
        epoch = stream.epoch
        stream = stream.batch(batch_size)
        stream.set_epoch(epoch)
    dataset = stream.to_dataset(rank=rank, num_ranks=num_ranks, steps=steps)
    # Here, and not only where they read: workers that fail as they begin are slow to end.
    _check_workers(steps, num_workers)
    return StreamLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        # What stages hold and learned goes on from epoch to epoch.
        persistent_workers=num_workers > 0,
        snapshot_every_n_steps=snapshot_every_n_steps,
    )


def _reader_states(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Give where the stream of each reader stands in a loader's state, by the reader's number."""
    snapshots = [state]
    if "_snapshot" in state:
        snapshots = sorted(
            state["_snapshot"]["_worker_snapshots"].values(), key=lambda one: one["worker_id"]
        )
    return [one["fetcher_state"]["dataset_iter_state"]["stream"] for one in snapshots]


def _workers_of(state: Mapping[str, Any]) -> int:
    """Give the number of workers of the loader whose state this is."""
    try:
        if "_num_yielded" in state:
            return 0
        return int(state["_snapshot"]["_main_snapshot"]["_num_workers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ResumeError(
            "this is no state of a stream's loader; it must be what the loader's state_dict() gave."
            " The state of the stream itself is loaded by the stream."
        ) from error


def _check_workers(steps: int | None, count: int) -> None:
    """Refuse more workers than steps."""
    if steps is not None and steps < count:
        raise ConfigError(
            f"steps is {steps}, and {count} workers share them: some would never read their "
            f"shards. Use at most {steps} workers."
        )


def _checked_steps(steps: object) -> int:
    """Refuse a number of steps that is none."""
    number = whole_number(steps)
    if number is None or number < 1:
        raise ConfigError(f"steps is {steps!r}; it must be an integer of at least 1.")
    return number
