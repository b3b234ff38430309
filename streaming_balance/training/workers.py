"""Batches made in worker processes: for transforms that hold the interpreter's lock.

The plan stays in this process. It sends a worker what a batch holds, in order; the worker reads,
transforms and sends back tensors in shared memory. torchdata's StatefulDataLoader starts and ends
the processes and keeps the order. Its own state is not used: where a run stands is the loader's to
know, and the same whether threads or processes make the batches.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize, get_temp_dir
from typing import Any

import torch

from streaming_balance.errors import BalanceError, ConfigError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.batches import BatchAssembler
from streaming_balance.training.buffers import BufferPool
from streaming_balance.training.delivery import Delivery, numpy_dtype
from streaming_balance.training.pending import MadeBatch
from streaming_balance.training.quarantine import Candidates, Quarantine
from streaming_balance.training.readahead import MOST_BATCHES
from streaming_balance.training.requests import Batch, BatchRequest
from streaming_balance.training.state import Position
from streaming_balance.training.stopping import heard_signals, leave_signals
from streaming_balance.training.threads import ReaderThreads, Signal, await_exits
from streaming_balance.training.transforms import KeyedTransform

Request = Callable[[Position], BatchRequest]
Following = Callable[[Position], Position | None]

# Where Linux keeps the memory that processes share.
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong in a worker, on its way to the process that asked."""

    error: BaseException
    """The error itself, or one that says the same where it cannot be sent."""


