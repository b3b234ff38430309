"""What an interrupted pack has finished: a small file per finished shard, gone when it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streaming_balance.storage.durable import durable_file
from streaming_balance.storage.layout import FORMAT_VERSION, JOURNAL_PREFIX
from streaming_balance.storage.manifest import ShardEntry, json_checksum
from streaming_balance.storage.rows import ArrayRow, MemberRow, SampleRow


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedShard:
    """A shard that is whole, and the table rows of its samples."""

    number: int
    """Its place in the order of writing, over all splits: its number in the manifest."""
    entry: ShardEntry
    """What the manifest will say about it."""
    rows: tuple[SampleRow, ...]
    """Its samples, in the order of writing."""


def write_journal(folder: Path, finished: FinishedShard, settings_digest: str) -> None:
    """Note a shard as finished, before it gets its final name.

    Raises:
        ShardError: the disk is full or failing.
    """
    body: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "settings_digest": settings_digest,
        "number": finished.number,
        "entry": asdict(finished.entry),
        "rows": [asdict(row) for row in finished.rows],
    }
    body["checksum"] = json_checksum(body)
    with durable_file(journal_path(folder, finished.entry)) as file:
        file.write(json.dumps(body, separators=(",", ":")).encode())


def finished_shards(folder: Path, settings_digest: str) -> list[FinishedShard]:
    """Give the shards an interrupted pack with the same settings has finished.

    Only an unbroken run from the first shard counts: what follows a missing or damaged shard is
    packed again, so that the result is the one an uninterrupted pack gives.
    """
    found = {}
    for path in journal_files(folder):
        finished = _read_journal(path, settings_digest)
        if finished is not None:
            found[finished.number] = finished
    sound = []
    for number in range(len(found)):
        if number not in found or not _is_whole(folder, found[number].entry):
            break
        sound.append(found[number])
    return sound


def has_journal(folder: Path, settings_digest: str) -> bool:
    """Say whether a pack with these settings was interrupted here after it finished a shard."""
    return any(_read_journal(path, settings_digest) for path in journal_files(folder))


def remove_journals(folder: Path, kept: Collection[Path] = ()) -> None:
    """Remove the journals in a folder, all but those kept."""
    for path in journal_files(folder):
        if path not in kept:
            path.unlink(missing_ok=True)


def journal_path(folder: Path, entry: ShardEntry) -> Path:
    """Give the journal's file of a shard."""
    return folder / f"{JOURNAL_PREFIX}{entry.name.removesuffix('.tar')}.json"


def journal_files(folder: Path) -> Sequence[Path]:
    """Give the journals in a folder."""
    return sorted(folder.glob(f"{JOURNAL_PREFIX}*.json"))


def _read_journal(path: Path, settings_digest: str) -> FinishedShard | None:
    """Read one journal; None if it is damaged or of another pack command."""
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("checksum")
        if checksum != json_checksum(body):
            return None
        if (body["version"], body["settings_digest"]) != (FORMAT_VERSION, settings_digest):
            return None
        return FinishedShard(
            number=body["number"],
            entry=ShardEntry(**body["entry"]),
            rows=tuple(_row(row) for row in body["rows"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a pack starts over what its journal cannot prove


def _row(row: Mapping[str, Any]) -> SampleRow:
    """Build a row from its JSON."""
    return SampleRow(
        **{**row, "members": {name: _member(member) for name, member in row["members"].items()}}
    )


def _member(member: Mapping[str, Any]) -> MemberRow:
    """Build a member's part of a row from its JSON."""
    if "shape" in member:
        return ArrayRow(**{**member, "shape": tuple(member["shape"])})
    return MemberRow(**member)


def _is_whole(folder: Path, entry: ShardEntry) -> bool:
    """Say whether a shard's bytes are the ones its journal was written for."""
    try:
        with (folder / entry.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    except OSError:
        return False
