"""The order in which samples go on that go on several times: copies of one stand far apart."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Generic

from streaming_balance.stream.draws import KeyedWords
from streaming_balance.stream.stages import Item

# Where a copy stands in the rest of a pass is a whole number, so that it sorts alike everywhere.
PHASE_BITS = 40


class Pending(Generic[Item]):
    """A held sample and how often it is still to go on."""

    __slots__ = ("has_gone", "item", "left")

    def __init__(self, item: Item, left: int, *, has_gone: bool = False) -> None:
        self.item = item
        """The sample."""
        self.left = left
        """Copies that have not gone on."""
        self.has_gone = has_gone
        """Whether one has."""


class CopyQueue(Generic[Item]):
    """Held samples, the least recently gone first.

    Args:
        words: the keyed choices; replaced by the owner when a pass begins.
    """

    __slots__ = ("_entries", "last_key", "words")

    def __init__(self, words: KeyedWords) -> None:
        self.words = words
        """Where the choices come from."""
        self.last_key: str | None = None
        """Name of the sample that went on last."""
        self._entries: deque[Pending[Item]] = deque()

    def __iter__(self) -> Iterator[Pending[Item]]:
        return iter(self._entries)

    def append(self, pending: Pending[Item]) -> None:
        """Put a sample at the end."""
        self._entries.append(pending)

    def next(self) -> Pending[Item]:
        """Let a copy go on of one of those that waited longest: a keyed choice of half the queue.

        Returns:
            The sample; it has left the queue if it has no copy left.
        """
        entries = self._entries
        length = len(entries)
        place = self.words.below(max(1, length // 2))
        if length > 1 and entries[place].item.key == self.last_key:
            place += 1
        chosen, entries[place] = entries[place], entries[0]
        entries.popleft()
        chosen.left -= 1
        if chosen.left:
            entries.append(chosen)
        self.last_key = chosen.item.key
        return chosen

    def rest(self) -> Iterator[Pending[Item]]:
        """Empty the queue: give whoever goes on, copy after copy, each sample's evenly spread."""
        waiting = list(self._entries)
        self._entries.clear()
        left = sum(pending.left for pending in waiting)
        timetable = _Timetable(waiting, self.words)
        for copies_left in range(left, 0, -1):
            chosen = timetable.next(copies_left, self.last_key)
            self.last_key = chosen.item.key
            yield chosen


class _Timetable(Generic[Item]):
    """Whose turn it is when no more samples come in.

    A sample with m copies gets a keyed phase in the first m-th of the rest, and its copies stand an
    m-th apart from there. One that went on last lets another go first; and one that has more than
    half of all copies left goes on whenever it may, or its last ones would meet.
    """

    def __init__(self, waiting: list[Pending[Item]], words: KeyedWords) -> None:
        self._waiting = waiting
        self._copies = [pending.left for pending in waiting]
        self._phases = [words.below(1 << PHASE_BITS) for _ in waiting]
        # Entries hold how many copies were left when they were made: others are out of date.
        self._due = [self._turn(number) for number in range(len(waiting))]
        self._heaviest = [(-pending.left, number) for number, pending in enumerate(waiting)]
        heapq.heapify(self._due)
        heapq.heapify(self._heaviest)

    def next(self, copies_left: int, last_key: str | None) -> Pending[Item]:
        """Let a copy of one sample go on.

        Args:
            copies_left: copies of all samples that have not gone on.
            last_key: name of the sample that went on last.
        """
        number = self._heavy()
        heavy = self._waiting[number]
        if heavy.left * 2 <= copies_left or heavy.item.key == last_key:
            number = self._whose_turn(last_key)
        chosen = self._waiting[number]
        chosen.left -= 1
        if chosen.left:
            heapq.heappush(self._due, self._turn(number))
            heapq.heappush(self._heaviest, (-chosen.left, number))
        return chosen

    def _turn(self, number: int) -> tuple[int, int, int]:
        """Give the place of a sample's next copy, its number, and how many it has left."""
        left, copies = self._waiting[number].left, self._copies[number]
        gone = copies - left
        return ((gone << PHASE_BITS) + self._phases[number]) // copies, number, left

    def _whose_turn(self, last_key: str | None) -> int:
        """Take out the earliest sample but the one that went on last, unless there is no other."""
        number = self._earliest()
        assert number is not None
        if self._waiting[number].item.key != last_key:
            return number
        other = self._earliest()
        if other is None:
            return number
        heapq.heappush(self._due, self._turn(number))
        return other

    def _earliest(self) -> int | None:
        """Take out the sample whose copy stands first; None where there is none left."""
        while self._due:
            _, number, left = heapq.heappop(self._due)
            if left == self._waiting[number].left:
                return number
        return None

    def _heavy(self) -> int:
        """Find the sample with the most copies left."""
        while -self._heaviest[0][0] != self._waiting[self._heaviest[0][1]].left:
            heapq.heappop(self._heaviest)
        return self._heaviest[0][1]
