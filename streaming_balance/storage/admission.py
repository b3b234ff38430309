"""Which samples a pack takes: names that fit, keys and patients that clash with no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streaming_balance.errors import ConfigError, SplitError, did_you_mean
from streaming_balance.storage.encoded import EncodedSample, PackedMember
from streaming_balance.storage.labelling import Labelling, join_findings, split_findings
from streaming_balance.storage.layout import ARRAY_FIELDS, check_split_name
from streaming_balance.storage.rows import SampleRow

_TABLE_COLUMNS = ("key", "patient", "label", "split", "shard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The names a pack is made with, none of them twice."""

    labelling: Labelling
    """Label names in class order, and whether samples have sets of them."""
    splits: tuple[str, ...]
    """Split names, in the order their samples come."""
    train_splits: tuple[str, ...]
    """Those of them that may be balanced."""
    columns: tuple[str, ...]
    """Names of the strata columns."""

    def __post_init__(self) -> None:
        for what in ("classes", "splits", "columns"):
            names = self.classes if what == "classes" else getattr(self, what)
            if len(set(names)) != len(names) or "" in names:
                raise ConfigError(f"{what} are {list(names)}: each must be named once, none empty")
        if not self.classes or not self.splits:
            raise ConfigError("packing needs at least one class and one split")
        for split in self.splits:
            check_split_name(split)
        if not set(self.train_splits) <= set(self.splits):
            raise ConfigError(
                f"train_splits {list(self.train_splits)} are not all among {list(self.splits)}"
            )
        clash = [name for name in self.columns if name in _TABLE_COLUMNS or "." in name]
        if clash:
            raise ConfigError(
                f"columns {clash} clash with the sample table's own; names may not hold dots or "
                f"be one of {', '.join(_TABLE_COLUMNS)}"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Label names; the place is the class number."""
        return self.labelling.classes

    def check_sample(self, sample: EncodedSample) -> None:
        """Refuse a sample that does not go with the settings.

        Raises:
            ConfigError: an unknown label or split, findings out of order, other columns, or no
                image.
        """
        labels = split_findings(sample.label) if self.labelling.multi_label else (sample.label,)
        for what, value, known in (
            *(("label", label, self.classes) for label in labels),
            ("split", sample.split, self.splits),
        ):
            if value not in known:
                raise ConfigError(
                    f"sample {sample.key!r} has {what} {value!r}; known: {', '.join(known)}."
                    + did_you_mean(value, known)
                )
        in_order = join_findings(labels, self.classes)
        if self.labelling.multi_label and sample.label != in_order:
            raise ConfigError(
                f"sample {sample.key!r} has label {sample.label!r}; write its findings in class "
                f"order, each once: {in_order!r}"
            )
        if sample.columns.keys() != set(self.columns):
            raise ConfigError(
                f"sample {sample.key!r} has columns {sorted(sample.columns)}, expected "
                f"{sorted(self.columns)}"
            )
        fields = tuple(array.field for array in sample.arrays)
        if fields not in (ARRAY_FIELDS, ARRAY_FIELDS[:1]):
            raise ConfigError(f"sample {sample.key!r} has arrays {fields}; image, then seg or none")


class PackedSamples:
    """What was packed so far, to find a sample's twin and its patient's split."""

    def __init__(self, splits: Sequence[str]) -> None:
        self._splits = tuple(splits)
        self._last_split = self._splits[0]
        # Folded, because some file systems and tools take P1 and p1 for the same name.
        self._row_of_folded_key: dict[str, SampleRow] = {}
        self._split_of_patient: dict[str, str] = {}

    def add(self, row: SampleRow) -> None:
        """Take note of a packed sample."""
        self._row_of_folded_key[row.key.lower()] = row
        self._split_of_patient[row.patient] = row.split
        self._last_split = row.split

    def check_new(self, sample: EncodedSample) -> None:
        """Refuse a key or patient that stands elsewhere, and a split that is over.

        Raises:
            ConfigError: the key, or one that differs in case only, is packed already; or another
                split was begun since.
            SplitError: the patient stands in another split.
        """
        twin = self._row_of_folded_key.get(sample.key.lower())
        if twin is not None:
            raise ConfigError(
                f"key {sample.key!r} of patient {sample.patient!r} (split {sample.split!r}) is "
                f"packed already: as {twin.key!r} of patient {twin.patient!r} (split "
                f"{twin.split!r}). Keys must differ in more than case; rename one"
            )
        split = self._split_of_patient.get(sample.patient, sample.split)
        if split != sample.split:
            raise SplitError(
                f"patient {sample.patient!r} stands in splits {split!r} and {sample.split!r}; a "
                "patient belongs to one split"
            )
        if self._splits.index(sample.split) < self._splits.index(self._last_split):
            raise ConfigError(
                f"sample {sample.key!r} of split {sample.split!r} comes after split "
                f"{self._last_split!r} was begun; give samples split after split. If an "
                "interrupted pack of a smaller source stands here, run again with --overwrite"
            )

    def check_unchanged(self, sample: EncodedSample, members: Sequence[PackedMember]) -> None:
        """Refuse a sample that is not the one an interrupted pack has packed.

        Raises:
            ConfigError: any of its bytes, or of what is said about it, differs.
        """
        row = self._row_of_folded_key[sample.key.lower()]
        now = {member.field: (member.xxh3, len(member.payload)) for member in members}
        then = {field: (member.xxh3, member.bytes) for field, member in row.members.items()}
        told = (sample.patient, sample.label, sample.split, dict(sample.columns), now)
        if told != (row.patient, row.label, row.split, dict(row.columns), then):
            raise ConfigError(
                f"sample {sample.key!r} changed since the pack was interrupted; "
                "run the same command with --overwrite to start over"
            )
