"""Where the arrays of one split lie, kept at hand for the reader.

The sample table answers questions about many samples at once; the reader asks for one after the
other, thousands of times a second. So the columns it needs are taken from the table a page at a
time (the rows of one of the table's blocks) and the pages used last are kept.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.storage.index import SampleTable
from streaming_balance.storage.kinds import ABSENT, ArrayKind, ArrayKinds
from streaming_balance.storage.layout import TABLE_BLOCK_ROWS

# 4 million samples at 33 bytes each: the columns of no data set take more than 150 megabytes.
_MAX_PAGES = 64
_BYTES = -2  # the kind of a member that is kept as bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """Where one array of one sample lies and what it must hold."""

    members: SplitMembers
    """The split it belongs to."""
    sample: int
    """Sample number within the split."""
    field: str
    """`image` or `seg`."""
    shard: int
    """Number of the shard in the manifest's list."""
    offset: int
    """Byte offset of its stored bytes in the shard."""
    bytes: int
    """How many bytes are stored."""
    checksum: int
    """xxh3-64 of the stored bytes."""
    codec: str
    """`blosc` or `npy`; `bytes` for a member without a decoder."""
    dtype: np.dtype[Any]
    """Type of its elements."""
    shape: tuple[int, ...]
    """Shape as packed, with or without a channel axis."""
    row_shape: tuple[int, ...]
    """Shape with its channel axis: (C, D, H, W) or (C, H, W)."""

    @property
    def raw_bytes(self) -> int:
        """Bytes of the decoded elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def header_bytes(self) -> int:
        """Bytes before the elements of an array stored with the codec `npy`."""
        return self.bytes - self.raw_bytes

    def __str__(self) -> str:
        return self.members.describe(self.sample, self.field)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    """Columns of consecutive samples of a split, for one array field."""

    first_sample: int
    """Sample number of the first row."""
    present: NDArray[np.bool_]
    """Whether the sample has this array."""
    shard: NDArray[np.int32]
    """Shard number."""
    offset: NDArray[np.int64]
    """Byte offset in the shard."""
    stored_bytes: NDArray[np.int64]
    """Bytes stored."""
    checksum: NDArray[np.uint64]
    """xxh3-64 of the stored bytes."""
    kind: NDArray[np.int32]
    """Number of its `ArrayKind`, `ABSENT` where the sample has no such array."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbours in one shard, by ascending offset."""

    offset: NDArray[np.int64]
    """Byte offset of each."""
    stored_bytes: NDArray[np.int64]
    """Bytes stored of each."""
    alike: bool
    """Whether all are stored raw with one dtype and shape, so that one rule places them all."""