class BatchSource:
    """What a worker process has: makes the batch of a request.

    Sent to workers before it made any batch; files, memory and threads are the worker's own.

    Args:
        shards: the data set.
        split: name of the split.
        how: how batches are read.
        seed: seed of transforms.
        candidates: says who may stand in for damaged samples; None: damage is an error.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        *,
        how: Delivery,
        seed: int,
        candidates: Candidates | None = None,
    ) -> None:
        self._shards, self._split, self._seed = shards, split, seed
        self._candidates = candidates
        # What happens to a finished batch happens in the process that asked.
        self._how = replace(how, batch_transform=None, device=None)
        self._assembler: BatchAssembler | None = None
        self._threads: ReaderThreads | None = None

    def __getitem__(self, request: BatchRequest) -> MadeBatch | Failure:
        """Make a batch, its tensors in shared memory, or give what went wrong."""
        try:
            made = self._made(request)
            _share_all(made.batch, made.num_bytes)
            return made
        except Exception as error:  # noqa: BLE001 - raised again in the process that asked
            return Failure(error=_sendable(error))

    def num_bytes(self, request: BatchRequest) -> int:
        """Count the bytes of memory the arrays of a batch take, without reading any."""
        with self._shards.reader(self._split) as reader:
            pool = BufferPool(keep_bytes=0)
            assembler = BatchAssembler(
                self._shards,
                self._split,
                reader=reader,
                pool=pool,
                dtype=numpy_dtype(self._how.dtype),
                size=self._how.size,
                transform=None,
            )
            return assembler.num_bytes(request)

    def _made(self, request: BatchRequest) -> MadeBatch:
        """Read and transform the samples of a batch."""
        if self._assembler is None:
            self._assembler = self._prepared()
        assembler, threads = self._assembler, self._threads
        wanted = assembler.settled(request)
        submit = _run_now if threads is None else threads.submit
        wait = _no_wait if threads is None else threads.wait
        pending = assembler.begin(wanted, num_bytes=assembler.num_bytes(wanted), submit=submit)
        return assembler.finish(pending, submit=submit, wait=wait)

    def _prepared(self) -> BatchAssembler:
        """Open what this process reads with."""
        how, transform = self._how, None
        if how.num_threads > 1:
            # Each begins with the one thread that torch's worker processes compute on.
            self._threads = ReaderThreads(how.num_threads)
        if how.transform is not None:
            alone = self._threads is None
            transform = KeyedTransform(how.transform, seed=self._seed, owns_process=alone)
        return BatchAssembler(
            self._shards,
            self._split,
            reader=self._shards.reader(self._split, verify=how.verify),
            # Memory comes home as soon as a batch has been copied to shared memory.
            pool=BufferPool(keep_bytes=how.prefetch_bytes),
            dtype=numpy_dtype(how.dtype),
            size=how.size,
            transform=transform,
            quarantine=None if self._candidates is None else Quarantine(self._candidates),
        )


class WorkerEngine:
    """Worker processes and the batches they make ahead. Never touched by another process.

    Args:
        source: what every worker has.
        how: how many workers, and how far they run ahead.
        request: says what a position asks for.
        following: gives the position after a position, None to stop there.
    """

    def __init__(
        self, source: BatchSource, *, how: Delivery, request: Request, following: Following
    ) -> None:
        self.process = os.getpid()
        self._source, self._how = source, how
        self._request, self._following = request, following
        self._stream: Any = None
        self._asked: deque[Position] = deque()
        _engines.add(self)

    @property
    def ahead(self) -> WorkerEngine:
        """What batches are taken from."""
        return self

    def take(self, position: Position) -> MadeBatch:
        """Give the batch at a position, and leave the next ones under way.

        Raises:
            BalanceError: a worker process died; asking again starts new ones.
            Exception: what went wrong in the worker.
        """
        try:
            if self._stream is None or not self._asked or self._asked[0] != position:
                self._start(position)
            answer = next(self._stream)
        except BaseException as error:
            # Also when interrupted: what was under way may be torn.
            died = _deaths(self._stream) if isinstance(error, RuntimeError) else ""
            self.clear()
            if not died:
                raise
            raise BalanceError(
                f"{died} before the batch of epoch {position.epoch}, step {position.step} was "
                f"there. Out of memory ends a worker by SIGKILL, a full {SHARED_MEMORY} by SIGBUS: "
                f"use fewer workers or a smaller prefetch_bytes, or look into the transform with "
                f"workers=0. This batch comes next when asked again."
            ) from error
        if isinstance(answer, Failure):
            self.clear()
            raise answer.error
        assert isinstance(answer, MadeBatch), "a worker sends what it made, or what went wrong"
        self._asked.popleft()
        return answer

    def clear(self) -> None:
        """End the workers and forget what is under way."""
        stream, self._stream = self._stream, None
        self._asked = deque()
        if stream is not None:
            # A worker that dies on its way out takes nothing with it that anybody waits for.
            with contextlib.suppress(RuntimeError):
                stream._shutdown_workers()

    def close(self) -> None:
        """End the workers."""
        self.clear()

    def _start(self, position: Position) -> None:
        """Start the workers at a position."""
        self.clear()
        await_exits()
        num_bytes = max(1, self._source.num_bytes(self._request(position)))
        batches = min(MOST_BATCHES, self._how.prefetch_bytes // num_bytes)
        requests = _requests(
            position, request=self._request, following=self._following, asked=self._asked
        )
        count = self._how.workers
        self._stream = _stream(self._source, requests, count, each=max(1, batches // count))


def _stream(
    source: BatchSource, requests: Iterator[BatchRequest], count: int, *, each: int
) -> Iterator[object]:
    """Start workers and give what they make, in the order of the requests."""
    # Imported late: it takes a second, and only those who ask for workers need it.
    from torchdata.stateful_dataloader import StatefulDataLoader

    # Tensors travel through sockets in a folder. Made here, it is removed when this process ends;
    # each worker would make one of its own, and leave it behind when it is ended by a signal.
    folder = get_temp_dir()
    with warnings.catch_warnings():
        # torchdata 0.11 calls what newer releases of torch would rather not have called.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        # Python 3.12 and newer warn of forking beside threads: what they lock stays locked in it.
        # Ours are gone or wait for work, and a worker makes files, memory and threads of its own.
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        loader = StatefulDataLoader(
            source,
            sampler=requests,
            batch_size=None,
            collate_fn=_as_it_is,
            worker_init_fn=functools.partial(_begin, folder, heard_signals(), os.getpid()),
            num_workers=count,
            prefetch_factor=each,
            pin_memory=torch.cuda.is_available(),
            # Its seed for the workers would come from the global generator otherwise.
            generator=torch.Generator(),
            snapshot_every_n_steps=None,
        )
        return iter(loader)


def _begin(folder: str, signals: tuple[int, ...], owner: int, worker: int) -> None:
    """Prepare a worker process; should its owner be killed, it clears up on its own way out."""
    leave_signals(signals, owner, worker)
    Finalize(None, _remove_if_orphaned, args=(folder, os.getppid()), exitpriority=-100)


def _remove_if_orphaned(folder: str, parent: int) -> None:
    """Remove the folder of sockets that a killed owner cannot remove any more."""
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)


def _requests(
    position: Position,
    *,
    request: Request,
    following: Following,
    asked: deque[Position],
) -> Iterator[BatchRequest]:
    """Say what one batch after another holds, and note what was said."""
    upcoming: Position | None = position
    while upcoming is not None:
        try:
            wanted = request(upcoming)
        except BalanceError:
            # A batch that cannot even be planned says so when its turn comes, not before.
            return
        asked.append(upcoming)
        yield wanted
        upcoming = following(upcoming)


def _as_it_is(answer: object) -> object:
    """Leave what a worker made as it is."""
    return answer


def _run_now(work: Callable[[], None]) -> None:
    """Do a piece of work at once."""
    work()


def _no_wait(done: Signal) -> None:
    """Find a batch finished: its work was done at once."""
    assert done.is_set(), "work was done as it was given"


def _share_all(batch: Batch, num_bytes: int) -> None:
    """Move the tensors of a batch to shared memory, and see that all else can be sent.

    Both would otherwise happen in a thread of the queue that nobody hears from when it fails.
    """
    for name, value in batch.items():
        try:
            for tensor in _tensors(value):
                _share(tensor)
        except RuntimeError as error:
            raise BalanceError(
                f"{name} of a batch of {num_bytes:,} bytes does not fit into shared memory "
                f"({error}). Every worker needs room for its batches in {SHARED_MEMORY}: make it "
                f"larger (docker run --shm-size), or use fewer workers, a smaller prefetch_bytes, "
                f"or workers=0, which needs none."
            ) from error
        rest = _without_tensors(value)
        if (problem := _unsendable(rest)) is not None:
            raise ConfigError(
                f"transform gave {name!r}, which cannot be sent from a worker process ({problem}). "
                f"Give tensors, numbers and text, or use workers=0."
            )


def _share(tensor: torch.Tensor) -> None:
    """Move the memory of one tensor."""
    if tensor.requires_grad:
        raise ConfigError(
            "transform gave a tensor that requires gradients, which end at a process. Give "
            "tensor.detach(), or use workers=0."
        )
    if tensor.numel():
        tensor.share_memory_()  # type: ignore[no-untyped-call]


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """List the tensors in a value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _without_tensors(value: object) -> object:
    """Leave the tensors in a value out."""
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, list | tuple):
        return [_without_tensors(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_tensors(item) for name, item in value.items()}
    return value


def _unsendable(value: object) -> Exception | None:
    """Give what goes wrong when a value is sent to another process, None if nothing does."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(value))
    except Exception as error:  # noqa: BLE001 - objects of users may raise anything here
        return error
    return None


def _sendable(error: Exception) -> BaseException:
    """Give an error that can be sent, with a note of where it came from."""
    told = "".join(traceback.format_exception(error))
    sent: BaseException = error
    if _unsendable(error) is not None:
        sent = BalanceError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", []):
            sent.add_note(note)
    sent.add_note(f"This happened in worker process {os.getpid()}:\n{told}")
    return sent


def _deaths(stream: Any) -> str:  # noqa: ANN401 - torchdata has no types
    """Say which workers ended by themselves, in a few words; nothing if none did."""
    workers = [] if stream is None else list(enumerate(stream._workers, start=1))
    return " and ".join(
        f"worker process {number} of {len(workers)} (pid {worker.pid}) {_ending(worker.exitcode)}"
        for number, worker in workers
        if not worker.is_alive()
    )


def _ending(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


_engines: weakref.WeakSet[WorkerEngine] = weakref.WeakSet()
_inherited: list[object] = []


def _leave_to_parent() -> None:
    """Keep what a forked child inherits for ever: letting go would end its parent's workers."""
    for engine in list(_engines):
        _inherited.append(engine._stream)
        engine._stream = None


if hasattr(os, "register_at_fork"):  # Windows has none, and is told of WSL where data is opened
    os.register_at_fork(after_in_child=_leave_to_parent)
