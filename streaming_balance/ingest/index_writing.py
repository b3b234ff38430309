"""From samples found in foreign shards to the table and the manifest of an index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streaming_balance.errors import ConfigError, ShardError, did_you_mean
from streaming_balance.ingest.checks import natural_order
from streaming_balance.ingest.foreign_labels import LabelSource, Told
from streaming_balance.ingest.index_folder import IndexFolder
from streaming_balance.ingest.index_rules import IndexRules
from streaming_balance.ingest.leaks import EqualVoxels
from streaming_balance.plan.splits import check_patients_apart, order_splits
from streaming_balance.storage.admission import Names
from streaming_balance.storage.foreign import Foreign
from streaming_balance.storage.labelling import Labelling
from streaming_balance.storage.layout import ARRAY_FIELDS, MEMBER_FIELDS, TABLE_NAME
from streaming_balance.storage.manifest import (
    JSON,
    Manifest,
    Rejected,
    ShardEntry,
    pack_id,
    settings_digest,
)
from streaming_balance.storage.rows import (
    ArrayRow,
    NamedRow,
    SampleRow,
    arrow_table,
    content_digest,
    sorted_rows,
    table_schema,
)
from streaming_balance.storage.table_file import write_table
from streaming_balance.storage.writer import split_entries

_NAMES_SHOWN = 5
_TRAIN = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedShard:
    """A foreign shard."""

    path: Path
    """Where it is."""
    name: str
    """The same as the manifest says it."""
    num_bytes: int
    """Its size when it was first seen."""
    sha256: str | None
    """Its SHA-256; None while it is not known."""

    def check_unchanged(self) -> None:
        """Raise unless it still has its size.

        Raises:
            ShardError: it was changed, or is gone.
        """
        found = self.path.stat().st_size if self.path.exists() else None
        if found != self.num_bytes:
            raise ShardError(
                f"{self.path} had {self.num_bytes} bytes when it was read, now {found}: it was "
                "changed meanwhile. Index again when nobody writes to it."
            )

    def with_digest(self, num_bytes: int, sha256: str) -> IndexedShard:
        """Give it with its SHA-256, once it is known to have its size still."""
        shard = replace(self, sha256=sha256)
        if num_bytes != self.num_bytes:
            shard.check_unchanged()
        return shard


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSample:
    """A sample of a foreign shard."""

    key: str
    """Its key in the table."""
    shard: str
    """Its shard, as the manifest says it."""
    offset: int
    """Where its first header starts."""
    told: Told
    """What is known of it beside its members."""
    members: Mapping[str, NamedRow]
    """Its members by field."""
    arrays: Mapping[str, ArrayRow | str]
    """What those hold that are named like arrays, or why they are no image."""


class IndexWriter:
    """Writes the table and the manifest of an index.

    Args:
        rules: what was asked for.
        labels: where labels come from.
        roles: `image` or `seg`, by the fields that hold them.
    """

    def __init__(self, rules: IndexRules, labels: LabelSource, roles: Mapping[str, str]) -> None:
        self._rules = rules
        self._labels = labels
        self._roles = roles

    def write(
        self,
        folder: IndexFolder,
        found: Sequence[FoundSample],
        shards: Sequence[IndexedShard],
        *,
        settings: Mapping[str, JSON],
        rejected: Sequence[Rejected],
    ) -> tuple[Manifest, tuple[str, ...]]:
        """Write an index.

        Args:
            folder: where to.
            found: every sample.
            shards: every shard, digested.
            settings: what decides the content.
            rejected: samples left out before.

        Returns:
            The manifest, and what the user should know.
        """
        self._check_told(found)
        kept, refused = self._sorted_out(found)
        left_out = (*rejected, *refused)
        if not kept:
            reasons = "".join(f"\n  {one.path}: {one.reason}" for one in left_out[:_NAMES_SHOWN])
            raise ShardError(
                f"nothing indexed: all of {len(left_out)} samples were rejected. Where arrays are "
                f"no images, keep them as bytes: image='none' (--image none).{reasons}"
            )
        names = self._names(kept)
        entries = _entries(kept, shards, names.splits, self._split_of)
        numbers = {(entry.name, entry.split): number for number, entry in enumerate(entries)}
        rows = [self._row(sample, numbers) for sample in kept]
        check_patients_apart([row.patient for row in rows], [row.split for row in rows])
        equal = self._equal_voxels(rows)
        manifest = self._written(folder, rows, names, entries, settings, left_out)
        folder.end(manifest)
        return manifest, (*self._warnings(manifest), *equal)

    def _written(
        self,
        folder: IndexFolder,
        rows: Sequence[SampleRow],
        names: Names,
        entries: Sequence[ShardEntry],
        settings: Mapping[str, JSON],
        rejected: Sequence[Rejected],
    ) -> Manifest:
        """Write the table and give the manifest that goes with it."""
        rows = sorted_rows(rows, splits=names.splits, labels=names.classes)
        there = {field for row in rows for field in row.members}
        arrays = tuple(field for field in ARRAY_FIELDS if field in self._roles.values())
        kept = _ordered(there - set(arrays))
        digest = content_digest(rows, labelling=names.labelling, columns=names.columns)
        identity = pack_id(digest, entries)
        table = arrow_table(
            rows,
            splits=names.splits,
            labels=names.classes,
            schema=table_schema(columns=names.columns, arrays=arrays, pack_id=identity, kept=kept),
            arrays=arrays,
            columns=names.columns,
            kept=kept,
        )
        folder.begin()
        patient = self._labels.patient
        return Manifest(
            pack_id=identity,
            classes=names.classes,
            foreign=Foreign(
                keys=self._rules.keys, label=self._labels.label, patient=patient, members=kept
            ),
            splits=split_entries(rows, names.splits),
            train_splits=names.train_splits,
            codec="npy",
            columns=names.columns,
            arrays=arrays,
            shards=tuple(entries),
            table=write_table(folder.path / TABLE_NAME, table),
            digest=digest,
            settings=settings,
            settings_digest=settings_digest(settings),
            rejected=tuple(rejected),
            found=len(rows) + len(rejected),
        )

    def _check_told(self, found: Sequence[FoundSample]) -> None:
        """Refuse samples without a label, and without patient or split where others have them."""
        fields = Counter(field for sample in found for field in sample.members)
        there = ", ".join(name for name, _ in fields.most_common(_NAMES_SHOWN))
        ways = f"Labels come from 'cls', 'json:FIELD' or 'csv:FILE'; fields there: {there}."
        _refuse_missing("label", self._labels.label, found, [s.told.label for s in found], ways)
        if self._labels.patient is not None:
            patients = [sample.told.patient for sample in found]
            ways = "Leave patient out and every key counts as a patient of its own."
            _refuse_missing("patient", self._labels.patient, found, patients, ways)
        if self._labels.has_splits:
            splits = [sample.told.split for sample in found]
            _refuse_missing("split", "csv", found, splits, "Fill in the column 'split'.")

    def _sorted_out(self, found: Sequence[FoundSample]) -> tuple[list[FoundSample], list[Rejected]]:
        """Tell samples whose image and mask can be read from the others."""
        kept, refused = [], []
        for sample in found:
            reason = self._problem(sample)
            if reason is None:
                kept.append(sample)
            else:
                patient = sample.told.patient or sample.key
                path = f"{sample.shard}:{sample.key}"
                refused.append(Rejected(patient=patient, path=path, reason=reason))
        return kept, refused

    def _problem(self, sample: FoundSample) -> str | None:
        """Say why a sample has no image or mask that can be read, or None."""
        roles = Counter(role for field, role in self._roles.items() if field in sample.members)
        if "image" in self._roles.values() and not roles["image"]:
            wanted = " or ".join(f for f, role in self._roles.items() if role == "image")
            return f"has no {wanted}, only {', '.join(sorted(sample.members))}"
        if max(roles.values(), default=1) > 1:
            return f"has {roles.most_common(1)[0][0]} twice: as .npb and as .npy"
        for field in self._roles:
            problem = sample.arrays.get(field)
            if isinstance(problem, str):
                return f"member {sample.members[field].member!r} {problem}"
        return None

    def _names(self, kept: Sequence[FoundSample]) -> Names:
        """Put classes and splits in order."""
        labels = [str(sample.told.label) for sample in kept]
        splits = order_splits(self._split_of(sample) for sample in kept)
        for_training = self._rules.train_splits
        if for_training is None:
            for_training = tuple(name for name in splits if name.startswith(_TRAIN))
        return Names(
            labelling=Labelling(
                classes=_classes(labels, kept, self._rules.classes), multi_label=False
            ),
            splits=splits,
            train_splits=for_training,
            columns=self._labels.columns,
        )

    def _split_of(self, sample: FoundSample) -> str:
        """Give the split of a sample."""
        return sample.told.split if sample.told.split is not None else self._rules.split

    def _row(self, sample: FoundSample, numbers: Mapping[tuple[str, str], int]) -> SampleRow:
        """Give the table's row of a sample."""
        members: dict[str, NamedRow] = {}
        for field, kept in sample.members.items():
            role = self._roles.get(field)
            array = sample.arrays.get(field)
            if role is None:
                members[field] = kept
            elif isinstance(array, ArrayRow):
                members[role] = array
        split = self._split_of(sample)
        return SampleRow(
            key=sample.key,
            patient=sample.told.patient or sample.key,
            label=str(sample.told.label),
            split=split,
            shard=numbers[sample.shard, split],
            members=members,
            columns=sample.told.columns,
        )

    def _equal_voxels(self, rows: Sequence[SampleRow]) -> tuple[str, ...]:
        """Refuse equal images in two splits, and mention equal ones in one."""
        equal = EqualVoxels()
        for row in rows:
            image = row.members.get("image")
            if isinstance(image, ArrayRow):
                equal.add(image.voxels, key=row.key, patient=row.patient, split=row.split)
        more = len(equal.warnings) - _NAMES_SHOWN
        rest = (f"{more:,} more samples have identical voxels.",) if more > 0 else ()
        return (*equal.warnings[:_NAMES_SHOWN], *rest)

    def _warnings(self, manifest: Manifest) -> tuple[str, ...]:
        """Say what may be a surprise about an index."""
        notes = []
        if self._labels.patient is None:
            notes.append(
                "no patient was named: every key counts as a patient of its own, and one with "
                "several samples is not recognised, not even in two splits. Say "
                "patient='json:FIELD' (--patient), or give a table a column 'patient'."
            )
        kept = [name for name in manifest.kept_members or () if name not in MEMBER_FIELDS]
        if kept:
            notes.append(f"kept as bytes, for a transform to decode: {', '.join(kept)}.")
        if not manifest.train_splits:
            names = ", ".join(split.name for split in manifest.splits)
            notes.append(
                f"no split is for training ({names}): none may be balanced. Name one train..., or "
                "say which with train_splits (--train-splits)."
            )
        unused = self._labels.unused()
        if unused:
            notes.append(f"{len(unused):,} row(s) of the table name no sample: {_shown(unused)}.")
        return tuple(notes)


