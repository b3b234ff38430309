"""A sample of a stream: its key, its members, and where it can be read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from streaming_balance.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a sample can be read again."""

    url: str
    """The shard, a path."""
    shard: int
    """Number of the shard in the order of this pass, from 0."""
    offset: int
    """Byte at which the header of its first member starts."""
    stop: int
    """Byte at which the header after its last member starts."""


class ByteRanges(Protocol):
    """A file that gives bytes from anywhere, as often as asked."""

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Give `length` bytes from `offset` on; `what` they are goes into an error."""
        ...

    def read_into(self, out: memoryview, offset: int, what: str) -> None:
        """Fill `out` with the bytes from `offset` on."""
        ...


class Payload:
    """The bytes of one member: held, or read from the shard whenever asked.

    Args:
        name: name of the member in its shard.
        size: how many bytes it has.
        held: the bytes, where the source cannot seek or they came along with a header.
        file: the shard, where they are read when asked.
        offset: where they start in `file`.
    """

    __slots__ = ("_file", "_held", "_offset", "name", "size")

    def __init__(
        self,
        name: str,
        size: int,
        held: bytes | None = None,
        file: ByteRanges | None = None,
        offset: int = 0,
    ) -> None:
        self.name = name
        self.size = size
        self._held = held
        self._file = file
        self._offset = offset

    @property
    def is_held(self) -> bool:
        """Whether the bytes are in memory now."""
        return self._held is not None

    def read(self) -> bytes:
        """Give the bytes.

        Raises:
            ShardError: the shard was cut, replaced or closed since its headers were read.
        """
        if self._held is not None:
            return self._held
        assert self._file is not None
        return self._file.read(self._offset, self.size, self.name)

    def start(self, count: int) -> bytes:
        """Give the first `count` bytes, or all where there are fewer.

        Raises:
            ShardError: the shard was cut, replaced or closed since its headers were read.
        """
        if self._held is not None:
            return self._held[:count]
        assert self._file is not None
        return self._file.read(self._offset, min(count, self.size), self.name)

    def read_into(self, out: memoryview) -> None:
        """Fill `out`, one-dimensional and of `size` bytes, which stays the caller's.

        Raises:
            ShardError: the shard was cut, replaced or closed since its headers were read.
        """
        if self._held is not None:
            out[:] = self._held
        else:
            assert self._file is not None
            self._file.read_into(out, self._offset, self.name)

    def __repr__(self) -> str:
        return f"Payload({self.name!r}, {self.size})"


class StreamSample:
    """One sample of a stream.

    Args:
        key: what its members' names have in common.
        url: the shard it came from, without credentials.
        shard: number of that shard in the order of this pass.
        offset: byte of the shard at which its first header starts.
        stop: byte at which the header after its last member starts.
        members: its members by field: `cls`, `image.npb`, `json`.
        can_seek: whether `shard` can be opened again and read from `offset`.
    """

    __slots__ = (
        "can_seek",
        "key",
        "label",
        "members",
        "num_bytes",
        "offset",
        "shard",
        "stop",
        "url",
    )

    def __init__(
        self,
        key: str,
        url: str,
        shard: int,
        offset: int,
        stop: int,
        members: dict[str, Payload],
        can_seek: bool,
    ) -> None:
        self.key = key
        self.url = url
        self.shard = shard
        self.offset = offset
        self.stop = stop
        self.members: Mapping[str, Payload] = members
        self.can_seek = can_seek
        self.num_bytes = sum([payload.size for payload in members.values()])
        self.label: str | None = None

    @property
    def place(self) -> Place | None:
        """Where it can be read again; None where the source cannot seek."""
        if not self.can_seek:
            return None
        return Place(url=self.url, shard=self.shard, offset=self.offset, stop=self.stop)

    def field_bytes(self, name: str) -> bytes:
        """Give the bytes of one member.

        Args:
            name: its field, such as `cls`.

        Returns:
            Its payload, as stored.

        Raises:
            ConfigError: the sample has no such field.
            ShardError: the bytes cannot be read any more.
        """
        payload = self.members.get(name)
        if payload is None:
            raise ConfigError(
                f"sample {self.key!r} of {self.url} has no field {name!r}; fields there: "
                f"{', '.join(sorted(self.members))}." + did_you_mean(name, self.members)
            )
        return payload.read()

    def held(self) -> StreamSample:
        """Give the same sample with all its bytes in memory, whatever becomes of its shard.

        Raises:
            ShardError: the bytes cannot be read any more.
        """
        members = {
            name: payload
            if payload.is_held
            else Payload(payload.name, payload.size, payload.read())
            for name, payload in self.members.items()
        }
        sample = StreamSample(
            self.key, self.url, self.shard, self.offset, self.stop, members, self.can_seek
        )
        sample.label = self.label
        return sample

    def to_dict(self) -> dict[str, str | bytes]:
        """Give the sample as webdataset does: `__key__`, `__url__`, and bytes by field.

        Raises:
            ShardError: the bytes cannot be read any more.
        """
        read = {name: payload.read() for name, payload in self.members.items()}
        return {"__key__": self.key, "__url__": self.url, **read}

    def __repr__(self) -> str:
        return f"StreamSample({self.key!r}, {sorted(self.members)}, {self.num_bytes} bytes)"
