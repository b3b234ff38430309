"""What each process of the test of many rank counts runs: train some steps, and write them down."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
import torch.distributed as dist

from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import train_loader
from tests.distributed.launching import Listener, begin, write_down
from tests.distributed.rank_program import told

GLOBAL_BATCH = 11
STEPS = 5


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    begin()
    heard = Listener()
    train = []
    with train_loader(
        open_shards(options.folder),
        global_batch_size=GLOBAL_BATCH,
        balance="class_balanced",
        seed=5,
    ) as loader:
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
        for batch in itertools.islice(endless, STEPS):
            train.append(told(batch))
            # A rank with fewer steps than another would keep it waiting here, until the deadline.
            dist.all_reduce(torch.ones(1))
        document = {
            "train": train,
            "rank": [loader.rank, loader.num_ranks],
            "state": loader.state_dict(),
            "said": heard.take(),
        }
    write_down(options.out, document)


if __name__ == "__main__":
    main()
