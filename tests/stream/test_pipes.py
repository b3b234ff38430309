"""A program's output is a shard only if the program ended well."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from streaming_balance.errors import ShardError
from streaming_balance.stream.pipes import PipeStream
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.tarstream import read_samples
from tests.stream.tars import COHORT, contents, put, read_all, tar_of


def python(program: str) -> str:
    """A `pipe:` that runs a Python program."""
    return f"pipe:{shlex.quote(sys.executable)} -c {shlex.quote(program)}"


def test_what_a_program_writes_is_read(
    tmp_path: Path, children: Callable[[], list[psutil.Process]]
) -> None:
    path = put(tmp_path, tar_of(COHORT), "my shard.tar")
    samples, counts = read_all(f"pipe:cat '{path}'", allow_pipe=True)
    assert contents(samples) == COHORT
    assert counts.bytes_read == len(tar_of(COHORT))
    assert children() == []


def test_a_shell_runs_only_when_named(tmp_path: Path) -> None:
    path = put(tmp_path, tar_of(COHORT))
    samples, _ = read_all(f"pipe:sh -c 'cat {path} | cat'", allow_pipe=True)
    assert contents(samples) == COHORT
    canary = tmp_path / "canary"
    with pytest.raises(ShardError, match="exit status 1"):
        read_all(f"pipe:cat $(touch\\ {canary}) {path}.absent;touch\\ {canary}", allow_pipe=True)
    assert not canary.exists()


def test_a_failing_program_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(
        ShardError, match=r"pipe:cat .*absent ended with exit status 1: cat: .*No s"
    ):
        read_all(f"pipe:cat {tmp_path}/absent", allow_pipe=True)


def test_a_program_that_fails_after_a_sound_tar_is_an_error_still(tmp_path: Path) -> None:
    path = put(tmp_path, tar_of(COHORT))
    program = f"pipe:sh -c 'cat {path}; echo disk is failing >&2; exit 3'"
    with pytest.raises(ShardError, match="ended with exit status 3: disk is failing"):
        read_all(program, allow_pipe=True)
    samples, counts = read_all(program, TarRules(on_error="skip"), allow_pipe=True)
    assert [sample.key for sample in samples] == ["P1", "P2"]
    assert counts.shards_lost == 1


MANY = {f"{number}.cls": b"1" for number in range(500)}


@pytest.mark.parametrize("cohort", [COHORT, MANY], ids=["three", "many"])
def test_a_killed_producer_is_an_error_not_an_end(tmp_path: Path, cohort: dict[str, bytes]) -> None:
    content = tar_of(cohort)
    path = put(tmp_path, content)
    # It stops itself where a shard could end: behind a sample, and behind the end of the tar.
    for count in (3584, 4096, 400 << 10, len(content)):
        program = (
            f"import os, signal, sys; sys.stdout.buffer.write(open({path!r}, 'rb').read({count})); "
            "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)"
        )
        with pytest.raises(ShardError, match="was killed by signal 9"):
            read_all(python(program), allow_pipe=True)


def test_a_producer_killed_from_outside_is_an_error(
    tmp_path: Path, children: Callable[[], list[psutil.Process]]
) -> None:
    path = put(tmp_path, tar_of(COHORT))
    program = (
        f"import signal, sys; sys.stdout.buffer.write(open({path!r}, 'rb').read(4096)); "
        "sys.stdout.flush(); signal.pause()"
    )
    samples = read_samples(python(program), allow_pipe=True)
    assert next(samples).key == "P1"
    (child,) = children()
    child.send_signal(signal.SIGTERM)
    with pytest.raises(ShardError, match="was killed by signal 15"):
        list(samples)
    assert children() == []


def test_a_program_is_stopped_with_all_it_started_when_reading_ends_early(
    tmp_path: Path, children: Callable[[], list[psutil.Process]]
) -> None:
    path = put(tmp_path, tar_of(COHORT))
    samples = read_samples(f"pipe:sh -c 'cat {path} | cat; sleep 1000 | cat'", allow_pipe=True)
    assert next(samples).key == "P1"
    started = children()
    assert started
    samples.close()  # type: ignore[attr-defined]
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


def test_a_program_that_does_not_end_after_its_output_is_an_error(
    children: Callable[[], list[psutil.Process]],
) -> None:
    program = "import os, signal, sys; os.write(1, b'x'); os.close(1); signal.pause()"
    stream = PipeStream([sys.executable, "-c", program], timeout_seconds=0.2)
    assert stream.read(1) == b"x"
    with pytest.raises(ShardError, match=r"did not end within 0.2 s") as caught:
        stream.read(1)
    stream.close()
    assert caught.value.__suppress_context__  # the context's text would show all arguments
    assert children() == []


def test_a_program_that_complains_a_lot_neither_blocks_nor_fills_memory(tmp_path: Path) -> None:
    path = put(tmp_path, tar_of(COHORT))
    program = (
        "import sys; [sys.stderr.write('x' * 1023 + '\\n') for _ in range(2000)]; "
        f"sys.stdout.buffer.write(open({path!r}, 'rb').read()); sys.exit('the end')"
    )
    with pytest.raises(ShardError, match="the end") as caught:
        read_all(python(program), allow_pipe=True)
    assert len(str(caught.value)) < 3000


def test_a_program_that_cannot_be_started_is_an_error() -> None:
    with pytest.raises(ShardError, match="pipe:no-such-program cannot be started: No such file"):
        read_all("pipe:no-such-program", allow_pipe=True)


def test_secrets_are_in_no_message_of_a_failing_program() -> None:
    url = "https://me:hunter2@host/a.tar?token=hunter2"
    program = f"pipe:sh -c 'echo cannot fetch {url} >&2; exit 1' hunter2"
    with pytest.raises(ShardError, match=r"cannot fetch https://host/a.tar") as caught:
        read_all(program, allow_pipe=True)
    assert "hunter2" not in str(caught.value)


def test_samples_are_handed_over_while_the_producer_still_writes(tmp_path: Path) -> None:
    """A live export: each sample comes when the next one begins, not when a buffer is full."""
    fifo = tmp_path / "permission"
    os.mkfifo(fifo)
    path = put(tmp_path, tar_of(COHORT))
    program = (
        f"import sys; content = open({path!r}, 'rb').read(); out = sys.stdout.buffer; "
        f"out.write(content[:4096]); out.flush(); open({str(fifo)!r}).read(); "
        "out.write(content[4096:])"
    )
    samples = read_samples(python(program), allow_pipe=True)
    started = time.monotonic()
    assert next(samples).key == "P1"
    assert time.monotonic() - started < 30
    fifo.write_text("go on")
    assert [sample.key for sample in samples] == ["P2", "P3"]
