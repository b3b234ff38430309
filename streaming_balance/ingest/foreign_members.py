"""The members of a sample that others wrote: where their payloads lie, and which are arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import xxhash

from streaming_balance.errors import ShardError
from streaming_balance.ingest.volume import AXES_OF_DIMENSIONS
from streaming_balance.storage.codecs import decode, voxel_digest
from streaming_balance.storage.layout import BLOCK, CODEC_EXTENSIONS
from streaming_balance.storage.npy import parse_header
from streaming_balance.storage.rows import ArrayRow, NamedRow
from streaming_balance.stream.grouping import walk_limits
from streaming_balance.stream.local import LocalTar, ShardFiles
from streaming_balance.stream.passing import PassingTar
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.samples import Payload, StreamSample
from streaming_balance.stream.walking import FILE, TarWalk

_CODECS = {extension: codec for codec, extension in CODEC_EXTENSIONS.items()}


class PlacedPayload(Payload):
    """A payload in memory that knows where it lies in its tar."""

    __slots__ = ("offset",)

    def __init__(self, name: str, payload: bytes, offset: int) -> None:
        super().__init__(name, len(payload), payload)
        self.offset = offset


class HashedStream:
    """The bytes of a file in order, once, digested on their way.

    Args:
        file: opened without a buffer, at its beginning.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size: int | None = os.fstat(file.fileno()).st_size
        self.sha256 = hashlib.sha256()
        """Digest of the bytes read so far."""
        self.num_read = 0
        """How many they are."""
        self._file = file

    def read(self, count: int) -> bytes:
        """Give exactly `count` bytes; fewer only where the file ends."""
        parts: list[bytes] = []
        missing = count
        while missing and (found := self.read_some(missing)):
            parts.append(found)
            missing -= len(found)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_some(self, count: int) -> bytes:
        """Give 1 to `count` bytes; none only where the file ends."""
        try:
            found = self._file.read(count)
        except OSError as error:
            raise ShardError(f"cannot be read: {error.strerror}") from error
        self.sha256.update(found)
        self.num_read += len(found)
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class HashedTar(PassingTar):
    """A local tar read once from end to end, digested, its payloads placed and in memory.

    Args:
        stream: its bytes.
    """

    can_seek = True

    def __init__(self, stream: HashedStream) -> None:
        super().__init__(stream)
        self.stream = stream

    def payload(self, name: str, offset: int, size: int) -> Payload:
        """Read the payload of a member.

        Raises:
            TarDamage: the file ends before it does.
        """
        return PlacedPayload(name, super().payload(name, offset, size).read(), offset)


def payload_offsets(sample: StreamSample, files: ShardFiles, rules: TarRules) -> dict[str, int]:
    """Say where the payloads of a sample lie in its tar.

    Args:
        sample: a sample of a tar that can be read anywhere.
        files: opens the tar where its headers must be read again.
        rules: the rules it was read with.

    Returns:
        Offset by field.

    Raises:
        ShardError: the tar was changed since.
    """
    placed = {
        name: payload.offset
        for name, payload in sample.members.items()
        if isinstance(payload, PlacedPayload)
    }
    if len(placed) == len(sample.members):
        return placed
    counted, end = _counted_offsets(sample)
    # Had there been anything but a header before each payload, the sample would end elsewhere.
    return counted if end == sample.stop else _walked_offsets(sample, files, rules)


def member_row(name: str, stored: bytes, offset: int) -> NamedRow:
    """Say where a member lies.

    Args:
        name: its name in the tar.
        stored: its bytes.
        offset: where they start.
    """
    checksum = xxhash.xxh3_64_intdigest(stored)
    return NamedRow(offset=offset, bytes=len(stored), xxh3=checksum, member=name)


def is_array(field: str) -> bool:
    """Say whether a field is named like an array that can be decoded.

    Examples:
        >>> is_array("npy"), is_array("image.npb"), is_array("png")
        (True, True, False)
    """
    return field.rpartition(".")[2] in _CODECS


def array_row(field: str, stored: bytes, kept: NamedRow, axes: str | None) -> ArrayRow | str:
    """Say what an array member holds, or why it is no image.

    Args:
        field: its field, which ends in npy or npb.
        stored: its bytes.
        kept: where it lies.
        axes: meaning of its axes; None goes by their number.
    """
    codec = _CODECS[field.rpartition(".")[2]]
    try:
        header = parse_header(stored)
        letters = AXES_OF_DIMENSIONS.get(len(header.shape)) if axes is None else axes
        if letters is None or len(letters) != len(header.shape) or 0 in header.shape:
            wanted = "2 to 4 sides, each at least 1" if axes is None else f"the axes {axes}"
            return f"is an array of shape {header.shape}; an image has {wanted}"
        array = decode(stored, codec)
    except ShardError as error:
        return str(error)
    return ArrayRow(
        offset=kept.offset,
        bytes=kept.bytes,
        xxh3=kept.xxh3,
        member=kept.member,
        codec=codec,
        dtype=array.dtype.name,
        shape=array.shape,
        axes=letters,
        voxels=voxel_digest(array, letters),
    )


def _counted_offsets(sample: StreamSample) -> tuple[dict[str, int], int]:
    """Place payloads as if every member had one plain header; give also where the last one ends."""
    offsets: dict[str, int] = {}
    at = sample.offset
    for name, payload in sample.members.items():
        offsets[name] = at + BLOCK
        at += BLOCK + payload.size + -payload.size % BLOCK
    return offsets, at


def _walked_offsets(sample: StreamSample, files: ShardFiles, rules: TarRules) -> dict[str, int]:
    """Place payloads by reading their headers again."""
    found = dict(_named_offsets(sample, files, rules))
    missing = [p.name for p in sample.members.values() if p.name not in found]
    if missing:
        raise ShardError(
            f"{sample.url}: member {missing[0]!r} of sample {sample.key!r} is not between bytes "
            f"{sample.offset} and {sample.stop} any more. The shard was changed: start again."
        )
    return {name: found[payload.name] for name, payload in sample.members.items()}


def _named_offsets(
    sample: StreamSample, files: ShardFiles, rules: TarRules
) -> Iterator[tuple[str, int]]:
    """Give name and payload offset of the files where a sample stands."""
    with closing(LocalTar(files.add(Path(sample.url)))) as tar:
        for entry in TarWalk(tar, walk_limits(rules), sample.offset, sample.stop):
            if entry.kind is FILE:
                yield entry.name, entry.payload_offset
