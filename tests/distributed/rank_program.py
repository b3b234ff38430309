"""What each process of the distributed tests runs: train, save, resume, evaluate, write it down."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from streaming_balance.storage.shards import open_shards
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader

DEADLINE = datetime.timedelta(seconds=30)


def told(batch: dict[str, Any]) -> dict[str, Any]:
    """Say what a batch holds."""
    return {
        "place": [batch["epoch"], batch["step"]],
        "slot": batch["slot"].tolist(),
        "sample": batch["sample"].tolist(),
        "label": batch["label"].tolist(),
        "voxels": [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch["image"]],
        "scaled_loss": batch["loss_scale"] * batch["image"].mean().item(),
    }


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--without-group", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if not options.without_group:
        dist.init_process_group("gloo", timeout=DEADLINE)
        # Wrong on purpose: the process group is what counts.
        os.environ.update(RANK="0", WORLD_SIZE="1")
    shards = open_shards(options.folder)
    loader = train_loader(shards, global_batch_size=7, balance="class_balanced", seed=5)
    if options.state:
        loader.load_state_dict(json.loads(options.state.read_text()))
    train: list[dict[str, Any]] = []
    while len(train) < options.batches:
        for batch in loader:
            train.append(told(batch))
            if not options.without_group:
                # A rank with more or fewer steps than another would hang here, until the deadline.
                loss = torch.tensor(train[-1]["scaled_loss"], dtype=torch.float64)
                dist.all_reduce(loss)
                train[-1]["mean_loss"] = loss.item() / dist.get_world_size()
            if len(train) == options.batches:
                break
    with eval_loader(shards, split="val", batch_size=2) as val:
        evaluated = [key for batch in val for key in batch["key"]]
    document = {
        "rank": loader.rank,
        "num_ranks": loader.num_ranks,
        "steps": len(loader),
        "state": json.dumps(loader.state_dict()),
        "train": train,
        "val": evaluated,
    }
    loader.close()
    (options.out / f"{rank}.json").write_text(json.dumps(document))
    if not options.without_group:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
