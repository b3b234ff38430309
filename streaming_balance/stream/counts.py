"""What a pass over tars read, delivered and left out: counts that always reconcile.

    samples:  read = delivered + skipped
    bytes:    read = delivered + skipped + headers

Headers are everything that is no payload: headers, extended headers, padding, the end of a tar.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

MAX_SKIPS_KEPT = 1000  # records kept in full; all are counted and logged

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """Something that was left out: one damaged sample, or the rest of a shard."""

    url: str
    """The shard, without credentials."""
    shard: int
    """Its number in the order of this pass."""
    offset: int
    """First byte left out."""
    stop: int | None
    """Byte after the last one left out; None: all to the end, wherever that is."""
    key: str | None
    """The sample; None where the rest of a shard is lost between two samples."""
    rest_of_shard: bool
    """Whether everything behind is lost too, and so nobody knows how many samples."""
    reason: str
    """What is wrong, with shard, byte offset and key."""


@dataclass(slots=True, kw_only=True)
class StreamCounts:
    """Counts of one pass so far; they reconcile whenever a sample has just been handed over."""

    shards_read: int = 0
    """Shards read to their sound end."""
    shards_lost: int = 0
    """Shards whose rest, or whole, could not be read."""
    samples_read: int = 0
    """Samples begun, damaged ones included."""
    samples_delivered: int = 0
    """Samples handed over."""
    samples_skipped: int = 0
    """Samples left out because they are damaged."""
    bytes_read: int = 0
    """Bytes of the tars gone past, decompressed."""
    bytes_delivered: int = 0
    """Payload bytes of samples handed over."""
    bytes_skipped: int = 0
    """Payload bytes of samples left out and of members passed over, and lost rests of shards."""
    bytes_headers: int = 0
    """Everything else: headers, padding, ends."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Members that make no sample, by kind: `folder`, `no key`, `metadata`."""
    keys_not_remembered: int = 0
    """Samples whose key could not be kept for comparing later ones: the table was full."""
    skips_not_kept: int = 0
    """Skips beyond the first thousand: counted and logged, but not in `skips`."""
    skips: list[Skip] = field(default_factory=list)
    """What was left out and why, in order."""

    def add_delivered(self, span: int, payload_bytes: int, passed_bytes: int) -> None:
        """Count a sample handed over.

        Args:
            span: bytes of the tar from the end of what was counted before to its own end.
            payload_bytes: payload bytes of its members.
            passed_bytes: payload bytes within the span that belong to no sample.
        """
        self.samples_read += 1
        self.samples_delivered += 1
        self.bytes_read += span
        self.bytes_delivered += payload_bytes
        self.bytes_skipped += passed_bytes
        self.bytes_headers += span - payload_bytes - passed_bytes

    def add_skipped(self, skip: Skip, span: int, payload_bytes: int) -> None:
        """Count something left out, keep the record, and log it.

        Args:
            skip: what and why.
            span: bytes of the tar from the end of what was counted before to its end.
            payload_bytes: payload bytes in it; all of the span for the rest of a shard.
        """
        if skip.key is not None:
            self.samples_read += 1
            self.samples_skipped += 1
        self.bytes_read += span
        self.bytes_skipped += payload_bytes
        self.bytes_headers += span - payload_bytes
        self.shards_lost += skip.rest_of_shard
        self.report(skip)

    def report(self, skip: Skip) -> None:
        """Keep the record of something left out, and log it, without counting it here.

        Args:
            skip: what and why; a sample that was handed over and then left out has its own count.
        """
        if len(self.skips) < MAX_SKIPS_KEPT:
            self.skips.append(skip)
        else:
            self.skips_not_kept += 1
        logger.warning("left out: %s", skip.reason)

    def add_end(self, span: int, passed_bytes: int) -> None:
        """Count the sound end of a shard."""
        self.shards_read += 1
        self.bytes_read += span
        self.bytes_skipped += passed_bytes
        self.bytes_headers += span - passed_bytes

    @property
    def reconcile(self) -> bool:
        """Whether the equations on top of this module hold."""
        return (
            self.samples_read == self.samples_delivered + self.samples_skipped
            and self.bytes_read == self.bytes_delivered + self.bytes_skipped + self.bytes_headers
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the counts as JSON-able values, for a state or a report."""
        return asdict(self) | {"passed_over": dict(self.passed_over)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamCounts:
        """Make counts of what `to_dict` gave.

        Args:
            values: its dictionary, perhaps through JSON; what is missing is 0.

        Returns:
            Equal counts.
        """
        known = {item.name for item in fields(cls)}
        counts = cls(**{name: value for name, value in values.items() if name in known})
        counts.passed_over = Counter(values.get("passed_over", {}))
        counts.skips = [Skip(**skip) for skip in values.get("skips", ())]
        return counts
