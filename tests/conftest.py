"""Fixtures every part of the test suite shares."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

PROJECT_ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = PROJECT_ROOT.parent / "shared" / "data"

# A deadline measures the machine, not the code; derandomised runs are the same on every machine.
settings.register_profile("default", deadline=None, derandomize=True)
# `make fuzz`: the same properties, a thousand times the examples, and not the same ones every time.
settings.register_profile("fuzz", deadline=None, max_examples=100_000)
settings.load_profile("default")
os.environ.setdefault("COLUMNS", "120")


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds pyproject.toml."""
    return PROJECT_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data with independently computed expectations, read in place."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real test data is absent: {SHARED_DATA.name} folder not beside the project")
    return SHARED_DATA


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """List processes that the test started and that still run, or that nobody waited for.

    Python's tracker of named resources is not among them: it starts with the first thing shared
    between processes, and ends with its parent.
    """
    earlier = set(psutil.Process().children(recursive=True))

    def started() -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return [child for child in found if child not in earlier and not _is_tracker(child)]

    return started


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False
