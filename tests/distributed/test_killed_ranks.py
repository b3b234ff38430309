"""Real processes, killed at random moments: on 2, then 3, then 1 rank, nothing is lost or changed.

Every sample is compared by a hash of the voxels that the training loop received, every saved state
by a count of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xxhash

from streaming_balance.report.audit import audit_run
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.legs import plan_of
from streaming_balance.training.loader import train_loader
from streaming_balance.training.state import LoaderState, delivered
from tests.distributed.killed_ranks_program import told
from tests.training.cohorts import PROJECT_ROOT, cohort, packed

DEADLINE_SECONDS = 90
# Worker processes look every five seconds whether their rank is alive.
GONE_SECONDS = 30.0
RANKS = (2, 3, 1)
ROUNDS = 20
NUM_BATCHES = 48
HGG, LGG = 16, 12
BATCH = 5
Place = tuple[int, int]
# Slot -> sample number and hash of its voxels.
Members = dict[int, tuple[int, str]]
BALANCES: list[Any] = [
    "class_balanced",
    None,
    {"name": "power", "alpha": 0.5, "last": "short"},
    {"name": "downsample", "rotate": True},
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A global batch, or a rank's part of one."""

    place: Place
    """Epoch and step."""
    members: Members
    """Who was delivered, by slot."""

    @classmethod
    def of(cls, line: dict[str, Any]) -> Batch:
        """Read what a rank wrote down."""
        members = zip(line["sample"], line["voxels"], strict=True)
        return cls(
            place=(line["place"][0], line["place"][1]),
            members=dict(zip(line["slot"], members, strict=True)),
        )


class Launcher:
    """The process that forks ranks, and all that became of them.

    Args:
        temporary: folder for temporary files of the ranks.
    """

    def __init__(self, temporary: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.killed_ranks_program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
            start_new_session=True,
        )
        self.leg = 0
        """Number of the leg that was started last."""
        self.forked: set[int] = {self.process.pid}
        """All processes there ever were, as far as they told."""

    def order(self, **order: Any) -> None:
        """Give an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"leg": self.leg, **order}) + "\n")
        self.process.stdin.flush()

    def event(self, *names: str) -> dict[str, Any]:
        """Wait for an event of these names in the leg that runs."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            event: dict[str, Any] = json.loads(line)
            self.forked |= {*event.get("workers", []), *event.get("processes", [])}
            if event["leg"] == self.leg and event["event"] in names:
                return event
        raise AssertionError(f"the launcher ended before {names}")

    def start(self, **order: Any) -> list[int]:
        """Start the ranks of another leg, and give their processes."""
        self.leg += 1
        self.order(**order)
        processes: list[int] = self.event("started")["processes"]
        return processes

    def bury(self, processes: list[int]) -> list[int]:
        """Wait until processes have ended, and give how."""
        self.order(bury=processes)
        statuses: list[int] = self.event("buried")["statuses"]
        return statuses

    def family(self) -> list[psutil.Process]:
        """List what still runs of it, also what lost its parent."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = os.getsid(process.pid) == self.process.pid
                # Whoever has ended and lost its parent may wait for ever to be noticed.
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files: the path of a socket has room for a hundred letters."""
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        yield Path(folder)


@pytest.fixture
def launcher(temporary: Path) -> Iterator[Launcher]:
    """A launcher, which has left nothing behind when the test is over."""
    before = in_shared_memory()
    launcher = Launcher(temporary)
    with launcher.process:
        try:
            yield launcher
            assert launcher.process.stdin is not None
            launcher.process.stdin.close()
            assert launcher.process.wait(GONE_SECONDS) == 0
            psutil.wait_procs(launcher.family(), timeout=GONE_SECONDS)
            assert launcher.family() == []
        finally:
            for process in launcher.family():
                process.kill()
            launcher.process.kill()
    mine = {str(process) for process in launcher.forked}
    left = in_shared_memory() - before
    assert not [name for name in left if mine & set(name.split("_"))]


def in_shared_memory() -> set[str]:
    """List what is in shared memory."""
    folder = Path("/dev/shm")
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def straight_run(shards: ShardSet, how: dict[str, Any]) -> list[Batch]:
    """Give the global batches that one process gets which nobody kills."""
    got: list[Batch] = []
    with train_loader(shards, rank=0, num_ranks=1, **how) as loader:
        while len(got) < NUM_BATCHES:
            got += [Batch.of(told(batch)) for batch in loader]
    return got[:NUM_BATCHES]


