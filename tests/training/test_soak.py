"""A hundred epochs: files, threads, processes and memory stay what they were."""

from __future__ import annotations

import json
from statistics import median

import pytest

from streaming_balance.storage.shards import ShardSet
from tests.training.cohorts import cohort, packed, run_python

# One batch of four, as float32, is 1.5 MiB: a batch lost in every epoch would show.
SHAPE = (4, 16, 32, 48)
MOST_BYTES_AN_EPOCH = 2**20
EPOCHS = 100
EPOCHS_OF_WORKERS = 40
WARM_UP = 10
TENSORS_OF_A_BATCH = 4  # image, label, sample, slot
MEASURE = """
import gc, json, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, on newer Pythons
import numpy as np
import psutil
from streaming_balance.storage.shards import open_shards
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader
shards, kind, epochs = open_shards(sys.argv[1]), sys.argv[2], int(sys.argv[3])
me = psutil.Process()

def measured():
    gc.collect()
    family = me.children(recursive=True)
    resident = me.memory_info().rss + sum(child.memory_info().rss for child in family)
    return {
        "files": me.num_fds(), "threads": me.num_threads(), "processes": len(family),
        "files of workers": sum(child.num_fds() for child in family), "bytes": resident,
    }

def noisy(sample, rng):
    return sample | {"image": sample["image"] * rng.uniform(0.9, 1.1)}

def training(**options):
    settings = {"global_batch_size": 4, "balance": "class_balanced", "num_threads": 2}
    return train_loader(shards, transform=noisy, **settings | options)

def evaluating():
    return eval_loader(shards, split="val", batch_size=2, num_threads=2)

def run(loader):
    with loader:
        for _ in range(epochs):
            for batch in loader:
                state = loader.state_dict()
            loader.stats()
            del batch
            yield measured()

def run_anew():
    for _ in range(epochs):
        with training() as train, evaluating() as val:
            for batch in train: pass
            for batch in val: pass
        del batch
        yield measured()

kinds = {
    "training": lambda: run(training(mixing={"name": "mixup"})),
    "evaluation": lambda: run(evaluating()),
    "loaders built anew": run_anew,
    "1 worker": lambda: run(training(workers=1, prefetch_bytes=0)),
    "2 workers": lambda: run(training(workers=2, prefetch_bytes=0)),
}
measured()
gc.freeze()  # what imports made need not be looked through a hundred times
before = measured()
course = list(kinds[kind]())
for thread in threading.enumerate():  # torch's queues of workers end by themselves, a little later
    if thread is not threading.current_thread():
        thread.join(20)
print(json.dumps({"before": before, "course": course, "after": measured()}))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """14 patients to train on and 7 to evaluate, in several shards."""
    samples = cohort(shape=SHAPE)
    return packed(tmp_path_factory.mktemp("soak") / "cohort", samples, shard_bytes=1 << 20)


def bytes_an_epoch(course: list[dict[str, int]]) -> float:
    """Say how fast memory grows in the second half: the middle of its last part over its first."""
    half = [entry["bytes"] for entry in course[len(course) // 2 :]]
    quarter = len(half) // 2
    return (median(half[quarter:]) - median(half[:quarter])) / quarter


@pytest.mark.parametrize(
    ("kind", "epochs"),
    [
        ("training", EPOCHS),
        ("evaluation", EPOCHS),
        ("loaders built anew", EPOCHS),
        ("1 worker", EPOCHS_OF_WORKERS),
        ("2 workers", EPOCHS_OF_WORKERS),
    ],
)
def test_files_threads_and_memory_stay_flat(
    shards: ShardSet, kind: str, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is freed goes back to the system at once, instead of to a heap that keeps it for later.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    ended = run_python(MEASURE, shards.path, kind, epochs, deadline_seconds=240)
    assert ended.returncode == 0, ended.stderr[-2000:]
    told = json.loads(ended.stdout)
    before, course, after = told["before"], told["course"], told["after"]
    assert len(course) == epochs
    later = course[WARM_UP:]
    workers = int(kind[0]) if kind.endswith(("worker", "workers")) else 0
    assert {entry["processes"] for entry in course} == {workers}
    assert {entry["threads"] for entry in later} == {course[WARM_UP]["threads"]}
    # Tensors that workers have made and nobody has received yet are open files: of one batch that
    # is on its way and one that waits. One file left open in each epoch is more than that.
    spare = 2 * workers * TENSORS_OF_A_BATCH
    assert spare < epochs / 2
    for name in ("files", "files of workers"):
        early = [entry[name] for entry in course[WARM_UP : epochs // 2]]
        late = [entry[name] for entry in course[epochs // 2 :]]
        assert max(late) <= min(early) + spare, name
    assert bytes_an_epoch(course) < MOST_BYTES_AN_EPOCH
    # Reading leaves nothing behind, not even what a first use costs.
    for name in ("threads", "processes", "files"):
        assert after[name] <= before[name], name


def test_a_batch_lost_in_every_epoch_would_be_seen() -> None:
    batch = 4 * SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3] * 4
    lost = [{"bytes": 300 * 2**20 + number * batch} for number in range(EPOCHS)]
    assert bytes_an_epoch(lost) > MOST_BYTES_AN_EPOCH
