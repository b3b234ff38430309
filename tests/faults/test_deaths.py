"""Threads and processes that die: an error that says which and how, soon, and nothing is lost."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from streaming_balance.errors import BalanceError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.building import Sample
from tests.training.cohorts import PROJECT_ROOT, cohort, packed, seen, take, voxels

Transform = Callable[[dict[str, Any]], dict[str, Any]]

# Each takes a second or less. A machine that is busy otherwise takes longer, a hang longer still.
SECONDS = 15.0


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


BEGIN = """
import os, signal, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import take
def loader_of(**options):
    settings = {"global_batch_size": 4, "balance": "class_balanced", "seed": 6, "num_threads": 2}
    return train_loader(open_shards(sys.argv[1]), **settings | options)
"""


def test_reader_threads_need_no_shared_memory(tmp_path: Path) -> None:
    isolated = ["unshare", "-m", "-r"]
    room = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run([*isolated, "sh", "-c", room], check=False).returncode:
        pytest.skip("a private /dev/shm needs user namespaces, which this machine does not give")
    samples = [Sample(key=f"P{n}", image=voxels(n, (4, 48, 48, 48))) for n in range(8)]
    shards = packed(tmp_path / "cohort", samples)
    with loader_of(shards, balance=None) as loader:
        plenty = take(loader, 3)
    script = tmp_path / "script.py"
    # Nothing fits there any more; batches of 7 MB are read ahead all the same.
    script.write_text(
        BEGIN
        + """
with open("/dev/shm/full", "wb") as file:
    try:
        while True: file.write(bytes(1 << 16)), file.flush()
    except OSError: pass
with loader_of(balance=None) as loader: print(take(loader, 3))
"""
    )
    command = f"{room} && exec {sys.executable} {script} {shards.path}"
    ended = subprocess.run(
        [*isolated, "sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
        check=False,
    )
    assert ended.stdout == f"{plenty}\n", ended.stderr[-1500:]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files: the path of a socket has room for a hundred letters."""
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("second", ["at once", "while leaving"])
def test_ctrl_c_twice_leaves_no_process_no_shared_memory_and_no_temporary_file(
    shards: ShardSet, temporary: Path, workers: int, second: str
) -> None:
    script = """
import psutil
def slow(sample):
    time.sleep(0.05)
    return sample
with loader_of(transform=slow, workers=int(sys.argv[2])) as loader:
    try:
        for number, batch in enumerate(loader):
            if not number: print(*[p.pid for p in psutil.Process().children()], flush=True)
    finally:
        os.write(1, b"leaving\\n")
"""
    before = {path.name for path in Path("/dev/shm").glob("*")}
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + script, str(shards.path), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT_ROOT,
        start_new_session=True,
    )
    alarm = threading.Timer(60, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        children = [int(pid) for pid in process.stdout.readline().split()]
        assert len(children) == workers
        # As a terminal does: to the whole group.
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        if second == "while leaving":
            assert process.stdout.readline() == "leaving\n"
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
        assert time.monotonic() - started < SECONDS
    finally:
        alarm.cancel()
        process.kill()
    assert "KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert list(temporary.iterdir()) == []
    mine = {str(pid) for pid in (process.pid, *children)}
    left = {path.name for path in Path("/dev/shm").glob("*")} - before
    assert not [name for name in left if mine & set(name.split("_"))]
