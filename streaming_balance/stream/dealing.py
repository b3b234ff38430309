"""Which part of a stream one of several readers takes: ranks, and the workers of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key, words
from streaming_balance.stream.sources import ShardSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of several readers that share a stream, so that nothing is read twice."""

    number: int = 0
    """Which one, from 0."""
    count: int = 1
    """How many there are."""

    def __post_init__(self) -> None:
        """Refuse a reader that does not exist."""
        if not 0 <= self.number < self.count:
            raise ConfigError(f"part {self.number} of {self.count} does not exist.")

    def deals_samples(self, sources: Sequence[ShardSource]) -> bool:
        """Say whether samples are dealt rather than shards: where there are too few shards.

        Every reader then walks all headers and takes every `count`-th sample; payloads of others
        are skipped, which is possible in files alone.

        Raises:
            ConfigError: samples would have to be dealt, and a shard is no file.
        """
        if len(sources) >= self.count:
            return False
        for source in sources:
            if source.kind != "file":
                raise ConfigError(
                    f"{self.count} readers (ranks x workers) share {len(sources)} shards, and "
                    f"{source.shown!r} is no file whose samples could be dealt without reading all "
                    f"of them in every reader. Use at most {len(sources)} readers, or more shards."
                )
        return True

    def shards(
        self, sources: Sequence[ShardSource], *, seed: int, epoch: int, shuffled: bool
    ) -> list[int]:
        """List the shards this reader goes through in a pass, in order.

        Args:
            sources: all shards.
            seed: keys the order.
            epoch: number of the pass.
            shuffled: whether every pass takes them in another order, by key.
        """
        order = np.arange(len(sources))
        if shuffled:
            key = stream_key(seed, "shard order", epoch)
            order = np.argsort(words(key, len(sources)), kind="stable")
        everything: list[int] = order.tolist()
        return everything if self.deals_samples(sources) else everything[self.number :: self.count]

    def takes(self, ordinal: int, *, deals_samples: bool) -> bool:
        """Say whether the sample with this ordinal in the pass is this reader's."""
        return not deals_samples or ordinal % self.count == self.number


def chunks(count: int, parts: int) -> Iterator[int]:
    """Cut `count` into parts that differ by one at most.

    Examples:
        >>> list(chunks(7, 3))
        [3, 2, 2]
    """
    for number in range(parts):
        yield count // parts + (number < count % parts)
