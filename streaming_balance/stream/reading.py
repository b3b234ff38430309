"""One pass of one reader over its shards: sample by sample, and where it stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.stream.counts import StreamCounts
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.recipe import Recipe
from streaming_balance.stream.samples import StreamSample
from streaming_balance.stream.tarstream import SampleReader


class Reading:
    """Reads one pass. After an error it stands behind the last sound sample, and tries again.

    Args:
        recipe: what to read, and which part of it.
        epoch: number of the pass; keys the order of shards.
        files: opens shards; the caller closes them.
        counts: counts what is read, pass after pass.
        spent: shards that passed by and cannot be opened again; filled while reading.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        epoch: int,
        files: ShardFiles,
        counts: StreamCounts,
        spent: set[int],
    ) -> None:
        self._recipe, self._files, self._counts, self._spent = recipe, files, counts, spent
        self._order = recipe.part.shards(
            recipe.sources, seed=recipe.seed, epoch=epoch, shuffled=recipe.shuffled_shards
        )
        self._deals_samples = recipe.part.deals_samples(recipe.sources)
        self._place = self._offset = self._ordinal = 0
        self.num_taken = 0
        """Samples of this pass that are this reader's, so far."""
        self._reader: SampleReader | None = None
        self._samples: Iterator[StreamSample] | None = None

    def read(self) -> StreamSample | None:
        """Give the next sample of this reader; None at the end of the pass.

        Raises:
            ShardError: a shard is damaged.
            ConfigError: a shard passed by, and cannot be read again or dealt.
        """
        while self._place < len(self._order):
            samples = self._samples or self._open()
            # Whoever raised would look like one that ended: it is opened again instead.
            self._samples = None
            sample = next(samples, None)
            if sample is None:
                self._place, self._offset = self._place + 1, 0
                continue
            self._samples, self._offset = samples, sample.stop
            if self._takes(sample):
                self.num_taken += 1
                return sample
        return None

    def state(self) -> dict[str, Any]:
        """Give where the reader stands."""
        return {
            "place": self._place,
            "offset": self._offset,
            "ordinal": self._ordinal,
            "taken": self.num_taken,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where a state says.

        Raises:
            ResumeError: there is no such place.
        """
        self._place, self._offset = int(state["place"]), int(state["offset"])
        self._ordinal, self.num_taken = int(state["ordinal"]), int(state["taken"])
        if not 0 <= self._place <= len(self._order) or self._offset < 0:
            raise ResumeError(
                f"the state stands at byte {self._offset} of shard {self._place} of "
                f"{len(self._order)}, which does not exist. Use an earlier checkpoint."
            )

    def _takes(self, sample: StreamSample) -> bool:
        """Say whether a sample is this reader's, and count it."""
        part, ordinal = self._recipe.part, self._ordinal
        if self._deals_samples and not sample.can_seek:
            raise part.cannot_deal(sample.url, len(self._recipe.sources))
        self._ordinal += 1
        return part.takes(ordinal, deals_samples=self._deals_samples)

    def _open(self) -> Iterator[StreamSample]:
        """Begin the shard at `place`, or go on within it."""
        began_well = self._reader is not None and not self._offset
        if self._reader is None or not began_well:
            self._reader = SampleReader(
                self._recipe.sources,
                rules=self._recipe.tar_rules,
                counts=self._counts,
                files=self._files,
            )
            return self._walked_to_here(self._reader)
        return self._shard(self._reader, self._order[self._place])

    def _walked_to_here(self, reader: SampleReader) -> Iterator[StreamSample]:
        """Walk to where the reader stands, so that keys that come again are known as such.

        Files before it are walked from header to header; what passed by is not read again, but for
        the beginning of the shard itself.
        """
        before = StreamCounts.from_dict(self._counts.to_dict())
        try:
            for number in self._order[: self._place]:
                if self._recipe.sources[number].kind == "file":
                    deque(reader.shard(number), maxlen=0)
            samples = self._shard(reader, self._order[self._place])
            if self._offset:
                self._pass_over(samples)
        finally:
            for item in fields(StreamCounts):
                setattr(self._counts, item.name, getattr(before, item.name))
        return samples

    def _pass_over(self, samples: Iterator[StreamSample]) -> None:
        """Pass over what was read of the shard before."""
        for sample in samples:
            if sample.stop == self._offset:
                return
        source = self._recipe.sources[self._order[self._place]]
        raise ResumeError(
            f"{source.shown}: no sample ends at byte {self._offset}, where the state stands. The "
            f"shard was changed since: start again."
        )

    def _shard(self, reader: SampleReader, number: int) -> Iterator[StreamSample]:
        """Open a shard, unless it passed by."""
        source = self._recipe.sources[number]
        if number in self._spent:
            raise ConfigError(
                f"{source.shown} passed by once and cannot be read again. Open it anew and build "
                f"another stream, or name a file."
            )
        if not source.can_repeat:
            self._spent.add(number)
        return reader.shard(number)
