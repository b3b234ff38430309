"""Keyed permutations: which member of a class stands at which place of a pass.

Small classes are shuffled exactly: every member gets a sort key made from its own hash and the
key of the pass, so a member that joins or leaves does not move the others among themselves.
Large classes use a Feistel network, which answers for any place without touching the rest.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Up to here a pass is sorted whole (about 0.1 s and 8 MB at the limit); above, places are computed.
EXACT_LIMIT = 1 << 20
# Twelve rounds leave no trace on large rectangles. On tiny ones a round is so weak that all
# orders of six members show a bias (chi-square 1,769 at 719 degrees of freedom); 24 do not (722).
FEISTEL_ROUNDS = 12
SMALL_FEISTEL_ROUNDS = 24
SMALL_FEISTEL_LIMIT = 1 << 16

# Arrays without axes are operands at once; numpy scalars are converted in every operation.
_MIX_FIRST = np.array(0xBF58476D1CE4E5B9, dtype=np.uint64)
_MIX_SECOND = np.array(0x94D049BB133111EB, dtype=np.uint64)
_SHIFT_30 = np.array(30, dtype=np.uint64)
_SHIFT_27 = np.array(27, dtype=np.uint64)
_SHIFT_31 = np.array(31, dtype=np.uint64)
# Leaves room to add a row or a column number to a scrambled word.
_ROOM = np.array(1, dtype=np.uint64)
_WORD = 2**64 - 1
_PHASE_BITS = np.uint64(40)
_PHASE_SHIFT = np.uint64(24)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words, one to one.

    Args:
        values: words of any shape; not changed.

    Returns:
        Words of the same shape.

    Source:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014
        (the SplitMix64 finaliser, Stafford's variant 13).

    Examples:
        >>> hex(int(mix64(np.array([0x9E3779B97F4A7C15], dtype=np.uint64))[0]))
        '0xe220a8397b1dcdaf'
    """
    mixed = (values ^ (values >> _SHIFT_30)) * _MIX_FIRST
    mixed = (mixed ^ (mixed >> _SHIFT_27)) * _MIX_SECOND
    return np.asarray(mixed ^ (mixed >> _SHIFT_31), dtype=np.uint64)


