"""`tools/simulate.py`: what it prints, and how it names a seed that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from streaming_balance.training.course import Course
from streaming_balance.training.state import Position
from tools import simulate

DEADLINE_SECONDS = 60


def run(project_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool as its users do, from somewhere else."""
    return subprocess.run(
        [sys.executable, str(project_root / "tools" / "simulate.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=project_root.parent,
        check=False,
    )


def test_one_seed_is_told_start_by_start(project_root: Path) -> None:
    ended = run(project_root, "--seed", "17")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("seed 17: {class 0: ")
    assert "start 0, at the beginning: " in ended.stdout
    assert "received by all ranks" in ended.stdout


def test_many_seeds_are_summed_up(project_root: Path) -> None:
    ended = run(project_root, "--cases", "12", "--first-seed", "40")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "       12 cases\n" in ended.stdout
    assert "parts of batches received\n" in ended.stdout


def test_a_seed_that_fails_is_named_with_the_command_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def jump(self: Course, target: Position) -> None:
        self.position = target

    monkeypatch.setattr(Course, "jump", jump)
    monkeypatch.setattr(sys, "argv", ["simulate.py", "--cases", "50"])
    assert simulate.main() == 1
    *_, last = capsys.readouterr().out.splitlines()
    command = last.split("See it again: python ")[1].split()
    assert command[:2] == ["tools/simulate.py", "--seed"]
    monkeypatch.setattr(sys, "argv", command)
    assert simulate.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == last
