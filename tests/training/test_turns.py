"""One thread at a time asks a loader for batches; a second one is told so and nothing is lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from streaming_balance.errors import BalanceError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import train_loader
from streaming_balance.training.turns import Turn

DEADLINE_SECONDS = 30


class Gate:
    """A batch transform that waits inside the thread that iterates."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.entered.set()
        assert self.open.wait(DEADLINE_SECONDS)
        return batch


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """Start work in a thread."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_second_thread_is_refused_while_the_first_waits_and_gets_batches_later(
    small: ShardSet,
) -> None:
    gate = Gate()
    got: list[tuple[int, int]] = []
    with train_loader(
        small, global_batch_size=4, seed=1, num_threads=1, batch_transform=gate
    ) as loader:
        iterator = iter(loader)

        def take() -> None:
            batch = next(iterator)
            got.append((batch["epoch"], batch["step"]))

        thread = in_thread(take)
        assert gate.entered.wait(DEADLINE_SECONDS)
        for _ in range(2):
            with pytest.raises(BalanceError, match="already in use by another thread"):
                next(iterator)
        with pytest.raises(BalanceError, match="already has an iterator in use"):
            iter(loader)
        gate.open.set()
        thread.join()
        take()
    assert got == [(0, 0), (0, 1)]


def test_threads_that_ask_again_after_a_refusal_share_the_epoch_without_a_duplicate(
    small: ShardSet,
) -> None:
    steps: list[int] = []
    with train_loader(small, global_batch_size=2, seed=1, num_threads=2) as loader:
        iterator = iter(loader)

        def drain() -> None:
            while True:
                try:
                    steps.append(next(iterator)["step"])
                except BalanceError:
                    continue
                except StopIteration:
                    return

        for thread in [in_thread(drain) for _ in range(4)]:
            thread.join()
        assert sorted(steps) == list(range(len(loader)))
        assert loader.stats()["samples"] == 2 * len(loader)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failed_batch_leaves_the_turn_to_any_thread(
    small: ShardSet, error: type[BaseException]
) -> None:
    def failing(batch: dict[str, Any]) -> dict[str, Any]:
        if threading.current_thread() is threading.main_thread():
            raise error
        return batch

    got: list[int] = []
    with train_loader(small, global_batch_size=4, num_threads=1, batch_transform=failing) as loader:
        iterator = iter(loader)
        with pytest.raises(error):
            next(iterator)
        in_thread(lambda: got.append(next(iterator)["step"])).join()
    assert got == [0]


def test_who_was_interrupted_on_the_way_in_is_in_nobody_s_way_when_it_comes_back() -> None:
    turn = Turn()
    turn.__enter__()  # and never left: what an interrupt right here leaves behind
    with turn:
        pass
    entered: list[bool] = []

    def enter() -> None:
        with turn:
            entered.append(True)

    in_thread(enter).join()
    assert entered == [True]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_was_inside_goes_ahead() -> None:
    turn, entered, leave = Turn(), threading.Event(), threading.Event()

    def stay() -> None:
        with turn:
            entered.set()
            leave.wait(DEADLINE_SECONDS)

    thread = in_thread(stay)
    assert entered.wait(DEADLINE_SECONDS)
    child = os.fork()
    if not child:
        try:
            with turn:
                os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
