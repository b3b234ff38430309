"""Traps that other loaders fell into, where no other test of ours stands in front of one.

docs/traps.md lists all twenty, with the tests that prove each.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torch.utils.data import DataLoader

import streaming_balance as sb
from streaming_balance.errors import ConfigError, ResumeError, ShardError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.samplers import BalancedBatchSampler, BalancedSampler
from streaming_balance.training.workers import WorkerEngine
from tests.building import Sample, by_key
from tests.training.cohorts import PROJECT_ROOT, as_float, cohort, packed, take, voxels

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

GONE_SECONDS = 20.0
BRATS = np.repeat([0, 1], [210, 75])


@pytest.fixture(scope="module")
def brats(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """210 and 75 patients of eight voxels to train on, 285 to evaluate, in many shards."""
    samples = [
        Sample(
            key=f"{split[0].upper()}{number:03d}",
            image=np.full((1, 2, 2, 2), number, np.int16),
            label=["HGG", "LGG"][int(label)],
            split=split,
        )
        for split in ("train", "val")
        for number, label in enumerate(BRATS)
    ]
    return packed(tmp_path_factory.mktemp("brats") / "cohort", samples, shard_bytes=20_000)


def class_sequence(plan: BalancedPlan, epoch: int, rank: int, num_ranks: int) -> tuple[int, ...]:
    """List the classes of an epoch as one rank receives them."""
    batches = [
        BRATS[plan.rank_batch(epoch, step, rank=rank, num_ranks=num_ranks)]
        for step in range(plan.num_steps(epoch))
    ]
    return tuple(np.concatenate(batches).tolist())


@pytest.mark.parametrize("name", ["class_balanced", "instance_balanced"])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_2_no_two_ranks_and_no_two_epochs_have_the_same_sequence_of_classes(
    name: str, num_ranks: int
) -> None:
    plan = BalancedPlan.from_labels(BRATS, global_batch_size=16, balance=name, seed=3)
    sequences = [
        class_sequence(plan, epoch, rank, num_ranks)
        for epoch in range(4)
        for rank in range(num_ranks)
    ]
    assert len(set(sequences)) == 4 * num_ranks


@pytest.mark.parametrize("per_rank", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_3_every_rank_sees_every_class_in_proportion_with_the_smallest_batches_too(
    num_ranks: int, per_rank: int
) -> None:
    batch = num_ranks * per_rank
    plan = BalancedPlan.from_labels(BRATS, global_batch_size=batch, seed=5)
    rare, drawn = np.zeros(num_ranks), np.zeros(num_ranks)
    for epoch in range(8):
        for rank in range(num_ranks):
            classes = class_sequence(plan, epoch, rank, num_ranks)
            rare[rank] += sum(classes)
            drawn[rank] += len(classes)
    # Half of the draws are LGG. A rank's part is a half where ranks divide the quota; where they do
    # not, it varies by one at each step, at most as much as a fair coin does.
    assert (np.abs(rare / drawn - 0.5) < 5 * 0.5 / np.sqrt(drawn / per_rank)).all()
    if per_rank == 2:
        assert (rare == drawn / 2).all()


@pytest.mark.parametrize("last", ["full", "drop"])
def test_4_each_of_64_ranks_gets_data_or_an_error(brats: ShardSet, last: str) -> None:
    balance = {"name": "class_balanced", "last": last}
    steps, delivered = set(), 0
    for rank in range(64):
        with train_loader(
            brats, global_batch_size=64, balance=balance, rank=rank, num_ranks=64, num_threads=1
        ) as loader:
            batches = list(loader)
            steps.add((len(loader), len(batches)))
            delivered += sum(len(batch["sample"]) for batch in batches)
    # 285 samples are four batches of 64 and a tail of 29, which is filled up or left out.
    assert steps == {(5, 5) if last == "full" else (4, 4)}
    assert delivered == (320 if last == "full" else 256)
    refused = {
        63: (balance, r"global_batch_size is 63 for 64 ranks.*>= 64"),
        64: (balance | {"last": "short"}, r"leaves 29 samples for the last batch.* 64 ranks"),
    }
    for size, (wrong, named) in refused.items():
        with pytest.raises(ConfigError, match=named):
            train_loader(brats, global_batch_size=size, balance=wrong, rank=0, num_ranks=64)


def test_4_with_eight_workers_each_nothing_changes(brats: ShardSet) -> None:
    for rank in (0, 63):
        runs = []
        for workers in (0, 8):
            with train_loader(
                brats, global_batch_size=64, rank=rank, num_ranks=64, workers=workers, num_threads=1
            ) as loader:
                runs.append(take(loader, len(loader)))
        assert len(runs[0]) == 5
        assert runs[0] == runs[1]


def test_4_samplers_of_64_ranks_feed_eight_workers() -> None:
    lengths = set()
    for rank in range(64):
        whole: dict[str, Any] = {"num_replicas": 64, "rank": rank, "batch_size": 1, "seed": 3}
        by_index = list(BalancedSampler(BRATS, **whole))
        by_batch = list(BalancedBatchSampler(BRATS, **whole))
        assert [[index] for index in by_index] == by_batch
        lengths.add(len(by_index))
    assert lengths == {5}
    numbers: list[Any] = list(range(285))
    sampler = BalancedBatchSampler(BRATS, **whole)
    loader: DataLoader[int] = DataLoader(numbers, batch_sampler=sampler, num_workers=8)  # type: ignore[arg-type]
    assert [batch.tolist() for batch in loader] == by_batch


def test_4_64_ranks_evaluate_285_samples_once(brats: ShardSet) -> None:
    gathered = []
    for rank in range(64):
        with eval_loader(
            brats, split="val", batch_size=2, rank=rank, num_ranks=64, num_threads=1
        ) as loader:
            gathered.append([batch["sample"] for batch in loader])
    loader.check_complete(gathered)


@pytest.mark.parametrize("workers", [0, 2])
def test_6_shards_are_read_in_another_order_in_every_epoch_and_under_every_seed(
    brats: ShardSet, workers: int
) -> None:
    # A shard holds a dozen neighbours of the packed order.
    shard_of = np.argsort(brats.packed_order("train")) // 12
    orders = []
    for seed in (1, 2):
        with train_loader(brats, global_batch_size=32, seed=seed, workers=workers) as loader:
            for _ in range(3):
                samples = np.concatenate([batch["sample"].numpy() for batch in loader])
                orders.append(tuple(shard_of[samples].tolist()))
    assert len(set(orders)) == 6


TRAINING = """
import json, os, sys, time
from pathlib import Path
from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import take
folder, out, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
loader = train_loader(open_shards(folder), global_batch_size=4, seed=3, workers=workers)
take(loader, 5)
state = json.dumps(loader.state_dict())
iterator = iter(loader)
kept = [next(iterator) for _ in range(2)]
(out / "state.json").write_text(state)
print("saved", flush=True)
while True:
    time.sleep(60)
