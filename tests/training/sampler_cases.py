"""Labels, samplers and states that several test modules share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

LABELS = ["HGG"] * 21 + ["LGG"] * 8
BATCH = 6


class Numbers(Dataset[int]):
    """Every sample is its own number, so that what a loader gives says what it asked for."""

    def __init__(self, size: int = len(LABELS)) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        return index


class Unreadable(Dataset[Any]):
    """A dataset of which no sample may be read."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        raise AssertionError(f"sample {index} was read")


def pieces(indices: list[int], size: int = BATCH) -> list[list[int]]:
    """Cut a list into batches."""
    return [indices[first : first + size] for first in range(0, len(indices), size)]


def plain(batches: Any) -> list[list[int]]:
    """Give what a DataLoader over `Numbers` delivers as lists."""
    return [batch.tolist() for batch in batches]


@contextmanager
def global_states_untouched() -> Iterator[None]:
    """Fail unless torch's, numpy's and Python's global generators are as they were."""
    before = _states()
    yield
    after = _states()
    assert before == after


def _states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the state others use
    return torch.get_rng_state().tolist(), name, list(keys), rest, random.getstate()
