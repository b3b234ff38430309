"""Two ranks spawned with an open data set; prints the keys that each of them gets in an epoch."""

from __future__ import annotations

import sys

from torch.multiprocessing.spawn import spawn

from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.loader import train_loader


def train(rank: int, shards: ShardSet) -> None:
    """Be one of two ranks."""
    with train_loader(
        shards, global_batch_size=4, seed=3, rank=rank, num_ranks=2, num_threads=1
    ) as loader:
        line = " ".join(key for batch in loader for key in batch["key"])
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    spawn(train, args=(open_shards(sys.argv[1]),), nprocs=2)  # type: ignore[no-untyped-call]
