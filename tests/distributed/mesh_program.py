"""What each process of the mesh tests runs: two data-parallel ranks, two processes in each."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader
from streaming_balance.training.samplers import BalancedBatchSampler
from tests.distributed.launching import Listener, begin, write_down
from tests.distributed.rank_program import told
from tests.training.sampler_cases import LABELS

GLOBAL_BATCH = 6
STEPS = 4
SHAPES = ((2, 2), (1, 4))


def received(shards: ShardSet, mesh: DeviceMesh) -> dict[str, Any]:
    """Say what the loaders of a process give that knows its data-parallel rank by a mesh."""
    rank, num_ranks = mesh["dp"].get_local_rank(), mesh["dp"].size()
    sampler = BalancedBatchSampler(
        LABELS, batch_size=GLOBAL_BATCH // num_ranks, seed=5, rank=rank, num_replicas=num_ranks
    )
    with train_loader(
        shards, global_batch_size=GLOBAL_BATCH, seed=5, rank=rank, num_ranks=num_ranks
    ) as train:
        endless = itertools.chain.from_iterable(itertools.repeat(train))
        batches = [told(batch) for batch in itertools.islice(endless, STEPS)]
    with eval_loader(shards, split="val", batch_size=2, rank=rank, num_ranks=num_ranks) as val:
        evaluated = [key for batch in val for key in batch["key"]]
    return {
        "place": [rank, mesh["tp"].get_local_rank()],
        "train": batches,
        "val": evaluated,
        "indices": list(itertools.islice(sampler, STEPS)),
    }


def main() -> None:
    """Run one process of four."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    begin()
    heard = Listener()
    shards = open_shards(options.folder)
    # Before there is a mesh: samplers of one replica that nobody deals out are warned of.
    next(iter(BalancedBatchSampler(LABELS, batch_size=4, rank=0, num_replicas=1)))
    document: dict[str, Any] = {"without a mesh": heard.take()}
    for shape in SHAPES:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        document[str(shape)] = received(shards, mesh) | {"said": heard.take()}
        torch.distributed.barrier()
    write_down(options.out, document)


if __name__ == "__main__":
    main()