def sort_keys(key: int, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Give each member its sort key under `key`: a function of its own hash and nothing else.

    Args:
        key: 128-bit stream key.
        hashes: `(n,)` member hashes.

    Returns:
        `(n,)` words; distinct wherever the hashes are.

    Examples:
        >>> hashes = np.array([1, 2, 3], dtype=np.uint64)
        >>> bool((sort_keys(5, hashes)[:2] == sort_keys(5, hashes[:2])).all())
        True
    """
    low, high = np.uint64(key & _WORD), np.uint64(key >> 64)
    return mix64(mix64(hashes ^ low) + high)


def shuffled(key: int, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Order the members by their sort keys: an exact keyed shuffle.

    Args:
        key: 128-bit stream key.
        hashes: `(n,)` member hashes.

    Returns:
        `(n,)` a permutation of 0..n-1; place p holds member `result[p]`.

    Examples:
        >>> sorted(shuffled(5, np.arange(4, dtype=np.uint64)).tolist())
        [0, 1, 2, 3]
    """
    return order_of(sort_keys(key, hashes))


def spread(
    key: int,
    hashes: NDArray[np.uint64],
    owners: NDArray[np.uint64],
    groups: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Shuffle the members so that those of one owner stand far apart.

    An owner of m members gets a keyed phase in the first m-th of the order, and its members, in
    keyed order, stand an m-th apart from there. Nobody's place depends on other owners' members
    but for being before or after them.

    Args:
        key: 128-bit stream key.
        hashes: `(n,)` member hashes, n <= 2**20.
        owners: `(n,)` hash of each member's owner.
        groups: `(n,)` ascending numbers: members change places inside their group only.

    Returns:
        `(n,)` a permutation of 0..n-1; place p holds member `result[p]`.

    Examples:
        >>> owners = np.array([7, 7, 7, 7, 1, 2, 3, 4], dtype=np.uint64)
        >>> order = spread(5, np.arange(8, dtype=np.uint64), owners)
        >>> places = np.flatnonzero(order < 4)
        >>> int(np.diff(places).min()) > 1, sorted(order.tolist()) == list(range(8))
        (True, True)
    """
    keys = sort_keys(key, hashes)
    apart = np.zeros(len(hashes), dtype=np.int64) if groups is None else groups
    by_owner = np.lexsort((keys, owners, apart))
    held, within = owners[by_owner], apart[by_owner]
    changes = (held[1:] != held[:-1]) | (within[1:] != within[:-1])
    starts = np.flatnonzero(np.concatenate([[True], changes]))
    counts = np.diff(np.append(starts, len(held)))
    rank = np.arange(len(held)) - np.repeat(starts, counts)
    # Ranks take 20 bits and phases 40: in whole numbers the order is the same on every machine.
    phase = np.repeat(sort_keys(key, held[starts]) >> _PHASE_SHIFT, counts)
    parts = np.repeat(counts, counts).astype(np.uint64)
    places = ((rank.astype(np.uint64) << _PHASE_BITS) + phase) // parts
    return by_owner[np.lexsort((keys[by_owner], places, within))].astype(np.int64)


def order_of(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Give the places of `keys` in ascending order, equal keys in the order they stand in.

    Examples:
        >>> order_of(np.array([7, 3, 7], dtype=np.uint64)).tolist()
        [1, 0, 2]
    """
    # The default sort uses wide registers (5x faster) but orders equal keys as it pleases. Keys
    # are equal only where two 64-bit hashes are, so the stable sort is hardly ever needed.
    order = np.argsort(keys)
    ascending = keys[order]
    if (ascending[1:] == ascending[:-1]).any():
        order = np.argsort(keys, kind="stable")
    return order.astype(np.int64)


class FeistelPermutation:
    """A keyed permutation of 0..size-1 that answers for any place at once.

    A Feistel network over a rectangle of rows x columns that holds `size` with hardly a cell to
    spare; a value that lands on a spare cell is encrypted again.

    Args:
        size: length of the permutation, at least 1.
        key: 128-bit stream key.

    Source:
        Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (generalised
        Feistel, cycle walking).

    Examples:
        >>> order = FeistelPermutation(10, key=3)
        >>> sorted(order(np.arange(10)).tolist()) == list(range(10))
        True
    """

    __slots__ = ("_columns", "_round_keys", "_rows", "size")

    def __init__(self, size: int, *, key: int) -> None:
        rows = math.isqrt(size - 1) + 1
        self.size = size
        self._rows = np.array(rows, dtype=np.uint64)
        self._columns = np.array(-(-size // rows), dtype=np.uint64)
        rounds = FEISTEL_ROUNDS if size > SMALL_FEISTEL_LIMIT else SMALL_FEISTEL_ROUNDS
        counters = np.arange(1, rounds + 1, dtype=np.uint64)
        self._round_keys = [np.asarray(word) for word in sort_keys(key, counters)]

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the members at `places`.

        Args:
            places: `(m,)` places in [0, size).

        Returns:
            `(m,)` members in [0, size).
        """
        values = self._encrypt(places.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Run the network once over the whole rectangle."""
        row, column = np.divmod(values, self._columns)
        # A block is small enough for its steps to cost more than its places: nothing is allocated.
        mixed, spare = np.empty_like(values), np.empty_like(values)
        for number, round_key in enumerate(self._round_keys):
            if number % 2:
                source, moved, bound = row, column, self._columns
            else:
                source, moved, bound = column, row, self._rows
            np.bitwise_xor(source, round_key, out=mixed)
            _mix_in_place(mixed, spare)
            np.right_shift(mixed, _ROOM, out=mixed)
            np.add(moved, mixed, out=moved)
            # The remainder: dividing by one number for all is much faster than `%`.
            np.floor_divide(moved, bound, out=spare)
            np.multiply(spare, bound, out=spare)
            np.subtract(moved, spare, out=moved)
        np.multiply(row, self._columns, out=row)
        return np.add(row, column, out=row)


def _mix_in_place(words: NDArray[np.uint64], spare: NDArray[np.uint64]) -> None:
    """Scramble words as `mix64` does, using a second array of the same shape."""
    np.right_shift(words, _SHIFT_30, out=spare)
    np.bitwise_xor(words, spare, out=words)
    np.multiply(words, _MIX_FIRST, out=words)
    np.right_shift(words, _SHIFT_27, out=spare)
    np.bitwise_xor(words, spare, out=words)
    np.multiply(words, _MIX_SECOND, out=words)
    np.right_shift(words, _SHIFT_31, out=spare)
    np.bitwise_xor(words, spare, out=words)
