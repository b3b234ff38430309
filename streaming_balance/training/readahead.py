"""Reading ahead of the training loop, by a budget of bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from streaming_balance.errors import BalanceError
from streaming_balance.training.batches import BatchAssembler
from streaming_balance.training.pending import MadeBatch, PendingBatch
from streaming_balance.training.requests import BatchRequest
from streaming_balance.training.state import Position
from streaming_balance.training.threads import LostWorkError, ReaderThreads

# Small batches reach no budget of bytes: hundreds of thousands would be begun before the first is
# given. So many hide any hiccup of the disk, and are begun in milliseconds.
MOST_BATCHES = 32
# Somebody waits for the batch that is given meanwhile: catching up is spread over several calls.
BEGUN_AT_ONCE = 4


class ReadAhead:
    """Keeps the next batches under way, in order, within a budget.

    Work is only begun inside `take`, in the thread that calls it: nothing runs on its own, and what
    is under way after a call is exactly what fits.

    Args:
        assembler: begins batches.
        threads: fill them.
        request: gives what a position asks for, or None past the end of what may be read ahead.
        following: gives the position after a position.
        budget_bytes: most bytes under way; one batch always is, and never more than `MOST_BATCHES`.
    """

    def __init__(
        self,
        assembler: BatchAssembler,
        threads: ReaderThreads,
        *,
        request: Callable[[Position], BatchRequest],
        following: Callable[[Position], Position | None],
        budget_bytes: int,
    ) -> None:
        self._assembler, self._threads = assembler, threads
        self._request, self._following = request, following
        self._budget_bytes = budget_bytes
        self._pending: deque[tuple[Position, PendingBatch]] = deque()
        # What came after the budget was used: it is asked for again when there is room.
        self._refused: tuple[Position, BatchRequest] | None = None
        self.most_bytes = 0
        """Most bytes that were ever under way at once."""

    def take(self, position: Position) -> MadeBatch:
        """Give the batch at a position, and leave the next ones under way.

        Raises:
            ShardError: a sample of this batch could not be read, and none may stand in for it.
            LostWorkError: a thread ended; asking again reads all of this again.
        """
        if self._pending and self._pending[0][0] != position:
            self.clear()
        if not self._pending:
            self._begin(position, self._assembler.settled(self._request(position)))
        pending = self._pending[0][1]
        try:
            self._threads.wait(pending.done)
            # Gone from the queue even if it failed: asking again reads it again.
            self._pending.popleft()
            made = self._assembler.finish(
                pending, submit=self._threads.submit, wait=self._threads.wait
            )
        except LostWorkError:
            # It may belong to any batch under way.
            self.clear()
            raise
        try:
            self._read_on(position)
        except KeyboardInterrupt:
            # Nobody has received the batch; asking again must not read it again.
            if pending.request is made.request:
                self._pending.appendleft((position, pending))
            raise
        return made

    def clear(self) -> None:
        """Forget what is under way."""
        for _, pending in self._pending:
            pending.cancelled = True
        self._pending.clear()
        self._refused = None

    def _read_on(self, delivered: Position) -> None:
        """Begin the batches after what is under way, until the budget is used."""
        last = self._pending[-1][0] if self._pending else delivered
        upcoming = self._following(last)
        try:
            for _ in range(BEGUN_AT_ONCE):
                if upcoming is None:
                    return
                request = self._requested(upcoming)
                if not self._begin(upcoming, request):
                    self._refused = (upcoming, request)
                    return
                upcoming = self._following(upcoming)
        except BalanceError:
            # A batch that cannot even be begun says so when its turn comes, not before.
            return

    def _requested(self, position: Position) -> BatchRequest:
        """Say what a position asks for, planned once even if it had to wait for room."""
        if self._refused is not None and self._refused[0] == position:
            return self._refused[1]
        return self._assembler.settled(self._request(position))

    def _begin(self, position: Position, request: BatchRequest) -> bool:
        """Begin one batch if it fits the budget; the first one always does."""
        if len(self._pending) >= MOST_BATCHES:
            return False
        num_bytes = self._assembler.num_bytes(request)
        under_way = sum(pending.num_bytes for _, pending in self._pending) + num_bytes
        if self._pending and under_way > self._budget_bytes:
            return False
        begun = self._assembler.begin(request, num_bytes=num_bytes, submit=self._threads.submit)
        self._pending.append((position, begun))
        self.most_bytes = max(self.most_bytes, under_way)
        return True
