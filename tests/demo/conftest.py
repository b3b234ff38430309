"""A packed cohort of a few generated patients."""

from __future__ import annotations

import pytest

from streaming_balance.demo.cohort import make_cohort
from streaming_balance.ingest.pack import write_shards
from streaming_balance.storage.shards import ShardSet, open_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """38 generated patients, 28 HGG and 10 LGG: 17 + 6 to train on, 11 + 4 to validate on."""
    folder = tmp_path_factory.mktemp("demo")
    make_cohort(folder / "patients", patients=38, shape=(12, 12, 12), seed=1)
    write_shards(folder / "patients", folder / "cohort", split="train=0.6,val=0.4", seed=1)
    return open_shards(folder / "cohort")
