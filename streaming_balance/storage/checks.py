"""What must hold for the rows of a sample table, checked a column at a time.

The table may come from anyone: no offset, size, shape or code is used before it went through
here, so nothing is ever read or allocated on the word of a damaged or crafted row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ShardError, SplitError
from streaming_balance.storage.layout import AXES, BLOCK, CODEC_EXTENSIONS
from streaming_balance.storage.manifest import Manifest
from streaming_balance.storage.npy import DTYPE_NAMES
from streaming_balance.storage.rows import table_members

_END_BYTES = 2 * BLOCK  # the two zero blocks that end a tar
_MAX_HEADER_BYTES = 10_012  # the longest .npy header that is read, with its prefix
_MAX_EXPANSION = 255  # LZ4 makes at most 255 bytes of one
_WORDS = {"codec": set(CODEC_EXTENSIONS), "dtype": set(DTYPE_NAMES), "axes": set(AXES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One record batch of the table."""

    first_row: int
    """Number of its first row in the table."""
    batch: pa.RecordBatch
    """Its rows."""

    def numbers(self, name: str) -> NDArray[Any]:
        """Give a numeric column, 0 where it is null; no copy where nothing is."""
        column = self.batch.column(name)
        filled = column.fill_null(0) if column.null_count else column
        return np.asarray(filled.to_numpy(zero_copy_only=True))

    def codes(self, name: str) -> NDArray[Any]:
        """Give a dictionary column's numbers, -1 where it is null."""
        indices = self.batch.column(name).indices
        filled = indices.fill_null(-1) if indices.null_count else indices
        return np.asarray(filled.to_numpy(zero_copy_only=True))

    def words(self, name: str) -> list[str]:
        """Give a dictionary column's words: the number is the place."""
        return list(self.batch.column(name).dictionary.to_pylist())

    def present(self, member: str) -> NDArray[np.bool_]:
        """Say for each row whether the sample has this member."""
        return np.asarray(
            self.batch.column(f"{member}.offset").is_valid().to_numpy(zero_copy_only=False)
        )

    def shapes(self, member: str) -> NDArray[np.int32]:
        """Give `(rows, 4)` sides of an array member, unused places 0."""
        column = self.batch.column(f"{member}.shape")
        lengths = np.asarray(pc.list_value_length(column).fill_null(0), dtype=np.int64)
        sides = np.zeros((len(lengths), 4), dtype=np.int32)
        sides[np.arange(4) < lengths[:, None]] = np.asarray(column.flatten())
        return sides


def check_block(block: Block, manifest: Manifest) -> None:
    """Check all that can be said of a block's rows alone.

    Raises:
        ShardError: a row that cannot be, named by its key.
    """
    _check_arrow(block)
    _check_order(block)
    _check_shards(block, manifest)
    for member in table_members(manifest.arrays, manifest.kept_members):
        _check_place(block, member, manifest)
        if member in manifest.arrays:
            _check_array(block, member)


def check_overlaps(blocks: Sequence[Block], manifest: Manifest) -> None:
    """Check that no two members share a byte, headers and padding included.

    Raises:
        ShardError: two members of one shard overlap.
    """
    shards, starts, stops, rows = [], [], [], []
    for block in blocks:
        for member in table_members(manifest.arrays, manifest.kept_members):
            present = np.flatnonzero(block.present(member))
            offsets = block.numbers(f"{member}.offset")[present]
            sizes = block.numbers(f"{member}.bytes")[present]
            shards.append(block.numbers("shard")[present])
            starts.append(offsets - BLOCK)
            stops.append(offsets + sizes + (-sizes % BLOCK))
            rows.append(present + block.first_row)
    shard, start, stop, row = map(np.concatenate, (shards, starts, stops, rows))
    # One file may be several shards, one for each split.
    files = {name: number for number, name in enumerate(sorted({s.name for s in manifest.shards}))}
    shard = np.array([files[entry.name] for entry in manifest.shards])[shard]
    order = np.lexsort((start, shard))
    before, after = order[:-1], order[1:]
    overlap = np.flatnonzero((shard[before] == shard[after]) & (start[after] < stop[before]))
    if len(overlap):
        first, second = before[overlap[0]], after[overlap[0]]
        raise ShardError(
            f"rows {row[first]} and {row[second]} claim the same bytes of "
            f"{sorted(files)[int(shard[first])]} near offset {start[second] + BLOCK}"
        )


