"""Which part of a stream one of several readers takes: ranks, and the workers of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key, words
from streaming_balance.plan.options import whole_number
from streaming_balance.stream.sources import ShardSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of several readers that share a stream, so that nothing is read twice.

    Raises:
        ConfigError: there is no such reader.
    """

    number: int = 0
    """Which one, from 0."""
    count: int = 1
    """How many there are."""

    def __post_init__(self) -> None:
        """Refuse a reader that does not exist."""
        number, count = whole_number(self.number), whole_number(self.count)
        if number is None or count is None or not 0 <= number < count:
            raise ConfigError(
                f"part {self.number!r} of {self.count!r} does not exist; both are integers, and "
                f"parts count from 0."
            )

    def of(self, number: int, count: int) -> Part:
        """Give one of `count` parts of this part.

        Examples:
            Two ranks with two workers each; shards go to the ranks in turn:

            >>> [Part(number=1, count=2).of(worker, 2).number for worker in range(2)]
            [1, 3]
        """
        inner = Part(number=number, count=count)
        return Part(number=self.number + self.count * inner.number, count=self.count * inner.count)

    def deals_samples(self, sources: Sequence[ShardSource]) -> bool:
        """Say whether samples are dealt rather than shards: where there are too few shards.

        Every reader then walks all headers and takes every `count`-th sample; payloads of others
        are passed over, which is possible in files alone.

        Raises:
            ConfigError: samples would have to be dealt, and a shard is no file.
        """
        if len(sources) >= self.count:
            return False
        for source in sources:
            if source.kind != "file":
                raise self.cannot_deal(source.shown, len(sources))
        return True

    def cannot_deal(self, shown: str, num_shards: int) -> ConfigError:
        """Give the error for a shard whose samples cannot be dealt."""
        return ConfigError(
            f"{self.count} readers (ranks x workers) share {num_shards} shards, and {shown!r} is "
            f"no plain tar on disk whose samples could be dealt without reading all of it in every "
            f"reader. Use at most {num_shards} readers, or more shards."
        )

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
