"""What each rank of the tests of preemption runs: train until told to stop, save, say how it went.

Every line on stdout is one event, written at once and whole: ranks share the pipe.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.stopping import StopTogether

DEADLINE = datetime.timedelta(seconds=40)
# A checkpoint after every so many batches: an epoch has two.
EVERY = 3


def same(sample: dict[str, Any]) -> dict[str, Any]:
    """Change nothing: workers have something to do with a transform."""
    return sample


def tell(event: str, **what: object) -> None:
    """Say that something has happened."""
    line = json.dumps({"event": event, "rank": dist.get_rank(), **what}) + "\n"
    os.write(1, line.encode())


def save(loader: BalancedLoader, path: Path) -> None:
    """Write the state so that it is whole or not there; rank 0 does it for all."""
    if not dist.get_rank():
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(loader.state_dict()))
        beside.replace(path)


def train(loader: BalancedLoader, stop: StopTogether, path: Path) -> None:
    """Train until somebody is told to stop."""
    taken = 0
    while True:
        for batch in loader:
            if not taken:
                children = psutil.Process().children(recursive=True)
                tell("begun", process=os.getpid(), workers=[child.pid for child in children])
            taken += 1
            place = [batch["epoch"], batch["step"]]
            tell("batch", place=place, slot=batch["slot"].tolist(), key=batch["key"])
            if stop.requested():
                save(loader, path)
                tell("saved", place=place, asked_by=stop.asked_by, state=loader.state_dict())
                return
            if taken % EVERY == 0:
                save(loader, path)
                tell("checkpoint", place=place)


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=DEADLINE)
    loader = train_loader(
        open_shards(options.folder),
        global_batch_size=7,
        balance="class_balanced",
        seed=5,
        workers=options.workers,
        transform=same if options.workers else None,
    )
    if options.state:
        loader.load_state_dict(json.loads(options.state.read_text()))
    with loader, StopTogether() as stop:
        train(loader, stop, options.out / "state.json")
    tell("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
