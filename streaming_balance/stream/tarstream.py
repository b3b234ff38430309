"""Strict tar streams: every sample of some shards, or an error that says what is wrong and where.

    for sample in read_samples("shards/train-{000..012}.tar"): ...
    for member in read_members("somebody.tar"): ...

Readers of WebDatasets commonly end in silence at a cut, and lose the rest of a shard to one flipped
bit. Here nothing of that is silent: it is an error with shard, byte and key, or with
`on_error="skip"` a record in counts that reconcile.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from streaming_balance.errors import ShardError
from streaming_balance.stream.counts import Skip, StreamCounts
from streaming_balance.stream.grouping import ShardSamples, walk_limits
from streaming_balance.stream.headers import TarDamageError
from streaming_balance.stream.local import LocalTar, ShardFiles
from streaming_balance.stream.names import KeyRule
from streaming_balance.stream.rules import OnError, TarRules
from streaming_balance.stream.samples import Payload, Place, StreamSample
from streaming_balance.stream.seen import SeenKeys
from streaming_balance.stream.sources import (
    DEFAULT_TIMEOUT_SECONDS,
    ShardSource,
    Urls,
    expand,
    open_source,
)
from streaming_balance.stream.walking import FILE, Entry, TarWalk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMember:
    """One file in a tar."""

    url: str
    """Its shard, without credentials."""
    name: str
    """Its name, after PAX and GNU extensions."""
    offset: int
    """Byte at which its first header starts, extensions included."""
    payload_offset: int
    """Byte at which its payload starts; of a compressed shard, once decompressed."""
    size: int
    """How many bytes it has."""
    payload: Payload
    """Its bytes."""


class SampleReader:
    """One pass over some shards: reads samples, counts, and knows the keys it met.

    Args:
        sources: the shards in order, as `expand` gives them.
        rules: how strictly to read.
        counts: counts to go on with; None begins at zero.
        files: who opens local shards; None: a `ShardFiles` of this reader.
        timeout_seconds: longest silence of a server, and how long a program may take to end.
    """

    def __init__(
        self,
        sources: Sequence[ShardSource],
        *,
        rules: TarRules | None = None,
        counts: StreamCounts | None = None,
        files: ShardFiles | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        self.sources = tuple(sources)
        self.rules = TarRules() if rules is None else rules
        self.counts = StreamCounts() if counts is None else counts
        self.files = ShardFiles() if files is None else files
        self._owns_files = files is None
        self._names = {number: source.shown for number, source in enumerate(self.sources)}
        self._timeout_seconds = timeout_seconds
        self._seen = SeenKeys(max_bytes=self.rules.max_key_bytes)

    def __iter__(self) -> Iterator[StreamSample]:
        """Read all shards in order.

        Yields:
            Their samples.

        Raises:
            ShardError: a shard is damaged, unless the rules say to skip.
        """
        for number in range(len(self.sources)):
            yield from self.shard(number)

    def shard(self, number: int, *, start: int = 0) -> Iterator[StreamSample]:
        """Read one shard.

        Args:
            number: its place in `sources`.
            start: byte to go on at: 0, or `stop` of a sample read before. Where the source cannot
                seek, what stands before it is read past, without a look at it.

        Yields:
            Its samples in order.

        Raises:
            ShardError: it is damaged, unless the rules say to skip.
        """
        if self.rules.unique_keys == "shard":
            self._seen = SeenKeys(max_bytes=self.rules.max_key_bytes)
        try:
            tar = open_source(
                self.sources[number], self.files, timeout_seconds=self._timeout_seconds
            )
        except ShardError as error:
            if self.rules.on_error == "raise":
                raise
            self._lose_shard(number, start, error)
            return
        with closing(tar):
            yield from ShardSamples(
                tar, number, self._names, self.rules, self.counts, self._seen, start
            )

    def again(self, place: Place) -> StreamSample:
        """Read a sample again from where it stands.

        Args:
            place: `place` of a sample of these shards, of this pass or an earlier one.

        Returns:
            The same sample.

        Raises:
            ShardError: what stands there now is not one whole sample.
        """
        path = self.sources[place.shard].address
        return read_place(place, self.files, rules=self.rules, path=path)

    def close(self) -> None:
        """Close the shards this reader opened: payloads not read yet cannot be read any more."""
        if self._owns_files:
            self.files.close()

    def _lose_shard(self, number: int, start: int, error: ShardError) -> None:
        """Count a shard that cannot be opened."""
        skip = Skip(
            url=self._names[number],
            shard=number,
            offset=start,
            stop=None,
            key=None,
            rest_of_shard=True,
            reason=str(error),
        )
        self.counts.add_skipped(skip, 0, 0)


def read_samples(
    urls: Urls,
    *,
    on_error: OnError = "raise",
    keys: KeyRule = "webdataset",
    wanted: Collection[str] | None = None,
    allow_pipe: bool = False,
    counts: StreamCounts | None = None,
) -> Iterator[StreamSample]:
    """Read every sample of some shards, strictly.

    Args:
        urls: shards, as `expand` takes them.
        on_error: `raise` ends the stream at the first damage; `skip` leaves it out and counts.
        keys: `webdataset` cuts names at the first dot of the base name, `last_dot` at the last.
        wanted: fields every sample must have, such as `image` and `cls`; None: any.
        allow_pipe: whether `pipe:` may start programs.
        counts: filled while reading; None keeps none.

    Returns:
        An iterator over the samples. Nothing is opened before the first is asked for.

    Raises:
        ConfigError: the shards are none, or a choice is none of those allowed.
        ShardError: while iterating: a shard is damaged, and `on_error` is `raise`.

    Examples:
        >>> import io, tarfile
        >>> file = io.BytesIO()
        >>> with tarfile.open(fileobj=file, mode="w") as tar:
        ...     for name, text in (("P1.cls", b"1"), ("P1.json", b"{}"), ("P2.cls", b"0")):
        ...         info = tarfile.TarInfo(name)
        ...         info.size = len(text)
        ...         tar.addfile(info, io.BytesIO(text))
        >>> _ = file.seek(0)
        >>> [(sample.key, sample.field_bytes("cls")) for sample in read_samples(file)]
        [('P1', b'1'), ('P2', b'0')]
    """
    if isinstance(wanted, str):
        wanted = (wanted,)
    rules = TarRules(on_error=on_error, keys=keys, wanted=frozenset(wanted or ()))
    return iter(SampleReader(expand(urls, allow_pipe=allow_pipe), rules=rules, counts=counts))


def read_members(
    urls: Urls, *, rules: TarRules | None = None, allow_pipe: bool = False
) -> Iterator[StreamMember]:
    """Read every file of some tars, whatever its name, strictly.

    Args:
        urls: shards, as `expand` takes them.
        rules: how strictly to read. With `on_error="skip"`, links and the like are passed over and
            logged; damage after which nothing is certain is raised nevertheless.
        allow_pipe: whether `pipe:` may start programs.

    Returns:
        An iterator over the files. Where a source cannot seek, payloads are held in memory.

    Raises:
        ConfigError: the shards are none.
        ShardError: while iterating: a tar is damaged, or holds what is no file nor folder.
    """
    chosen = TarRules() if rules is None else rules
    return _members(expand(urls, allow_pipe=allow_pipe), chosen)


def read_place(
    place: Place, files: ShardFiles, *, rules: TarRules | None = None, path: str | None = None
) -> StreamSample:
    """Read one sample again from where it stands.

    Args:
        place: `place` of a sample that was read with the same rules.
        files: who opens local shards.
        rules: how strictly to read.
        path: where the shard is, if not at `place.url` seen from the current folder.

    Returns:
        The same sample.

    Raises:
        ShardError: what stands there now is not one whole sample.
    """
    chosen = replace(TarRules() if rules is None else rules, on_error="raise")
    names = {place.shard: place.url}
    with closing(LocalTar(files.add(Path(place.url if path is None else path)))) as tar:
        samples = ShardSamples(
            tar,
            place.shard,
            names,
            chosen,
            StreamCounts(),
            SeenKeys(),
            start=place.offset,
            stop=place.stop,
        )
        found = list(samples)
    if len(found) != 1 or (found[0].offset, found[0].stop) != (place.offset, place.stop):
        raise ShardError(
            f"{place.url}: bytes {place.offset} to {place.stop} were one sample, and now are "
            f"{[sample.key for sample in found]}. The shard was changed since: start again."
        )
    return found[0]


def _members(sources: Sequence[ShardSource], rules: TarRules) -> Iterator[StreamMember]:
    """Walk the files of some tars."""
    files = ShardFiles()
    for source in sources:
        with closing(open_source(source, files)) as tar:
            walk = TarWalk(tar, walk_limits(rules))
            try:
                for entry in walk:
                    if entry.problem is not None:
                        _refuse(source, entry, rules)
                    elif entry.kind is FILE:
                        payload = tar.payload(entry.name, entry.payload_offset, entry.size)
                        yield StreamMember(
                            url=source.shown,
                            name=entry.name,
                            offset=entry.offset,
                            payload_offset=entry.payload_offset,
                            size=entry.size,
                            payload=payload,
                        )
            except TarDamageError as error:
                raise ShardError(f"{source.shown}: at byte {walk.offset}: {error}.") from error


def _refuse(source: ShardSource, entry: Entry, rules: TarRules) -> None:
    """Raise for a member that cannot be taken, or log it."""
    text = f"{source.shown}: member {entry.name!r} at byte {entry.offset} {entry.problem}."
    if rules.on_error == "raise":
        raise ShardError(text)
    logger.warning("left out: %s", text)
