"""The members of one shard, put together to samples, damaged ones told from sound ones.

A sample is the consecutive members of one key. It is handed over when the next key, or the sound
end of the tar, shows that it is whole: where a shard breaks off, the sample open there may lack
members and is never handed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from streaming_balance.errors import ShardError
from streaming_balance.stream.counts import Skip, StreamCounts
from streaming_balance.stream.names import is_metadata, key_rule, missing_fields
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.samples import Payload, StreamSample
from streaming_balance.stream.seen import SeenKeys
from streaming_balance.stream.walking import FOLDER, Entry, TarBytes, TarWalk, WalkLimits

MAX_FIELDS = 10_000  # members of one sample
_WAY_OUT = (
    "Fetch or write the shard again; a stream leaves out and counts such places with "
    "on_error='skip' (resample --on-error skip)."
)


@dataclass(slots=True)
class _OpenSample:
    """The sample whose members are being read."""

    key: str
    """What its members' names have in common."""
    offset: int
    """Where its first header starts."""
    members: dict[str, Payload] = field(default_factory=dict)
    """What was taken so far, by field."""
    payload_bytes: int = 0
    """Payload bytes of all its members, taken or not."""
    problem: str | None = None
    """Why it cannot be handed over."""


def walk_limits(rules: TarRules) -> WalkLimits:
    """Give what of the rules concerns walking a tar."""
    return WalkLimits(
        max_member_bytes=rules.max_member_bytes,
        accept_missing_end=rules.missing_end == "accept",
    )


