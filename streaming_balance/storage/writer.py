"""Packing samples into shards so that a crash at any moment leaves nothing that looks whole.

Shards are written under temporary names, synced, renamed; then the table; the manifest last. A
finished shard is noted in a journal, so that the same command run again goes on after it, and
ends with the very bytes an uninterrupted run would have written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage import folder as pack_folder
from streaming_balance.storage.admission import Names, PackedSamples
from streaming_balance.storage.durable import durable_file, sync_folder
from streaming_balance.storage.encoded import (
    EncodedArray,
    EncodedSample,
    PackedMember,
    encode_array,
    packed_members,
)
from streaming_balance.storage.journal import (
    FinishedShard,
    finished_shards,
    has_journal,
    journal_path,
    remove_journals,
    write_journal,
)
from streaming_balance.storage.labelling import Labelling
from streaming_balance.storage.layout import (
    ARRAY_FIELDS,
    MANIFEST_NAME,
    TABLE_NAME,
    codec_extension,
)
from streaming_balance.storage.manifest import (
    JSON,
    Manifest,
    Rejected,
    ShardEntry,
    SplitEntry,
    manifest_text,
    pack_id,
    read_manifest,
    settings_digest,
)
from streaming_balance.storage.rows import (
    SampleRow,
    arrow_table,
    content_digest,
    sorted_rows,
    table_schema,
)
from streaming_balance.storage.shard_file import ShardFile
from streaming_balance.storage.table_file import write_table

__all__ = ["EncodedArray", "EncodedSample", "PackWriter", "encode_array"]


class PackWriter:
    """Packs samples into a folder; a context manager that holds the folder's lock.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> image = encode_array(
        ...     "image", np.zeros((2, 2), dtype=np.uint8), axes="HW", codec="npy"
        ... )
        >>> sample = EncodedSample(
        ...     key="P1", patient="P1", label="LGG", split="train", columns={}, arrays=(image,),
        ...     details={},
        ... )
        >>> with tempfile.TemporaryDirectory() as folder, PackWriter(
        ...     Path(folder), classes=["LGG"], splits=["train"], train_splits=["train"],
        ...     codec="npy", columns=[], shard_bytes=1 << 28, settings={}, overwrite=False,
        ... ) as writer:
        ...     writer.add(sample)
        ...     writer.finish(found=1, rejected=[]).shards[0].name
        'train-000000.tar'
    """

    def __init__(
        self,
        out: Path,
        *,
        classes: Sequence[str],
        splits: Sequence[str],
        train_splits: Sequence[str],
        codec: str,
        columns: Sequence[str],
        shard_bytes: int,
        settings: Mapping[str, JSON],
        overwrite: bool,
        multi_label: bool = False,
    ) -> None:
        """Lock the folder and make it ready: what an interrupted pack left is kept or removed.

        Args:
            out: the folder, made if it is absent.
            classes: label names; the place is the class number.
            splits: split names, in the order their samples will come.
            train_splits: those of them that may be balanced.
            codec: `blosc` or `npy`, noted in the manifest.
            columns: names of the strata columns.
            shard_bytes: a shard is closed before it would grow beyond this.
            settings: what the packer was asked to do; equal settings resume an interrupted pack.
            overwrite: start from nothing even where a data set or an interrupted pack stands.
            multi_label: samples have sets of findings, each of them a class.

        Raises:
            ConfigError: a setting is wrong, the folder is being packed by another process, or it
                holds a data set already.
            ShardError: the folder cannot be written.
        """
        self._names = Names(
            labelling=Labelling(classes=tuple(classes), multi_label=multi_label),
            splits=tuple(splits),
            train_splits=tuple(train_splits),
            columns=tuple(columns),
        )
        codec_extension(codec)
        if shard_bytes < 1:
            raise ConfigError(f"shard_bytes is {shard_bytes}; use 1 or more, like 268435456")
        self._folder = Path(out)
        self._codec = codec
        self._shard_bytes = shard_bytes
        self._settings = dict(settings)
        self._settings_digest = settings_digest(settings)
        self._shards: list[ShardEntry] = []
        self._rows: list[SampleRow] = []
        self._packed = PackedSamples(splits)
        self._open_shard: ShardFile | None = None
        self._open_rows: list[SampleRow] = []
        pack_folder.make_folder(self._folder)
        self._lock = pack_folder.FolderLock(self._folder)
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            self._prepare(overwrite)
            undo.pop_all()
        self._finished_keys = {row.key for row in self._rows}

    @staticmethod
    def already_complete(out: Path, settings: Mapping[str, JSON]) -> Manifest | None:
        """Give the manifest of a complete pack made with equal settings, else None.

        Raises:
            ShardError: the folder's manifest, or a file it lists, is damaged; pack again with
                overwrite.
        """
        folder = Path(out)
        if not (folder / MANIFEST_NAME).exists():
            return None
        manifest = read_manifest(folder)
        if manifest.settings_digest != settings_digest(settings):
            return None
        sizes = {shard.name: shard.bytes for shard in manifest.shards}
        for name, expected in {**sizes, manifest.table.name: manifest.table.bytes}.items():
            path = folder / name
            size = path.stat().st_size if path.exists() else None
            if size != expected:
                raise ShardError(
                    f"{path} has {size} bytes, the manifest says {expected}: the data set is "
                    "damaged. Run the same pack command again with --overwrite"
                )
        pack_folder.remove_stale_lock(folder)
        remove_journals(folder)  # left by a packer that died after its manifest
        return manifest

    def finished_keys(self) -> set[str]:
        """Give the keys an interrupted pack has finished: these samples need no encoding again.

        Adding one of them all the same is checked against what was packed. A caller whose cohort
        no longer has one of them must start over with `overwrite`.
        """
        return set(self._finished_keys)

    def add(self, sample: EncodedSample) -> None:
        """Pack the next sample; samples come split after split, in the order of `splits`.

        Raises:
            ConfigError: the sample does not go with the settings, its key was packed before (P1
                and p1 count as the same), or it is not the one an interrupted pack packed.
            SplitError: its patient stands in another split already.
            ShardError: the disk is full or failing.
        """
        self._names.check_sample(sample)
        members = packed_members(sample, self._names.labelling)
        if sample.key in self._finished_keys:
            self._packed.check_unchanged(sample, members)
            return
        self._packed.check_new(sample)
        shard = self._shard_for(sample.split, members)
        row = SampleRow(
            key=sample.key,
            patient=sample.patient,
            label=sample.label,
            split=sample.split,
            shard=len(self._shards),
            members=shard.add(members),
            columns=dict(sample.columns),
        )
        self._open_rows.append(row)
        self._packed.add(row)

    def finish(self, *, found: int, rejected: Sequence[Rejected]) -> Manifest:
        """Write the table, then the manifest, which makes the folder a data set.

        Args:
            found: cases found in the source.
            rejected: those of them that were not packed.

        Returns:
            The manifest.

        Raises:
            ConfigError: no sample was added.
            ShardError: the disk is full or failing.
        """
        self._close_shard()
        if not self._rows:
            raise ConfigError(
                f"nothing to pack: {found} cases found, {len(rejected)} rejected, none left"
            )
        manifest = self._write_table(found, rejected)
        pack_folder.remove_stale_shards(self._folder, {shard.name for shard in self._shards})
        sync_folder(self._folder)
        with durable_file(self._folder / MANIFEST_NAME) as file:
            file.write(manifest_text(manifest).encode())
        # After the manifest: until it stands, they are what tells whose shards these are.
        remove_journals(self._folder)
        self._lock.release()
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open_shard is not None:
            self._open_shard.discard()
        self._lock.release()

    def _prepare(self, overwrite: bool) -> None:
        """Keep what an interrupted pack with these settings finished, remove its other traces."""
        if overwrite:
            pack_folder.remove_manifest(self._folder)
        elif (self._folder / MANIFEST_NAME).exists():
            raise ConfigError(self._refusal())
        else:
            pack_folder.refuse_foreign_shards(self._folder)
            self._refuse_other_packs()
        pack_folder.remove_leftovers(self._folder)
        finished = [] if overwrite else finished_shards(self._folder, self._settings_digest)
        pack_folder.remove_stale_files(self._folder, {shard.entry.name for shard in finished})
        kept = {journal_path(self._folder, shard.entry) for shard in finished}
        remove_journals(self._folder, kept)
        for shard in finished:
            self._shards.append(shard.entry)
            for row in shard.rows:
                self._rows.append(row)
                self._packed.add(row)

    def _refuse_other_packs(self) -> None:
        """Leave shards alone that no journal ties to this command."""
        is_ours = has_journal(self._folder, self._settings_digest)
        if pack_folder.holds_packed_files(self._folder) and not is_ours:
            raise ConfigError(
                f"{self._folder} holds shards of another or unfinished command, and no "
                f"{MANIFEST_NAME}; run that command again, use another folder, or --overwrite to "
                "replace them"
            )

    def _refusal(self) -> str:
        """Say why a folder with a data set is left alone."""
        manifest = read_manifest(self._folder)
        changed = sorted(
            name
            for name in manifest.settings.keys() | self._settings.keys()
            if manifest.settings.get(name) != self._settings.get(name)
        )
        made = f"with other settings ({', '.join(changed)})" if changed else "with these settings"
        return (
            f"{self._folder} holds a complete data set, packed {made}; use another folder, or "
            "--overwrite to replace it"
        )

    def _shard_for(self, split: str, members: Sequence[PackedMember]) -> ShardFile:
        """Give the shard the next sample goes to, closing the one before where it is full."""
        shard = self._open_shard
        if shard is not None and shard.split == split:
            fits = shard.size_with(members) <= self._shard_bytes
            if fits or shard.samples == 0:
                return shard
        self._close_shard()
        number = sum(entry.split == split for entry in self._shards)
        self._open_shard = ShardFile(self._folder, split, number)
        return self._open_shard

    def _close_shard(self) -> None:
        """End the open shard: journal first, then its final name."""
        if self._open_shard is None:
            return
        entry = self._open_shard.end()
        finished = FinishedShard(number=len(self._shards), entry=entry, rows=tuple(self._open_rows))
        write_journal(self._folder, finished, self._settings_digest)
        self._open_shard.publish()
        self._shards.append(entry)
        self._rows += self._open_rows
        self._open_rows = []
        self._open_shard = None

    def _write_table(self, found: int, rejected: Sequence[Rejected]) -> Manifest:
        """Sort and digest the rows, write the table, and say all of it in a manifest."""
        labelling = self._names.labelling
        labels = labelling.words(row.label for row in self._rows)
        rows = sorted_rows(self._rows, splits=self._names.splits, labels=labels)
        has_seg = any("seg" in row.members for row in rows)
        arrays = ARRAY_FIELDS if has_seg else ARRAY_FIELDS[:1]
        digest = content_digest(rows, labelling=labelling, columns=self._names.columns)
        identity = pack_id(digest, self._shards)
        table = arrow_table(
            rows,
            splits=self._names.splits,
            labels=labels,
            schema=table_schema(columns=self._names.columns, arrays=arrays, pack_id=identity),
            arrays=arrays,
            columns=self._names.columns,
        )
        entry = write_table(self._folder / TABLE_NAME, table)
        return Manifest(
            pack_id=identity,
            classes=labelling.classes,
            multi_label=labelling.multi_label,
            splits=split_entries(rows, self._names.splits),
            train_splits=self._names.train_splits,
            codec=self._codec,
            columns=self._names.columns,
            arrays=arrays,
            shards=tuple(self._shards),
            table=entry,
            digest=digest,
            settings=self._settings,
            settings_digest=self._settings_digest,
            rejected=tuple(rejected),
            found=found,
        )


def split_entries(rows: Sequence[SampleRow], splits: Sequence[str]) -> tuple[SplitEntry, ...]:
    """Count samples and patients of each split."""
    samples = Counter(row.split for row in rows)
    patients = Counter(split for split, _ in {(row.split, row.patient) for row in rows})
    return tuple(
        SplitEntry(name=split, samples=samples[split], patients=patients[split]) for split in splits
    )