class Run:
    """A run that is killed again and again, and what is known of it.

    Args:
        shards: what it trains on.
        out: folder of the run.
        how: settings of its loaders.
        straight: the uninterrupted run.
    """

    def __init__(
        self, shards: ShardSet, out: Path, how: dict[str, Any], straight: list[Batch]
    ) -> None:
        out.mkdir()
        self.shards, self.out, self.how, self.straight = shards, out, how, straight
        self.history: list[Batch] = []
        """Global batches that were received before the state that was saved last."""
        self._audited: set[Path] = set()

    @property
    def states(self) -> list[Path]:
        """States that were saved, in order."""
        return sorted(self.out.glob("state-*.json"))

    def go(self, launcher: Launcher, num_ranks: int, random: np.random.Generator | None) -> None:
        """Start so many ranks from the last state; kill them unless they may run to the end."""
        state, received = None, 0
        if self.states:
            state, received = str(self.states[-1]), int(self.states[-1].stem.split("-")[1])
        processes = launcher.start(
            out=str(self.out),
            folder=str(self.shards.path),
            state=state,
            received=received,
            num_ranks=num_ranks,
            num_batches=NUM_BATCHES,
            loader=self.how,
        )
        if random is None:
            assert launcher.bury(processes) == [0] * num_ranks
        else:
            kill_sometime(launcher, processes, random)
        self.check(launcher.leg, num_ranks, received)

    def check(self, leg: int, num_ranks: int, received: int) -> None:
        """Compare all that a leg's ranks received with the uninterrupted run, and audit."""
        parts = [self.part(leg, rank) for rank in range(num_ranks)]
        united = [Batch(place=batch.place, members={}) for batch in self.straight[received:]]
        for part in parts:
            for batch, whole in zip(part, united, strict=False):
                assert batch.place == whole.place
                assert not batch.members.keys() & whole.members.keys()
                whole.members.update(batch.members)
        steps = [len(part) for part in parts]
        assert max(steps) - min(steps) <= 1
        for batch, wanted in zip(united, self.straight[received:], strict=True):
            assert batch.members.items() <= wanted.members.items()
        whole_steps = self.straight[received : received + min(steps)]
        assert united[: min(steps)] == whole_steps
        self.audit(received, united[: min(steps)])

    def part(self, leg: int, rank: int) -> list[Batch]:
        """Read what a rank received; a line that a kill cut off is none."""
        path = self.out / f"leg-{leg}-{rank}.jsonl"
        if not path.exists():
            return []
        *lines, _ = path.read_text().split("\n")
        return [Batch.of(json.loads(line)) for line in lines]

    def audit(self, received: int, batches: list[Batch]) -> None:
        """Check every state that was saved meanwhile against what was received before it."""
        assert len(self.history) == received
        self.history += batches
        for path in self.states:
            if path in self._audited:
                continue
            self._audited.add(path)
            until = self.history[: int(path.stem.split("-")[1])]
            state = LoaderState.from_dict(json.loads(path.read_text()))
            seen = Counter(sample for batch in until for sample, _ in batch.members.values())
            counts = delivered(plan_of(state, [self.shards]), state).tolist()
            assert counts == [seen[number] for number in range(len(counts))]
            assert state.complete
        saved = max((int(path.stem.split("-")[1]) for path in self.states), default=0)
        # What was received after it is received again.
        self.history = self.history[:saved]


