"""One small data set for all tests that only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from streaming_balance.storage.shards import ShardSet
from tests.training.cohorts import cohort, packed


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """9 HGG and 5 LGG patients in train, 7 in val, over several shards."""
    folder: Path = tmp_path_factory.mktemp("small") / "cohort"
    return packed(folder, cohort(), shard_bytes=8192)
