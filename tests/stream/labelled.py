"""Streams of labelled samples for the tests of stages: compositions, orders, and who is alive."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from streaming_balance.stream.stages import StageRun

# Samples per class, as in the streams that people ask for help with: wd37 is the first.
COMPOSITIONS: dict[str, dict[str, int]] = {
    "89/11": {"HGG": 89, "LGG": 11},
    "99/1": {"HGG": 99, "LGG": 1},
    "1000:1": {"HGG": 1000, "LGG": 1},
    # CIFAR-10-LT with imbalance factor 0.01: floor(5000 * 0.01**(i / 9)).
    "long tail": {
        f"c{number}": count
        for number, count in enumerate([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    },
}
ORDERS = ("common first", "rare first", "blocked", "random")


@dataclass(eq=False)
class Sample:
    """A sample that can be watched: equal to nobody else, and weakly referenced."""

    key: str
    label: str | None
    num_bytes: int = 0


def counts_of(composition: Mapping[str, int], length: int) -> dict[str, int]:
    """Cut a composition down to `length` samples: floors, and the rest to the most frequent."""
    total = sum(composition.values())
    counts = {label: count * length // total for label, count in composition.items()}
    counts[max(composition, key=lambda label: composition[label])] += length - sum(counts.values())
    return counts


def labels_of(composition: Mapping[str, int], length: int, order: str, seed: int = 0) -> list[str]:
    """Give the labels of a stream in the order named."""
    counts = counts_of(composition, length)
    by_count = sorted(counts, key=lambda label: -counts[label])
    labels = [label for label in by_count for _ in range(counts[label])]
    generator = np.random.default_rng(seed)
    if order == "rare first":
        return labels[::-1]
    if order == "blocked":
        blocks = [labels[start : start + 40] for start in range(0, length, 40)]
        return [label for number in generator.permutation(len(blocks)) for label in blocks[number]]
    if order == "random":
        return [labels[number] for number in generator.permutation(length)]
    assert order == "common first"
    return labels


def samples(labels: Iterable[str | None], *, num_bytes: int = 0) -> list[Sample]:
    """Give one sample per label, with keys s0, s1, ..."""
    return [Sample(f"s{number}", label, num_bytes) for number, label in enumerate(labels)]


def even(labels: Iterable[str]) -> dict[str, float]:
    """Ask for all classes equally."""
    return dict.fromkeys(labels, 1.0)


def shares(weights: Mapping[str, int | float]) -> dict[str, Fraction]:
    """Give exact shares."""
    exact = {label: Fraction(str(weight)) for label, weight in weights.items()}
    return {label: weight / sum(exact.values()) for label, weight in exact.items()}


def flat(outputs: Iterable[Any]) -> list[str]:
    """Give the keys of what went on, batches taken apart."""
    keys: list[str] = []
    for output in outputs:
        keys.extend(item.key for item in (output if isinstance(output, list) else [output]))
    return keys


def saved_and_restored(
    run: StageRun[Any, Any], begin: Callable[[], StageRun[Any, Any]], by_key: Mapping[str, Any]
) -> StageRun[Any, Any]:
    """Give a fresh run that took over the state of `run`, by way of JSON text."""
    state = json.loads(json.dumps(run.state_dict(lambda item: item.key)))
    other = begin()
    other.load_state_dict(state, lambda key: by_key[key])
    return other


class Watch:
    """Counts the samples that are alive without asking the run that holds them."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[Sample] = weakref.WeakSet()
        self.made = 0

    def make(self, label: str, num_bytes: int) -> Sample:
        """Make a sample and watch it."""
        sample = Sample(f"s{self.made}", label, num_bytes)
        self.made += 1
        self._alive.add(sample)
        return sample

    def sizes(self) -> list[int]:
        """Give the bytes of every sample that somebody still holds."""
        return [sample.num_bytes for sample in self._alive]