class ShardSamples:
    """Iterates, once, over the samples of one shard.

    Args:
        tar: its bytes.
        shard: its number.
        names: the shards of the pass by number, as messages show them.
        rules: how strictly to read.
        counts: counts what is read, handed over and left out.
        seen: keys of this pass so far.
        start: byte of the header to start at.
        stop: byte of the header to stop before; None reads to the end of the tar.
    """

    def __init__(
        self,
        tar: TarBytes,
        shard: int,
        names: Mapping[int, str],
        rules: TarRules,
        counts: StreamCounts,
        seen: SeenKeys,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self._tar = tar
        self._shard = shard
        self._names = names
        self._rules = rules
        self._counts = counts
        self._seen = seen
        self._split = key_rule(rules.keys)
        self._walk = TarWalk(tar, walk_limits(rules), start, stop)
        self._open: _OpenSample | None = None
        self._counted_to = start
        self._passed_bytes = 0

    def __iter__(self) -> Iterator[StreamSample]:
        """Read the shard.

        Yields:
            Its samples in order.

        Raises:
            ShardError: it is damaged, unless the rules say to skip.
        """
        entries = iter(self._walk)
        while True:
            try:
                entry = next(entries, None)
            except ShardError as error:
                self._lose_rest(error)
                return
            if entry is None:
                break
            split = None if entry.kind is FOLDER else self._split(entry.name)
            if split is None or (entry.name.startswith("__") and is_metadata(entry.name)):
                self._pass_over(entry)
                continue
            key, name = split
            if self._open is None or self._open.key != key:
                sample = self._close(entry.offset)
                if sample is not None:
                    yield sample
                self._open = _OpenSample(key, entry.offset)
            problem = self._problem_of(self._open, entry, name)
            self._open.payload_bytes += entry.size
            if problem is not None:
                self._refuse(problem)
            elif self._open.problem is None:
                try:
                    payload = self._tar.payload(entry.name, entry.payload_offset, entry.size)
                except ShardError as error:
                    self._lose_rest(error)
                    return
                self._open.members[name] = payload
        sample = self._close(self._walk.offset)
        if sample is not None:
            yield sample
        self._counts.add_end(self._walk.num_bytes - self._counted_to, self._passed_bytes)

    def _problem_of(self, sample: _OpenSample, entry: Entry, name: str) -> str | None:
        """Say why a member cannot be taken into its sample, or None."""
        if entry.problem is not None:
            problem = entry.problem
        elif name in sample.members:
            problem = f"is the second {name!r} of its sample; names differ in case at most"
        elif name.startswith("__"):
            problem = f"has the field {name!r}; two underscores mark what readers add themselves"
        elif len(sample.members) >= MAX_FIELDS:
            problem = f"is one more than the {MAX_FIELDS:,} a sample may have"
        elif sample.payload_bytes + entry.size > self._rules.max_sample_bytes:
            most = self._rules.max_sample_bytes
            problem = f"makes its sample larger than max_sample_bytes ({most:,})"
        else:
            return None
        return f"member {entry.name!r} at byte {entry.offset} {problem}"

    def _refuse(self, problem: str) -> None:
        """Raise for what is wrong with the open sample, or note it: the sample is left out."""
        assert self._open is not None
        text = f"{self._names[self._shard]}: sample {self._open.key!r}: {problem}."
        if self._rules.on_error == "raise":
            raise ShardError(f"{text} {_WAY_OUT}")
        self._open.problem = self._open.problem or text

    def _close(self, stop: int) -> StreamSample | None:
        """End the open sample at byte `stop`: give it, or leave it out if it is damaged."""
        opened = self._open
        if opened is None:
            return None
        self._check_whole(opened)
        self._open = None
        span, self._counted_to = stop - self._counted_to, stop
        passed_bytes, self._passed_bytes = self._passed_bytes, 0
        if opened.problem is not None:
            skip = self._skip(opened.offset, stop, opened.key, opened.problem)
            self._counts.add_skipped(skip, span, opened.payload_bytes + passed_bytes)
            return None
        self._counts.add_delivered(span, opened.payload_bytes, passed_bytes)
        return StreamSample(
            opened.key,
            self._names[self._shard],
            self._shard,
            opened.offset,
            stop,
            opened.members,
            self._tar.can_seek,
        )

    def _check_whole(self, opened: _OpenSample) -> None:
        """Check that a sample came once, and has all that is wanted of it."""
        forgotten = self._seen.num_forgotten
        earlier = self._seen.remember(opened.key, self._shard, opened.offset)
        self._counts.keys_not_remembered += self._seen.num_forgotten - forgotten
        if earlier is not None:
            shard, offset = earlier
            self._refuse(
                f"its key stands at byte {opened.offset}, and stood at byte {offset} of "
                f"{self._names[shard]} before. Members of a sample stand together, and keys "
                "differ; where each shard counts from 0, read with unique_keys='shard'"
            )
        if self._rules.wanted:
            missing = missing_fields(self._rules.wanted, opened.members)
            if missing and opened.problem is None:
                self._refuse(
                    f"the sample at byte {opened.offset} has no {', '.join(missing)}, only "
                    f"{', '.join(sorted(opened.members)) or 'nothing'}"
                )

    def _pass_over(self, entry: Entry) -> None:
        """Count a member that makes no sample; links and the like are refused nevertheless."""
        if entry.problem is None:
            kind = FOLDER if entry.kind is FOLDER else "no key"
            self._counts.passed_over["metadata" if is_metadata(entry.name) else kind] += 1
        else:
            text = (
                f"{self._names[self._shard]}: member {entry.name!r} at byte {entry.offset} "
                f"{entry.problem}."
            )
            if self._rules.on_error == "raise":
                raise ShardError(f"{text} {_WAY_OUT}")
            stop = entry.payload_offset + entry.size
            self._counts.add_skipped(self._skip(entry.offset, stop, None, text), 0, 0)
        self._passed_bytes += entry.size

    def _lose_rest(self, error: ShardError) -> None:
        """Raise for damage after which nothing is certain, or count the rest as lost."""
        opened, at = self._open, self._walk.offset
        text = f"{self._names[self._shard]}: at byte {at}: {str(error).removesuffix('.')}."
        if opened is not None:
            text += f" Sample {opened.key!r}, begun at byte {opened.offset}, may lack members."
        if self._rules.on_error == "raise":
            raise ShardError(f"{text} {_WAY_OUT}") from error
        if opened is not None and opened.problem is not None:
            text += f" Before: {opened.problem}"
        stop = self._tar.size
        skip = Skip(
            url=self._names[self._shard],
            shard=self._shard,
            offset=at if opened is None else opened.offset,
            stop=stop,
            key=None if opened is None else opened.key,
            rest_of_shard=True,
            reason=text,
        )
        span = max(at if stop is None else stop, self._counted_to) - self._counted_to
        self._counts.add_skipped(skip, span, span)
        self._open = None

    def _skip(self, offset: int, stop: int, key: str | None, reason: str) -> Skip:
        """Make the record of one sample or member left out."""
        return Skip(
            url=self._names[self._shard],
            shard=self._shard,
            offset=offset,
            stop=stop,
            key=key,
            rest_of_shard=False,
            reason=reason,
        )
