"""Building an index of foreign shards, sample by sample, as they pass."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.ingest.foreign_labels import LabelSource, Told
from streaming_balance.ingest.foreign_members import (
    HashedStream,
    array_row,
    is_array,
    member_row,
    payload_offsets,
)
from streaming_balance.ingest.index_folder import IndexFolder
from streaming_balance.ingest.index_rules import IndexRules, array_fields
from streaming_balance.ingest.index_writing import FoundSample, IndexedShard, IndexWriter
from streaming_balance.storage.elsewhere import foreign_path
from streaming_balance.storage.manifest import JSON, Manifest, Rejected
from streaming_balance.storage.rows import ArrayRow, NamedRow
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.samples import StreamSample

_MAX_FIELDS = 64  # each takes four columns of the table
_BYTES_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """What became of foreign shards."""

    found: int
    """Samples found in them."""
    indexed: int
    """Samples in the index."""
    rejected: tuple[Rejected, ...]
    """Samples left out, each with its reason; found = indexed + rejected."""
    digest: str
    """The data set's content digest."""
    manifest: Manifest
    """The index's manifest."""
    warnings: tuple[str, ...]
    """What the user should know."""
    is_new: bool
    """False if the complete index was there already and was left alone."""


class IndexBuilder:
    """Makes an index of shards while their samples pass; a context manager that holds the folder.

    The shards must be plain tars on local disk. They are never written to; until `finish` nothing
    is written but a lock.

    Args:
        out: folder for the index.
        rules: what is asked for; None: labels from `cls`, every key its own patient.
        overwrite: replace a complete index.

    Raises:
        ConfigError: a choice cannot be used, or the folder holds another data set.
        ShardError: the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> from streaming_balance.stream.tarstream import read_samples
        >>> with tempfile.TemporaryDirectory() as out, IndexBuilder(out) as builder:
        ...     for sample in read_samples("shards/demo/val-000000.tar"):
        ...         builder.add(sample)
        ...     builder.finish().indexed
        5
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        rules: IndexRules | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self._rules = IndexRules() if rules is None else rules
        self._labels = LabelSource(self._rules.label, self._rules.patient)
        if self._labels.has_splits and self._rules.split != "train":
            raise ConfigError(
                f"split is {self._rules.split!r}, and the table has a column 'split'; leave out "
                "one."
            )
        self._folder = IndexFolder(Path(out), overwrite=overwrite)
        self._tar_rules = self._rules.tar_rules()
        self._files = ShardFiles()
        self._names: dict[str, str] = {}
        self._shards: dict[str, IndexedShard] = {}
        self._found: dict[str, FoundSample] = {}
        self._fields: set[str] = set()

    def begin(self, shards: Iterable[str]) -> None:
        """List shards in this order, whatever the order their samples come in."""
        for path in shards:
            # Whoever reads a shard that is not there says so.
            if Path(path).exists():
                self._name_of(path)

    def add_shard(self, path: str | os.PathLike[str], *, num_bytes: int, sha256: str) -> None:
        """Take in size and SHA-256 of a shard whose bytes were read anyway.

        `finish` reads every shard that this was not called for, from end to end.
        """
        name = self._name_of(os.fspath(path))
        self._shards[name] = IndexedShard(
            path=Path(path), name=name, num_bytes=num_bytes, sha256=sha256
        )

    def add(self, sample: StreamSample) -> None:
        """Index a sample; one that comes again from the same place is the same sample.

        Args:
            sample: as it was read from its shard, no member added, changed or left out.

        Raises:
            ConfigError: its shard cannot be read at any place, or there are too many fields.
            ShardError: its key stands elsewhere already, or its shard was changed meanwhile.
        """
        if not sample.can_seek:
            raise ConfigError(
                f"{sample.url} cannot be indexed in place: only plain tars on local disk can be "
                "read at any place. Decompress or copy it first, or stream it without an index."
            )
        name = self._name_of(sample.url)
        key = self._key_of(sample, name)
        other = self._found.get(key)
        if other is not None:
            if (other.shard, other.offset) == (name, sample.offset):
                return
            way_out = (
                "where each shard counts from 0, use unique_keys='shard' (--unique-keys shard)."
            )
            if self._rules.unique_keys == "shard":
                way_out = "with unique_keys='shard', so must the names of shards. Rename one."
            raise ShardError(
                f"{sample.url}: the key {sample.key!r} stands at byte {sample.offset}, and at byte "
                f"{other.offset} of {other.shard}. Keys must differ: {way_out}"
            )
        offsets = payload_offsets(sample, self._files, self._tar_rules)
        self._found[key] = self._read(sample, key, name, offsets)
        self._check_fields(sample)

    def finish(self, *, rejected: Sequence[Rejected] = ()) -> IndexReport:
        """Write the table, then the manifest, which makes the folder a data set.

        Args:
            rejected: samples of the shards that were not given to `add`, each with its reason.

        Raises:
            ConfigError: labels or patients are missing, or a choice does not fit what was found.
            SplitError: a patient, or the same voxels, would stand in two splits.
            ShardError: nothing was found, a shard was changed, or the disk is full or failing.
        """
        found = list(self._found.values())
        if not found:
            raise ShardError(
                "nothing to index: no sample was found. Members need names such as P1.npy and "
                "P1.cls; `tar tf` lists what a tar holds."
            )
        roles = array_fields(self._rules, (tuple(sample.members) for sample in found))
        for shard in self._shards.values():
            shard.check_unchanged()
        writer = IndexWriter(self._rules, self._labels, roles)
        shards = [_hashed(shard) for shard in self._shards.values()]
        _refuse_equal(shards)
        manifest, warnings = writer.write(
            self._folder, found, shards, settings=self.settings(), rejected=rejected
        )
        return index_report(manifest, warnings, is_new=True)

    def settings(self) -> dict[str, JSON]:
        """List what decides the content of the index, the shards so far by place and size."""
        return index_settings(
            self._rules,
            self._labels,
            [(shard.name, shard.num_bytes) for shard in self._shards.values()],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; without `finish` it is as it was. May be called twice."""
        self._files.close()
        self._folder.release()

    def _name_of(self, url: str) -> str:
        """Give the name a shard has in the manifest, and take the shard in."""
        name = self._names.get(url)
        if name is None:
            path = Path(url)
            name = self._names[url] = foreign_path(self._folder.path, path)
            size = path.stat().st_size
            self._shards.setdefault(
                name, IndexedShard(path=path, name=name, num_bytes=size, sha256=None)
            )
        return name

    def _key_of(self, sample: StreamSample, name: str) -> str:
        """Give the key a sample has in the table."""
        if self._rules.unique_keys == "stream":
            return sample.key
        return f"{name.rpartition('/')[2].removesuffix('.tar')}/{sample.key}"

    def _read(
        self, sample: StreamSample, key: str, shard: str, offsets: Mapping[str, int]
    ) -> FoundSample:
        """Read every member of a sample once."""
        members: dict[str, NamedRow] = {}
        arrays: dict[str, ArrayRow | str] = {}
        texts: dict[str, bytes] = {}
        for field, payload in sample.members.items():
            stored = payload.read()
            members[field] = member_row(payload.name, stored, offsets[field])
            if is_array(field):
                arrays[field] = array_row(field, stored, members[field], self._rules.axes)
            elif field in ("cls", "json"):
                texts[field] = stored
        return FoundSample(
            key=key,
            shard=shard,
            offset=sample.offset,
            told=self._told(sample, key, texts),
            members=members,
            arrays=arrays,
        )

    def _told(self, sample: StreamSample, key: str, texts: Mapping[str, bytes]) -> Told:
        """Say label and patient of a sample."""
        try:
            return self._labels.tell(key, texts.get("cls"), texts.get("json"))
        except (ValueError, RecursionError) as error:
            raise ShardError(
                f"{sample.url}: sample {sample.key!r} at byte {sample.offset}: its label cannot be "
                f"read: {error}. Say where it is: label='json:FIELD' or 'csv:FILE'."
            ) from error

    def _check_fields(self, sample: StreamSample) -> None:
        """Refuse shards whose samples differ in their fields without end."""
        self._fields |= sample.members.keys()
        if len(self._fields) > _MAX_FIELDS:
            raise ConfigError(
                f"{sample.url}: sample {sample.key!r} brings the fields to over {_MAX_FIELDS}: "
                f"{', '.join(sorted(self._fields)[:5])}, ... Do keys hold dots? Then cut names at "
                "the last one: keys='last_dot' (--keys last_dot)."
            )