"""


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Give the files of a folder with their sizes and times of change."""
    return {e.name: (e.stat().st_size, e.stat().st_mtime_ns) for e in folder.iterdir()}


def shared_memory() -> set[str]:
    """List the names in shared memory."""
    folder = Path("/dev/shm")
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def wait_until_gone(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Give the processes that are still there when time is up."""
    _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("workers", [0, 2])
def test_12_a_killed_training_leaves_nothing_behind_and_starts_again(
    tmp_path: Path, workers: int
) -> None:
    shards = packed(tmp_path / "cohort", cohort())
    with train_loader(shards, global_batch_size=4, seed=3) as straight:
        expected = take(straight, 9)
    before, in_memory = listing(shards.path), shared_memory()
    # Not `tmp_path`: the path of a socket has room for a hundred letters.
    with tempfile.TemporaryDirectory(prefix="sb-") as temporary:
        training = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(shards.path), str(tmp_path), str(workers)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": temporary},
        )
        try:
            assert training.stdout is not None
            assert training.stdout.readline() == "saved\n"
            family = psutil.Process(training.pid).children(recursive=True)
            assert len(family) >= workers
        finally:
            training.send_signal(signal.SIGKILL)
            training.communicate(timeout=GONE_SECONDS)
        assert wait_until_gone(family) == []
        left_in_memory = {name for name in shared_memory() - in_memory if str(training.pid) in name}
        assert left_in_memory == set()
        assert list(Path(temporary).iterdir()) == []
    assert listing(shards.path) == before
    state = json.loads((tmp_path / "state.json").read_text())
    with train_loader(shards, global_batch_size=4, seed=3, workers=workers) as again:
        again.load_state_dict(state)
        assert take(again, 4) == expected[5:]


def test_14_two_data_sets_with_equal_names_in_one_process_never_mix(tmp_path: Path) -> None:
    first = cohort()
    second = [
        Sample(key=s.key, image=voxels(500 + n), label=s.label, split=s.split)
        for n, s in enumerate(first)
    ]
    sets = {name: packed(tmp_path / name / "cohort", samples, shard_bytes=8192)
            for name, samples in (("first", first), ("second", second))}  # fmt: skip
    names = [sorted(p.name for p in shards.path.glob("*.tar")) for shards in sets.values()]
    assert names[0] == names[1]
    assert len(names[0]) > 2
    images = {"first": by_key(first), "second": by_key(second)}
    with contextlib.ExitStack() as stack:
        loaders = {
            (name, split): stack.enter_context(loader)
            for name, shards in sets.items()
            for split, loader in (
                ("train", train_loader(shards, global_batch_size=5, seed=1)),
                ("val", eval_loader(shards, split="val", batch_size=3)),
            )
        }
        for _ in range(3):
            for (name, _), loader in loaders.items():
                for batch in loader:
                    wanted = as_float([images[name][key].image for key in batch["key"]])
                    assert np.array_equal(batch["image"].numpy(), wanted.numpy())
        # The same names, labels and splits; other voxels are another data set all the same.
    with train_loader(sets["first"], global_batch_size=5, seed=1) as loader:
        state = loader.state_dict()
    with (
        train_loader(sets["second"], global_batch_size=5, seed=1) as loader,
        pytest.raises(ResumeError, match="shards_digest"),
    ):
        loader.load_state_dict(state)


def test_19_no_setting_counts_retries_so_none_can_be_misread() -> None:
    faces = [getattr(sb, name) for name in sb.__all__]
    named = {
        parameter
        for face in faces
        if inspect.isfunction(face)
        for parameter in inspect.signature(face).parameters
    }
    assert {"on_error", "global_batch_size"} <= named
    assert not [name for name in named if "retr" in name or "attempt" in name or "tries" in name]


def reads_that_fail(shards: ShardSet, number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the disk fail on the shard of one sample; its failed reads are listed as they come."""
    place = shards.packed_order("train").tolist().index(number)
    bad = shards.path / f"train-{place:06d}.tar"
    real, failed = os.preadv, list[int]()

    def failing(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == bad:
            failed.append(offset)
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", failing)
    return failed


def test_19_a_read_that_fails_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shard for every sample, so that the shard of one can fail alone.
    shards = packed(tmp_path / "cohort", cohort(), shard_bytes=1)
    failed = reads_that_fail(shards, 4, monkeypatch)
    with train_loader(shards, global_batch_size=14, num_threads=1, prefetch_bytes=0) as loader:
        for turn in (1, 2):
            with pytest.raises(ShardError, match=r"'H04' at byte 512 .*train-000004\.tar"):
                next(iter(loader))
            # Asking again asks the disk again: once more, and no more.
            assert len(failed) == turn


def test_19_before_another_stands_in_a_sample_is_read_twice_and_then_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = packed(tmp_path / "cohort", cohort(), shard_bytes=1)
    failed = reads_that_fail(shards, 4, monkeypatch)
    with train_loader(
        shards, global_batch_size=7, num_threads=1, prefetch_bytes=0, on_error="substitute"
    ) as loader:
        samples = [n for _ in range(4) for batch in loader for n in batch["sample"].tolist()]
    assert len(samples) == 4 * 14
    assert 4 not in samples
    assert len(failed) == 2


def test_7_from_two_workers_to_four_and_back_to_threads(brats: ShardSet) -> None:
    def loader_with(workers: int) -> BalancedLoader:
        return train_loader(
            brats, global_batch_size=32, balance="class_balanced", seed=6, workers=workers
        )

    with loader_with(0) as straight:
        expected = take(straight, 20)
    state, got = None, []
    for workers, count in ((2, 1), (4, 8), (1, 3), (0, 4), (2, 4)):
        with loader_with(workers) as loader:
            if state is not None:
                loader.load_state_dict(json.loads(state))
            got += take(loader, count)
            state = json.dumps(loader.state_dict())
    assert got == expected


@pytest.mark.parametrize(("batches", "under_way"), [(0, 2), (1, 2), (4, 4), (9, 8)])
def test_20_what_workers_have_under_way_stays_within_the_budget(
    brats: ShardSet, batches: int, under_way: int
) -> None:
    image_bytes = 4 * 8 * 4  # four images of eight voxels in float32
    options: dict[str, Any] = {
        "global_batch_size": 4,
        "workers": 2,
        "prefetch_bytes": batches * image_bytes,
    }
    with train_loader(brats, **options) as loader:
        for number, _ in enumerate(loader):
            engine = loader._engine
            assert isinstance(engine, WorkerEngine)
            # One batch for each worker is the least that keeps them at work.
            assert len(engine._asked) <= under_way
            if number == 20:
                break
        assert loader.stats()["bytes"] == 21 * image_bytes
