"""Reference numbers that several tests of streams share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def vectors(shared_data: Path) -> dict[str, Any]:
    """Give the reference numbers of balancing, or skip where they are absent."""
    path = shared_data.parent / "vectors" / "balance_vectors.json"
    if not path.is_file():
        pytest.skip("reference vectors are absent")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
