"""A packed cohort, and a way to run commands in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.cli.app import run
from streaming_balance.demo.cohort import make_cohort
from streaming_balance.ingest.pack import write_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command printed and how it ended."""

    status: int
    """Exit status."""
    out: str
    """Its stdout."""
    err: str
    """Its stderr."""

    @property
    def document(self) -> Any:
        """Its stdout as the one JSON document it must be."""
        return json.loads(self.out)


Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command line in this process."""

    def run_command(*arguments: object) -> Answer:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(status=status, out=captured.out, err=captured.err)

    return run_command


@pytest.fixture(scope="session")
def raw_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 generated patients: 28 HGG, 10 LGG."""
    out = tmp_path_factory.mktemp("raw")
    make_cohort(out, patients=38, shape=(8, 8, 8))
    return out


@pytest.fixture(scope="session")
def packed_cohort(raw_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, packed half and half: 14 HGG and 5 LGG in each of train and val."""
    out = tmp_path_factory.mktemp("packed") / "cohort"
    write_shards(raw_cohort, out, split="train=0.5,val=0.5", shard_bytes=20_000)
    return out
