"""What each process of the evaluation test runs: evaluate splits, gather, check, write it down."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from streaming_balance.errors import BalanceError
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.evaluation import eval_loader

DEADLINE = datetime.timedelta(seconds=30)


def gathered_after_the_loop(shards: ShardSet, split: str) -> dict[str, Any]:
    """Evaluate without any collective in the loop, then gather and check."""
    numbers: list[int] = []
    means: list[float] = []
    with eval_loader(shards, split=split, batch_size=2) as loader:
        for batch in loader:
            numbers += batch["sample"].tolist()
            means += batch["image"].mean(dim=(1, 2, 3, 4)).tolist()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {"numbers": numbers, "means": means})
        loader.check_complete([part["numbers"] for part in everyone])
        lost = [part["numbers"][1:] for part in everyone]
        try:
            loader.check_complete(lost)
            complaint = ""
        except BalanceError as error:
            complaint = str(error)
        return {
            "own": numbers,
            "steps": len(loader),
            "most_steps": loader.most_steps,
            "everyone": everyone,
            "complaint": complaint,
            "position": loader.state_dict()["position"],
        }


def reduced_in_the_loop(shards: ShardSet, split: str) -> dict[str, float]:
    """Meet in every one of `most_steps` turns; whoever has no batch left adds nothing."""
    totals = torch.zeros(2, dtype=torch.float64)
    with eval_loader(shards, split=split, batch_size=2) as loader:
        batches = itertools.chain(loader, itertools.repeat(None))
        # range comes first: zip then asks for no batch after the last turn.
        for _, batch in zip(range(loader.most_steps), batches, strict=False):
            mine = torch.zeros(2, dtype=torch.float64)
            if batch is not None:
                mine += torch.tensor([batch["image"].double().sum().item(), len(batch["sample"])])
            # A rank with more or fewer turns than another would hang here, until the deadline.
            dist.all_reduce(mine)
            totals += mine
    return {"sum": totals[0].item(), "count": totals[1].item()}


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=DEADLINE)
    shards = open_shards(options.folder)
    document = {
        split: {
            **gathered_after_the_loop(shards, split),
            **reduced_in_the_loop(shards, split),
        }
        for split in ("val", "test")
    }
    (options.out / f"{dist.get_rank()}.json").write_text(json.dumps(document))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
