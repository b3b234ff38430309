"""The manifest: the small JSON file that makes a folder of shards a data set.

It is written last. A folder without one is an unfinished pack, whatever else lies in it. Every
byte of it is covered by its own checksum, and it holds the sizes and digests of everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.foreign import (
    Foreign,
    check_foreign_names,
    check_foreign_shards,
    read_foreign,
)
from streaming_balance.storage.json_values import count_of, text_of, texts_of
from streaming_balance.storage.labelling import Labelling
from streaming_balance.storage.layout import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    NEEDS_VERSION,
    belongs_to_a_pack,
)

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

_MAX_MANIFEST_BYTES = 256 << 20  # a million shards need 150 MB; more is no manifest
_REBUILD = (
    "Rebuild the data set: run its pack command again with --overwrite. "
    "`streaming-balance verify {folder}` lists everything that is wrong."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitEntry:
    """What the manifest says about a split."""

    name: str
    """The split's name."""
    samples: int
    """Its samples; 0 where none of the cohort fell into it."""
    patients: int
    """Its patients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """What the manifest says about a shard."""

    name: str
    """File name in the data set's folder; of a foreign shard, its path: from there, or absolute."""
    split: str
    """The split its samples belong to; a foreign shard of several is listed once for each."""
    bytes: int
    """File size."""
    sha256: str
    """SHA-256 of the file, 64 hex digits."""
    samples: int
    """Samples in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """What the manifest says about the sample table."""

    name: str
    """File name in the data set's folder."""
    bytes: int
    """File size."""
    rows: int
    """Samples of all splits."""
    sha256: str
    """SHA-256 of the file, 64 hex digits."""
    block_rows: int
    """Rows per record batch; the last may hold fewer."""
    block_ends: tuple[int, ...]
    """Where each block ends in the file; the first starts at 0, the last ends with the file."""
    block_xxh3: tuple[str, ...]
    """xxh3-64 of each block's bytes, 16 hex digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A case the packer found and did not pack."""

    patient: str
    """The patient's id."""
    path: str
    """The file at fault, relative to the source."""
    reason: str
    """Why it was left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All a data set says about itself outside its shards and table."""

    pack_id: str
    """Ties manifest and table: of shard names, sizes, SHA-256 and the content digest."""
    classes: tuple[str, ...]
    """Label names in class order: the place is the class number, for ever."""
    multi_label: bool = False
    """Whether a sample has a set of findings, each of them a class; written only where true."""
    foreign: Foreign | None = None
    """How its shards are read if others wrote them; written only then."""
    splits: tuple[SplitEntry, ...]
    """The splits, in the order of the table's rows."""
    train_splits: tuple[str, ...]
    """Splits that may be balanced; all others are for evaluation."""
    codec: str
    """Codec new members are written with: `blosc` or `npy`."""
    columns: tuple[str, ...]
    """Names of the strata columns."""
    arrays: tuple[str, ...]
    """Array members: `image`, or `image` and `seg`."""
    shards: tuple[ShardEntry, ...]
    """The shards; the place is the shard number in the table."""
    table: TableEntry
    """The sample table."""
    digest: str
    """Content digest: the same whatever codec, shard size or order of packing."""
    settings: Mapping[str, JSON]
    """What the packer was asked to do."""
    settings_digest: str
    """Digest of `settings`: an equal one means the same pack command."""
    rejected: tuple[Rejected, ...]
    """Cases found and not packed."""
    found: int
    """Cases found; packed plus rejected."""

    @property
    def labelling(self) -> Labelling:
        """How labels are written."""
        return Labelling(classes=self.classes, multi_label=self.multi_label)

    @property
    def kept_members(self) -> tuple[str, ...] | None:
        """Fields of foreign shards that are kept as bytes; None where the shards are our own."""
        return None if self.foreign is None else self.foreign.members


