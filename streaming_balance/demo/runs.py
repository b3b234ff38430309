"""The runs that are compared: natural, balanced, and balanced but stopped and resumed."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from streaming_balance.demo.network import recall_by_class
from streaming_balance.demo.places import Places
from streaming_balance.demo.trainer import GlobalBatch, Trainer
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import BalancedLoader, train_loader

BALANCED = "class_balanced"
STATE_NAME, NETWORK_NAME = "state.json", "network.npz"
# Nine batches of these small volumes; reading hundreds ahead would take the processors' time from
# the network.
PREFETCH_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One network trained from the start to the end."""

    recall: Mapping[str, float]
    """label -> recall on validation."""
    batches: tuple[GlobalBatch, ...]
    """What each global batch held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A run that was stopped and resumed, held against one that was not."""

    epoch: int
    """Epoch it stopped in, from 0."""
    step: int
    """Step of that epoch that came next."""
    ranks: int
    """Ranks it was resumed on."""
    compared: int
    """Global batches from the stop to the end."""
    equal: int
    """How many of them held what the uninterrupted run's held."""
    recall: Mapping[str, float]
    """label -> recall of the resumed network on validation."""

    @property
    def is_equal(self) -> bool:
        """Whether every compared batch is the same."""
        return self.equal == self.compared > 0


class Experiment:
    """Trains networks that differ in their batches alone.

    Args:
        shards: a data set with the splits `train` and `val`.
        epochs: epochs to train for.
        seed: names the random streams of weights and batches.
    """

    global_batch_size: ClassVar[int] = 8
    resumed_ranks: ClassVar[int] = 2

    def __init__(self, shards: ShardSet, *, epochs: int, seed: int) -> None:
        self.shards, self._seed = shards, seed
        with self._loader(BALANCED) as loader:
            self._steps_per_epoch = len(loader)
        self.steps = epochs * self._steps_per_epoch
        # The middle of the middle epoch.
        self._stop_after = (epochs // 2) * self._steps_per_epoch + self._steps_per_epoch // 2

    @cached_property
    def natural(self) -> Run:
        """Train on classes as they come."""
        return self._whole_run(None)

    @cached_property
    def balanced(self) -> Run:
        """Train on as much of every class."""
        return self._whole_run(BALANCED)

    def stop_and_resume(self, places: Places) -> Resumption:
        """Stop a balanced run in mid-epoch, resume it on other ranks, and compare.

        Args:
            places: where the checkpoint and the state at the end are written.

        Returns:
            What the resumed run delivered, against the uninterrupted one.
        """
        self._run_until_stop(places.checkpoint)
        state = json.loads((places.checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        trainer = self._trainer()
        trainer.load(places.checkpoint / NETWORK_NAME)
        with ExitStack() as stack:
            ranks = [
                stack.enter_context(self._loader(BALANCED, rank=rank, num_ranks=self.resumed_ranks))
                for rank in range(self.resumed_ranks)
            ]
            for loader in ranks:
                loader.load_state_dict(state)
            resumed = trainer.train(ranks, steps=self.steps - self._stop_after)
            _write_state(ranks[0], places.state)
        expected = self.balanced.batches[self._stop_after :]
        return Resumption(
            epoch=state["position"]["epoch"],
            step=state["position"]["step"],
            ranks=self.resumed_ranks,
            compared=len(expected),
            equal=sum(map(operator.eq, expected, resumed)),
            recall=self._recall(trainer),
        )

    def _whole_run(self, balance: str | None) -> Run:
        """Train a fresh network without a stop."""
        trainer = self._trainer()
        with self._loader(balance) as loader:
            batches = trainer.train([loader], steps=self.steps)
        return Run(recall=self._recall(trainer), batches=tuple(batches))

    def _run_until_stop(self, checkpoint: Path) -> None:
        """Train a fresh network on one rank, stop, and save what is needed to go on."""
        trainer = self._trainer()
        with self._loader(BALANCED) as loader:
            trainer.train([loader], steps=self._stop_after)
            _write_state(loader, checkpoint / STATE_NAME)
        trainer.save(checkpoint / NETWORK_NAME)

    def _trainer(self) -> Trainer:
        """Make a network; every one begins with the same weights."""
        modalities = len(self.shards.read("train", 0)["image"])
        return Trainer(
            modalities, len(self.shards.classes), total_steps=self.steps, seed=self._seed
        )

    def _loader(self, balance: str | None, *, rank: int = 0, num_ranks: int = 1) -> BalancedLoader:
        """Make one rank's training loader."""
        return train_loader(
            self.shards,
            global_batch_size=self.global_batch_size,
            balance=balance,
            seed=self._seed,
            rank=rank,
            num_ranks=num_ranks,
            prefetch_bytes=PREFETCH_BYTES,
        )

    def _recall(self, trainer: Trainer) -> dict[str, float]:
        """Judge a network on the untouched validation patients."""
        with eval_loader(
            self.shards, split="val", batch_size=self.global_batch_size, rank=0, num_ranks=1
        ) as loader:
            return recall_by_class(trainer.network, loader, self.shards.classes)


def _write_state(loader: BalancedLoader, path: Path) -> None:
    """Save a loader's state as users do."""
    path.write_text(json.dumps(loader.state_dict(), indent=2) + "\n", encoding="utf-8")
