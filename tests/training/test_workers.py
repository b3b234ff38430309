"""Worker processes: batches and states as with threads, named errors, nothing left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from streaming_balance.errors import BalanceError, ConfigError, ShardError
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.building import Sample
from tests.training.cohorts import PROJECT_ROOT, packed, run_python, seen, take, voxels

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

# Far above the second it takes, far below a hang: a loaded machine is no fault.
EXIT_SECONDS = 15.0


def noisy(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Add noise and say which process did."""
    image = sample["image"] + torch.from_numpy(rng.normal(size=sample["image"].shape))
    return sample | {"image": image, "process": os.getpid()}


def loader_of(shards: ShardSet, transform: Any = noisy, **options: Any) -> BalancedLoader:
    """Build the loader most tests use."""
    settings: dict[str, Any] = {"global_batch_size": 4, "balance": "class_balanced", "seed": 3}
    return train_loader(shards, transform=transform, **settings | {"workers": 2} | options)


def walked(shards: ShardSet, **options: Any) -> list[Any]:
    """Break off, jump, resume through JSON, and note batches, states and statistics on the way."""
    notes: list[Any] = []
    with loader_of(shards, **options) as loader:
        for number, batch in enumerate(loader):
            notes += [seen(batch), sorted(batch), batch["key"], batch["loss_scale"]]
            notes.append(loader.state_dict())
            if number == 1:
                break
        notes += take(loader, 5)
        loader.set_epoch(loader.epoch + 3)
        notes += take(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
        notes.append({**loader.stats(), "seconds_waited": None, "slowest_read": None})
    with loader_of(shards, **options) as resumed:
        resumed.load_state_dict(state)
        notes += take(resumed, 4)
    return [*notes, state]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_give_the_batches_states_and_statistics_of_threads(
    small: ShardSet, workers: int
) -> None:
    assert walked(small, workers=workers) == walked(small, workers=0)


def test_ranks_mixing_and_batch_transforms_work_as_with_threads(small: ShardSet) -> None:
    def mark(batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"marked": os.getpid()}

    runs = []
    for workers in (0, 2):
        run: list[Any] = []
        for rank in range(2):
            options = {"rank": rank, "num_ranks": 2, "workers": workers, "batch_transform": mark}
            with loader_of(small, mixing={"name": "mixup"}, **options) as loader:
                run += [(seen(b), b["lam"].tolist(), b["marked"]) for b in loader]
                run.append(loader.state_dict())
        runs.append(run)
    assert runs[0] == runs[1]


def test_transforms_run_in_that_many_processes_and_none_of_them_is_this_one(
    small: ShardSet, children: Callable[[], list[psutil.Process]]
) -> None:
    with loader_of(small, workers=3) as loader:
        processes = {pid for _ in range(3) for batch in loader for pid in batch["process"].tolist()}
        assert len(children()) == 3
    assert len(processes) == 3
    assert os.getpid() not in processes


def test_batches_of_workers_do_not_change_later(small: ShardSet) -> None:
    with loader_of(small) as loader:
        kept = [(batch, seen(batch)) for _ in range(6) for batch in loader]
    assert [seen(batch) for batch, _ in kept] == [was for _, was in kept]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", [None, "cuda"])
def test_batches_of_workers_are_pinned_or_on_the_device(
    small: ShardSet, device: str | None
) -> None:
    with loader_of(small, workers=0) as straight, loader_of(small, device=device) as loader:
        for expected, batch in zip(straight, loader, strict=True):
            assert batch["image"].is_pinned() if device is None else batch["image"].is_cuda
            assert torch.equal(batch["image"].cpu(), expected["image"])
        assert loader.state_dict() == straight.state_dict()


def test_volumes_of_unequal_shapes_come_as_lists_from_workers_too(tmp_path: Path) -> None:
    shapes = [(2, 3, 4, 5), (2, 5, 4, 3), (2, 2, 2, 2)]
    samples = [Sample(key=f"P{n}", image=voxels(n, shapes[n % 3])) for n in range(9)]
    shards = packed(tmp_path / "cohort", samples)
    runs = []
    for workers in (0, 2):
        with loader_of(shards, None, balance=None, workers=workers) as loader:
            runs.append(take(loader, 5))
    assert runs[0] == runs[1]


def test_the_global_generators_stand_where_they_stood(small: ShardSet) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002
    with loader_of(small) as loader:
        take(loader, 5)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002
    assert before == after


def global_draws(sample: dict[str, Any]) -> dict[str, Any]:
    """Draw from all that is global, as older libraries of augmentations do."""
    drawn = [random.random(), np.random.random(), torch.rand(1).item()]  # noqa: NPY002
    drawn.append(torch.nn.functional.dropout(torch.ones(40)).sum().item())
    return sample | {"drawn": torch.tensor(drawn)}


def test_what_a_worker_draws_from_global_generators_depends_on_the_sample_alone(
    small: ShardSet,
) -> None:
    runs = []
    for workers in (1, 2, 3):
        with loader_of(small, global_draws, workers=workers) as loader:
            drawn = [row for _ in range(2) for b in loader for row in b["drawn"].tolist()]
        runs.append(drawn)
    assert runs[0] == runs[1] == runs[2]
    for column in list(zip(*runs[0], strict=True))[:3]:
        assert len(set(column)) == len(column)


def failing(sample: dict[str, Any]) -> dict[str, Any]:
    """Refuse one sample."""
    if sample["key"] == "L02":
        raise LookupError("no good")
    return sample


def test_an_error_in_a_worker_names_the_sample_its_place_and_the_process(small: ShardSet) -> None:
    with loader_of(small, None, workers=0) as loader:
        place = next(batch for batch in loader if "L02" in batch["key"])
    slot = place["slot"][place["key"].index("L02")].item()
    with loader_of(small, failing) as loader:
        batches = []
        with pytest.raises(LookupError, match="no good") as caught:
            batches += [batch["step"] for batch in loader]
        where, told = caught.value.__notes__
        assert where == (
            f"The transform was given sample 'L02' at epoch 0, step {place['step']}, slot {slot}."
        )
        assert "This happened in worker process" in told
        assert 'raise LookupError("no good")' in told
        assert loader.state_dict()["position"] == {"epoch": 0, "step": place["step"]}
        with pytest.raises(LookupError, match="no good"):
            next(iter(loader))


class AwkwardError(Exception):
    """An error that cannot be made again from what it holds."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def awkward(_: Any) -> Any:
    """Raise what cannot be sent."""
    raise AwkwardError("this", "that")


def test_an_error_that_cannot_be_sent_says_the_same_all_the_same(small: ShardSet) -> None:
    with (
        loader_of(small, awkward) as loader,
        pytest.raises(BalanceError, match="AwkwardError: this and that") as caught,
    ):
        next(iter(loader))
    assert "The transform was given sample" in caught.value.__notes__[0]


UNSENDABLE = {
    "an open file": (lambda s: s | {"note": sys.stdout}, r"gave 'note', which cannot be sent"),
    "a lock": (lambda s: s | {"note": [threading.Lock()]}, r"gave 'note', which cannot be sent"),
    "gradients": (
        lambda s: s | {"image": s["image"].requires_grad_() * 2},
        r"requires gradients.*detach\(\)",
    ),
}


@pytest.mark.parametrize("what", UNSENDABLE)
def test_what_cannot_leave_a_worker_is_refused_with_the_way_out(small: ShardSet, what: str) -> None:
    transform, message = UNSENDABLE[what]
    with (
        loader_of(small, transform) as loader,
        pytest.raises(ConfigError, match=f"{message}.*workers=0"),
    ):
        next(iter(loader))


def test_a_transform_raising_stop_iteration_in_a_worker_is_no_end_of_the_epoch(
    small: ShardSet,
) -> None:
    with (
        loader_of(small, lambda _: next(iter(()))) as loader,
        pytest.raises(RuntimeError, match="StopIteration"),
    ):
        next(iter(loader))


def test_damage_is_named_by_the_worker_that_met_it(small: ShardSet, tmp_path: Path) -> None:
    folder = tmp_path / "cohort"
    shutil.copytree(small.path, folder)
    shards = open_shards(folder)
    first = shards.manifest.shards[0].name
    content = bytearray((folder / first).read_bytes())
    (place,) = [content.find(voxels(0).tobytes())]
    content[place] ^= 1
    (folder / first).write_bytes(content)
    errors = []
    for workers in (0, 2):
        with (
            loader_of(shards, None, workers=workers) as loader,
            pytest.raises(ShardError, match=first) as caught,
        ):
            take(loader, 5)
        errors.append((str(caught.value), caught.value.args, caught.value.filename))
    assert errors[0] == errors[1]


def test_a_size_that_does_not_fit_is_refused_before_any_worker_starts(
    small: ShardSet, children: Callable[[], list[psutil.Process]]
) -> None:
    with (
        loader_of(small, None, size=(4, 4)) as loader,
        pytest.raises(ConfigError, match="size is"),
    ):
        next(iter(loader))
    assert children() == []


def test_a_killed_worker_is_named_and_asking_again_goes_on(
    small: ShardSet, children: Callable[[], list[psutil.Process]]
) -> None:
    with loader_of(small, workers=0) as straight:
        expected = take(straight, 20)
    with loader_of(small, prefetch_bytes=0) as loader:
        got = take(loader, 3)
        victim = children()[0]
        started = time.monotonic()
        # torch's signal handler raises at once, here in the training loop's own code.
        with pytest.raises(RuntimeError, match=str(victim.pid)):
            kill(victim)
        with pytest.raises(BalanceError, match=rf"\(pid {victim.pid}\) was ended by SIGKILL"):
            exhaust(loader, got)
        assert time.monotonic() - started < EXIT_SECONDS
        got += take(loader, 20 - len(got))
    assert got == expected
    assert children() == []


def kill(process: psutil.Process) -> None:
    """Kill a process and wait until it is gone."""
    process.kill()
    process.wait(10)


def exhaust(loader: BalancedLoader, got: list[Any]) -> None:
    """Iterate until something goes wrong, noting what came before."""
    while True:
        got += take(loader, 1)


def leave(status: int) -> Any:
    """Make a transform that ends its process in mid-sample."""

    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["key"] == "L02":
            os._exit(status)
        return sample

    return transform


@pytest.mark.parametrize(
    ("transform", "ending"),
    [
        (leave(123), r"exited with status 123"),
        (leave(0), r"exited with status 0"),
        (lambda _: os.kill(os.getpid(), signal.SIGKILL), r"was ended by SIGKILL"),
    ],
    ids=["123", "0", "killed"],
)
def test_a_worker_that_ends_by_itself_is_an_error_that_says_how(
    small: ShardSet, transform: Any, ending: str, children: Callable[[], list[psutil.Process]]
) -> None:
    with (
        loader_of(small, transform) as loader,
        pytest.raises(
            BalanceError, match=rf"worker process \d of 2 \(pid \d+\) {ending} before the batch"
        ),
    ):
        take(loader, 9)
    assert children() == []


@pytest.mark.parametrize("way", ["with", "close", "del", "exception", "end of the loop"])
def test_workers_end_with_their_loader_whatever_the_way_out(
    small: ShardSet, way: str, children: Callable[[], list[psutil.Process]]
) -> None:
    loader = loader_of(small)
    iterator = iter(loader)
    next(iterator)
    workers = {str(worker.pid) for worker in children()}
    assert len(workers) == 2
    if way == "with":
        with loader:
            next(iterator)
    elif way == "close":
        loader.close()
    elif way == "del":
        del iterator, loader
    elif way == "exception":
        with pytest.raises(KeyError), loader:
            next(iterator)["no such name"]
    else:
        list(iterator)
        loader.close()
    assert children() == []
    # torch names what it shares after the process that made it.
    left = Path("/dev/shm").glob("torch_*")
    assert not [entry for entry in left if workers & set(entry.name.split("_"))]


BEGIN = """
import os, signal, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import seen, take
def loader_of(**options):
    settings = {"global_batch_size": 4, "balance": "class_balanced", "seed": 3, "workers": 2}
    return train_loader(open_shards(sys.argv[1]), **settings | options)
"""


@pytest.mark.parametrize("way", ["", "raise ValueError"])
def test_the_interpreter_exits_soon_with_live_workers_and_leaves_nothing(
    small: ShardSet, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""
iterator = iter(loader_of())
kept = next(iterator)
print(*[worker.pid for worker in iterator._loader._engine._stream._workers])
print(time.time(), flush=True)
{way}
"""
    # Not `tmp_path`: the path of a socket has room for a hundred letters.
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        ended = run_python(BEGIN + script, small.path)
        ended_at = time.time()
        assert list(Path(folder).iterdir()) == []
    pids, left = ended.stdout.splitlines()
    assert ended_at - float(left) < EXIT_SECONDS
    assert not [pid for pid in pids.split() if psutil.pid_exists(int(pid))]
    assert "Exception ignored" not in ended.stderr


def test_ctrl_c_ends_training_and_workers_soon(small: ShardSet) -> None:
    script = """
def slow(sample):
    time.sleep(0.2)
    return sample
with loader_of(transform=slow) as loader:
    for batch in loader:
        print("begun", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + script, str(small.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT_ROOT,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - started < EXIT_SECONDS
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_forked_child_iterates_on_its_own_and_leaves_the_workers_alone(small: ShardSet) -> None:
    script = """
with loader_of(workers=0) as straight:
    expected = take(straight, 8)
loader = loader_of()
iterator = iter(loader)
mine = [seen(next(iterator))]
child = os.fork()
if not child:
    signal.alarm(30)
    got = [seen(batch) for batch in iterator]
    del iterator
    got += [seen(batch) for batch in loader]
    loader.close()
    os._exit(0 if got[:7] == expected[1:] else 1)
assert os.waitpid(child, 0)[1] == 0
mine += [seen(batch) for batch in iterator]
mine += take(loader, 8 - len(mine))
assert mine == expected
print("done")
"""
    ended = run_python(BEGIN + script, small.path)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


def test_workers_may_be_started_afresh_instead_of_forked(small: ShardSet) -> None:
    script = """
import multiprocessing
from tests.training.recipes import torch_draws
runs = []
for workers, method in ((0, "fork"), (1, "spawn"), (2, "forkserver")):
    multiprocessing.set_start_method(method, force=True)
    with loader_of(workers=workers, transform=torch_draws) as loader:
        runs.append(take(loader, 4))
assert runs[0] == runs[1] == runs[2]
print("done")
"""
    ended = run_python(BEGIN + script, small.path)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


def test_shared_memory_that_is_too_small_is_named_with_the_way_out(tmp_path: Path) -> None:
    isolated = ["unshare", "-m", "-r"]
    room = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run([*isolated, "sh", "-c", room], check=False).returncode:
        pytest.skip("a private /dev/shm needs user namespaces, which this machine does not give")
    samples = [Sample(key=f"P{n}", image=voxels(n, (4, 48, 48, 48))) for n in range(8)]
    shards = packed(tmp_path / "cohort", samples)
    script = tmp_path / "script.py"
    script.write_text(BEGIN + "take(loader_of(balance=None), 2)\n")
    command = f"{room} && exec {sys.executable} {script} {shards.path}"
    ended = subprocess.run(
        [*isolated, "sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
        check=False,
    )
    assert ended.returncode == 1
    assert "streaming_balance.errors.BalanceError" in ended.stderr
    assert "/dev/shm" in ended.stderr
    assert "fewer workers" in ended.stderr
