"""A pack killed at any system call ends, run again, in the bytes of an undisturbed one.

The numbers are the rows of the fault catalogue: 40 and 42-47.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

from streaming_balance.errors import ShardError
from streaming_balance.storage.layout import MANIFEST_NAME
from streaming_balance.storage.manifest import read_manifest
from tests.faults import pack_until_killed

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
COMMAND = [sys.executable, "-m", "tests.faults.pack_until_killed"]

needs_strace = pytest.mark.skipif(which("strace") is None, reason="strace is not installed")


def contents(folder: Path) -> dict[str, str]:
    """Digest every file in a folder, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed pack leaves."""
    folder = tmp_path_factory.mktemp("expected")
    pack_until_killed.pack(folder)
    return contents(folder)


def check_after_kill(folder: Path, expected: dict[str, str]) -> None:
    """Check that a killed pack is whole or said to be unfinished, and finishes the same."""
    if (folder / MANIFEST_NAME).exists():
        whole = {name: digest for name, digest in contents(folder).items() if name in expected}
        assert whole == expected
    else:
        with pytest.raises(ShardError, match=r"unfinished pack|not a data set|not a folder"):
            read_manifest(folder)
    pack_until_killed.pack(folder)
    assert contents(folder) == expected


# Forked once per system call: starting an interpreter each time would take minutes.
KILL_EVERYWHERE = """
import os, sys
from pathlib import Path
from tests.faults import pack_until_killed
for call in range(10_000):
    child = os.fork()
    if child == 0:
        pack_until_killed.die_at(call)
        pack_until_killed.pack(Path(sys.argv[1]) / f"{call:04d}", overwrite=len(sys.argv) > 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == 9, status
"""


@pytest.mark.parametrize("is_overwriting", [False, True])
def test_40_a_pack_killed_at_every_system_call_finishes_with_the_same_bytes(
    tmp_path: Path, expected: dict[str, str], is_overwriting: bool
) -> None:
    arguments = ["overwrite"] if is_overwriting else []
    subprocess.run(
        [sys.executable, "-c", KILL_EVERYWHERE, str(tmp_path), *arguments],
        check=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    killed = sorted(tmp_path.iterdir())
    assert len(killed) > 100
    for folder in killed:
        check_after_kill(folder, expected)


@needs_strace
@pytest.mark.parametrize(
    ("syscall", "nth"),
    [
        *itertools.product(["write"], [1, 2, 5, 9]),
        *itertools.product(["fsync"], [1, 2, 6, 13]),
        *itertools.product(["rename"], [1, 2, 4, 7]),
    ],
)
def test_40_a_pack_killed_by_the_system_finishes_with_the_same_bytes(
    tmp_path: Path, expected: dict[str, str], syscall: str, nth: int
) -> None:
    folder = tmp_path / "cohort"
    finished = injected(folder, f"{syscall}:signal=SIGKILL:when={nth}")
    assert finished.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), finished.stderr
    check_after_kill(folder, expected)


def injected(folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    """Run a pack with a fault in one of its system calls."""
    syscall = fault.partition(":")[0]
    return subprocess.run(
        [
            *("strace", "-f", "-qq", "-o", os.devnull),
            *("-e", f"trace={syscall}", "-e", f"inject={fault}"),
            *COMMAND,
            str(folder),
        ],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@needs_strace
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("write:error=ENOSPC:when=1", "No space left on device; [0-9,]+ more bytes were needed"),
        ("write:error=ENOSPC:when=7", "No space left on device"),
        ("fsync:error=EIO:when=2", "Input/output error"),
        ("fsync:error=EIO:when=9", "Input/output error"),
        ("rename:error=EACCES:when=3", "Permission denied"),
    ],
)
def test_42_and_43_a_full_or_failing_disk_stops_the_pack_and_the_next_run_finishes_it(
    tmp_path: Path, expected: dict[str, str], fault: str, said: str
) -> None:
    folder = tmp_path / "cohort"
    finished = injected(folder, fault)
    assert finished.returncode == 1
    assert "ShardError" in finished.stderr
    assert "run the same command again" in finished.stderr
    assert re.search(said, finished.stderr)
    assert not [name for name in contents(folder) if name.endswith((".tmp", ".lock"))]
    check_after_kill(folder, expected)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from tests.faults import pack_until_killed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
pack_until_killed.pack(Path(sys.argv[1]))
"""


def test_44_a_file_size_limit_is_named_and_leaves_nothing_half_written(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    folder = tmp_path / "cohort"
    finished = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    assert "File too large; " in finished.stderr
    assert contents(folder) == {}
    check_after_kill(folder, expected)


def test_47_bytes_do_not_depend_on_umask_or_time_zone(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    folder = tmp_path / "cohort"
    subprocess.run(
        [*COMMAND, str(folder)],
        env={**ENVIRONMENT, "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "3", "LC_ALL": "C"},
        cwd=ROOT,
        umask=0o077,
        check=True,
    )
    assert contents(folder) == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_47_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ShardError, match="cannot be locked: Permission denied"):
        pack_until_killed.pack(tmp_path)
    tmp_path.chmod(0o700)
