"""Leaving: whatever the way out, soon, with no thread, file or shared memory left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streaming_balance.storage.shards import ShardSet
from tests.training.cohorts import PROJECT_ROOT, run_python

BEGIN = """
import gc, os, signal, sys, threading, time
import torch
from streaming_balance.storage.shards import open_shards
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import seen
shards = open_shards(sys.argv[1])
def loader_of(**options):
    settings = {"global_batch_size": 4, "balance": "class_balanced", "seed": 3, "num_threads": 3}
    return train_loader(shards, **settings | options)
def files(): return len(os.listdir("/proc/self/fd"))
def readers(): return [t for t in threading.enumerate() if "reader" in t.name]
"""
# The package waits a second for its threads; the rest is for a machine that is busy otherwise.
EXIT_SECONDS = 5.0


def left_in_shared_memory() -> set[str]:
    """List what torch left in shared memory of processes that have ended."""
    # Segments are named after their process; one that lives is still using them. What other names
    # there are belongs to other programs, or to tests that run beside this one.
    found = {path.name for path in Path("/dev/shm").glob("torch_*")}
    return {name for name in found if not Path("/proc", name.split("_")[1]).is_dir()}


def nothing_is_left(before: set[str]) -> bool:
    """Say whether nothing stays there; what a test beside this one left is gone with that test."""
    deadline = time.monotonic() + 10
    while left_in_shared_memory() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    return left_in_shared_memory() <= before


def run(script: str, shards: ShardSet) -> subprocess.CompletedProcess[str]:
    """Run a script over a data set; nothing may stay in shared memory."""
    before = left_in_shared_memory()
    ended = run_python(BEGIN + script, shards.path, deadline_seconds=60)
    assert nothing_is_left(before)
    return ended


WAYS_OUT = {
    "the end of the script": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an exception": ("raise ValueError('loss is nan')", 1),
    "keyboard interrupt": ("raise KeyboardInterrupt", -signal.SIGINT),
    "inside the loop": ("for batch in second: sys.exit(4)", 4),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_the_interpreter_exits_at_once_with_live_iterators(small: ShardSet, way: str) -> None:
    leave, status = WAYS_OUT[way]
    script = f"""
first, second = loader_of(), eval_loader(shards, split="val", batch_size=2, num_threads=2)
circle = [first]
circle.append(circle)
iterator = iter(first)
kept = next(iterator)["image"]
print(time.time(), flush=True)
{leave}
"""
    ended = run(script, small)
    left = float(ended.stdout)
    # The time from the last line to the end of the process, measured from outside.
    assert ended.returncode in (status, 130 if status == -signal.SIGINT else status)
    assert time.time() - left < EXIT_SECONDS
    assert "reader" not in ended.stderr


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("where", ["waiting for a batch", "in the loop"])
def test_ctrl_c_ends_a_training_at_once(small: ShardSet, signals: int, where: str) -> None:
    script = (
        BEGIN
        + """
stuck = threading.Event()
def slow(sample):
    if sys.argv[2] == "waiting for a batch":
        os.write(1, b"begun\\n")
        time.sleep(0.5)
    return sample
with loader_of(transform=slow) as loader:
    for batch in loader:
        print("begun", flush=True)
        while sys.argv[2] == "in the loop": time.sleep(0.01)
"""
    )
    before = left_in_shared_memory()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(small.path), where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT_ROOT,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        started = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - started < EXIT_SECONDS + 0.5
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 130, 1)
    assert "KeyboardInterrupt" in errors
    assert "Fatal Python error" not in errors
    assert nothing_is_left(before)


def test_files_and_threads_are_given_back_whatever_the_way_out(small: ShardSet) -> None:
    script = """
def use(way):
    if way == "with":
        with loader_of() as loader:
            next(iter(loader))
        return
    loader = loader_of()
    next(iter(loader))
    if way == "close":
        loader.close()
    if way == "circle":
        circle = [loader]
        circle.append(circle)
    if way == "exception":
        for batch in loader:
            raise ValueError
use_once = loader_of(); next(iter(use_once)); use_once.close(); del use_once
before = files()
for way in ("close", "with", "del", "circle", "exception"):
    for _ in range(10):
        try:
            use(way)
        except ValueError:
            pass
    gc.collect()
    for reader in readers():
        reader.join(10)
    assert not readers(), (way, readers())
    gc.collect()  # a reader in the middle of a piece held what belongs to a circle
    assert files() == before, (way, files(), before)
print("done")
"""
    ended = run(script, small)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


def test_a_child_forked_in_mid_iteration_iterates_on_its_own(small: ShardSet) -> None:
    script = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads is what is tested
straight = loader_of(seed=3)
expected = [seen(b) for b in straight] + [seen(b) for b in straight]
straight.close()
loader = loader_of(seed=3)
iterator = iter(loader)
first = next(iterator)
mine = [seen(first)]
children = []
for number in range(4):
    child = os.fork()
    if not child:
        signal.alarm(20)
        got = [seen(batch) for batch in iterator]
        del iterator
        got += [seen(batch) for batch in loader]
        right = got == expected[len(mine):] and len(readers()) == 3
        loader.close()
        right = right and seen(first) == expected[0] and not readers()
        os._exit(0 if right else 1)
    children.append(child)
    if number < 2:
        mine.append(seen(next(iterator)))
statuses = [os.waitpid(child, 0)[1] for child in children]
mine += [seen(batch) for batch in iterator]
del iterator
mine += [seen(batch) for batch in loader]
assert mine == expected
assert statuses == [0] * 4, statuses
print("done")
"""
    ended = run(script, small)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


def test_a_child_that_exits_normally_leaves_its_parent_alone(small: ShardSet) -> None:
    script = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
loader = loader_of()
iterator = iter(loader)
next(iterator)
child = os.fork()
if not child:
    signal.alarm(20)
    loader.close()
    del loader, iterator
    gc.collect()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert sum(1 for _ in iterator) == 3
assert len(readers()) == 3
print("done")
"""
    ended = run(script, small)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


def test_batches_sent_to_another_process_keep_their_voxels_on_both_sides(small: ShardSet) -> None:
    script = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
import torch.multiprocessing as processes
def echo(incoming, outgoing):
    signal.alarm(30)
    kept = []
    while (batch := incoming.get()) is not None:
        kept.append(batch)
    outgoing.put([seen(batch) for batch in kept])
context = processes.get_context("fork")
incoming, outgoing = context.Queue(), context.Queue()
child = context.Process(target=echo, args=(incoming, outgoing))
child.start()
kept = []
with loader_of() as loader:
    for _ in range(5):
        for batch in loader:
            kept.append((seen(batch), batch))
            incoming.put(batch)
            del batch
    incoming.put(None)
    there = outgoing.get(timeout=30)
    for _ in range(3):
        for batch in loader: pass
child.join(30)
assert there == [was for was, _ in kept]
assert [seen(batch) for _, batch in kept] == there
print("done")
"""
    ended = run(script, small)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


def test_a_failed_batch_frees_its_memory_without_the_garbage_collector(small: ShardSet) -> None:
    script = """
gc.disable()
def fail(sample): raise LookupError
loader = loader_of(transform=fail, num_threads=1, prefetch_bytes=0)
for _ in range(200):
    try: next(iter(loader))
    except LookupError: pass
pool = loader._engine.pool
loader._engine._threads.close()
assert pool.fresh_bytes <= 16 * 4096, pool.fresh_bytes
print("done")
"""
    ended = run(script, small)
    assert ended.stdout == "done\n", ended.stderr[-1500:]
