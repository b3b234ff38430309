"""How many of each class: shares into epoch totals, epoch totals into batches. Integers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError


def apportion(shares: Sequence[float | Fraction], draws: int) -> NDArray[np.int64]:
    """Share out `draws` by largest remainder, ties to the lower class.

    Args:
        shares: `(K,)` non-negative shares; they need not sum to 1.
        draws: how many draws to hand out, at least 0.

    Returns:
        `(K,)` counts that sum to `draws`, each the floor or the ceiling of its exact share.

    Raises:
        ConfigError: a share is negative or not finite, or all are zero.

    Source:
        Hamilton's method of apportionment.

    Examples:
        >>> apportion([0.5, 0.5], 285).tolist()
        [143, 142]
    """
    exact = exact_shares(shares)
    ideal = [share * draws for share in exact]
    counts = [int(value) for value in ideal]
    by_remainder = sorted(range(len(exact)), key=lambda c: (counts[c] - ideal[c], c))
    for c in by_remainder[: draws - sum(counts)]:
        counts[c] += 1
    return np.array(counts, dtype=np.int64)


def exact_shares(shares: Sequence[float | Fraction]) -> tuple[Fraction, ...]:
    """Turn weights into exact shares that sum to 1.

    Args:
        shares: `(K,)` finite, non-negative, not all zero.

    Returns:
        `(K,)` fractions that sum to exactly 1.

    Raises:
        ConfigError: names the class number and the value that cannot be a share.

    Examples:
        >>> exact_shares([1, 3])
        (Fraction(1, 4), Fraction(3, 4))
    """
    exact = []
    for number, share in enumerate(shares):
        if not np.isfinite(float(share)) or share < 0:
            raise ConfigError(f"share of class {number} is {share}; shares are finite and >= 0.")
        exact.append(Fraction(share))
    total = sum(exact, Fraction(0))
    if total == 0:
        raise ConfigError(f"all {len(exact)} shares are 0; at least one class needs a share.")
    return tuple(share / total for share in exact)


def split_totals(totals: Sequence[int], steps: int, left_steps: int, offset: int) -> list[int]:
    """Give the part of `totals` that falls to the first `left_steps` of `steps` batches.

    Each class gets the floor or the ceiling of its share, and the sum is the floor or the ceiling
    of the whole's share (exact where every batch has the same size).

    Args:
        totals: `(K,)` draws per class over all `steps`, in the order in which they are summed up.
        steps: number of batches, at least 1.
        left_steps: how many of them lie on the left, in [0, steps].
        offset: added before every floor, in [0, steps); which classes round up depends on it.

    Returns:
        `(K,)` draws of the left part.

    Examples:
        Two batches share 3 + 5; an offset of 1 rounds the first class up instead of the second.

        >>> split_totals([3, 5], 2, 1, offset=0), split_totals([3, 5], 2, 1, offset=1)
        ([1, 3], [2, 2])
    """
    left = []
    running = below = 0
    for total in totals:
        running += total
        reached = (running * left_steps + offset) // steps
        left.append(reached - below)
        below = reached
    return left


def quotas(totals: Sequence[int], steps: int, offset: int = 0) -> NDArray[np.int64]:
    """Spread class totals over batches by binary time splitting.

    Args:
        totals: `(K,)` draws per class in the epoch; their sum is a multiple of `steps`.
        steps: number of batches T, at least 1.
        offset: rounding offset used at every node, taken modulo the node's length.

    Returns:
        `(T, K)` draws of each class in each batch: rows sum to the batch size, columns to
        `totals`, and every entry is the floor or the ceiling of `totals[c] / T`.

    Examples:
        >>> quotas([3, 5], 2).tolist()
        [[1, 3], [2, 2]]
    """
    whole = [int(total) for total in totals]
    walk = StepQuotas(whole, steps=steps, offset_of=lambda _start, length: offset % length)
    rows = [walk.at(step)[1] for step in range(steps)]
    return np.array(rows, dtype=np.int64).reshape(steps, len(whole))


class StepQuotas:
    """The batches of one epoch: for any step its class counts and what came before it.

    A node of the tree is a run of batches with its totals. Its first half gets the floor or the
    ceiling of its share of every class, the second half the rest, down to a single batch. The
    path to the last step asked for is kept, so walking through an epoch costs two nodes a step.

    Args:
        totals: `(K,)` draws per class in the epoch.
        steps: number of batches T, at least 1.
        offset_of: rounding offset in [0, length) of the node `(start, length)`.
    """

    __slots__ = ("_offset_of", "_path")

    def __init__(
        self, totals: Sequence[int], *, steps: int, offset_of: Callable[[int, int], int]
    ) -> None:
        self._offset_of = offset_of
        self._path: tuple[_Node, ...] = (_Node(0, steps, [0] * len(totals), list(totals)),)

    def at(self, step: int) -> tuple[list[int], list[int]]:
        """Give what classes got before `step`, and what they get in it.

        Args:
            step: number of the batch in [0, T).

        Returns:
            Two `(K,)` lists: the sum over earlier batches of the epoch, and this batch's counts.
        """
        # The path is replaced, never changed, so that threads may ask at the same time.
        path = [node for node in self._path if node.start <= step < node.start + node.length]
        while path[-1].length > 1:
            path.append(self._descend(path[-1], step))
        self._path = tuple(path)
        return path[-1].before, path[-1].totals

    def _descend(self, node: _Node, step: int) -> _Node:
        """Give the half of `node` that holds `step`."""
        half = node.length // 2
        offset = self._offset_of(node.start, node.length)
        left = split_totals(node.totals, node.length, half, offset)
        if step < node.start + half:
            return _Node(node.start, half, node.before, left)
        before = [b + got for b, got in zip(node.before, left, strict=True)]
        rest = [total - got for total, got in zip(node.totals, left, strict=True)]
        return _Node(node.start + half, node.length - half, before, rest)


class _Node:
    """A run of batches: where it starts, how long it is, what came before, what it holds."""

    __slots__ = ("before", "length", "start", "totals")

    def __init__(self, start: int, length: int, before: list[int], totals: list[int]) -> None:
        self.start, self.length, self.before, self.totals = start, length, before, totals
