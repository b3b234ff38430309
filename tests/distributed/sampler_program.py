"""What each process of the sampler test runs: iterate a DataLoader, save, and write it down."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from streaming_balance.training.samplers import BalancedBatchSampler, BalancedSampler
from tests.training.sampler_cases import LABELS, Numbers, plain


def loaders(batch_size: int) -> dict[str, DataLoader[Any]]:
    """Make a loader with either kind of sampler; ranks are found in the environment."""
    by_index = BalancedSampler(LABELS, batch_size=batch_size, seed=3)
    by_batch = BalancedBatchSampler(LABELS, batch_size=batch_size, seed=3)
    return {
        "sampler": DataLoader(Numbers(), sampler=by_index, batch_size=batch_size),
        "batch_sampler": DataLoader(Numbers(), batch_sampler=by_batch),
    }


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--state", type=Path)
    chosen = parser.parse_args()
    document = {}
    for kind, loader in loaders(chosen.batch_size).items():
        sampler: Any = getattr(loader, kind)
        if chosen.state:
            sampler.load_state_dict(json.loads(chosen.state.read_text()))
        received: list[list[int]] = []
        while len(received) < chosen.batches:
            received += plain(itertools.islice(loader, chosen.batches - len(received)))
        document[kind] = {"batches": received, "state": json.dumps(sampler.state_dict())}
    (chosen.out / f"{os.environ['RANK']}.json").write_text(json.dumps(document))


if __name__ == "__main__":
    main()
