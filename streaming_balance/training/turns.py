"""One thread at a time may ask for a batch."""

from __future__ import annotations

import os
import threading
from types import TracebackType

from streaming_balance.errors import BalanceError


class Turn:
    """Lets one thread in and refuses others meanwhile, as a running generator does.

    Not a lock: an interrupt between taking a lock and entering the block it guards leaves it taken,
    and a fork copies it taken. Here stands who is in, so that whoever finds itself, or a process
    that is not this one, goes ahead.

    Examples:
        >>> turn = Turn()
        >>> with turn:
        ...     pass
    """

    def __init__(self) -> None:
        self._inside: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> None:
        mine = (os.getpid(), threading.get_ident())
        # One call that cannot be interrupted: finds who is inside, or puts this thread there.
        inside = self._inside.setdefault("thread", mine)
        if inside[0] != mine[0]:
            self._inside["thread"] = mine
        elif inside != mine:
            raise BalanceError(
                "this loader is already in use by another thread; like a generator, it gives one "
                "batch at a time. Call next() in one thread, or build a loader for each."
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._inside.clear()
