"""Checking every byte of a data set, and going on after a problem so that all are listed.

Opening a data set looks at sizes and at the table; reading compares what it reads with checksums.
Here everything is read: the SHA-256 of every file, the structure of every tar, every member against
its row of the table, the content of every array, and whether two splits share a content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from streaming_balance.errors import ShardError, SplitError
from streaming_balance.storage.descriptors import read_fully
from streaming_balance.storage.index import SampleTable
from streaming_balance.storage.layout import MANIFEST_NAME, is_shard_name
from streaming_balance.storage.manifest import Manifest, ShardEntry, read_manifest
from streaming_balance.storage.split_columns import ExpectedMember, SplitColumns
from streaming_balance.storage.tar import scan_tar

_BYTES_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    shard: str
    """File name in the data set's folder; of a foreign shard, its path as the manifest has it."""
    key: str | None
    """Key of the sample, where the problem is one sample's."""
    offset: int | None
    """Byte offset in the file, where there is one."""
    problem: str
    """What is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What checking every byte found."""

    ok: bool
    """Whether nothing is wrong."""
    problems: tuple[Problem, ...]
    """Everything that is wrong, file after file."""
    samples: int
    """Samples the manifest lists."""
    bytes: int
    """Bytes of the shards the manifest lists."""


def verify_shards(path: str | Path) -> VerifyReport:
    """Check every byte of a data set.

    Args:
        path: the data set's folder.

    Returns:
        All that is wrong. A manifest or a table that cannot be read is one of the problems; without
        the table the shards are still checked for their SHA-256 and structure.

    Examples:
        >>> report = verify_shards("/nowhere")
        >>> report.ok, report.problems[0].shard
        (False, 'manifest.json')
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except ShardError as error:
        problem = Problem(shard=MANIFEST_NAME, key=None, offset=None, problem=str(error))
        return VerifyReport(ok=False, problems=(problem,), samples=0, bytes=0)
    problems = tuple(_all_problems(folder, manifest))
    return VerifyReport(
        ok=not problems,
        problems=problems,
        samples=sum(split.samples for split in manifest.splits),
        bytes=sum(shard.bytes for shard in manifest.shards),
    )


def _all_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Check the table, every shard, and the splits against each other."""
    entry = manifest.table
    yield from _digest_problems(folder / entry.name, entry.name, entry.bytes, entry.sha256)
    columns: dict[str, SplitColumns] = {}
    try:
        table = SampleTable.open(folder / entry.name, manifest)
        table.check_all()
        columns = {
            split.name: SplitColumns(table, manifest, split.name) for split in manifest.splits
        }
    except (ShardError, SplitError) as error:
        yield Problem(shard=entry.name, key=None, offset=None, problem=str(error))
    is_foreign = manifest.foreign is not None
    digested: set[str] = set()
    for number, shard in enumerate(manifest.shards):
        if shard.name not in digested:
            place = folder / shard.name
            yield from _digest_problems(place, shard.name, shard.bytes, shard.sha256)
            digested.add(shard.name)
        yield from _shard_problems(
            folder, shard, number, columns.get(shard.split), is_foreign=is_foreign
        )
    if not is_foreign:
        yield from _unlisted_shards(folder, manifest)
    yield from _twins(columns, manifest)


def _shard_problems(
    folder: Path,
    shard: ShardEntry,
    number: int,
    columns: SplitColumns | None,
    *,
    is_foreign: bool,
) -> Iterator[Problem]:
    """Check one shard: its structure as a tar, and every member."""
    path = folder / shard.name
    if not path.is_file():
        return
    members = None if columns is None else columns.members_of(number)
    # Others write tars in many ways; that theirs are as they were is what the SHA-256 says.
    if not is_foreign:
        yield from _structure_problems(path, members)
    if columns is None or members is None:
        return
    with path.open("rb", buffering=0) as file:
        for member in members:
            problem = _payload_problem(file, member, columns)
            if problem:
                yield Problem(
                    shard=shard.name,
                    key=member.key,
                    offset=member.offset,
                    problem=f"{member.name}: {problem}",
                )


