"""One shard being written: members appended, digested as they go, published when whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from streaming_balance.storage.durable import DurableFile
from streaming_balance.storage.encoded import PackedMember
from streaming_balance.storage.layout import BLOCK, shard_name
from streaming_balance.storage.manifest import ShardEntry
from streaming_balance.storage.rows import MemberRow
from streaming_balance.storage.tar import END_OF_TAR, member_header, padding


class ShardFile:
    """A shard under its temporary name."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.samples = 0
        """Samples written so far."""
        self.split = split
        """The split all of its samples belong to."""
        self._name = shard_name(split, number)
        self._file = DurableFile(folder / self._name)
        self._sha256 = hashlib.sha256()

    def size_with(self, members: Sequence[PackedMember]) -> int:
        """Say how large the finished shard would be with these members in it."""
        added = sum(
            BLOCK + len(member.payload) + -len(member.payload) % BLOCK for member in members
        )
        return self._file.size + added + len(END_OF_TAR)

    def add(self, members: Sequence[PackedMember]) -> Mapping[str, MemberRow]:
        """Append a sample and say where its members lie.

        Raises:
            ShardError: the disk is full or failing, or a name does not fit a header.
        """
        rows: dict[str, MemberRow] = {}
        parts: list[bytes] = []
        offset = self._file.size
        for member in members:
            size = len(member.payload)
            parts += [member_header(member.name, size), member.payload, padding(size)]
            rows[member.field] = member.row(offset + BLOCK)
            offset += BLOCK + size + -size % BLOCK
        self._append(b"".join(parts))
        self.samples += 1
        return rows

    def end(self) -> ShardEntry:
        """Write the end of the tar and say what the manifest will say about the shard.

        Raises:
            ShardError: the disk is full or failing.
        """
        self._append(END_OF_TAR)
        return ShardEntry(
            name=self._name,
            split=self.split,
            bytes=self._file.size,
            sha256=self._sha256.hexdigest(),
            samples=self.samples,
        )

    def publish(self) -> None:
        """Give the shard its final name, synced.

        Raises:
            ShardError: the disk is failing.
        """
        self._file.publish()

    def discard(self) -> None:
        """Remove the shard unless it is published."""
        self._file.discard()

    def _append(self, content: bytes) -> None:
        """Write and digest."""
        self._file.write(content)
        self._sha256.update(content)
