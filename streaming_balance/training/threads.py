"""Reader threads: they take pieces of work from a queue and never outlive their owner."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable

from streaming_balance.errors import BalanceError

Work = Callable[[], None]

# How often someone who waits looks whether the threads are still there.
LIVENESS_SECONDS = 1.0
# How long the interpreter waits, when it exits, for what the threads are in the middle of.
EXIT_SECONDS = 1.0
# How often someone who waits for the system looks again; an exit takes some of these.
POLL_SECONDS = 0.0005


class Signal:
    """Says once that something is done.

    `threading.Event` does the same, but an interrupt (Ctrl-C) that meets its `wait` between two of
    its lines leaves its inner lock taken, and whoever sets or awaits it later hangs. Here every
    step that blocks is one call that takes nothing with it when it is interrupted.

    Examples:
        >>> done = Signal()
        >>> done.wait(0.0), done.set(), done.wait(0.0)
        (False, None, True)
    """

    __slots__ = ("_done", "_wake")

    def __init__(self) -> None:
        self._done = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        """Say it."""
        self._done = True
        self._wake.put(None)

    def is_set(self) -> bool:
        """Tell whether it was said."""
        return self._done

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until it is said, but no longer than this; one waits at a time.

        Returns:
            Whether it was said.
        """
        if not self._done:
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=timeout_seconds)
        return self._done


class ReaderThreads:
    """A fixed number of threads that run pieces of work in the order they were given.

    The threads know the queue and nothing else, so they keep no loader alive. They end when the
    owner closes them, is collected, or the interpreter exits; only closing waits until they have.

    Args:
        count: number of threads, at least 1.
        prepare: run once in every thread, before its first piece of work.
    """

    def __init__(self, count: int, *, prepare: Work | None = None) -> None:
        self.process = os.getpid()
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_run,
                args=(self._work, prepare),
                name=f"streaming-balance-reader-{n}",
                daemon=True,
            )
            for n in range(count)
        ]
        # Collection may come at any moment: in a reader thread, or while somebody holds a lock that
        # a reader thread waits for. So it tells the threads to end and waits for none.
        self._stop = weakref.finalize(self, _stop, self._work, count, self.process)
        for thread in self._threads:
            thread.start()
            _started.add(thread)
        _owners.add(self)

    def submit(self, work: Work) -> None:
        """Queue a piece of work; it must not raise."""
        self._work.put(work)

    def wait(self, done: Signal) -> None:
        """Wait until work is done.

        Raises:
            BalanceError: the threads are gone, so that it never will be: after a fork, say.
        """
        while not done.wait(LIVENESS_SECONDS):
            if not all(thread.is_alive() for thread in self._threads):
                raise BalanceError(
                    f"the reader threads of process {self.process} are gone (this is process "
                    f"{os.getpid()}). Begin a new iteration in the process that uses the loader."
                )

    def close(self) -> None:
        """End the threads and wait for them; may be called twice."""
        self._stop()
        if os.getpid() != self.process:
            return
        for thread in self._threads:
            # A transform may close its own loader.
            if thread is not threading.current_thread():
                thread.join()
        await_exits()


def _run(work: queue.SimpleQueue[Work | None], prepare: Work | None) -> None:
    """Do pieces of work until told to stop."""
    if prepare is not None:
        prepare()
    while (piece := work.get()) is not None:
        piece()
        # A finished piece holds buffers; waiting for the next one must not keep them.
        del piece


def _stop(work: queue.SimpleQueue[Work | None], count: int, process: int) -> None:
    """Drop what is queued and tell every thread to stop."""
    if os.getpid() != process:
        return
    while not work.empty():
        try:
            work.get_nowait()
        except queue.Empty:
            break
    for _ in range(count):
        work.put(None)


def await_exits() -> None:
    """Wait until the system has let go of reader threads that Python has finished.

    Joining a thread does not wait for what libraries do when it exits. Intel's MKL gives back its
    memory there; a process forked in the middle of that spins for ever in its first transform.
    """
    deadline = time.monotonic() + EXIT_SECONDS
    for thread in list(_started):
        place = f"/proc/self/task/{thread.native_id}"
        # Where there is no such folder, as on macOS, nothing is to be seen.
        while not thread.is_alive() and os.path.exists(place):  # noqa: PTH110 - called in a loop
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)


_owners: weakref.WeakSet[ReaderThreads] = weakref.WeakSet()
_started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def _end_at_exit() -> None:
    """Let threads finish what they are in the middle of, but not hold up the exit."""
    for owner in list(_owners):
        owner._stop()
    deadline = time.monotonic() + EXIT_SECONDS
    for thread in list(_started):
        thread.join(max(0.0, deadline - time.monotonic()))


atexit.register(_end_at_exit)
