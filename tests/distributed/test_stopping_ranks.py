"""Preemption and deaths under torchrun: all stop after one step, nothing is lost or left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest

from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import PROJECT_ROOT, cohort, packed

Event = dict[str, Any]
Place = tuple[int, int]
# Where it stands, and which key is in which slot.
GlobalBatch = tuple[Place, list[tuple[int, str]]]

DEADLINE_SECONDS = 120
# torchrun kills what has not ended 30 seconds after the signal.
SAVING_SECONDS = 5.0
LEAVING_SECONDS = 60.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """14 patients to train on, in global batches of 7."""
    return packed(tmp_path_factory.mktemp("stopping") / "cohort", cohort())


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files of a job: the path of a socket has room for 100 letters."""
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


class Job:
    """A program on several ranks of this machine under torchrun, ended at the deadline.

    Args:
        shards: what it trains on.
        out: folder for its state and its errors.
        num_ranks: number of ranks.
        arguments: more for the program.
    """

    def __init__(self, shards: ShardSet, out: Path, num_ranks: int, *arguments: object) -> None:
        out.mkdir()
        self.out, self.num_ranks = out, num_ranks
        self.events: list[Event] = []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={num_ranks}", "-m", "tests.distributed.stopping_program"]
        with (out / "errors.txt").open("w") as errors:
            self.agent = subprocess.Popen(
                [*command, str(shards.path), str(out), *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=PROJECT_ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT_ROOT)},
            )
        self._alarm = threading.Timer(DEADLINE_SECONDS, self._kill)
        self._alarm.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._alarm.cancel()
        self._kill()
        assert self.agent.stdout is not None
        self.agent.stdout.close()

    @property
    def errors(self) -> str:
        """What all its processes wrote to stderr so far."""
        return (self.out / "errors.txt").read_text()

    @property
    def processes(self) -> list[int]:
        """The ranks and their workers, as they said when they began."""
        begun = self.named("begun")
        return [pid for event in begun for pid in (event["process"], *event["workers"])]

    def named(self, name: str) -> list[Event]:
        """Give the events of one name, one rank after another."""
        return sorted((e for e in self.events if e["event"] == name), key=lambda e: e["rank"])

    def read_until(self, enough: Callable[[], bool]) -> None:
        """Follow the events until there are enough of them."""
        assert self.agent.stdout is not None
        while not enough():
            line = self.agent.stdout.readline()
            assert line, f"the job ended at {self.events[-9:]}: {self.errors[-3000:]}"
            self.events.append(json.loads(line))

    def read_until_all_took(self, batches: int) -> None:
        """Follow the events until every rank has had so many batches."""
        ranks = range(self.num_ranks)
        self.read_until(
            lambda: all(
                sum(e["rank"] == rank for e in self.named("batch")) >= batches for rank in ranks
            )
        )

    def finish(self) -> int:
        """Follow the events to the end; give the exit status of torchrun."""
        assert self.agent.stdout is not None
        self.events += map(json.loads, self.agent.stdout)
        return self.agent.wait(DEADLINE_SECONDS)

    def global_batches(self) -> list[GlobalBatch]:
        """Unite the parts of the ranks, for all batches that each of them had."""
        parts = itertools.groupby(self.named("batch"), key=lambda event: event["rank"])
        batches = []
        for whole in zip(*(list(own) for _, own in parts), strict=False):
            (place,) = {tuple(part["place"]) for part in whole}
            pairs = [pair for part in whole for pair in zip(part["slot"], part["key"], strict=True)]
            batches.append((place, sorted(pairs)))
        return batches

    def _kill(self) -> None:
        """End what is left of it."""
        for pid in (self.agent.pid, *self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()


def straight(shards: ShardSet, count: int, state: Event | None = None) -> list[GlobalBatch]:
    """What one process gets that nobody interrupts, from the beginning or from a state."""
    got: list[GlobalBatch] = []
    with train_loader(
        shards, global_batch_size=7, balance="class_balanced", seed=5, rank=0, num_ranks=1
    ) as loader:
        if state is not None:
            loader.load_state_dict(state)
        while len(got) < count:
            for batch in loader:
                pairs = sorted(zip(batch["slot"].tolist(), batch["key"], strict=True))
                got.append(((batch["epoch"], batch["step"]), pairs))
    return got[:count]


def alive(processes: list[int]) -> list[int]:
    """List those that have not ended."""
    return [pid for pid in processes if psutil.pid_exists(pid)]


def left_in(temporary: Path) -> list[Path]:
    """List what a job left among temporary files; torchrun leaves a folder for logs."""
    return [path for path in temporary.iterdir() if not path.name.startswith("torchelastic_")]


def shared_memory() -> set[str]:
    """List what is in shared memory."""
    return {path.name for path in Path("/dev/shm").glob("*")}


def left_in_shared_memory(before: set[str], processes: list[int]) -> list[str]:
    """List what these processes left there: torch names it after the process that made it."""
    mine = {str(pid) for pid in processes}
    return [name for name in shared_memory() - before if mine & set(name.split("_"))]


def assert_all_stopped_alike(job: Job) -> Event:
    """Check that all ranks saved the same state after the same step; give what rank 0 said."""
    saved = job.named("saved")
    assert [event["rank"] for event in saved] == list(range(job.num_ranks)), job.errors[-3000:]
    assert [event["rank"] for event in job.named("done")] == list(range(job.num_ranks))
    assert all(event | {"rank": 0} == saved[0] for event in saved)
    assert json.loads((job.out / "state.json").read_text()) == saved[0]["state"]
    for rank in range(job.num_ranks):
        *_, last = (event for event in job.named("batch") if event["rank"] == rank)
        assert last["place"] == saved[0]["place"]
    return saved[0]


def test_sigterm_to_one_rank_or_to_torchrun_stops_all_after_one_step_and_nothing_is_lost(
    shards: ShardSet, tmp_path: Path, temporary: Path
) -> None:
    before = shared_memory()
    with Job(shards, tmp_path / "two", 2) as job:
        job.read_until_all_took(3)
        sent = time.time()
        os.kill(job.named("begun")[1]["process"], signal.SIGTERM)
        assert job.finish() == 0, job.errors[-3000:]
        assert assert_all_stopped_alike(job)["asked_by"] == 1
        state = job.out / "state.json"
        assert state.stat().st_mtime - sent < SAVING_SECONDS
        two, processes = job.global_batches(), job.processes

    # Resumed on one rank more, with worker processes, which torchrun signals as well as the ranks.
    with Job(shards, tmp_path / "three", 3, "--workers", 1, "--state", state) as job:
        job.read_until_all_took(3)
        sent = time.time()
        job.agent.terminate()
        assert job.finish() == 1
        assert "got signal: 15" in job.errors
        saved = assert_all_stopped_alike(job)
        assert (job.out / "state.json").stat().st_mtime - sent < SAVING_SECONDS
        assert len(job.processes) == 6
        three, processes = job.global_batches(), processes + job.processes

    got = two + three
    uninterrupted = straight(shards, len(got) + 5)
    assert got == uninterrupted[: len(got)]
    assert straight(shards, 5, saved["state"]) == uninterrupted[len(got) :]
    assert alive(processes) == []
    assert left_in(temporary) == []
    assert left_in_shared_memory(before, processes) == []


def test_a_killed_rank_ends_the_others_by_name_and_the_last_checkpoint_goes_on_exactly(
    shards: ShardSet, tmp_path: Path, temporary: Path
) -> None:
    before = shared_memory()
    with Job(shards, tmp_path / "job", 2) as job:
        job.read_until(lambda: len(job.named("checkpoint")) >= 2)
        victim = job.named("begun")[1]["process"]
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        assert job.finish() == 1
        assert time.monotonic() - killed < LEAVING_SECONDS
        _, _, first_failure = job.errors.partition("Root Cause (first observed failure):")
        assert "rank      : 1 (local_rank: 1)" in first_failure
        assert f"Signal 9 (SIGKILL) received by PID {victim}" in first_failure
        assert "BalanceError: rank 0 asked all 2 ranks whether to stop (call " in job.errors
        assert alive([job.agent.pid, *job.processes]) == []
        assert left_in(temporary) == []
        assert left_in_shared_memory(before, job.processes) == []
        assert sorted(path.name for path in job.out.iterdir()) == ["errors.txt", "state.json"]
        got = job.global_batches()
        state = json.loads((job.out / "state.json").read_text())
    uninterrupted = straight(shards, len(got) + 9)
    assert got == uninterrupted[: len(got)]
    place = (state["position"]["epoch"], state["position"]["step"])
    following = [place for place, _ in uninterrupted].index(place)
    assert straight(shards, 9, state) == uninterrupted[following : following + 9]