def index_settings(
    rules: IndexRules, labels: LabelSource, shards: Sequence[tuple[str, int]]
) -> dict[str, JSON]:
    """List what decides the content of an index.

    Args:
        rules: what was asked for.
        labels: where labels come from.
        shards: name in the manifest and size of every shard, in order.
    """
    return {**rules.settings, **labels.settings, "shards": [list(shard) for shard in shards]}


def index_report(manifest: Manifest, warnings: Sequence[str], *, is_new: bool) -> IndexReport:
    """Say what a finished index holds, and make sure that nothing vanished."""
    assert manifest.found == manifest.table.rows + len(manifest.rejected)
    return IndexReport(
        found=manifest.found,
        indexed=manifest.table.rows,
        rejected=manifest.rejected,
        digest=manifest.digest,
        manifest=manifest,
        warnings=tuple(warnings),
        is_new=is_new,
    )


def _refuse_equal(shards: Iterable[IndexedShard]) -> None:
    """Refuse a tar under two names: all of its samples would count twice, as different patients."""
    first: dict[str | None, IndexedShard] = {}
    for shard in shards:
        other = first.setdefault(shard.sha256, shard)
        if other is not shard:
            raise ShardError(
                f"{shard.path} and {other.path} are the same, byte for byte: every sample would "
                "count twice. Name one of them."
            )


def _hashed(shard: IndexedShard) -> IndexedShard:
    """Digest a shard that nobody digested yet."""
    if shard.sha256 is not None:
        return shard
    with shard.path.open("rb", buffering=0) as file:
        stream = HashedStream(file)
        while stream.read_some(_BYTES_HASHED_AT_ONCE):
            pass
        return shard.with_digest(stream.num_read, stream.sha256.hexdigest())
