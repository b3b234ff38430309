"""What each process of the checkpoint test runs: train, then save or load with torch's own tool.

The loader's state travels as one JSON text: torch.distributed.checkpoint loads into what is there,
entry by entry, and a fresh loader has no entries for what the saved run jumped over.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.distributed.launching import begin, write_down
from tests.distributed.rank_program import told

GLOBAL_BATCH = 7
BEFORE = 3
AFTER = 4


def built(shards: ShardSet, **ranks: Any) -> BalancedLoader:
    """Build the loader that all processes have."""
    return train_loader(
        shards, global_batch_size=GLOBAL_BATCH, balance="class_balanced", seed=5, **ranks
    )


def steps(loader: BalancedLoader, count: int) -> list[dict[str, Any]]:
    """Write down the next batches, of as many epochs as they need."""
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    return [told(batch) for batch in itertools.islice(endless, count)]


def first_leg(loader: BalancedLoader) -> list[dict[str, Any]]:
    """Train a bit, jump over what is left of two epochs, and train a bit more."""
    batches = steps(loader, BEFORE)
    loader.set_epoch(3)
    return batches + steps(loader, 1)


def save(path: Path, loader: BalancedLoader, weight: float) -> None:
    """Save a model's weight and where the loader stands."""
    state = {"model": {"weight": torch.full((3,), weight)}, "data": json.dumps(loader.state_dict())}
    state_dict_saver.save(state, checkpoint_id=path)


def load(path: Path, loader: BalancedLoader) -> torch.Tensor:
    """Load both; gives the model's weight."""
    state: dict[str, Any] = {"model": {"weight": torch.zeros(3)}, "data": ""}
    state_dict_loader.load(state, checkpoint_id=path)
    loader.load_state_dict(json.loads(state["data"]))
    weight: torch.Tensor = state["model"]["weight"]
    return weight


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--load", action="store_true")
    options = parser.parse_args()
    begin()
    document: dict[str, Any] = {}
    with built(open_shards(options.folder)) as loader:
        if options.load:
            document["weight"] = load(options.checkpoint, loader).tolist()
            document["state"] = loader.state_dict()
            document["train"] = steps(loader, AFTER)
        else:
            document["train"] = first_leg(loader)
            save(options.checkpoint, loader, 2.5)
            document["state"] = loader.state_dict()
    write_down(options.out, document)


if __name__ == "__main__":
    main()
