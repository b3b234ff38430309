"""Stopping together: a signal sets a flag, every rank hears it at the same step, nothing else."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import train_loader
from streaming_balance.training.stopping import StopTogether, heard_signals
from tests.training.cohorts import run_python, take


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """Check after every test that this process hears what it heard before."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_only_sets_a_flag_that_stays_however_often_it_comes() -> None:
    with StopTogether() as stop:
        assert not stop.requested()
        assert stop.asked_by is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked_by is None
        assert stop.requested()
        # While the state is being saved.
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested()
        assert stop.asked_by == 0
    assert stop.requested()


@pytest.mark.parametrize("way", ["the end", "an exception"])
def test_previous_handlers_come_back_whatever_the_way_out(way: str) -> None:
    heard: list[int] = []
    originally = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    own = signal.getsignal(signal.SIGUSR1)
    try:
        with StopTogether(signals=(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)) as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert stop.requested()
            if way == "an exception":
                raise KeyError
    except KeyError:
        pass
    assert heard == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) is own
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    signal.signal(signal.SIGUSR1, originally)
    signal.signal(signal.SIGUSR2, ignored)


def test_blocks_inside_each_other_give_the_signal_to_the_inner_one_and_then_back() -> None:
    with StopTogether() as outer:
        with StopTogether(signals=(signal.SIGTERM, signal.SIGUSR1)) as inner:
            assert heard_signals() == (signal.SIGUSR1, signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        assert inner.requested()
        assert not outer.requested()
        assert heard_signals() == (signal.SIGTERM,)
        signal.raise_signal(signal.SIGTERM)
        assert outer.requested()
    assert heard_signals() == ()


def test_ctrl_c_interrupts_as_ever_where_it_is_not_named() -> None:
    with StopTogether() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested()


def test_ctrl_c_asks_once_where_it_is_named_and_the_second_one_interrupts() -> None:
    with StopTogether(signals=(signal.SIGTERM, signal.SIGINT)) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_code_asks_from_any_thread_also_where_no_signal_is_heard() -> None:
    for signals in ((signal.SIGTERM,), ()):
        with StopTogether(signals=signals) as stop:
            assert not stop.requested()
            clock = threading.Thread(target=stop.request)
            clock.start()
            clock.join()
            assert stop.requested()
    without_block = StopTogether(signals=())
    without_block.request()
    assert without_block.requested()


def raised_in_thread(work: Any) -> BaseException | None:
    """Give what a piece of work raises in a thread that is not the main one."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="trainer")
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_another_thread_is_told_that_signals_are_for_the_main_one() -> None:
    error = raised_in_thread(lambda: StopTogether().__enter__())
    assert "in thread 'trainer'" in str(error)
    assert "main thread" in str(error)
    assert "SIGTERM" in str(error)
    assert "signals=()" in str(error)
    assert (
        raised_in_thread(lambda: StopTogether(signals=()).__enter__().__exit__(*[None] * 3)) is None
    )


def test_a_block_that_was_not_entered_or_is_entered_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hears no SIGTERM yet: enter it first, `with StopTog"):
        StopTogether().requested()
    with StopTogether() as stop, pytest.raises(ConfigError, match="in use already"):
        stop.__enter__()
    with stop:
        assert not stop.requested()


@pytest.mark.parametrize(
    "signals",
    [signal.SIGTERM, "SIGTERM", (signal.SIGKILL,), (signal.SIGTERM, signal.SIGSTOP), (0,), ("9",)],
    ids=repr,
)
def test_what_no_process_can_hear_is_refused_with_what_it_can(signals: Any) -> None:
    with pytest.raises(ConfigError, match=r"signals (is|holds) .*signal\.SIGTERM"):
        StopTogether(signals=signals)


def test_one_of_several_ranks_without_a_process_group_does_not_stop_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        StopTogether() as stop,
        pytest.raises(ConfigError, match=r"rank 1 of 2.*init_process_group"),
    ):
        stop.requested()


FORKED = """
import ctypes, os, signal, sys, warnings
import torch.multiprocessing as processes
from streaming_balance.training.stopping import StopTogether
warnings.simplefilter("ignore", DeprecationWarning)
def ending(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
def ready():
    signal.alarm(30)
    os.write(out, b"!")
    while True: signal.pause()
into, out = os.pipe()
def wait(): os.read(into, 1)
"""


def test_a_forked_child_is_ended_by_signals_as_before() -> None:
    script = """
with StopTogether() as stop:
    process = processes.get_context("fork").Process(target=ready)
    process.start()
    wait()
    process.terminate()
    process.join(30)
    assert process.exitcode == -signal.SIGTERM, process.exitcode
    child = os.fork()
    if not child:
        # At once, also in the middle of a long computation: no code of Python is asked.
        os._exit(0 if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 1)
    assert ending(child) == 0
    # Forked by a library, without a word to Python: it still has the handler.
    child = ctypes.PyDLL(None).fork()
    if not child: ready()
    wait()
    os.kill(child, signal.SIGTERM)
    assert ending(child) == -signal.SIGTERM
    assert not stop.requested()
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested()
print("done")
"""
    ended = run_python(FORKED + script)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


def test_a_forked_child_does_what_the_handler_before_did() -> None:
    script = """
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(7))
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
with StopTogether(signals=(signal.SIGTERM, signal.SIGUSR1)) as stop:
    for fork in (os.fork, ctypes.PyDLL(None).fork):
        child = fork()
        if not child: ready()
        wait()
        os.kill(child, signal.SIGUSR1)
        os.kill(child, signal.SIGTERM)
        assert ending(child) == 7
    assert not stop.requested()
print("done")
"""
    ended = run_python(FORKED + script)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


def test_a_child_that_leaves_the_block_by_an_exception_changes_nothing_for_its_parent() -> None:
    script = """
child = None
try:
    with StopTogether() as stop:
        child = os.fork()
        if not child: raise ValueError
        assert ending(child) == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested()
except ValueError:
    os._exit(0 if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 1)
print("done")
"""
    ended = run_python(FORKED + script)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_leave_the_signals_to_their_rank_but_end_when_their_rank_says_so(
    small: ShardSet, children: Callable[[], list[psutil.Process]]
) -> None:
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    options: dict[str, Any] = {"global_batch_size": 4, "balance": "class_balanced", "seed": 3}
    with train_loader(small, **options) as straight:
        expected = take(straight, 20)
    with StopTogether(signals=signals) as stop, train_loader(small, workers=2, **options) as loader:
        got = take(loader, 2)
        workers = children()
        assert len(workers) == 2
        # As a cluster does: from outside, to every process it finds.
        for worker in workers:
            for number in signals:
                subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
        got += take(loader, 18)
        assert children() == workers
        assert not stop.requested()
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(30) == 0
    assert got == expected


def test_a_worker_whose_parent_has_died_ends_by_anybody_s_signal() -> None:
    script = """
from streaming_balance.training.stopping import leave_signals
orphan, told = os.pipe()
parent = os.fork()
if not parent:
    child = os.fork()
    if child: os.waitpid(child, os.WNOHANG), os.read(into, 1), os._exit(0)
    os.close(orphan)
    leave_signals((signal.SIGTERM,), os.getppid(), 0)
    os.write(told, str(os.getpid()).encode())
    signal.alarm(30)
    while True: signal.pause()
os.close(told)
child = int(os.read(orphan, 9))
os.write(out, b"!")
os.waitpid(parent, 0)
signal.alarm(30)
os.kill(child, signal.SIGTERM)
# Its end of the pipe closes with it.
assert os.read(orphan, 1) == b""
print("done")
"""
    ended = run_python(FORKED + script)
    assert ended.stdout == "done\n", ended.stderr[-1500:]


RANKS = """
import datetime, json, os, signal, sys, time
import torch.distributed as dist
from streaming_balance.errors import BalanceError
from streaming_balance.training.stopping import StopTogether
folder, num_ranks = sys.argv[1], int(sys.argv[2])
into, out = os.pipe()
def run(scenario):
    started = []
    for rank in range(num_ranks):
        child = os.fork()
        if not child:
            signal.alarm(50)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                world_size=num_ranks, timeout=datetime.timedelta(seconds=3))
            with open(f"{folder}/{rank}.json", "w") as file:
                json.dump(scenario(rank), file)
            os._exit(0)
        started.append(child)
    assert [os.waitpid(child, 0)[1] for child in started] == [0] * num_ranks
