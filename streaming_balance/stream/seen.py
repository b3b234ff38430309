"""Which keys a pass has met, and where: 16 bytes a key, bounded."""

from __future__ import annotations

from array import array

from xxhash import xxh3_64_intdigest

from streaming_balance.errors import ConfigError
from streaming_balance.storage.layout import BLOCK

_ENTRY_BYTES = 16
_FIRST_ENTRIES = 1 << 10
# Shard number and block number share a 64-bit word: a million shards of less than 8 PiB.
_BLOCK_BITS = 44
_BLOCK_MASK = (1 << _BLOCK_BITS) - 1


class SeenKeys:
    """Remembers keys by their 64-bit hash, in a table that doubles up to `max_bytes`.

    Two different keys are taken for one with probability n^2 / 2^65: 3 in 100,000,000 for a million
    keys. Once the table is full, further keys are compared, but not remembered.

    Args:
        max_bytes: size the table may grow to; 256 MiB remember 12.6 million keys.

    Raises:
        ConfigError: that is less than the smallest table has.
    """

    def __init__(self, *, max_bytes: int = 256 << 20) -> None:
        if max_bytes < _FIRST_ENTRIES * _ENTRY_BYTES:
            raise ConfigError(
                f"max_key_bytes is {max_bytes}; the table of keys begins with "
                f"{_FIRST_ENTRIES * _ENTRY_BYTES} bytes."
            )
        self.num_forgotten = 0
        """Keys that were compared with those before, but found the table full."""
        self._most = max_bytes // _ENTRY_BYTES
        self._count = 0
        self._make(_FIRST_ENTRIES)

    def __len__(self) -> int:
        """Keys remembered."""
        return self._count

    def remember(self, key: str, shard: int, offset: int) -> tuple[int, int] | None:
        """Take in a key, and say where it was met before.

        Args:
            key: the key of a sample.
            shard: number of its shard, below 2^20.
            offset: byte of its first header, a multiple of 512.

        Returns:
            Shard number and offset of the sample of the same key; None where there was none.

        Examples:
            >>> seen = SeenKeys()
            >>> seen.remember("P1", 0, 512), seen.remember("P2", 0, 2048)
            (None, None)
            >>> seen.remember("P1", 3, 0)
            (0, 512)
        """
        mark = xxh3_64_intdigest(key.encode()) or 1  # 0 stands for an empty place
        at = mark & self._mask
        marks = self._marks
        while found := marks[at]:
            if found == mark:
                place = self._places[at]
                return place >> _BLOCK_BITS, (place & _BLOCK_MASK) * BLOCK
            at = (at + 1) & self._mask
        if self._count >= self._limit:
            if 2 * len(marks) > self._most:
                self.num_forgotten += 1
                return None
            self._grow()
            return self.remember(key, shard, offset)
        marks[at] = mark
        self._places[at] = shard << _BLOCK_BITS | offset // BLOCK
        self._count += 1
        return None

    def _make(self, entries: int) -> None:
        """Lay out an empty table."""
        self._marks = array("Q", [0]) * entries
        self._places = array("Q", [0]) * entries
        self._mask = entries - 1
        self._limit = entries * 3 // 4  # fuller, and chains of taken places grow long

    def _grow(self) -> None:
        """Double the table."""
        old_marks, old_places = self._marks, self._places
        self._make(2 * len(old_marks))
        for mark, place in zip(old_marks, old_places, strict=True):
            if mark:
                at = mark & self._mask
                while self._marks[at]:
                    at = (at + 1) & self._mask
                self._marks[at], self._places[at] = mark, place
