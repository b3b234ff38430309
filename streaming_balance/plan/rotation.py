"""Whose turn it is: an endless chain of passes over the members of one class.

Ordinal j since the start of the run is place j mod n of pass j // n, so at any moment two members
have had equally many turns, give or take one. What happens at the seam between two passes decides
whether a member can come twice in quick succession:

* where twice the window fits into a pass, the first places of a pass are reordered so that whoever
  came last waits (`seam`);
* elsewhere the members keep to fixed groups of consecutive places and change places only inside
  their group (`groups`), which bounds how far a turn can move. The first pass is the same with
  and without groups, so it depends on nothing but the members' names.

Either way any window of d consecutive draws holds a member at most ceil(d / n) times.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.permutation import (
    EXACT_LIMIT,
    FeistelPermutation,
    shuffled,
    sort_keys,
    spread,
)

# A seam is repaired member by member; longer windows use groups, which cost nothing.
SEAM_LIMIT = 4096
# The rounds of a network cost 0.08 ms whatever they are asked, and a block about a third more.
BLOCK_PLACES = 512
CACHED_BLOCKS = 8
# A whole pass of a million members takes 8 MB: of such, only those around a seam are kept.
CACHED_LARGE_PASSES = 3
LARGE_PASS = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Spacing:
    """How far apart the turns of one member are kept."""

    group: int
    """Members per fixed group of consecutive places; the class size when all may mix."""
    window: int
    """Draws at the seam that are kept free of repeats by reordering; 1 leaves the seam alone."""
    offset: int = 0
    """By how many places the first group is shorter than the others."""


def spacing_for(size: int, windows: Iterable[int]) -> Spacing:
    """Choose the freest order in which every window of d draws repeats nobody needlessly.

    Args:
        size: members of the class, n >= 1.
        windows: the numbers d of consecutive draws that must hold a member at most ceil(d / n)
            times: the most a batch asks for, and what an epoch without repeats asks for.

    Returns:
        A seam repair where the longest window fits twice into a pass, else fixed groups: two turns
        of a member in passes p and p + c lie at least c n - (g - 1) draws apart, and with
        d = (c - 1) n + b that reaches d for groups of g = n - b + 1.

    Examples:
        >>> spacing_for(75, [4])
        Spacing(group=75, window=4, offset=0)
        >>> spacing_for(5, [4])
        Spacing(group=2, window=1, offset=0)
    """
    lengths = [max(1, length) for length in windows] or [1]
    longest = max(lengths)
    if size >= 2 * longest - 1 and longest <= SEAM_LIMIT:
        return Spacing(group=size, window=longest)
    widest = min(size - (length - 1) % size for length in lengths)
    # Groups of even size: 210 members in groups of at most 68 are better as 53 + 53 + 53 + 51.
    return Spacing(group=-(-size // -(-size // widest)), window=1)


def split_spacing(size: int, place: int) -> Spacing:
    """Keep those before a place of a pass apart from those after it.

    Two groups, so that the last part of any pass and the first part of the next one are together
    everybody once.

    Args:
        size: members of the class.
        place: where the second part starts, in [1, size).

    Examples:
        >>> split_spacing(10, 3)
        Spacing(group=7, window=1, offset=4)
    """
    group = max(place, size - place)
    return Spacing(group=group, window=1, offset=group - place)


class Rotation:
    """The turns of one class.

    Args:
        seed: the run's seed.
        label: the class's name; other classes do not enter, so adding one changes nothing here.
        size: number of members n >= 1.
        hashes: gives the `(n,)` member hashes; asked once, and only where passes are sorted.
        spacing: how far apart turns are kept.
        lead: by how many places blocks start early, in [0, BLOCK_PLACES): classes that differ in
            it seldom compute theirs in the same step. The turns do not depend on it.
        sorted_up_to: largest size whose passes are sorted whole; above, places are computed.
        owners: `(n,)` hash of each member's patient where patients take turns, or None.
    """

    __slots__ = (
        "_blocks",
        "_hashes",
        "_hashes_of",
        "_label",
        "_lead",
        "_networks",
        "_next",
        "_owners",
        "_seed",
        "_sorts",
        "size",
        "spacing",
    )

    _first_seam = 1
    """The first pass that another one comes before."""

    def __init__(
        self,
        *,
        seed: int,
        label: str,
        size: int,
        hashes: Callable[[], NDArray[np.uint64]],
        spacing: Spacing,
        lead: int = 0,
        sorted_up_to: int = EXACT_LIMIT,
        owners: NDArray[np.uint64] | None = None,
    ) -> None:
        self.size, self.spacing = size, spacing
        self._seed, self._label = seed, label
        self._hashes_of, self._lead, self._owners = hashes, lead, owners
        self._sorts = size <= sorted_up_to
        # The place after the last one given: whoever asks for it walks, and gets blocks.
        self._next = (0, 0)
        self._hashes: NDArray[np.uint64] | None = None
        self._blocks: OrderedDict[tuple[str, int, int], NDArray[np.int64]] = OrderedDict()
        self._networks: OrderedDict[tuple[int, ...], FeistelPermutation] = OrderedDict()

    def take(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the draws with ordinals `start` to `start + count - 1`.

        Returns:
            `(count,)` members, and `(count,)` how many turns each had before: its pass.
        """
        members, turns = [], []
        while count:
            pass_number, place = divmod(start, self.size)
            here = min(count, self.size - place)
            members.append(self._places(pass_number, place, here))
            turns.append(np.full(here, pass_number, dtype=np.int64))
            start, count = start + here, count - here
        if not members:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return np.concatenate(members), np.concatenate(turns)

    def place(self, ordinal: int) -> int:
        """Give the place in its pass of the draw with this ordinal: [0, n)."""
        return ordinal % self.size

    def at(self, start: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the members at any places, `(m,)`, of the pass that starts with ordinal `start`."""
        return self._scattered(start // self.size, places)

    def turns_before(self, ordinal: int) -> NDArray[np.int64]:
        """Count each member's turns among the first `ordinal` draws: `(n,)`."""
        passes, place = divmod(ordinal, self.size)
        turns = np.full(self.size, passes, dtype=np.int64)
        if place:
            turns[self._places(passes, 0, place)] += 1
        return turns

    def _places(self, pass_number: int, start: int, count: int) -> NDArray[np.int64]:
        """Give the members at consecutive places of one pass, seam repaired."""
        window = min(self.spacing.window, self.size)
        if window < 2 or start >= window or pass_number < self._first_seam:
            return self._raw(pass_number, start, count)
        head = self._block("head", pass_number, 0)[start : start + count]
        rest = count - len(head)
        if not rest:
            return head
        return np.concatenate([head, self._raw(pass_number, window, rest)])

    def _scattered(self, pass_number: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the members at any places of one pass."""
        if self._sorts:
            members = self._block("pass", pass_number, 0)[places]
        else:
            members = self._distant(pass_number, places)
        window = min(self.spacing.window, self.size)
        if window > 1 and pass_number >= self._first_seam:
            early = places < window
            members[early] = self._block("head", pass_number, 0)[places[early]]
        return members

    def _tail(self, pass_number: int, count: int) -> NDArray[np.int64]:
        """Give the last `count` members of a pass; a seam leaves them as they are."""
        return self._raw(pass_number, self.size - count, count)

    def _repaired_head(self, pass_number: int) -> NDArray[np.int64]:
        """Reorder the first places of a pass so that the last of the pass before wait."""
        window = self.spacing.window
        head = self._raw(pass_number, 0, window).tolist()
        tail = self._tail(pass_number - 1, window - 1).tolist()
        # Who stood i places from the end may come again at place window - 1 - i, not before.
        earliest = {member: place for place, member in enumerate(tail, window - len(tail))}
        waiting: list[list[int]] = [[] for _ in range(window)]
        for place, member in enumerate(head):
            waiting[earliest.get(member, 0)].append(place)
        ready: list[int] = []
        order = []
        for place in range(window):
            for raw_place in waiting[place]:
                heapq.heappush(ready, raw_place)
            order.append(head[heapq.heappop(ready)])
        return np.array(order, dtype=np.int64)

    def _raw(self, pass_number: int, start: int, count: int) -> NDArray[np.int64]:
        """Give the members at consecutive places of one pass before the seam is repaired."""
        if self._sorts:
            return self._block("pass", pass_number, 0)[start : start + count]
        first = (start + self._lead) // BLOCK_PLACES
        last = (start + count - 1 + self._lead) // BLOCK_PLACES
        names = [("pass", pass_number, number) for number in range(first, last + 1)]
        is_walking, self._next = self._next == (pass_number, start), (pass_number, start + count)
        if len(names) > CACHED_BLOCKS or not (
            is_walking or any(name in self._blocks for name in names)
        ):
            # Nobody asked for the places before: those after may never be asked for either.
            return self._distant(pass_number, np.arange(start, start + count, dtype=np.int64))
        blocks = [self._block(*name) for name in names]
        offset = start - self._first_place(first)
        return np.concatenate(blocks)[offset : offset + count]

    def _first_place(self, number: int) -> int:
        """Give the place of a pass at which a block starts."""
        return min(self.size, max(0, number * BLOCK_PLACES - self._lead))

    def _block(self, kind: str, pass_number: int, number: int) -> NDArray[np.int64]:
        """Give a piece of a pass, computed once while it is in use."""
        name = (kind, pass_number, number)
        block = self._blocks.get(name)
        if block is None:
            block = self._compute(kind, pass_number, number)
            self._keep(name, block)
        return block

    def _keep(self, name: tuple[str, int, int], block: NDArray[np.int64]) -> None:
        """Keep a piece for the steps that follow, and let the oldest ones go."""
        block.flags.writeable = False
        self._blocks[name] = block
        is_large = self._sorts and self.size > LARGE_PASS
        while len(self._blocks) > (CACHED_LARGE_PASSES if is_large else CACHED_BLOCKS):
            self._blocks.popitem(last=False)

    def _compute(self, kind: str, pass_number: int, number: int) -> NDArray[np.int64]:
        """Compute a repaired head, a whole exact pass, or a block of a large one."""
        if kind == "head":
            return self._repaired_head(pass_number)
        if self._sorts:
            if self._hashes is None:
                self._hashes = self._hashes_of()
            return self._exact_pass(pass_number, self._hashes)
        start, stop = self._first_place(number), self._first_place(number + 1)
        return self._distant(pass_number, np.arange(start, stop, dtype=np.int64))

    def _exact_pass(self, pass_number: int, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Shuffle all members, or the members of each fixed group among themselves."""
        key = self._pass_key(pass_number)
        group = self.spacing.group
        if group >= self.size:
            return self._shuffled(key, hashes)
        seats = self._seats(hashes)
        if not pass_number:
            return seats
        groups = (np.arange(self.size) + self.spacing.offset) // group
        if self._owners is not None:
            return seats[spread(key, hashes[seats], self._owners[seats], groups)]
        return seats[np.lexsort((sort_keys(key, hashes[seats]), groups))]

    def _seats(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Order the members as in the first pass, which says who shares a group."""
        return self._shuffled(self._pass_key(0), hashes)

    def _shuffled(self, key: int, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Shuffle all members; where patients take turns, those of a patient far apart."""
        return shuffled(key, hashes) if self._owners is None else spread(key, hashes, self._owners)

    def _distant(self, pass_number: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Permute single places of a class too large to sort."""
        group, offset = self.spacing.group, self.spacing.offset
        if group >= self.size:
            return self._network(self.size, pass_number)(places)
        if not pass_number:
            return self._seated(places)
        seats = np.empty_like(places)
        groups = (places + offset) // group
        # Groups of millions need no sorting to be told apart.
        for number in range(int(groups.min()), int(groups.max()) + 1):
            inside = groups == number
            start = max(0, number * group - offset)
            length = min((number + 1) * group - offset, self.size) - start
            network = self._network(length, pass_number, number)
            seats[inside] = start + network(places[inside] - start)
        return self._seated(seats)

    def _seated(self, seats: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the members at places of the first pass, which says who shares a group."""
        return self._network(self.size, 0)(seats)

    def _network(self, size: int, *parts: int) -> FeistelPermutation:
        """Give the network of a pass, or of a group in a pass, prepared once while in use."""
        network = self._networks.get(parts)
        if network is None:
            key = stream_key(self._seed, "order", self._label, *parts)
            network = self._networks[parts] = FeistelPermutation(size, key=key)
            while len(self._networks) > CACHED_BLOCKS:
                self._networks.popitem(last=False)
        return network

    def _pass_key(self, pass_number: int) -> int:
        """Name the order of a pass."""
        return stream_key(self._seed, "order", self._label, pass_number)