class SplitMembers:
    """The arrays of one split, by sample number. Safe for many threads.

    Args:
        table: the sample table.
        split: name of the split.
        arrays: the data set's array fields: `image`, or `image` and `seg`.
        kept: fields of foreign shards that are kept as bytes.

    Raises:
        ConfigError: no such split.
    """

    def __init__(
        self,
        table: SampleTable,
        split: str,
        arrays: tuple[str, ...],
        kept: tuple[str, ...] = (),
    ) -> None:
        self._table = table
        self._split = split
        self._arrays = arrays
        self._fields = (*arrays, *kept)
        self._start, self._stop = table.split_rows(split)
        self._kinds = ArrayKinds()
        self._pages: dict[tuple[str, int], _Page] = {}
        self._loading = threading.Lock()

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields a sample may have: arrays, then what is kept as bytes."""
        return self._fields

    def has(self, sample: int, field: str) -> bool:
        """Say whether a sample has this array.

        Raises:
            ConfigError: no such field.
            IndexError: no such sample.
        """
        self._check_sample(sample)
        page = self._page(field, (self._start + sample) // TABLE_BLOCK_ROWS)
        return bool(page.present[sample - page.first_sample])

    def stored_array(self, sample: int, field: str) -> StoredArray:
        """Say where one array of a sample lies.

        Raises:
            ConfigError: no such field, or this sample has none.
            IndexError: no such sample.
        """
        self._check_sample(sample)
        page = self._page(field, (self._start + sample) // TABLE_BLOCK_ROWS)
        row = sample - page.first_sample
        if not page.present[row]:
            key = self._table.keys(self._split, [sample])[0]
            raise ConfigError(f"sample '{key}' of split {self._split!r} has no {field}.")
        kind = self._kind_of(page, row)
        return StoredArray(
            members=self,
            sample=sample,
            field=field,
            shard=int(page.shard[row]),
            offset=int(page.offset[row]),
            bytes=int(page.stored_bytes[row]),
            checksum=int(page.checksum[row]),
            codec=kind.codec,
            dtype=kind.dtype,
            shape=kind.shape,
            row_shape=kind.row_shape,
        )

    def _kind_of(self, page: _Page, row: int) -> ArrayKind:
        """Say how a member on a page is stored; bytes count as a line of uint8."""
        number = int(page.kind[row])
        if number != _BYTES:
            return self._kinds[number]
        line = (int(page.stored_bytes[row]),)
        return ArrayKind(codec="bytes", dtype=np.dtype(np.uint8), shape=line, row_shape=line)

    def kind_numbers(self, samples: NDArray[np.int64], field: str) -> NDArray[np.int32]:
        """Say of what kind the arrays of samples are, in numbers that `kind` explains.

        Args:
            samples: sample numbers.
            field: `image` or `seg`.

        Returns:
            A number per sample, equal where arrays are stored alike; `ABSENT` where there is none.

        Raises:
            ConfigError: no such field.
            IndexError: no such sample.
        """
        numbers = np.empty(len(samples), dtype=np.int32)
        for here, page, rows in self._pages_of(samples, field):
            numbers[here] = page.kind[rows]
        return numbers

    def kind(self, number: int) -> ArrayKind:
        """Say what a number that `kind_numbers` gave stands for."""
        return self._kinds[number]

    def neighbours(
        self,
        samples: NDArray[np.int64],
        field: str,
        *,
        small_bytes: int,
        gap_bytes: int,
        window_bytes: int,
    ) -> list[NDArray[np.int64]]:
        """Group samples so that one read fetches each group.

        Args:
            samples: sample numbers.
            field: `image` or `seg`.
            small_bytes: a sample with more stored bytes stands alone.
            gap_bytes: most bytes between two neighbours.
            window_bytes: samples of a group start in the same window of so many bytes.

        Returns:
            Places in `samples`, by ascending shard and offset, one array per group.

        Raises:
            ConfigError: no such field.
            IndexError: no such sample.
        """
        if len(samples) < 2:
            return [np.arange(len(samples))] if len(samples) else []
        shard, offset, stored = self._places(samples, field)
        order = np.lexsort((offset, shard))
        shard, offset, stored = shard[order], offset[order], stored[order]
        gap = offset[1:] - (offset + stored)[:-1]
        window = offset // window_bytes
        large = stored > small_bytes
        apart = (shard[1:] != shard[:-1]) | (gap > gap_bytes) | (window[1:] != window[:-1])
        apart |= large[1:] | large[:-1]
        return np.split(order, np.flatnonzero(apart) + 1)

    def run(self, samples: NDArray[np.int64], field: str) -> Run:
        """Say where neighbours lie, as `neighbours` grouped them, and whether they are alike."""
        _, offset, stored = self._places(samples, field)
        kinds = self.kind_numbers(samples, field)
        alike = bool((kinds == kinds[0]).all() and (stored == stored[0]).all())
        raw = self._kinds[int(kinds[0])].codec == "npy"
        return Run(offset=offset, stored_bytes=stored, alike=alike and raw)

    def describe(self, sample: int, field: str) -> str:
        """Name a member for a message: its sample's key and its name in the tar."""
        key = self._table.keys(self._split, [sample])[0]
        name = self._table.member_names(self._split, field, [sample])[0]
        return f"member {name} of sample '{key}'"

    def _places(
        self, samples: NDArray[np.int64], field: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Collect shard, offset and stored bytes of samples from the pages they lie on."""
        shard, offset, stored = (np.empty(len(samples), np.int64) for _ in range(3))
        for here, page, rows in self._pages_of(samples, field):
            shard[here], offset[here] = page.shard[rows], page.offset[rows]
            stored[here] = page.stored_bytes[rows]
        return shard, offset, stored

    def _pages_of(
        self, samples: NDArray[np.int64], field: str
    ) -> Iterator[tuple[NDArray[np.bool_] | slice, _Page, NDArray[np.int64]]]:
        """Give the pages that samples lie on: which samples, the page, and their rows on it."""
        if not len(samples):
            return
        lowest, highest = int(samples.min()), int(samples.max())
        self._check_sample(lowest)
        self._check_sample(highest)
        first, last = ((self._start + n) // TABLE_BLOCK_ROWS for n in (lowest, highest))
        if first == last:
            page = self._page(field, first)
            yield slice(None), page, samples - page.first_sample
            return
        numbers = (samples + self._start) // TABLE_BLOCK_ROWS
        for number in np.unique(numbers).tolist():
            page = self._page(field, number)
            here = numbers == number
            yield here, page, samples[here] - page.first_sample

    def _page(self, field: str, number: int) -> _Page:
        """Give the columns of the rows in one block of the table."""
        page = self._pages.get((field, number))
        if page is not None:
            return page
        if field not in self._fields:
            raise ConfigError(
                f"field is {field!r}; this data set holds {', '.join(self._fields)}."
                + did_you_mean(field, self._fields)
            )
        with self._loading:
            page = self._loaded_page(field, number)
            while len(self._pages) >= _MAX_PAGES:
                # The oldest goes; whoever still reads from it holds its own reference.
                self._pages.pop(next(iter(self._pages)))
            self._pages[field, number] = page
        return page

    def _loaded_page(self, field: str, number: int) -> _Page:
        """Take the columns of one block from the table, which checks the block on the way."""
        first = max(number * TABLE_BLOCK_ROWS, self._start) - self._start
        stop = min((number + 1) * TABLE_BLOCK_ROWS, self._stop) - self._start
        samples = None if stop - first == len(self) else np.arange(first, stop)
        places = self._table.members(self._split, field, samples)
        if field in self._arrays:
            formats = self._table.formats(self._split, field, samples)
            kind = self._kinds.numbers(formats, places.present)
        else:
            kind = np.where(places.present, _BYTES, ABSENT).astype(np.int32)
        return _Page(
            first_sample=first,
            present=places.present,
            shard=places.shard,
            offset=places.offset,
            stored_bytes=places.stored_bytes,
            checksum=places.xxh3,
            kind=kind,
        )

    def _check_sample(self, sample: int) -> None:
        """Raise unless the split has this sample."""
        if not 0 <= sample < len(self):
            raise IndexError(
                f"sample {sample} is outside split {self._split!r} of {len(self)} samples, "
                f"numbered 0 to {len(self) - 1}."
            )