def check_together(blocks: Sequence[Block], manifest: Manifest) -> None:
    """Check what holds between blocks: keys stand once, and rows go on in order.

    Raises:
        ShardError: a key stands twice (P1 and p1 count as the same, but in shards that others
            wrote), or blocks are out of order.
    """
    keys = pa.chunked_array([block.batch.column("key") for block in blocks], pa.utf8())
    folded = pc.ascii_lower(keys) if manifest.foreign is None else keys
    if pc.count_distinct(folded).as_py() != len(folded):
        counts = pc.value_counts(folded)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        raise ShardError(f"key {twice.as_py()!r} stands in more than one row, or differs in case")
    for before, after in itertools.pairwise(blocks):
        if _order_of(before, -1) >= _order_of(after, 0):
            raise _row_error(after, 0, "does not follow the row before it in order")


def check_splits(blocks: Iterable[Block], manifest: Manifest) -> None:
    """Check that splits lie where the manifest says, classes are its own, and patients in one.

    Reads two columns of every block; all but the first need not be checked yet.

    Raises:
        ShardError: rows, splits or classes are not what the manifest says.
        SplitError: a patient stands in two splits.
    """
    names = [split.name for split in manifest.splits]
    owner: NDArray[np.int8] | None = None  # per patient: the split seen, -1 for none yet
    expected = np.repeat(
        np.arange(len(names), dtype=np.int8), [split.samples for split in manifest.splits]
    )
    for block in blocks:
        patients, splits = block.codes("patient"), block.codes("split")
        if owner is None:
            _check_arrow(block)
            _check_words(block, manifest)
            owner = np.full(len(block.batch.column("patient").dictionary), -1, dtype=np.int8)
        rows = slice(block.first_row, block.first_row + len(splits))
        _refuse(block, splits != expected[rows], "is in another split than the manifest says")
        _refuse(block, (patients < 0) | (patients >= len(owner)), "has no patient")
        for split in np.unique(splits).tolist():
            seen = patients[splits == split]
            twice = seen[(owner[seen] >= 0) & (owner[seen] != split)]
            if len(twice):
                raise SplitError(
                    f"patient {block.words('patient')[twice[0]]!r} stands in splits "
                    f"{names[owner[twice[0]]]!r} and {names[split]!r}"
                )
            owner[seen] = split


def _check_words(block: Block, manifest: Manifest) -> None:
    """Check the dictionaries: labels and splits as in the manifest, patients sorted."""
    for name, expected in (
        ("label", _label_words(block, manifest)),
        ("split", tuple(split.name for split in manifest.splits)),
    ):
        found = tuple(block.words(name))
        if found != expected:
            raise ShardError(f"{name} words are {found}, the manifest says {expected}")
    patients = block.batch.column("patient").dictionary
    if not pc.all(pc.less(patients[:-1], patients[1:]), min_count=0).as_py():
        raise ShardError("the patients' dictionary is not sorted, or holds one twice")


def _label_words(block: Block, manifest: Manifest) -> tuple[str, ...]:
    """Give the words the label column must have: the classes, or the sets it has, in order."""
    try:
        return manifest.labelling.words(block.words("label"))
    except ConfigError as error:
        raise ShardError(f"label words are wrong: {error}") from error


def _order_of(block: Block, row: int) -> tuple[int, int, int, str]:
    """Give what the rows are sorted by."""
    codes = [int(block.codes(name)[row]) for name in ("split", "label", "patient")]
    return (
        codes[0],
        codes[1],
        codes[2],
        block.batch.column("key")[row % block.batch.num_rows].as_py(),
    )


def _check_arrow(block: Block) -> None:
    """Check that the columns are sound Arrow: codes in range, text in UTF-8, no unforeseen null."""
    try:
        block.batch.validate(full=True)
    except pa.ArrowException as error:
        raise ShardError(f"rows from {block.first_row} are no sound Arrow: {error}") from error
    for field in block.batch.schema:
        column = block.batch.column(field.name)
        if column.null_count and not field.nullable:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise ShardError(f"row {block.first_row + row} has no value in column {field.name!r}")


def _check_order(block: Block) -> None:
    """Check that rows are sorted by split, class, patient and key, and no key stands twice."""
    if block.batch.num_rows < 2:
        return
    equal = np.ones(block.batch.num_rows - 1, dtype=np.bool_)
    wrong = np.zeros_like(equal)
    for name in ("split", "label", "patient"):
        codes = block.codes(name)
        wrong |= equal & (codes[1:] < codes[:-1])
        equal &= codes[1:] == codes[:-1]
    keys = block.batch.column("key")
    rising = pc.less(keys.slice(0, len(keys) - 1), keys.slice(1))
    wrong |= equal & ~np.asarray(rising.to_numpy(zero_copy_only=False))
    _refuse(block, np.concatenate([[False], wrong]), "does not follow the row before it in order")