def kill_sometime(launcher: Launcher, processes: list[int], random: np.random.Generator) -> None:
    """Kill all ranks after some batches; sometimes one of them before the others."""
    last = int(random.integers(0, len(processes) * NUM_BATCHES // 2))
    at_work = len(processes)
    for _ in range(last):
        if launcher.event("batch", "done")["event"] == "done":
            at_work -= 1
        if not at_work:
            break
    order = random.permutation(processes).tolist()
    if random.random() < 0.3:
        os.kill(order[0], signal.SIGKILL)
        assert launcher.bury([order.pop(0)])[0] in (0, -signal.SIGKILL)
    for process in order:
        os.kill(process, signal.SIGKILL)
    assert {*launcher.bury(order)} <= {0, -signal.SIGKILL}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """16 HGG and 12 LGG patients, over several shards."""
    folder = tmp_path_factory.mktemp("killed") / "cohort"
    return packed(folder, cohort(hgg=HGG, lgg=LGG), shard_bytes=8192)


def voxel_hashes(shards: ShardSet) -> dict[int, str]:
    """Hash the voxels every sample was made with, as they should arrive."""
    made = {sample.key: sample.image for sample in cohort(hgg=HGG, lgg=LGG)}
    return {
        number: xxhash.xxh3_128_hexdigest(made[key].astype(np.float32).tobytes())
        for number, key in enumerate(shards.keys("train").tolist())
    }


@pytest.mark.timeout(DEADLINE_SECONDS)
def test_two_then_three_then_one_ranks_killed_at_random_moments_give_the_uninterrupted_run(
    shards: ShardSet, tmp_path: Path, launcher: Launcher, temporary: Path
) -> None:
    settings = [
        {"global_batch_size": BATCH, "seed": 7 + number, "balance": balance, "num_threads": 2}
        for number, balance in enumerate(BALANCES)
    ]
    straight = [straight_run(shards, how) for how in settings]
    hashes = voxel_hashes(shards)
    for batches in straight:
        assert all(hashes[n] == voxel for b in batches for n, voxel in b.members.values())
    for number in range(ROUNDS):
        random = np.random.default_rng([61, number])
        # One thread and one worker process per rank now and then.
        workers = {"workers": 1, "num_threads": 1} if number % 7 == 3 else {}
        kind = number % len(settings)
        run = Run(shards, tmp_path / f"round-{number}", settings[kind] | workers, straight[kind])
        for num_ranks in RANKS[:-1]:
            run.go(launcher, num_ranks, random)
        if number % 2:
            run.go(launcher, RANKS[-1], random)
        run.go(launcher, RANKS[-1], None)
        assert run.history == straight[kind]
        saved = json.loads(run.states[-1].read_text())
        exposure = audit_run(shards, LoaderState.from_dict(saved)).exposure
        samples = Counter(n for batch in run.history for n, _ in batch.members.values())
        keys = shards.patients("train").tolist()
        assert {key: exposure[key] for key in keys} == {k: samples[n] for n, k in enumerate(keys)}
    # Python names the folder for sockets of workers so, and only who lives can remove it.
    assert [path for path in temporary.iterdir() if not path.name.startswith("pymp-")] == []


def damage(shards: ShardSet, number: int) -> None:
    """Flip one bit of what is stored of a sample's voxels."""
    members = shards.table.members("train", "image")
    shard = shards.manifest.shards[int(members.shard[number])]
    with (shards.path / shard.name).open("r+b") as file:
        # Past the header of an .npy file.
        file.seek(int(members.offset[number]) + 140)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.timeout(DEADLINE_SECONDS)
def test_killed_ranks_replace_damaged_samples_as_if_never_killed_and_record_each(
    tmp_path: Path, launcher: Launcher
) -> None:
    shards = packed(tmp_path / "cohort", cohort(hgg=HGG, lgg=LGG), shard_bytes=8192)
    hashes, damaged = voxel_hashes(shards), {3, HGG + 2}
    for sample in damaged:
        damage(shards, sample)
    shards = open_shards(shards.path)
    how = {
        "global_batch_size": BATCH,
        "seed": 3,
        "balance": "class_balanced",
        "num_threads": 2,
        "on_error": "substitute",
    }
    straight = straight_run(shards, how)
    for number in range(4):
        random = np.random.default_rng([62, number])
        workers = {"workers": 1, "num_threads": 1} if number == 1 else {}
        run = Run(shards, tmp_path / f"round-{number}", how | workers, straight)
        for num_ranks in RANKS:
            run.go(launcher, num_ranks, random)
        run.go(launcher, 2, None)
        assert run.history == straight
        state = LoaderState.from_dict(json.loads(run.states[-1].read_text()))
        plan = plan_of(state, [shards])
        expected = []
        for batch in run.history:
            for slot, planned in enumerate(plan.batch(*batch.place).tolist()):
                came, voxel = batch.members[slot]
                assert voxel == hashes[came]
                if planned in damaged:
                    stand_ins = plan.substitutes(*batch.place, slot).tolist()
                    assert came == next(one for one in stand_ins if one not in damaged)
                    expected.append((*batch.place, slot, planned, came))
                else:
                    assert came == planned
        recorded = [
            (one.epoch, one.step, one.slot, one.sample, one.substitute)
            for one in state.substitutions
        ]
        assert len(expected) > 4
        assert recorded == sorted(expected)
