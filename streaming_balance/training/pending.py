"""A batch whose rows are being filled by other threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from streaming_balance.errors import ShardError
from streaming_balance.training.requests import Batch, BatchRequest
from streaming_balance.training.threads import Signal, as_error


class DamagedSamplesError(ShardError):
    """Samples of a batch that could not be read, twice.

    Args:
        found: sample number -> what is wrong with it.
    """

    def __init__(self, found: Mapping[int, ShardError]) -> None:
        super().__init__("; ".join(map(str, found.values())))
        self.found = dict(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of the work on a batch, done in one thread."""

    work: Callable[[], None]
    """Does it."""
    samples: Sequence[int]
    """The samples it reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowRead:
    """The piece of a batch that took longest."""

    seconds: float
    """How long reading (and transforming) took."""
    samples: tuple[int, ...]
    """Which samples it read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeBatch:
    """A finished batch."""

    request: BatchRequest
    """What it holds."""
    batch: Batch
    """The arrays, and what describes them."""
    num_bytes: int
    """Memory its arrays take."""
    slowest: SlowRead
    """What it waited for longest."""


class PendingBatch:
    """A batch whose rows are being filled.

    Args:
        request: what it will hold.
        num_bytes: memory it takes.
        collect: gives the arrays of the batch once all rows are filled.
        pieces: the work it waits for.
    """

    def __init__(
        self,
        request: BatchRequest,
        *,
        num_bytes: int,
        collect: Callable[[], Batch],
        pieces: Sequence[Piece],
    ) -> None:
        self.request, self.num_bytes, self.pieces = request, num_bytes, pieces
        self.done = Signal()
        self._collect, self._missing = collect, len(pieces)
        self._errors: dict[int, BaseException] = {}
        self._slowest = SlowRead(seconds=0.0, samples=())
        self._lock = threading.Lock()
        self.cancelled = False
        """Nobody wants it any more: pieces still queued do nothing."""
        if not pieces:
            self.done.set()

    def run(self, number: int) -> None:
        """Do one piece of work; whatever it raises waits for the batch's turn."""
        piece, started = self.pieces[number], time.perf_counter()
        try:
            if not self.cancelled:
                piece.work()
        except BaseException as error:  # noqa: BLE001 - raised again where the batch is taken
            self._errors[number] = as_error(error)
        seconds = time.perf_counter() - started
        with self._lock:
            if seconds > self._slowest.seconds:
                self._slowest = SlowRead(seconds=seconds, samples=tuple(piece.samples))
            self._missing -= 1
            finished = not self._missing
        if finished:
            # Work holds buffers; a batch that is kept for its errors must not.
            self.pieces = ()
            self.done.set()

    def take(self) -> MadeBatch:
        """Give the finished batch, or raise what went wrong first in row order.

        Raises:
            DamagedSamplesError: all of them, where nothing else went wrong.
        """
        if self._errors:
            error = self._first_error()
            try:
                raise error
            finally:
                # Its traceback leads back here: a circle that would keep the batch's memory.
                self._errors.clear()
                del error
        return MadeBatch(
            request=self.request,
            batch=self._collect(),
            num_bytes=self.num_bytes,
            slowest=self._slowest,
        )

    def _first_error(self) -> BaseException:
        """Give the first error in row order; of damage alone, all there is."""
        errors = [self._errors[number] for number in sorted(self._errors)]
        for error in errors:
            if not isinstance(error, DamagedSamplesError):
                return error
        damage = [error for error in errors if isinstance(error, DamagedSamplesError)]
        return DamagedSamplesError({n: what for error in damage for n, what in error.found.items()})