"""


def told_by_ranks(scenario: str, folder: Path, num_ranks: int) -> list[Any]:
    """Let every rank of a gloo group play a scenario, and give what each has to say."""
    ended = run_python(RANKS + scenario, folder, num_ranks)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def test_every_rank_hears_the_signal_at_the_same_call_and_the_same_rank_named(
    tmp_path: Path,
) -> None:
    scenario = """
def scenario(rank):
    calls = 0
    with StopTogether() as stop:
        while True:
            calls += 1
            if calls == 4 and rank in (0, 1): signal.raise_signal(signal.SIGTERM)
            if stop.requested(): break
        # Asking on needs nobody else: these are asked equally often no more.
        return [calls, stop.asked_by, all(stop.requested() for _ in range(rank + 1))]
run(scenario)
"""
    assert told_by_ranks(scenario, tmp_path, 3) == [[4, 1, True]] * 3


def test_a_group_stops_without_the_others_and_refuses_who_is_not_in_it(tmp_path: Path) -> None:
    scenario = """
def scenario(rank):
    # Ranks 1 and 2 train one model, rank 0 another.
    pair, alone = dist.new_group([1, 2]), dist.new_group([0])
    mine = alone if rank == 0 else pair
    heard = []
    with StopTogether(group=mine) as stop, StopTogether(signals=(), group=pair) as foreign:
        if rank == 2: stop.request()
        heard += [stop.requested(), stop.asked_by]
        try: heard.append(foreign.requested())
        except ValueError as error: heard.append(str(error))
    return heard
run(scenario)
"""
    first, *others = told_by_ranks(scenario, tmp_path, 3)
    assert others == [[True, 2, False]] * 2
    assert first[:2] == [False, None]
    assert "rank 0 is not in the group" in first[2]


def test_a_device_that_does_not_exist_is_not_taken_for_a_rank_that_died(tmp_path: Path) -> None:
    scenario = """
def scenario(rank):
    try: StopTogether(signals=(), device="gramophone").requested()
    except RuntimeError as error: return str(error)
run(scenario)
"""
    (message,) = told_by_ranks(scenario, tmp_path, 1)
    assert "gramophone" in message
    assert "rank" not in message


def test_a_rank_that_does_not_answer_is_an_error_within_the_group_s_timeout(
    tmp_path: Path,
) -> None:
    scenario = """
def scenario(rank):
    with StopTogether() as stop:
        started = time.monotonic()
        if rank == 1:
            stop.requested()
            os.read(into, 1)
            return None
        try:
            while not stop.requested(): pass
        except BalanceError as error:
            os.write(out, b"!")
            return [type(error).__name__, str(error), time.monotonic() - started]
run(scenario)
"""
    (name, message, seconds), _ = told_by_ranks(scenario, tmp_path, 2)
    assert name == "BalanceError"
    assert "rank 0 asked all 2 ranks whether to stop (call 2 of requested())" in message
    assert "Timed out" in message
    assert "last saved state" in message
    assert seconds < 3 + 20