def _digest_problems(path: Path, name: str, expected_bytes: int, sha256: str) -> Iterator[Problem]:
    """Compare a file's size and SHA-256 with the manifest's."""

    def problem(text: str, offset: int | None = None) -> Problem:
        return Problem(shard=name, key=None, offset=offset, problem=text)

    try:
        size = path.stat().st_size
        if size == 0 and expected_bytes:
            yield problem(f"empty file, the manifest says {expected_bytes} bytes", 0)
        elif size != expected_bytes:
            text = f"size {size}, the manifest says {expected_bytes}"
            yield problem(text, min(size, expected_bytes))
        elif (found := _sha256(path)) != sha256:
            yield problem(f"SHA-256 is {found}, the manifest says {sha256}")
    except FileNotFoundError:
        yield problem("the file is missing")
    except OSError as error:
        yield problem(f"the file cannot be read: {error.strerror}")


def _structure_problems(path: Path, members: list[ExpectedMember] | None) -> Iterator[Problem]:
    """Walk the tar strictly and compare names, offsets and sizes with the table's rows."""
    rest = {member.name: member for member in members or []}
    end = 0
    try:
        for found in scan_tar(path):
            end = found.payload_offset + found.size
            if members is None:
                continue
            expected = rest.pop(found.name, None)
            text = None
            if expected is None:
                text = f"unknown member {found.name!r}: the table has no row for it"
            elif (found.payload_offset, found.size) != (expected.offset, expected.bytes):
                text = (
                    f"{found.name} has {found.size} bytes at byte {found.payload_offset}, the "
                    f"table says {expected.bytes} at byte {expected.offset}"
                )
            if text:
                key = None if expected is None else expected.key
                yield Problem(shard=path.name, key=key, offset=found.payload_offset, problem=text)
    except ShardError as error:
        # What follows a broken header cannot be found from the tar, only from the table.
        yield Problem(shard=path.name, key=None, offset=end, problem=str(error))
        return
    for missing in rest.values():
        yield Problem(
            shard=path.name,
            key=missing.key,
            offset=missing.offset,
            problem=f"{missing.name} is missing, or is there twice",
        )


def _payload_problem(file: BinaryIO, member: ExpectedMember, columns: SplitColumns) -> str | None:
    """Read one member where the table says it lies, and compare it with its row."""
    end = os.fstat(file.fileno()).st_size
    if member.offset + member.bytes > end:
        return f"ends at byte {member.offset + member.bytes}, the file at byte {end}"
    payload = bytearray(member.bytes)
    try:
        read_fully(file.fileno(), [memoryview(payload)], member.offset)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    found = xxhash.xxh3_64_intdigest(payload)
    if found != member.checksum:
        return f"xxh3-64 is {found:016x}, the table says {member.checksum:016x}"
    return columns.content_problem(member, payload)


def _unlisted_shards(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Find shards the manifest does not list: other tools would read them along."""
    listed = {shard.name for shard in manifest.shards}
    for name in sorted(path.name for path in folder.iterdir()):
        if is_shard_name(name) and name not in listed:
            yield Problem(
                shard=name, key=None, offset=None, problem="the manifest lists no such shard"
            )


def _twins(columns: Mapping[str, SplitColumns], manifest: Manifest) -> Iterator[Problem]:
    """Find images with the same voxels in two splits."""
    if not columns or "image" not in manifest.arrays:
        return
    parts = list(columns.values())
    voxels = np.concatenate([part.formats["image"].voxels for part in parts])
    split_of = np.repeat(np.arange(len(parts)), [len(part.keys) for part in parts])
    row_of = np.concatenate([np.arange(len(part.keys)) for part in parts])
    order = np.argsort(voxels, kind="stable")
    equal = voxels[order][1:] == voxels[order][:-1]
    # Equal voxels stand side by side, by ascending split: a change of split within them is a leak.
    leaks = np.flatnonzero(equal & (split_of[order][1:] != split_of[order][:-1]))
    for place in leaks.tolist():
        first, second = int(order[place]), int(order[place + 1])
        one, other = parts[split_of[first]], parts[split_of[second]]
        places = other.places["image"]
        yield Problem(
            shard=manifest.shards[int(places.shard[row_of[second]])].name,
            key=str(other.keys[row_of[second]]),
            offset=int(places.offset[row_of[second]]),
            problem=(
                f"the image has the same voxels as sample '{one.keys[row_of[first]]}' of patient "
                f"'{one.patients[row_of[first]]}' in split {one.split!r}"
            ),
        )


def _sha256(path: Path) -> str:
    """Digest a file piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_BYTES_HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()