def settings_digest(settings: Mapping[str, JSON]) -> str:
    """Digest the settings of a pack, whatever the order of their names.

    Returns:
        32 hex digits.

    Raises:
        ConfigError: a value that JSON cannot hold.

    Examples:
        >>> settings_digest({"a": 1, "b": 2}) == settings_digest({"b": 2, "a": 1})
        True
    """
    try:
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pack settings must be plain JSON values: {error}") from error
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def pack_id(digest: str, shards: Sequence[ShardEntry]) -> str:
    """Name one pack: the content digest and every shard's name, size and SHA-256.

    Returns:
        32 hex digits.
    """
    listed = [digest, [[shard.name, shard.bytes, shard.sha256] for shard in shards]]
    text = json.dumps(listed, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def manifest_text(manifest: Manifest) -> str:
    """Write a manifest as JSON: the same manifest gives the same text."""
    body: dict[str, Any] = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "needs": NEEDS_VERSION,
        **asdict(manifest),
        "splits": {
            split.name: {"samples": split.samples, "patients": split.patients}
            for split in manifest.splits
        },
    }
    if not manifest.multi_label:
        del body["multi_label"]
    if manifest.foreign is None:
        del body["foreign"]
    body["settings"] = json.loads(json.dumps(dict(manifest.settings), sort_keys=True))
    body["checksum"] = json_checksum(body)
    return json.dumps(body, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a data set.

    Args:
        folder: the data set's folder.

    Returns:
        The manifest, every field of the right type and its checksum right.

    Raises:
        ShardError: there is none (an unfinished pack, or no data set), it is damaged, or it was
            written by a newer release.
    """
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            stored = file.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise ShardError(_missing(folder)) from error
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error
    if len(stored) > _MAX_MANIFEST_BYTES:
        raise ShardError(f"{path} has more than {_MAX_MANIFEST_BYTES:,} bytes: no manifest")
    return parse_manifest(stored, path)


def parse_manifest(stored: bytes, path: Path) -> Manifest:
    """Check a manifest's bytes and give what they say.

    Args:
        stored: the file's bytes.
        path: where they come from, for messages.

    Returns:
        The manifest.

    Raises:
        ShardError: damaged, of another format, or written by a newer release.
    """
    way_out = _REBUILD.format(folder=path.parent)
    try:
        body = json.loads(stored.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is damaged, not whole JSON ({error}). {way_out}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT_NAME:
        raise ShardError(f"{path} is not a {FORMAT_NAME} manifest. {way_out}")
    if body.get("version") != FORMAT_VERSION:
        raise ShardError(_other_version(path, body))
    checksum = body.pop("checksum", None)
    if checksum != json_checksum(body):
        raise ShardError(
            f"{path} is damaged: its checksum is {checksum!r}, its content gives "
            f"{json_checksum(body)!r}. {way_out}"
        )
    try:
        return _manifest_from(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{path} does not follow the format: {error}. {way_out}") from error


def _missing(folder: Path) -> str:
    """Say what a folder without a manifest is."""
    if not folder.is_dir():
        return f"{folder} is not a folder; give the folder that holds {MANIFEST_NAME}"
    if any(belongs_to_a_pack(file.name) for file in folder.iterdir()):
        return (
            f"{folder} has no {MANIFEST_NAME}: an unfinished pack. Run the same pack command "
            "again: it goes on where it stopped. (If it was complete and lost its manifest, add "
            "--overwrite.)"
        )
    return (
        f"{folder} is not a data set: it has neither {MANIFEST_NAME} nor shards. "
        "Make one with `streaming-balance pack SOURCE --out DIR`."
    )


def _other_version(path: Path, body: Mapping[str, Any]) -> str:
    """Say which release reads a manifest of another version."""
    return (
        f"{path} has format version {body.get('version')!r}, this release reads "
        f"{FORMAT_VERSION}: it needs streaming-balance >= {body.get('needs', 'a newer one')}. "
        "Upgrade with `pip install -U streaming-balance`."
    )


def json_checksum(body: Mapping[str, Any]) -> str:
    """Digest a JSON document in the order it stands, so that any changed byte shows."""
    text = json.dumps(body, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _manifest_from(body: Mapping[str, Any]) -> Manifest:
    """Build the manifest, checking the type of every field and that none is unknown."""
    known = {"format", "version", "needs", *Manifest.__dataclass_fields__}
    if body.keys() | {"multi_label", "foreign"} != known:
        wrong = (body.keys() ^ known) - {"multi_label", "foreign"}
        raise ValueError(f"unknown or missing names: {sorted(wrong)}")
    if body.get("multi_label", True) is not True:
        raise ValueError(f"multi_label is {body['multi_label']!r}; it is true or not there")
    manifest = Manifest(
        pack_id=text_of(body["pack_id"]),
        classes=texts_of(body["classes"]),
        multi_label="multi_label" in body,
        foreign=read_foreign(body["foreign"]) if "foreign" in body else None,
        splits=tuple(_split(name, entry) for name, entry in body["splits"].items()),
        train_splits=texts_of(body["train_splits"]),
        codec=text_of(body["codec"]),
        columns=texts_of(body["columns"]),
        arrays=texts_of(body["arrays"]),
        shards=tuple(_shard(entry) for entry in body["shards"]),
        table=_table(body["table"]),
        digest=text_of(body["digest"]),
        settings=dict(body["settings"]),
        settings_digest=text_of(body["settings_digest"]),
        rejected=tuple(
            Rejected(**{name: text_of(value) for name, value in entry.items()})
            for entry in body["rejected"]
        ),
        found=count_of(body["found"]),
    )
    _check_consistency(manifest)
    return manifest


def _check_consistency(manifest: Manifest) -> None:
    """Check what several fields say about each other."""
    # Refuses class names that could not be told apart once joined.
    Labelling(classes=manifest.classes, multi_label=manifest.multi_label)
    splits = {split.name for split in manifest.splits}
    rows = sum(split.samples for split in manifest.splits)
    if rows != manifest.table.rows or rows != sum(shard.samples for shard in manifest.shards):
        raise ValueError("splits, shards and table count different numbers of samples")
    if rows == 0:
        raise ValueError("there are no samples")
    if not {shard.split for shard in manifest.shards} <= splits:
        raise ValueError("a shard belongs to a split that is not listed")
    if not set(manifest.train_splits) <= splits:
        raise ValueError("train_splits names a split that is not listed")
    names = [manifest.table.name]
    if manifest.foreign is None:
        names += [shard.name for shard in manifest.shards]
    else:
        check_foreign_names((*manifest.arrays, *manifest.foreign.members), manifest.multi_label)
        check_foreign_shards(manifest.shards)
    if len(set(names[1:])) < len(names) - 1:
        raise ValueError("a shard is listed twice")
    for name in names:
        if "/" in name or name in {"", ".", ".."}:
            raise ValueError(f"file name {name!r} leads out of the folder")


def _split(name: str, entry: Mapping[str, Any]) -> SplitEntry:
    """Read one split's entry."""
    return SplitEntry(
        name=name, samples=count_of(entry["samples"]), patients=count_of(entry["patients"])
    )


def _shard(entry: Mapping[str, Any]) -> ShardEntry:
    """Read one shard's entry."""
    return ShardEntry(
        name=text_of(entry["name"]),
        split=text_of(entry["split"]),
        bytes=count_of(entry["bytes"]),
        sha256=text_of(entry["sha256"]),
        samples=count_of(entry["samples"]),
    )


def _table(entry: Mapping[str, Any]) -> TableEntry:
    """Read the table's entry."""
    table = TableEntry(
        name=text_of(entry["name"]),
        bytes=count_of(entry["bytes"]),
        rows=count_of(entry["rows"]),
        sha256=text_of(entry["sha256"]),
        block_rows=count_of(entry["block_rows"]),
        block_ends=tuple(count_of(end) for end in entry["block_ends"]),
        block_xxh3=texts_of(entry["block_xxh3"]),
    )
    ends = table.block_ends
    if table.block_rows < 1 or len(ends) != -(-table.rows // table.block_rows):
        raise ValueError(f"{table.rows} rows do not make {len(ends)} blocks")
    if len(ends) != len(table.block_xxh3) or sorted(set(ends)) != list(ends):
        raise ValueError("the table's blocks do not follow each other")
    if ends and ends[-1] != table.bytes:
        raise ValueError("the table's blocks do not end with the file")
    return table