def _entries(
    kept: Sequence[FoundSample],
    shards: Sequence[IndexedShard],
    splits: Sequence[str],
    split_of: Callable[[FoundSample], str],
) -> list[ShardEntry]:
    """List the shards, each once for every split it has samples of."""
    counts = Counter((sample.shard, split_of(sample)) for sample in kept)
    return [
        ShardEntry(
            name=shard.name,
            split=split,
            bytes=shard.num_bytes,
            sha256=str(shard.sha256),
            samples=counts[shard.name, split],
        )
        for shard in shards
        for split in splits
        if counts[shard.name, split]
    ]


def _ordered(fields: Iterable[str]) -> tuple[str, ...]:
    """Put fields in their columns' order: those every data set has first, then by name."""
    places = {field: place for place, field in enumerate(MEMBER_FIELDS)}
    return tuple(sorted(fields, key=lambda field: (places.get(field, len(places)), field)))


def _classes(
    labels: Sequence[str], kept: Sequence[FoundSample], declared: Sequence[str] | None
) -> tuple[str, ...]:
    """Put the classes in order; the place of a class is its number for ever."""
    if declared is None:
        return natural_order(set(labels))
    for label in sorted(set(labels) - set(declared)):
        owners = [s.key for s, its in zip(kept, labels, strict=True) if its == label]
        raise ConfigError(
            f"label {label!r} of {len(owners)} sample(s) is not in classes {list(declared)}: "
            f"{_shown(owners)}. Add it to classes, or correct the label."
            + did_you_mean(label, declared)
        )
    return tuple(declared)


def _refuse_missing(
    what: str,
    source: str,
    found: Sequence[FoundSample],
    values: Sequence[str | None],
    way_out: str,
) -> None:
    """Raise if a value is missing, naming how often, where first, and the way out."""
    without = [sample for sample, value in zip(found, values, strict=True) if value is None]
    if without:
        first = without[0]
        raise ConfigError(
            f"{len(without):,} of {len(found):,} samples have no {what} ({source}): "
            f"{_shown([sample.key for sample in without])}, the first at byte {first.offset} of "
            f"{first.shard}. {way_out}"
        )


def _shown(names: Sequence[str]) -> str:
    """Write the first few names, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + more
