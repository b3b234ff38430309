"""Sample numbers gathered from all ranks, and whether every sample is among them exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from streaming_balance.errors import BalanceError, ConfigError

Gathered: TypeAlias = "torch.Tensor | NDArray[Any] | int | Sequence[Gathered]"
# Enough to find the cause, few enough for one line of a log.
MOST_NAMED = 5


def flat_numbers(gathered: Gathered) -> NDArray[np.int64]:
    """Give all numbers of what ranks gathered, in its order.

    Args:
        gathered: whole numbers: a tensor or array of any shape, or a list of numbers, of arrays or
            of lists, as `all_gather_object` gives them; parts may be empty.

    Returns:
        `(n,)` numbers.

    Raises:
        ConfigError: something in it is no whole number.

    Examples:
        >>> flat_numbers([torch.tensor([4, 1]), [], [np.array([0]), 3]]).tolist()
        [4, 1, 0, 3]
    """
    if isinstance(gathered, torch.Tensor):
        # bfloat16 has no numpy dtype; a float of any kind is refused below.
        tensor = gathered.detach().cpu()
        gathered = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    if isinstance(gathered, list | tuple):
        if not all(_is_number(part) for part in gathered):
            parts = [flat_numbers(part) for part in gathered]
            return np.concatenate([np.empty(0, dtype=np.int64), *parts])
        gathered = np.array(gathered)
    elif _is_number(gathered):
        gathered = np.array([gathered])
    if not isinstance(gathered, np.ndarray) or (gathered.size and gathered.dtype.kind not in "iu"):
        found = gathered.dtype if isinstance(gathered, np.ndarray) else type(gathered).__name__
        raise ConfigError(
            f"gathered holds {found} where sample numbers are expected: whole numbers, since "
            f"floats of 32 bits merge those above 2**24. Gather batch['sample'] as it is."
        )
    return gathered.ravel().astype(np.int64)


def check_exactly_once(
    gathered: Gathered, *, keys: NDArray[np.str_] | Sequence[str], split: str
) -> None:
    """Refuse numbers that are not every sample of a split exactly once, in any order.

    Args:
        gathered: as for `flat_numbers`.
        keys: `(N,)` key of every sample of the split.
        split: name of the split, for the message.

    Raises:
        BalanceError: says how many samples are missing, came more than once or are none of the
            split, and names the first of each.
        ConfigError: something gathered is no whole number.

    Examples:
        >>> check_exactly_once([[2], [0, 1]], keys=["P1", "P2", "P3"], split="val")
    """
    numbers = flat_numbers(gathered)
    belongs = (numbers >= 0) & (numbers < len(keys))
    counts = np.bincount(numbers[belongs], minlength=len(keys))
    missing, doubled = np.flatnonzero(counts == 0), np.flatnonzero(counts > 1)
    foreign = np.unique(numbers[~belongs])
    found = []
    if len(missing):
        named = _listed([f"{number} ({keys[number]})" for number in missing[:MOST_NAMED]], missing)
        found.append(f"missing: {len(missing)} of {len(keys)} samples: {named}")
    if len(doubled):
        times = [f"{n} ({keys[n]}) {counts[n]} times" for n in doubled[:MOST_NAMED]]
        found.append(f"more than once: {len(doubled)} samples: {_listed(times, doubled)}")
    if len(foreign):
        named = _listed([str(number) for number in foreign[:MOST_NAMED]], foreign)
        found.append(f"numbers of no sample (there are 0..{len(keys) - 1}): {named}")
    if found:
        raise BalanceError(
            f"split {split!r} was not evaluated exactly once. {'; '.join(found)}. Gather "
            f"batch['sample'] of every batch of every rank, of one whole pass, without padding."
        )


def _is_number(part: object) -> bool:
    """Tell a whole number from anything else."""
    return isinstance(part, int | np.integer) and not isinstance(part, bool)


def _listed(named: Sequence[str], whole: NDArray[np.int64]) -> str:
    """Write the first of many, and say that there are more."""
    return ", ".join(named) + (", ..." if len(whole) > len(named) else "")