def _check_shards(block: Block, manifest: Manifest) -> None:
    """Check that shard numbers exist and belong to the row's split."""
    shards = block.numbers("shard")
    _refuse(
        block,
        (shards < 0) | (shards >= len(manifest.shards)),
        f"names a shard outside the manifest's {len(manifest.shards)}",
    )
    places = {split.name: place for place, split in enumerate(manifest.splits)}
    split_of_shard = np.array([places[shard.split] for shard in manifest.shards])
    _refuse(
        block, split_of_shard[shards] != block.codes("split"), "lies in a shard of another split"
    )


def _check_place(block: Block, member: str, manifest: Manifest) -> None:
    """Check that a member's bytes lie inside its shard."""
    present = block.present(member)
    for field in block.batch.schema:
        if field.name.startswith(f"{member}.") and field.nullable:
            valid = np.asarray(block.batch.column(field.name).is_valid())
            _refuse(block, valid != present, f"has half a {member}: {field.name} disagrees")
    offsets, sizes = block.numbers(f"{member}.offset"), block.numbers(f"{member}.bytes")
    ends = np.array([shard.bytes for shard in manifest.shards], dtype=np.int64) - _END_BYTES
    # Others' tars may hold empty files.
    least = 1 if manifest.foreign is None or member in manifest.arrays else 0
    room = ends[block.numbers("shard")] - offsets  # cannot overflow: both are checked below 2^62
    outside = (offsets < BLOCK) | (offsets % BLOCK != 0) | (sizes < least) | (sizes > room)
    _refuse(block, present & outside, f"claims a {member} outside its shard")


def _check_array(block: Block, member: str) -> None:
    """Check that an array's shape, dtype and codec go with its stored bytes."""
    for name, known in _WORDS.items():
        words = set(block.words(f"{member}.{name}"))
        if not words <= known:
            raise ShardError(f"{member}.{name} is {sorted(words - known)}; known: {sorted(known)}")
    present = block.present(member)
    shapes = block.batch.column(f"{member}.shape")
    lengths = np.asarray(pc.list_value_length(shapes).fill_null(0), dtype=np.int64)
    letters = _looked_up(block, f"{member}.axes", len)
    _refuse(block, present & (lengths != letters), f"has a {member} shape unlike its axes")
    sides = np.where(np.arange(4) < lengths[:, None], block.shapes(member), 1)
    _refuse(block, present & (sides < 1).any(axis=1), f"has a {member} side below 1")
    items = _looked_up(block, f"{member}.dtype", lambda word: np.dtype(word).itemsize)
    # A product of four 31-bit sides overflows 64 bits; in floats it only loses its last digits.
    rough = sides.astype(np.float64).prod(axis=1) * items
    raw = np.where(rough < 2.0**53, rough, 0).astype(np.int64)
    stored = block.numbers(f"{member}.bytes")
    is_npy = _looked_up(block, f"{member}.codec", lambda word: word == "npy")
    header = stored - raw
    sound = np.where(
        is_npy, (header > 0) & (header <= _MAX_HEADER_BYTES), raw <= stored * _MAX_EXPANSION
    )
    _refuse(block, present & (~sound | (raw == 0)), f"has a {member} shape its bytes cannot hold")
    digests = block.batch.column(f"{member}.voxels")
    matches = pc.match_substring_regex(digests, "^[0-9a-f]{32}$").fill_null(True)
    _refuse(block, ~np.asarray(matches), f"has a {member}.voxels that is no digest")
    names = pc.binary_length(block.batch.column(f"{member}.member")).fill_null(1)
    _refuse(block, np.asarray(names) < 1, f"has a {member} without a name")


def _looked_up(block: Block, name: str, number_of: Callable[[str], int]) -> NDArray[np.int64]:
    """Turn a dictionary column into a number per row, 0 where it is null."""
    numbers = [int(number_of(word)) for word in block.words(name)]
    return np.asarray(np.array([*numbers, 0])[block.codes(name)], dtype=np.int64)


def _refuse(block: Block, wrong: NDArray[np.bool_], problem: str) -> None:
    """Raise for the first row where `wrong` is true."""
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise _row_error(block, int(rows[0]), problem)


def _row_error(block: Block, row: int, problem: str) -> ShardError:
    """Name a row by its number and key."""
    key = block.batch.column("key")[row].as_py()
    return ShardError(f"row {block.first_row + row}, sample {key!r}, {problem}")
