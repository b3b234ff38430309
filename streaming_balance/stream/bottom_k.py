"""The k members of smallest rank, whatever the order in which they come."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

Rank = tuple[float, int]
"""Primary rank, and a hash that decides between equal ones. Ranks of two members differ."""

WORD_BITS = 128
# Hashes count as numbers in (0, 1): the middle of their cell, never an end.
_HALF = 0.5
_BELOW_ONE = math.nextafter(1.0, 0.0)


def uniform_rank(word: int) -> Rank:
    """Rank a member by its 128-bit hash: every subset of k members is as likely as any other."""
    return 0.0, word


def weighted_rank(word: int, weight: float) -> Rank:
    """Rank a member by -ln(u) / weight, with u uniform on (0, 1) made from its 128-bit hash.

    The k smallest are drawn one after the other, each with a chance in proportion to its weight
    among those that are left.

    Args:
        word: in [0, 2**128).
        weight: above 0.

    Source:
        Efraimidis and Spirakis, "Weighted random sampling with a reservoir", Information
        Processing Letters 2006; Cohen and Kaplan, "Summarizing data using bottom-k sketches",
        PODC 2007.

    Examples:
        >>> weighted_rank(2**127, 2.0)[0] == math.log(2) / 2
        True
    """
    # 1 - u is as uniform as u, and small ones, which are the ranks that count, keep all digits.
    complement = min(math.ldexp(word + _HALF, -WORD_BITS), _BELOW_ONE)
    return -math.log1p(-complement) / weight, word


class _Entry(Generic[Value]):
    """A member in the heap: the largest rank comes first."""

    __slots__ = ("num_bytes", "rank", "value")

    def __init__(self, rank: Rank, value: Value, num_bytes: int) -> None:
        self.rank, self.value, self.num_bytes = rank, value, num_bytes

    def __lt__(self, other: _Entry[Value]) -> bool:
        return self.rank > other.rank


class BottomK(Generic[Value]):
    """The members of smallest rank: at most `size`, and at most as many as fit `most_bytes`.

    What is kept depends on who came, never on the order: all members before a bar, which falls when
    a number or a byte too many makes it fall, and never rises.

    Args:
        size: members at most.
        most_bytes: bytes at most; None: no bound.

    Examples:
        >>> kept = BottomK(size=2)
        >>> [kept.offer(uniform_rank(word), name) for word, name in [(5, "e"), (9, "i"), (2, "b")]]
        [[], [], ['i']]
        >>> [value for _, value, _ in kept.ranked()]
        ['b', 'e']
    """

    __slots__ = ("_heap", "_ranks", "bar", "most_bytes", "num_bytes", "size")

    def __init__(self, *, size: int, most_bytes: int | None = None) -> None:
        self.size, self.most_bytes = size, most_bytes
        self.num_bytes = 0
        """Bytes of what is kept."""
        self.bar: Rank | None = None
        """Smallest rank ever turned away; nobody from it on is kept. None: nobody was."""
        self._heap: list[_Entry[Value]] = []
        self._ranks: set[Rank] = set()

    def __len__(self) -> int:
        return len(self._heap)

    def is_wanted(self, rank: Rank) -> bool:
        """Say whether a member of this rank would be kept, for now."""
        return (self.bar is None or rank < self.bar) and rank not in self._ranks

    def offer(self, rank: Rank, value: Value, num_bytes: int = 0) -> list[Value]:
        """Take a member in, unless its rank is too large or it is there already.

        Returns:
            Whoever is not kept now: others, or the member itself.
        """
        if not self.is_wanted(rank):
            return [value]
        heapq.heappush(self._heap, _Entry(rank, value, num_bytes))
        self._ranks.add(rank)
        self.num_bytes += num_bytes
        return self._trim()

    def copy(self) -> BottomK[Value]:
        """Give another one that keeps the same, to be changed apart from this one."""
        other: BottomK[Value] = BottomK(size=self.size, most_bytes=self.most_bytes)
        other.num_bytes, other.bar = self.num_bytes, self.bar
        other._heap, other._ranks = list(self._heap), set(self._ranks)
        return other

    def has_any_of(self, other: BottomK[Value]) -> bool:
        """Say whether a member is kept by both."""
        return not self._ranks.isdisjoint(other._ranks)

    def absorb(self, other: BottomK[Value]) -> list[Value]:
        """Keep of both what one would have kept that was offered everybody.

        Returns:
            Whoever is not kept now, of either.
        """
        gone = []
        for rank, value, num_bytes in other.ranked():
            gone.extend(self.offer(rank, value, num_bytes))
        if other.bar is not None and (self.bar is None or other.bar < self.bar):
            self.bar = other.bar
            while self._heap and self._heap[0].rank >= self.bar:
                gone.append(self._pop())
        return gone

    def state(self, save: Callable[[Value], Any]) -> dict[str, Any]:
        """Give what is kept as plain values: 128 bits as text, for JSON of any kind."""
        return {
            "entries": [
                {"item": save(value), "rank": _written(rank), "bytes": num_bytes}
                for rank, value, num_bytes in self.ranked()
            ],
            "bar": None if self.bar is None else _written(self.bar),
        }

    def load(self, state: Mapping[str, Any], restore: Callable[[Any], Value]) -> None:
        """Keep, from nothing, what `state` says was kept."""
        for entry in state["entries"]:
            self.offer(_read(entry["rank"]), restore(entry["item"]), int(entry["bytes"]))
        self.bar = None if state["bar"] is None else _read(state["bar"])

    def ranked(self) -> Iterator[tuple[Rank, Value, int]]:
        """Give rank, member and bytes of what is kept, smallest rank first."""
        for entry in sorted(self._heap, reverse=True):
            yield entry.rank, entry.value, entry.num_bytes

    def _trim(self) -> list[Value]:
        """Let the largest ranks go until all bounds hold."""
        gone = []
        while len(self._heap) > self.size or (
            self.most_bytes is not None and self.num_bytes > self.most_bytes
        ):
            self.bar = self._heap[0].rank
            gone.append(self._pop())
        return gone

    def _pop(self) -> Value:
        """Let the largest rank go."""
        entry = heapq.heappop(self._heap)
        self._ranks.remove(entry.rank)
        self.num_bytes -= entry.num_bytes
        return entry.value


def _written(rank: Rank) -> list[float | str]:
    """Write a rank as plain values."""
    return [rank[0], f"{rank[1]:032x}"]


def _read(saved: Sequence[Any]) -> Rank:
    """Read a rank that `_written` wrote."""
    primary, word = saved
    return float(primary), int(word, 16)
