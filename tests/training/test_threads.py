"""Reader threads: they do what they are given, and never outlive their owner."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest
import torch

from streaming_balance.errors import BalanceError
from streaming_balance.training.threads import LostWorkError, ReaderThreads, Signal
from tests.training.cohorts import run_python

DEADLINE = 10.0


def readers() -> list[threading.Thread]:
    """List the reader threads of this process."""
    return [t for t in threading.enumerate() if t.name.startswith("streaming-balance-reader")]


def test_one_thread_does_the_work_in_the_order_given() -> None:
    threads, done, order = ReaderThreads(1), Signal(), list[int]()
    for number in range(100):
        threads.submit(lambda number=number: order.append(number))  # type: ignore[misc]
    threads.submit(done.set)
    threads.wait(done)
    threads.close()
    assert order == list(range(100))


def test_closing_waits_for_work_under_way_and_drops_what_is_queued() -> None:
    threads = ReaderThreads(1)
    begun, release = threading.Event(), threading.Event()
    finished: list[str] = []

    def first() -> None:
        begun.set()
        release.wait(DEADLINE)
        finished.append("first")

    threads.submit(first)
    threads.submit(lambda: finished.append("queued"))
    assert begun.wait(DEADLINE)
    threading.Timer(0.05, release.set).start()
    threads.close()
    assert finished == ["first"]
    threads.close()
    assert not any(thread.is_alive() for thread in threads._threads)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system lists no threads")
def test_after_closing_the_system_has_no_such_threads_any_more() -> None:
    """A child forked while MKL tidies up after a thread would hang in its first transform."""
    for _ in range(100):
        threads = ReaderThreads(4)
        done = [Signal() for _ in range(4)]
        for signal in done:
            threads.submit(lambda signal=signal: (torch.fft.fft(torch.ones(60)), signal.set())[1])  # type: ignore[misc]
        for signal in done:
            threads.wait(signal)
        places = [Path(f"/proc/self/task/{thread.native_id}") for thread in threads._threads]
        threads.close()
        assert not [place for place in places if place.exists()]


def test_waiting_for_threads_that_are_gone_is_an_error_not_a_hang() -> None:
    threads = ReaderThreads(2)
    threads.close()
    started = time.monotonic()
    with pytest.raises(BalanceError, match=r"reader threads of process .* are gone"):
        threads.wait(Signal())
    assert time.monotonic() - started < 5


def test_a_thread_that_ends_by_itself_is_told_to_who_waits_even_if_the_others_did_the_work() -> (
    None
):
    threads, done, named = ReaderThreads(2), Signal(), list[threading.Thread]()

    def leave() -> None:
        named.append(threading.current_thread())
        begun.set()
        raise SystemExit(7)

    begun = threading.Event()
    threads.submit(leave)
    assert begun.wait(DEADLINE)
    named[0].join(DEADLINE)
    threads.submit(done.set)
    with pytest.raises(LostWorkError, match=rf"{named[0].name}: SystemExit with status 7") as error:
        threads.wait(done)
    assert "raise SystemExit(7)" in error.value.__notes__[0]
    threads.wait(done)
    assert [thread.is_alive() for thread in threads._threads] == [True, True]
    threads.close()


def test_threads_that_cannot_prepare_themselves_are_named_every_time() -> None:
    """Not only the first time: their places are taken by others, which fail alike."""

    def prepare() -> None:
        raise MemoryError("no stack left")

    before = len(readers())
    threads = ReaderThreads(1, prepare=prepare)
    for _ in range(3):
        started = time.monotonic()
        with pytest.raises(LostWorkError, match=r"reader-0: MemoryError: no stack left"):
            threads.wait(Signal())
        assert time.monotonic() - started < 5
    threads.close()
    assert len(readers()) == before


def test_threads_the_system_does_not_start_are_an_error_that_names_the_setting() -> None:
    script = """
import threading
from streaming_balance.errors import BalanceError
from streaming_balance.training.threads import ReaderThreads
def stack(megabytes): threading.stack_size(megabytes << 20)
threads = ReaderThreads(1)
stack(1 << 26)
for attempt in range(2):
    try: ReaderThreads(2)
    except BalanceError as error: print(error)
threads.submit(exit)
for attempt in range(2):
    try: threads.wait(threading.Event())
    except BalanceError as error: print(error, "/", error.__cause__)
stack(0)
try: threads.wait(threading.Event())
except BalanceError as error: print(error)
done = threading.Event()
threads.submit(done.set)
threads.wait(done)
print(threading.active_count())
"""
    ended = run_python(script)
    first, second, *later, count = ended.stdout.splitlines() or [ended.stderr]
    assert first == second
    assert first.startswith("reader thread 0 did not start (can't start new thread).")
    assert "lower num_threads" in first
    assert "SystemExit with status 0" in later[0]
    assert all(first in line for line in later[:2])
    assert len(later) == 3
    assert count == "2"


def test_threads_end_when_their_owner_is_forgotten() -> None:
    before = set(readers())
    threads = ReaderThreads(3)
    mine = set(readers()) - before
    assert len(mine) == 3
    del threads
    for thread in mine:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_collecting_an_owner_in_one_of_its_threads_waits_for_no_other_thread() -> None:
    # Thread A collects the owner while it holds a lock that thread B waits for.
    lock, holding, finished = threading.Lock(), threading.Event(), threading.Semaphore(0)

    class Owner:
        def __init__(self) -> None:
            self.threads, self.circle = ReaderThreads(2), self

    def collecting() -> None:
        with lock:
            holding.set()
            waiting.wait(DEADLINE)
            gc.collect()
        finished.release()

    def needing_the_lock() -> None:
        holding.wait(DEADLINE)
        waiting.set()
        with lock:
            finished.release()

    waiting = threading.Event()
    gc.disable()
    try:
        owner = Owner()
        owner.threads.submit(collecting)
        owner.threads.submit(needing_the_lock)
        del owner
        assert finished.acquire(timeout=DEADLINE)
        assert finished.acquire(timeout=DEADLINE)
    finally:
        gc.enable()


def test_closing_inside_a_reader_thread_does_not_wait_for_itself() -> None:
    threads, done = ReaderThreads(2), Signal()

    def close() -> None:
        threads.close()
        done.set()

    threads.submit(close)
    assert done.wait(DEADLINE)


def test_the_interpreter_exits_soon_though_a_thread_is_stuck() -> None:
    script = """
import threading, time
from streaming_balance.training.threads import ReaderThreads
threads, begun = ReaderThreads(2), threading.Event()
def stuck():
    begun.set()
    threading.Event().wait()
threads.submit(stuck)
begun.wait()
import atexit
started = time.monotonic()
atexit._run_exitfuncs()
print(time.monotonic() - started)
"""
    ended = run_python(script)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 2
    assert ended.stderr == ""
