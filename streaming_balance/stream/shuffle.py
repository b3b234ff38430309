"""Shuffling a stream through a bounded buffer, in another order every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from streaming_balance.plan.keys import stream_key
from streaming_balance.stream.draws import KeyedWords
from streaming_balance.stream.stages import Item, Stage, StageRun, checked_bytes, held_bytes


@dataclass(frozen=True, slots=True)
class Shuffle(Stage):
    """Hold samples up to `buffer_bytes` and let one of them go on, chosen by key, for room.

    The order is keyed by seed and pass: the same seed gives the same order, and every pass another
    one. A sample larger than the buffer goes on at once, unshuffled, and is counted.

    Raises:
        ConfigError: `buffer_bytes` is no positive number of bytes.

    Examples:
        >>> from streaming_balance.stream.stages import BareItem
        >>> stream = [BareItem(f"P{number}", "HGG") for number in range(9)]
        >>> order = [item.key for item in Shuffle(1 << 20).begin(seed=1).over(stream)]
        >>> sorted(order) == [item.key for item in stream], order == sorted(order)
        (True, False)
    """

    name: ClassVar[str] = "shuffle"

    buffer_bytes: int
    """Bytes that held samples may take, 1 KiB for each one's objects included."""

    def __post_init__(self) -> None:
        """Check the setting."""
        checked = checked_bytes(self.name, self.buffer_bytes)
        object.__setattr__(self, "buffer_bytes", checked)

    def begin(self, *, seed: int = 0) -> ShuffleRun[Any]:
        """Give a fresh run; see `Stage.begin`."""
        return ShuffleRun(self, seed=seed)


class ShuffleRun(StageRun[Item, Item]):
    """A run of `Shuffle`."""

    def __init__(self, stage: Shuffle, *, seed: int) -> None:
        super().__init__(stage, seed=seed, labels=None)
        self._buffer_bytes = stage.buffer_bytes
        self._buffer: list[Item] = []
        self._passed_through = 0
        self._words = self._words_of_pass()

    def feed(self, item: Item) -> list[Item]:
        """Take the sample in, and give as many as have to make room."""
        held = self._tallies.held
        size = held_bytes(item)
        tally = self._tallies.of(item.label)
        tally.read += 1
        if size > self._buffer_bytes:
            self._passed_through += 1
            tally.delivered += 1
            return [item]
        self._buffer.append(item)
        held.add(size)
        gone = []
        while held.size > self._buffer_bytes:
            gone.append(self._let_go())
        held.settle()
        return gone

    def finish(self) -> list[Item]:
        """Give all that is held, in keyed order."""
        gone = [self._let_go() for _ in range(len(self._buffer))]
        self.passes += 1
        self._words = self._words_of_pass()
        return gone

    def _let_go(self) -> Item:
        """Take a keyed choice out of the buffer."""
        buffer = self._buffer
        place = self._words.below(len(buffer))
        chosen, buffer[place] = buffer[place], buffer[-1]
        buffer.pop()
        self._tallies.held.remove(held_bytes(chosen))
        self._tallies.of(chosen.label).delivered += 1
        return chosen

    def _words_of_pass(self, *, taken: int = 0) -> KeyedWords:
        """Give the choices of this pass."""
        return KeyedWords(stream_key(self.seed, "shuffle", self.passes), taken=taken)

    def _own_stats(self) -> dict[str, Any]:
        """Give how many samples were too large for the buffer."""
        return {"passed_through": self._passed_through}

    def _own_state(self, save: Callable[[Item], Any]) -> dict[str, Any]:
        """Give what is held, in its places, and the choices made."""
        return {
            "taken": self._words.taken,
            "passed_through": self._passed_through,
            "buffer": [save(item) for item in self._buffer],
        }

    def _load_own(self, state: Mapping[str, Any], restore: Callable[[Any], Item]) -> None:
        """Hold again what was held, in the same places."""
        self._words = self._words_of_pass(taken=int(state["taken"]))
        self._passed_through = int(state["passed_through"])
        self._buffer = [restore(saved) for saved in state["buffer"]]
        for item in self._buffer:
            self._tallies.held.add(held_bytes(item))
