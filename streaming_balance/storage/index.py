"""The sample table: which samples there are, and where every byte of them lies.

Columns are given as read-only numpy arrays. A sample number is a row's place within its split.
Up to a million rows everything is checked when the table is opened; beyond that a block of 65,536
rows is checked when it is first touched, so that opening stays quick and memory stays mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ShardError, SplitError, did_you_mean
from streaming_balance.storage.checks import (
    Block,
    check_block,
    check_overlaps,
    check_splits,
    check_together,
)
from streaming_balance.storage.manifest import Manifest
from streaming_balance.storage.table_file import (
    check_block_bytes,
    opened_reader,
    read_block,
    stored_table,
)

Samples = Sequence[int] | NDArray[np.integer[Any]]

EAGER_ROWS = 1_000_000
# A mapped file kills the process when it shrinks, so only tables too big to copy are mapped.
IN_MEMORY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Where one member of some samples lies; every field has one value per sample."""

    shard: NDArray[np.int32]
    """Number of the shard in the manifest's list."""
    offset: NDArray[np.int64]
    """Byte offset of the payload in the shard, a multiple of 512."""
    stored_bytes: NDArray[np.int64]
    """Bytes of the payload; 0 where absent."""
    xxh3: NDArray[np.uint64]
    """xxh3-64 of the payload."""
    present: NDArray[np.bool_]
    """Whether the sample has this member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """What an array member of some samples holds; every field has one value per sample."""

    member: NDArray[np.str_]
    """Name in the tar; empty where absent."""
    codec: NDArray[np.str_]
    """`blosc` or `npy`; empty where absent."""
    dtype: NDArray[np.str_]
    """numpy name of the dtype; empty where absent."""
    axes: NDArray[np.str_]
    """`CDHW`, `DHW`, `CHW` or `HW`: its length is the number of sides; empty where absent."""
    shape: NDArray[np.int32]
    """`(samples, 4)` sides, unused places 0."""
    voxels: NDArray[np.str_]
    """Digest of the content, 32 hex digits; empty where absent."""


class SampleTable:
    """The sample table of a data set, opened and checked.

    Row numbers run over all splits, split after split; sample numbers start at 0 in each split.
    Every accessor takes `samples`, the sample numbers wanted, or None for the whole split.
    Safe to use from several threads.
    """

    def __init__(self, stored: pa.Buffer, manifest: Manifest, *, is_eager: bool) -> None:
        """Take a table's bytes, of the size the manifest says; use `SampleTable.open`."""
        self.rows = manifest.table.rows
        """Samples of all splits."""
        self._stored = stored
        self._manifest = manifest
        self._block_rows = manifest.table.block_rows
        self._is_eager = is_eager
        self._blocks: dict[int, Block] = {}
        # The first block holds schema and dictionaries, the last one the list of all blocks.
        for number in {0, len(manifest.table.block_ends) - 1}:
            check_block_bytes(stored, number, manifest.table)
        self._reader = opened_reader(stored, manifest)
        self._ranges: dict[str, tuple[int, int]] = {}
        start = 0
        for split in manifest.splits:
            self._ranges[split.name] = (start, start + split.samples)
            start += split.samples

    @classmethod
    def open(
        cls,
        path: Path,
        manifest: Manifest,
        *,
        eager_rows: int = EAGER_ROWS,
        in_memory_bytes: int = IN_MEMORY_BYTES,
    ) -> SampleTable:
        """Open a sample table and check it against its manifest.

        Args:
            path: the table's file.
            manifest: the manifest of the same pack.
            eager_rows: tables of up to so many rows are checked whole, now.
            in_memory_bytes: tables below this size are read into memory, others mapped.

        Returns:
            The table.

        Raises:
            ShardError: the table is missing, damaged, of another pack, or a row cannot be.
            SplitError: a patient stands in two splits.
        """
        try:
            stored = stored_table(path, manifest.table, in_memory_bytes)
            table = cls(stored, manifest, is_eager=manifest.table.rows <= eager_rows)
            table._check_opening()
        except (ShardError, SplitError) as error:
            raise type(error)(
                f"{path}: {error}. Rebuild it: run the pack command again with --overwrite; "
                f"`streaming-balance verify {path.parent}` lists everything that is wrong."
            ) from error
        return table

    def split_rows(self, split: str) -> tuple[int, int]:
        """Give the first row of a split and the row after its last.

        Raises:
            ConfigError: no such split.
        """
        if split not in self._ranges:
            raise ConfigError(
                f"there is no split {split!r}; splits: {', '.join(self._ranges)}."
                + did_you_mean(split, self._ranges)
            )
        return self._ranges[split]

    def labels(self, split: str, samples: Samples | None = None) -> NDArray[Any]:
        """Give class numbers, int64; of a multi-label data set `(n, K)` of 0 and 1, uint8."""
        codes = self._gather(split, samples, lambda block: block.codes("label"))
        if not self._manifest.multi_label:
            return _read_only(codes.astype(np.int64))
        words = self._block(0).words("label")
        return _read_only(self._manifest.labelling.indicators(words)[codes])

    def label_words(self, split: str, samples: Samples | None = None) -> NDArray[np.str_]:
        """Give labels as they are written: a class, or findings in class order joined by `|`."""
        return self._words(split, samples, "label")

    def patients(self, split: str, samples: Samples | None = None) -> NDArray[np.str_]:
        """Give the patients' ids."""
        return self._words(split, samples, "patient")

    def keys(self, split: str, samples: Samples | None = None) -> NDArray[np.str_]:
        """Give the samples' keys."""
        return self._texts(split, samples, "key")

    def column(self, split: str, name: str, samples: Samples | None = None) -> NDArray[np.str_]:
        """Give a strata column.

        Raises:
            ConfigError: no such split or column.
        """
        columns = self._manifest.columns
        if name not in columns:
            raise ConfigError(
                f"there is no column {name!r}; columns: {', '.join(columns) or 'none'}."
                + did_you_mean(name, columns)
            )
        return self._texts(split, samples, name)

    def members(self, split: str, field: str, samples: Samples | None = None) -> Members:
        """Give where a member lies: `image`, `seg`, `cls`, `json`, or a field of foreign shards."""

        def numbers(name: str) -> NDArray[Any]:
            return self._gather(split, samples, lambda block: block.numbers(name))

        return Members(
            shard=numbers("shard"),
            offset=numbers(f"{field}.offset"),
            stored_bytes=numbers(f"{field}.bytes"),
            xxh3=numbers(f"{field}.xxh3"),
            present=self._gather(split, samples, lambda block: block.present(field)),
        )

    def member_names(
        self, split: str, field: str, samples: Samples | None = None
    ) -> NDArray[np.str_]:
        """Give what a member is called in its tar: an array, or any member of foreign shards."""
        return self._texts(split, samples, f"{field}.member")

    def formats(self, split: str, field: str, samples: Samples | None = None) -> Formats:
        """Give what an array member holds: `image` or `seg`."""
        return Formats(
            member=self._texts(split, samples, f"{field}.member"),
            codec=self._words(split, samples, f"{field}.codec"),
            dtype=self._words(split, samples, f"{field}.dtype"),
            axes=self._words(split, samples, f"{field}.axes"),
            shape=self._gather(split, samples, lambda block: block.shapes(field)),
            voxels=self._texts(split, samples, f"{field}.voxels"),
        )

    def check_all(self) -> None:
        """Check every block that was not touched yet.

        Raises:
            ShardError: a block is damaged, or a row cannot be.
        """
        for number in range(len(self._manifest.table.block_ends)):
            self._block(number)

    def _check_opening(self) -> None:
        """Check whole splits always, and whole rows while there are few enough."""
        if self._is_eager:
            self.check_all()
            blocks = [self._blocks[number] for number in sorted(self._blocks)]
            check_overlaps(blocks, self._manifest)
            check_together(blocks, self._manifest)
        all_blocks = (
            read_block(self._reader, number, self._manifest.table)
            for number in range(len(self._manifest.table.block_ends))
        )
        check_splits(all_blocks, self._manifest)

    def _words(self, split: str, samples: Samples | None, name: str) -> NDArray[np.str_]:
        """Give a dictionary column as text, empty where it is null."""
        codes = self._gather(split, samples, lambda block: block.codes(name))
        words = self._block(0).words(name) if len(codes) else []
        return _read_only(np.array([*words, ""], dtype=np.str_)[codes])

    def _texts(self, split: str, samples: Samples | None, name: str) -> NDArray[np.str_]:
        """Give a text column, empty where it is null."""
        start, stop = self.split_rows(split)
        if samples is None:
            parts = [
                block.batch.column(name)[rows.start : rows.stop].fill_null("").to_pylist()
                for block, rows in self._blocks_of(start, stop)
            ]
            return _read_only(np.array([text for part in parts for text in part], dtype=np.str_))
        texts = []
        for row in self._row_numbers(split, samples).tolist():
            block = self._block(row // self._block_rows)
            texts.append(block.batch.column(name)[row - block.first_row].as_py() or "")
        return _read_only(np.array(texts, dtype=np.str_))

    def _gather(
        self, split: str, samples: Samples | None, values_of: Callable[[Block], NDArray[Any]]
    ) -> NDArray[Any]:
        """Collect values of a split's rows from the blocks they lie in."""
        start, stop = self.split_rows(split)
        if samples is None:
            parts = [values_of(block)[rows] for block, rows in self._blocks_of(start, stop)]
            return _read_only(parts[0] if len(parts) == 1 else np.concatenate(parts))
        rows = self._row_numbers(split, samples)
        numbers = rows // self._block_rows
        touched = np.unique(numbers).tolist()
        if len(touched) == 1:
            return _read_only(values_of(self._block(touched[0]))[rows % self._block_rows])
        pieces = [values_of(self._block(number)) for number in touched or [0]]
        gathered = np.zeros((len(rows), *pieces[0].shape[1:]), dtype=pieces[0].dtype)
        for number, piece in zip(touched, pieces, strict=False):
            here = numbers == number
            gathered[here] = piece[rows[here] % self._block_rows]
        return _read_only(gathered)

    def _row_numbers(self, split: str, samples: Samples) -> NDArray[np.int64]:
        """Turn sample numbers into row numbers."""
        start, stop = self.split_rows(split)
        numbers = np.asarray(samples, dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < stop - start:
            raise IndexError(
                f"samples {numbers.min()} to {numbers.max()} of split {split!r}, which has "
                f"{stop - start}"
            )
        return np.asarray(numbers + start, dtype=np.int64)

    def _blocks_of(self, start: int, stop: int) -> list[tuple[Block, slice]]:
        """Give the blocks that hold some rows, each with the rows in it."""
        if start == stop:  # a split without samples
            return [(self._block(0), slice(0, 0))]
        found = []
        for number in range(start // self._block_rows, (stop - 1) // self._block_rows + 1):
            first = number * self._block_rows
            rows = slice(max(start - first, 0), min(stop - first, self._block_rows))
            found.append((self._block(number), rows))
        return found

    def _block(self, number: int) -> Block:
        """Give a block, checked when it is first touched."""
        block = self._blocks.get(number)
        if block is None:
            check_block_bytes(self._stored, number, self._manifest.table)
            block = read_block(self._reader, number, self._manifest.table)
            check_block(block, self._manifest)
            if not self._is_eager:
                check_overlaps([block], self._manifest)
            self._blocks[number] = block
        return block


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    """Forbid writing: callers share what is given out."""
    values.flags.writeable = False
    return values
