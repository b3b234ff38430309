"""Keyed choices made one after the other: the only randomness a stage has."""

from __future__ import annotations

from streaming_balance.plan.keys import words

# So many words are made at once: one at a time costs forty times as much.
BLOCK_WORDS = 256
# Philox makes four words per counter value.
WORDS_PER_COUNT = 4


class KeyedWords:
    """The words of one random stream, taken in order.

    Where the stream stands is one integer, `taken`, so that a saved run goes on with the next word.

    Args:
        key: 128-bit key of the stream.
        taken: how many words were taken before.

    Examples:
        >>> first, again = KeyedWords(7), KeyedWords(7)
        >>> [first.below(10) for _ in range(300)] == [again.below(10) for _ in range(300)]
        True
        >>> KeyedWords(7, taken=300).below(10) == first.below(10)
        True
    """

    __slots__ = ("_block", "_key", "taken")

    def __init__(self, key: int, *, taken: int = 0) -> None:
        self._key = key
        self.taken = taken
        """Words taken so far."""
        self._block: list[int] = []
        if taken % BLOCK_WORDS:
            self._fill()

    def below(self, bound: int) -> int:
        """Choose a whole number in [0, bound), each as likely as the others to within 2**-64."""
        place = self.taken % BLOCK_WORDS
        if not place:
            self._fill()
        self.taken += 1
        return (self._block[place] * bound) >> 64

    def _fill(self) -> None:
        """Make the block of words in which the next one lies."""
        start = self.taken - self.taken % BLOCK_WORDS
        block = words(self._key, BLOCK_WORDS, first_block=start // WORDS_PER_COUNT)
        self._block = block.tolist()
