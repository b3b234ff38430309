"""Threads and processes that die: an error that says which and how, soon, and nothing is lost."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from streaming_balance.errors import BalanceError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.training.cohorts import cohort, packed, seen, take

Transform = Callable[[dict[str, Any]], dict[str, Any]]

# What the catalogue of faults allows, and what a hang would be.
SECONDS = 5.0
READER = r"streaming-balance-reader-\d"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """9 HGG and 5 LGG patients."""
    return packed(tmp_path_factory.mktemp("deaths") / "cohort", cohort())


def loader_of(shards: ShardSet, transform: Transform | None = None, **how: Any) -> BalancedLoader:
    """Build the loader all tests use."""
    settings: dict[str, Any] = {"global_batch_size": 4, "balance": "class_balanced", "seed": 6}
    return train_loader(shards, transform=transform, **settings | {"num_threads": 2} | how)


@pytest.fixture(scope="module")
def expected(shards: ShardSet) -> list[Any]:
    """The first batches of a run in which nobody dies."""
    with loader_of(shards) as loader:
        return take(loader, 24)


class Once:
    """Does something fatal to the sample that is first asked for, and nothing to all others.

    A file remembers that it has: every thread and process has a copy of its own of this.
    """

    def __init__(self, folder: Path, fatal: Callable[[], None]) -> None:
        self.mark, self.fatal = folder / "done", fatal

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Give the sample as it is, if at all."""
        if sample["key"] == "L02":
            try:
                self.mark.touch(exist_ok=False)
            except FileExistsError:
                return sample
            self.fatal()
        return sample


def raising(error: type[BaseException], *arguments: object) -> Callable[[], None]:
    """Make what raises something."""

    def fatal() -> None:
        raise error(*arguments)

    return fatal


def until_an_error(loader: BalancedLoader, got: list[Any]) -> tuple[BalanceError, float]:
    """Iterate until an error; give it, and the seconds it took to come after the last batch."""
    while True:
        begun = time.monotonic()
        try:
            for batch in loader:
                got.append(seen(batch))
                begun = time.monotonic()
        except BalanceError as error:
            return error, time.monotonic() - begun


@pytest.mark.parametrize(
    ("fatal", "what"),
    [
        (raising(SystemExit, 123), "SystemExit with status 123"),
        (raising(SystemExit), "SystemExit with status 0"),
        (raising(SystemExit, "no licence"), "SystemExit with status 1: no licence"),
        (raising(KeyboardInterrupt), "KeyboardInterrupt"),
        (raising(GeneratorExit), "GeneratorExit"),
    ],
    ids=["123", "0", "text", "interrupt", "generator"],
)
def test_an_exit_in_a_reader_thread_names_thread_status_and_sample_and_the_loader_goes_on(
    shards: ShardSet, expected: list[Any], tmp_path: Path, fatal: Callable[[], None], what: str
) -> None:
    got: list[Any] = []
    with loader_of(shards, Once(tmp_path, fatal)) as loader:
        error, seconds = until_an_error(loader, got)
        assert seconds < SECONDS
        assert str(error).startswith(f"{what} was raised in streaming-balance-reader-")
        assert any("was given sample 'L02' at epoch 0, step" in note for note in error.__notes__)
        assert type(error.__cause__).__name__ == what.split()[0].rstrip(":")
        assert loader.state_dict()["position"] == {"epoch": 0, "step": len(got)}
        got += take(loader, 24 - len(got))
    assert got == expected


def test_a_reader_thread_that_ends_by_itself_is_named_and_replaced(
    shards: ShardSet, expected: list[Any]
) -> None:
    before = threading.active_count()
    with loader_of(shards) as loader:
        got = take(loader, 3)
        for status in (5, 6, 7):
            loader._engine._threads.submit(raising(SystemExit, status))  # type: ignore[union-attr]
            error, seconds = until_an_error(loader, got)
            assert seconds < SECONDS
            assert error.__notes__[0].rstrip().endswith(f"SystemExit: {status}")
            assert f"SystemExit with status {status}" in str(error)
            assert "ended by itself (streaming-balance-reader-" in str(error)
            got += take(loader, 2)
            assert threading.active_count() == before + 2
        got += take(loader, 24 - len(got))
    assert got == expected
    assert threading.active_count() == before


def segfault() -> None:
    """Read where nothing is."""
    ctypes.string_at(0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("fatal", "ending"),
    [
        (raising(SystemExit, 123), "SystemExit with status 123 was raised in"),
        (segfault, "was ended by SIGSEGV before the batch of epoch 0, step"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was ended by SIGKILL before the batch"),
    ],
    ids=["123", "segfault", "killed"],
)
def test_a_worker_that_dies_in_a_sample_says_how_and_the_loader_goes_on(
    shards: ShardSet,
    expected: list[Any],
    tmp_path: Path,
    fatal: Callable[[], None],
    ending: str,
    num_threads: int,
) -> None:
    got: list[Any] = []
    once = Once(tmp_path, fatal)
    with loader_of(shards, once, workers=2, num_threads=num_threads) as loader:
        error, seconds = until_an_error(loader, got)
        assert ending in str(error)
        assert seconds < SECONDS
        assert loader.state_dict()["position"] == {"epoch": 0, "step": len(got)}
        got += take(loader, 24 - len(got))
    assert got == expected
    assert psutil.Process().children(recursive=True) == []
