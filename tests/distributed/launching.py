"""Running a program of this folder under torchrun, and reading what each of its ranks wrote."""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.training.cohorts import PROJECT_ROOT

# What a rank waits for another; eight ranks on two processors start slowly.
WAIT = datetime.timedelta(seconds=60)
DEADLINE_SECONDS = 150


def launch(program: str, out: Path, num_ranks: int, *arguments: object) -> list[dict[str, Any]]:
    """Run a program on so many ranks of this machine.

    Args:
        program: name of a module of this folder; it takes the folder to write to, then `arguments`.
        out: folder for what the ranks write; made here.
        num_ranks: how many processes.
        arguments: more words of the command line.

    Returns:
        What each rank gave to `write_down`.
    """
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", "-m", f"tests.distributed.{program}"]
    ended = subprocess.run(
        [*command, str(out), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT_ROOT)},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def begin() -> None:
    """Join the process group, on one thread of a shared machine."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=WAIT)


def write_down(out: Path, document: dict[str, Any]) -> None:
    """Leave what this rank found where `launch` looks for it, and part."""
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(document))
    dist.barrier()
    dist.destroy_process_group()


class Listener(logging.Handler):
    """Keeps the warnings of the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        logging.getLogger("streaming_balance").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def take(self) -> list[str]:
        """Give what was said since the last call."""
        said, self.said = self.said, []
        return said
