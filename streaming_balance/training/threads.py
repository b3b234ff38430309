"""Reader threads: they take pieces of work from a queue and never outlive their owner."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

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


class LostWorkError(BalanceError):
    """Work that was queued will never be done: its thread ended in the middle of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """How a thread ended that nobody told to end."""

    thread: str
    """Its name."""
    cause: str
    """What was raised in it, in a few words."""
    trace: str
    """Where that was."""


class ReaderThreads:
    """A fixed number of threads that run pieces of work in the order they were given.

    The threads know their queues and nothing else, so they keep no loader alive. They end when the
    owner closes them, is collected, or the interpreter exits; only closing waits until they have.
    A thread that ends by itself is an error for whoever waits for work, and another takes its
    place.

    Args:
        count: number of threads, at least 1.
        prepare: run once in every thread, before its first piece of work.

    Raises:
        BalanceError: the system starts no more threads.
    """

    def __init__(self, count: int, *, prepare: Work | None = None) -> None:
        self.process, self._prepare = os.getpid(), prepare
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._deaths: queue.SimpleQueue[Death] = queue.SimpleQueue()
        # Collection may come at any moment: in a reader thread, or while somebody holds a lock that
        # a reader thread waits for. So it tells the threads to end and waits for none.
        self._stop = weakref.finalize(self, _stop, self._work, count, self.process)
        _owners.add(self)
        self._threads: list[threading.Thread] = []
        try:
            for number in range(count):
                self._threads.append(self._new_thread(number))
        except BalanceError:
            self._stop()
            raise

    def submit(self, work: Work) -> None:
        """Queue a piece of work; it must not raise."""
        self._work.put(work)

    def wait(self, done: Signal) -> None:
        """Wait until work is done.

        Raises:
            LostWorkError: it may never be. A thread has ended by itself: what it was doing is lost,
                and new work will be done. Or all of them are gone: after a fork, say.
        """
        while True:
            # Looking at every thread costs more than most waits; the dead say so themselves.
            if not self._deaths.empty():
                self._replace_dead()
            if done.wait(LIVENESS_SECONDS):
                return
            if not all(thread.is_alive() for thread in self._threads):
                self._replace_dead()

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

    def _new_thread(self, number: int) -> threading.Thread:
        """Start one thread."""
        thread = threading.Thread(
            target=_run,
            args=(self._work, self._prepare, self._deaths),
            name=f"streaming-balance-reader-{number}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:
            raise BalanceError(
                f"reader thread {number} did not start ({error}). Every rank and every worker "
                f"process has num_threads of them: lower num_threads, or raise the limits on "
                f"processes (ulimit -u) and memory."
            ) from error
        _started.add(thread)
        return thread

    def _replace_dead(self) -> NoReturn:
        """Start others in the place of threads that ended by themselves, and raise what ended them.

        Raises:
            LostWorkError: always.
        """
        if os.getpid() != self.process or not self._stop.alive:
            raise LostWorkError(
                f"the reader threads of process {self.process} are gone (this is process "
                f"{os.getpid()}). Begin a new iteration in the process that uses the loader."
            )
        deaths: list[Death] = []
        with contextlib.suppress(queue.Empty):
            while True:
                deaths.append(self._deaths.get_nowait())
        causes = ", ".join(f"{death.thread}: {death.cause}" for death in deaths)
        error = LostWorkError(
            f"a reader thread ended by itself ({causes or 'without a word'}). What it was doing is "
            f"lost, and another takes its place: ask for the batch again."
        )
        for death in deaths:
            error.add_note(death.trace)
        # One that has just said so may still be on its way out.
        names = {death.thread for death in deaths}
        for number, thread in enumerate(self._threads):
            if thread.name in names or not thread.is_alive():
                try:
                    self._threads[number] = self._new_thread(number)
                except BalanceError as problem:
                    raise error from problem
        raise error


def _run(
    work: queue.SimpleQueue[Work | None],
    prepare: Work | None,
    deaths: queue.SimpleQueue[Death],
) -> None:
    """Do pieces of work until told to stop."""
    try:
        if prepare is not None:
            prepare()
        while (piece := work.get()) is not None:
            piece()
            # A finished piece holds buffers; waiting for the next one must not keep them.
            del piece
    except BaseException as error:  # noqa: BLE001 - whoever waits for its work is told
        name, trace = threading.current_thread().name, "".join(traceback.format_exception(error))
        deaths.put(Death(thread=name, cause=in_words(error), trace=trace))


def in_words(error: BaseException) -> str:
    """Say what was raised, an exit with its status.

    Examples:
        >>> in_words(SystemExit(123)), in_words(SystemExit("no licence"))
        ('SystemExit with status 123', 'SystemExit with status 1: no licence')
        >>> in_words(MemoryError()), in_words(OSError(5, "Input/output error"))
        ('MemoryError', 'OSError: [Errno 5] Input/output error')
    """
    name, text = type(error).__name__, str(error)
    if isinstance(error, SystemExit):
        # As the interpreter does: nothing is success, and text is a failure to be printed.
        status, text = (error.code or 0, "") if not isinstance(error.code, str) else (1, text)
        name += f" with status {status}"
    return f"{name}: {text}" if text else name


def as_error(error: BaseException) -> BaseException:
    """Give what the training loop hears of something raised in another thread.

    Raised on as it is, an exit that a transform asked for would end the training as if the training
    loop had asked for it, without a word of where that was.

    Returns:
        The error; in place of SystemExit, KeyboardInterrupt and others that are no `Exception`, a
        `BalanceError` that says what it was, in which thread, and where.
    """
    if isinstance(error, Exception):
        return error
    told = BalanceError(
        f"{in_words(error)} was raised in {threading.current_thread().name} of process "
        f"{os.getpid()}, where it ends neither the thread nor the program. Raise an error that "
        f"says what is wrong, such as ValueError, instead."
    )
    for note in getattr(error, "__notes__", []):
        told.add_note(note)
    told.__cause__ = error
    return told


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
