"""Ranks that somebody kills: one clean process imports once, and forks ranks as it is told.

A line on stdin is an order: to start the ranks of a leg, or to bury processes. A line on stdout is
an event. What ranks received and saved lies in files, which survive them.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torchdata.stateful_dataloader  # noqa: F401 - imported here once, not in every rank
import xxhash

from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.merging import merge_states

# A checkpoint every so many batches.
EVERY = 4


class Together:
    """Lets ranks end a step together, as the reduction of gradients does."""

    def __init__(self, num_ranks: int) -> None:
        self._arrived = os.pipe()
        self._go = [os.pipe() for _ in range(num_ranks)]

    def wait(self, rank: int) -> None:
        """Wait until all ranks are here; for ever, once one of them is dead."""
        if rank:
            os.write(self._arrived[1], b".")
            os.read(self._go[rank][0], 1)
            return
        for _ in self._go[1:]:
            os.read(self._arrived[0], 1)
        for _, end in self._go[1:]:
            os.write(end, b".")

    def close(self) -> None:
        """Close the ends of this process."""
        for end in (*self._arrived, *(end for ends in self._go for end in ends)):
            os.close(end)


def tell(**event: object) -> None:
    """Say what has happened, in one write: ranks share the pipe."""
    os.write(1, (json.dumps(event) + "\n").encode())


def told(batch: dict[str, Any]) -> dict[str, Any]:
    """Say what a batch holds."""
    return {
        "place": [batch["epoch"], batch["step"]],
        "slot": batch["slot"].tolist(),
        "sample": batch["sample"].tolist(),
        "voxels": [xxhash.xxh3_128_hexdigest(row.numpy().tobytes()) for row in batch["image"]],
    }


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is whole or not there."""
    beside = path.with_suffix(".part")
    beside.write_text(text)
    beside.replace(path)


def save(loader: BalancedLoader, out: Path, received: int, together: Together) -> None:
    """Save the state of the run: rank 0's, or with stand-ins what is made of all ranks' states."""
    state = loader.state_dict()
    if state["recorders"] is not None:
        write_whole(out / f"own-{loader.rank}.json", json.dumps(state))
        together.wait(loader.rank)
    if loader.rank:
        return
    if state["recorders"] is not None:
        owns = [out / f"own-{rank}.json" for rank in range(loader.num_ranks)]
        state = merge_states([json.loads(own.read_text()) for own in owns])
    write_whole(out / f"state-{received:06d}.json", json.dumps(state))


def train(order: dict[str, Any], rank: int, together: Together) -> None:
    """Be a rank: receive batches, write them down, save, until the end or until killed."""
    out, leg, received = Path(order["out"]), order["leg"], order["received"]
    received_file = os.open(out / f"leg-{leg}-{rank}.jsonl", os.O_WRONLY | os.O_CREAT)
    with train_loader(
        open_shards(order["folder"]), rank=rank, num_ranks=order["num_ranks"], **order["loader"]
    ) as loader:
        if order["state"] is not None:
            loader.load_state_dict(json.loads(Path(order["state"]).read_text()))
        while received < order["num_batches"]:
            for batch in loader:
                os.write(received_file, (json.dumps(told(batch)) + "\n").encode())
                workers = [child.pid for child in multiprocessing.active_children()]
                tell(leg=leg, event="batch", workers=workers)
                received += 1
                together.wait(rank)
                if not received % EVERY:
                    save(loader, out, received, together)
                if received == order["num_batches"]:
                    break
    tell(leg=leg, event="done")


def start(order: dict[str, Any]) -> list[ForkProcess]:
    """Fork the ranks of a leg."""
    together = Together(order["num_ranks"])
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=train, args=(order, rank, together))
        for rank in range(order["num_ranks"])
    ]
    for process in processes:
        process.start()
    together.close()
    tell(leg=order["leg"], event="started", processes=[process.pid for process in processes])
    return processes


def main() -> None:
    """Do what stdin says until it ends."""
    torch.set_num_threads(1)
    # What was imported stays shared with the ranks, which would copy it to count references.
    gc.freeze()
    ranks: dict[int | None, ForkProcess] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "bury" in order:
            ended = [ranks.pop(pid) for pid in order["bury"]]
            for process in ended:
                process.join()
            statuses = [process.exitcode for process in ended]
            tell(leg=order["leg"], event="buried", statuses=statuses)
        else:
            ranks |= {process.pid: process for process in start(order)}


if __name__ == "__main__":
    main()
