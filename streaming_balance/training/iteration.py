"""What both loaders share: where iteration stands, and the machinery that delivers batches."""

from __future__ import annotations

import logging
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import torch

from streaming_balance.errors import BalanceError, ConfigError, ResumeError
from streaming_balance.storage.labelling import count_carriers
from streaming_balance.storage.reader import Reader
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.batches import BatchAssembler
from streaming_balance.training.buffers import BufferPool
from streaming_balance.training.course import Standing
from streaming_balance.training.delivery import DEFAULT_PREFETCH_BYTES, Delivery, numpy_dtype
from streaming_balance.training.mixing import BatchMixer
from streaming_balance.training.pending import MadeBatch
from streaming_balance.training.quarantine import Candidates, Quarantine
from streaming_balance.training.readahead import ReadAhead
from streaming_balance.training.requests import Batch, BatchRequest
from streaming_balance.training.sharding import ShardingWatch
from streaming_balance.training.state import Position
from streaming_balance.training.threads import ReaderThreads
from streaming_balance.training.torch_draws import one_thread_each
from streaming_balance.training.transforms import KeyedTransform
from streaming_balance.training.turns import Turn
from streaming_balance.training.workers import BatchSource, WorkerEngine

logger = logging.getLogger(__name__)


class PlannedLoader(ABC):
    """Delivers the batches of a plan, and knows which one comes next.

    Iterating goes on where the training loop stopped: the rest of an epoch left by `break`, else
    the next epoch. A batch counts as delivered once `next` has returned it.

    Args:
        shards: the data set.
        split: name of the split.
        delivery: how batches are read and handed over.
        seed: seed of transforms.
        standing: where iteration stands; moved on with every batch.
    """

    _watch: ShardingWatch
    """Looks who iterates; made by whoever knows the ranks."""

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        *,
        delivery: Delivery,
        seed: int,
        standing: Standing | None = None,
    ) -> None:
        if delivery.transform is None:
            shards.check_decodable(split)
        self._shards, self._split, self._delivery, self._seed = shards, split, delivery, seed
        self._standing = standing or Standing()
        self._mixer: BatchMixer | None = None
        self._engine: ThreadEngine | WorkerEngine | None = None
        self._live: weakref.ref[_LoaderIterator] | None = None
        self._turn = Turn()
        self._closed = False
        self._samples = self._bytes = 0
        self._seconds_waited = 0.0
        self._slowest: dict[str, Any] | None = None
        self._labels = shards.labels(split)
        self._class_counts = np.zeros(len(shards.classes), dtype=np.int64)

    @abstractmethod
    def _num_steps(self, epoch: int) -> int:
        """Count this loader's batches in an epoch."""

    @abstractmethod
    def _request(self, position: Position) -> BatchRequest:
        """Say what the batch at a position holds."""

    @abstractmethod
    def _following(self, position: Position) -> Position | None:
        """Give the position to read ahead after this one, or None to stop there."""

    @property
    def _position(self) -> Position:
        """The batch that the training loop gets next."""
        return self._standing.position

    @property
    def _candidates(self) -> Candidates | None:
        """Who may stand in for damaged samples; None: damage is an error."""
        return None

    def __len__(self) -> int:
        """Count the steps of a whole epoch."""
        return self._num_steps(self._position.epoch)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._position.epoch

    def __iter__(self) -> Iterator[Batch]:
        """Go on with the rest of the epoch, or with the next one.

        Raises:
            BalanceError: another iterator of this loader is still in use, or it is closed.
        """
        self._refuse_if_closed()
        self._watch.look()
        iterator = _LoaderIterator(self, self._position.epoch)
        self._claim(iterator)
        return iterator

    def stats(self) -> dict[str, Any]:
        """Give what was delivered so far by this process.

        Returns:
            `samples` and `bytes` delivered, `seconds_waited` by the training loop for batches,
            `class_counts`, label -> samples (one with several findings counts for each), and
            `slowest_read`, the reading (and transforming) that took longest: `seconds`, `epoch`,
            `step` and the `keys` read, or None before the first batch.
        """
        counts = zip(self._shards.classes, self._class_counts.tolist(), strict=True)
        return {
            "samples": self._samples,
            "bytes": self._bytes,
            "seconds_waited": self._seconds_waited,
            "class_counts": dict(counts),
            "slowest_read": None if self._slowest is None else dict(self._slowest),
        }

    def close(self) -> None:
        """End the reader threads and close the shards; batches handed out stay valid."""
        self._closed = True
        self._shut_engine()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or sent elsewhere: threads, files and pooled memory do not travel."""
        raise ConfigError(
            f"a {type(self).__name__} cannot be pickled or copied. Build the loader in the process "
            "that uses it: the open data set can be sent there, and state_dict() says where to go "
            "on."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _deliver(self, epoch: int) -> Batch | None:
        """Give the next batch of `epoch` and move on; None when the epoch has no more."""
        self._refuse_if_closed()
        if self._position.epoch != epoch or self._position.step >= self._num_steps(epoch):
            return None
        started = time.perf_counter()
        made = self._running_engine().ahead.take(self._position)
        request, batch = made.request, made.batch
        if self._mixer is not None:
            # While labels are here: looking at them on the device would wait for it.
            self._mixer.check(batch)
        if self._delivery.device is not None:
            batch = _moved(batch, self._delivery.device)
        self._seconds_waited += time.perf_counter() - started
        if self._mixer is not None:
            slots = request.slots.tolist()
            batch = self._mixer.mix(batch, epoch=request.epoch, step=request.step, slots=slots)
        if self._delivery.batch_transform is not None:
            batch = self._delivery.batch_transform(batch)
        self._count(made)
        self._tell(request)
        self._standing.advance(self._after(self._position), request.substitutions)
        return batch

    def _count(self, made: MadeBatch) -> None:
        """Add a delivered batch to the statistics."""
        request, slowest = made.request, made.slowest
        labels = self._labels[request.samples]
        self._class_counts += count_carriers(labels, len(self._class_counts))
        self._samples += len(request.samples)
        self._bytes += made.num_bytes
        if self._slowest is None or slowest.seconds > self._slowest["seconds"]:
            self._slowest = {
                "seconds": slowest.seconds,
                "epoch": request.epoch,
                "step": request.step,
                "keys": self._shards.keys(self._split)[list(slowest.samples)].tolist(),
            }

    def _tell(self, request: BatchRequest) -> None:
        """Name who stood in for whom: nobody is replaced in silence."""
        for record in request.substitutions:
            keys = self._shards.keys(self._split)
            logger.warning(
                "epoch %d, step %d, slot %d: %s is damaged, and %s stands in for it. %s",
                record.epoch,
                record.step,
                record.slot,
                keys[record.sample],
                keys[record.substitute],
                record.reason,
            )

    def _after(self, position: Position) -> Position:
        """Give the position after a batch: the next step, or the start of the next epoch."""
        if position.step + 1 < self._num_steps(position.epoch):
            return Position(position.epoch, position.step + 1)
        return Position(position.epoch + 1, 0)

    def _move_to(self, position: Position) -> None:
        """Stand somewhere else from now on."""
        self._refuse_to_move()
        self._standing.position = position

    def _refuse_to_move(self) -> None:
        """Refuse to change the position while an iterator is in use."""
        if self._live_iterator() is not None:
            raise BalanceError(
                "this loader has an iterator in use; its position cannot change under it. Leave "
                "the loop first."
            )

    def _refuse_after_start(self) -> None:
        """Refuse to take over a state once iteration has begun."""
        if self._samples or self._live_iterator() is not None:
            raise ResumeError(
                "iteration of this loader has begun; a state is loaded before the first batch, or "
                "what was delivered already would be counted nowhere. Build a new loader for it."
            )

    def _claim(self, iterator: _LoaderIterator) -> None:
        """Give the batches to one iterator, if no other has them."""
        if self._live_iterator() not in (None, iterator):
            raise BalanceError(
                "this loader already has an iterator in use; two would take batches from each "
                "other. Finish it, delete it, or build a second loader."
            )
        self._live = weakref.ref(iterator)

    def _live_iterator(self) -> _LoaderIterator | None:
        """Give the iterator that may still ask for batches."""
        iterator = None if self._live is None else self._live()
        return None if iterator is None or iterator.finished else iterator

    def _refuse_if_closed(self) -> None:
        """Refuse to deliver after `close`."""
        if self._closed:
            raise BalanceError("this loader is closed; build a new one.")

    def _running_engine(self) -> ThreadEngine | WorkerEngine:
        """Give the machinery of this process, started on first use and anew after a fork."""
        if self._engine is None or self._engine.process != os.getpid():
            self._engine = _worker_engine(self) if self._delivery.workers else ThreadEngine(self)
        return self._engine

    def _shut_engine(self) -> None:
        """End threads and close files, if this process started them."""
        engine, self._engine = self._engine, None
        if engine is not None and engine.process == os.getpid():
            engine.close()


class _LoaderIterator:
    """One pass of a for loop; the loader keeps the position."""

    def __init__(self, loader: PlannedLoader, epoch: int) -> None:
        self._loader, self._epoch = loader, epoch
        self.finished = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        with self._loader._turn:
            return self._next()

    def _next(self) -> Batch:
        """Give the next batch, while no other thread asks for one."""
        if self.finished:
            raise StopIteration
        self._loader._claim(self)
        try:
            batch = self._loader._deliver(self._epoch)
        except BaseException as error:
            # Its traceback, which a notebook keeps, keeps this iterator; that must not bar the next
            # loop from going on. Whoever asks this one again gets its batches, if nobody else has.
            self._loader._live = None
            if isinstance(error, StopIteration):
                # Passed on, it would end the epoch early and look like its end.
                raise RuntimeError(
                    "a transform raised StopIteration. Does it call next() on something that has "
                    "run out?"
                ) from error
            raise
        # After the last batch nobody has to ask once more for the loader to be free again.
        self.finished = batch is None or self._loader.epoch != self._epoch
        if batch is None:
            raise StopIteration
        return batch


class ThreadEngine:
    """Threads, files and buffers of one process. Never touched by another one."""

    def __init__(self, loader: PlannedLoader) -> None:
        how = loader._delivery
        self.process = os.getpid()
        self._reader = loader._shards.reader(loader._split, verify=how.verify)
        # Reads under way end well; without this a loader that nobody closes leaves files open.
        weakref.finalize(self, _close_reader, self._reader, self.process)
        prepare = None if how.transform is None else one_thread_each()
        self._threads = ReaderThreads(how.num_threads, prepare=prepare)
        self.pool = BufferPool(
            keep_bytes=2 * how.prefetch_bytes + DEFAULT_PREFETCH_BYTES,
            pinned=torch.cuda.is_available(),
        )
        transform = how.transform
        assembler = BatchAssembler(
            loader._shards,
            loader._split,
            reader=self._reader,
            pool=self.pool,
            dtype=numpy_dtype(how.dtype),
            size=how.size,
            transform=None if transform is None else KeyedTransform(transform, seed=loader._seed),
            quarantine=None if loader._candidates is None else Quarantine(loader._candidates),
        )
        # Bound methods would keep the loader alive through its own engine: a cycle that only the
        # garbage collector breaks. A weak reference lets the loader go with its last user.
        owner = weakref.ref(loader)
        self.ahead = ReadAhead(
            assembler,
            self._threads,
            request=lambda position: _alive(owner)._request(position),
            following=lambda position: _alive(owner)._following(position),
            budget_bytes=how.prefetch_bytes,
        )

    def close(self) -> None:
        """Stop the threads, then close the files they read."""
        self.ahead.clear()
        self._threads.close()
        self._reader.close()


def _worker_engine(loader: PlannedLoader) -> WorkerEngine:
    """Let worker processes make a loader's batches."""
    how = loader._delivery
    owner = weakref.ref(loader)
    return WorkerEngine(
        BatchSource(
            loader._shards,
            loader._split,
            how=how,
            seed=loader._seed,
            candidates=loader._candidates,
        ),
        how=how,
        request=lambda position: _alive(owner)._request(position),
        following=lambda position: _alive(owner)._following(position),
    )


def _close_reader(reader: Reader, process: int) -> None:
    """Close an engine's files, but not in a forked child, where a lock may be held for ever."""
    if os.getpid() == process:
        reader.close()


def _alive(owner: weakref.ref[PlannedLoader]) -> PlannedLoader:
    """Give the loader that is asking right now."""
    loader = owner()
    assert loader is not None, "a loader asks for its own batches, so it is alive"
    return loader


def _moved(batch: Batch, device: torch.device) -> Batch:
    """Copy the tensors of a batch to a device, asynchronously from pinned memory."""
    moved: Batch = {}
    for name, value in batch.items():
        if isinstance(value, list):
            moved[name] = [_on_device(item, device) for item in value]
        else:
            moved[name] = _on_device(value, device)
    return moved


def _on_device(value: object, device: torch.device) -> object:
    """Copy one tensor; anything else stays as it is."""
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
