"""A bounded ring of one class's samples: the newest replaces the oldest, and all take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Generic

from streaming_balance.stream.stages import Item, held_bytes


class _Kept(Generic[Item]):
    """A sample in a ring."""

    __slots__ = ("has_gone", "item")

    def __init__(self, item: Item, *, has_gone: bool) -> None:
        self.item, self.has_gone = item, has_gone


class Ring(Generic[Item]):
    """The samples of one class that may go on, as many as fit.

    Turns: first those that never went on, in the order in which they came, then the others in a
    circle. Of two samples in the ring neither goes on twice while the other does not.

    Args:
        budget: bytes that the samples may take.

    Examples:
        >>> from streaming_balance.stream.stages import BareItem
        >>> ring = Ring(budget=2 * 1024)
        >>> [ring.put(BareItem(name, "LGG")) for name in "ab"], [ring.take()[0].key for _ in "ab"]
        ([0, 0], ['a', 'b'])
        >>> ring.put(BareItem("c", "LGG")), [ring.take()[0].key for _ in range(4)]
        (0, ['c', 'b', 'c', 'b'])
    """

    __slots__ = ("_ages", "_fresh", "_used", "budget", "num_waiting", "size")

    def __init__(self, *, budget: int) -> None:
        self.budget = budget
        """Bytes that the samples may take."""
        self.size = 0
        """Bytes that they take."""
        self.num_waiting = 0
        """Samples that have not gone on."""
        # By sample key. Whose turn it is stands first, among the fresh and then among the used.
        self._fresh: OrderedDict[str, _Kept[Item]] = OrderedDict()
        self._used: OrderedDict[str, _Kept[Item]] = OrderedDict()
        self._ages: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ages)

    def __iter__(self) -> Iterator[Item]:
        """Give what is held, the oldest first."""
        for key in self._ages:
            yield self._kept(key).item

    def put(self, item: Item) -> int:
        """Take a sample in, which must fit the budget, and let the oldest go to make room.

        A sample that is still held from the pass before keeps its turn.

        Returns:
            How many samples left that never went on.
        """
        lost = 0
        key = item.key
        kept = self._used.get(key) or self._fresh.get(key)
        if kept is None:
            self._fresh[key] = _Kept(item, has_gone=False)
            self._ages[key] = None
        else:
            lost = self._replace(kept, item)
            self._ages.move_to_end(key)
        self.num_waiting += 1
        self.size += held_bytes(item)
        while self.size > self.budget:
            lost += self._drop_oldest()
        return lost

    def take(self) -> tuple[Item, bool]:
        """Give the sample whose turn it is, and whether this is its first time."""
        turns = self._fresh or self._used
        key, kept = turns.popitem(last=False)
        self._used[key] = kept
        is_first = not kept.has_gone
        kept.has_gone = True
        self.num_waiting -= is_first
        return kept.item, is_first

    def state(self, save: Callable[[Item], Any]) -> dict[str, Any]:
        """Give what is held, in the order of turns, and how old it is."""
        return {
            "ages": list(self._ages),
            "fresh": [save(kept.item) for kept in self._fresh.values()],
            "used": [[save(kept.item), kept.has_gone] for kept in self._used.values()],
        }

    def load(self, state: dict[str, Any], restore: Callable[[Any], Item]) -> None:
        """Hold again what `state` says was held."""
        fresh = [(restore(saved), False) for saved in state["fresh"]]
        used = [(restore(saved), bool(has_gone)) for saved, has_gone in state["used"]]
        self._fresh = OrderedDict((item.key, _Kept(item, has_gone=gone)) for item, gone in fresh)
        self._used = OrderedDict((item.key, _Kept(item, has_gone=gone)) for item, gone in used)
        self._ages = OrderedDict((key, None) for key in state["ages"])
        self.size = sum(held_bytes(item) for item, _ in [*fresh, *used])
        self.num_waiting = sum(not has_gone for _, has_gone in [*fresh, *used])

    def _kept(self, key: str) -> _Kept[Item]:
        """Find a held sample."""
        return self._used.get(key) or self._fresh[key]

    def _replace(self, kept: _Kept[Item], item: Item) -> int:
        """Put a sample in the place of the one of the same name; say if that one never went on."""
        self.size -= held_bytes(kept.item)
        never_went = not kept.has_gone
        self.num_waiting -= never_went
        kept.item, kept.has_gone = item, False
        return int(never_went)

    def _drop_oldest(self) -> int:
        """Let the oldest sample go; say if it never went on."""
        key, _ = self._ages.popitem(last=False)
        kept = self._used.pop(key, None) or self._fresh.pop(key)
        self.size -= held_bytes(kept.item)
        never_went = not kept.has_gone
        self.num_waiting -= never_went
        return int(never_went)
