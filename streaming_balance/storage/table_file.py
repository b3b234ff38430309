"""The sample table as a file: written durably with a hash per block, read back with suspicion."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from streaming_balance.errors import ShardError
from streaming_balance.storage.checks import Block
from streaming_balance.storage.durable import DurableFile, durable_file
from streaming_balance.storage.layout import TABLE_BLOCK_ROWS
from streaming_balance.storage.manifest import Manifest, TableEntry
from streaming_balance.storage.rows import table_schema


def write_table(final: Path, table: pa.Table, *, block_rows: int = TABLE_BLOCK_ROWS) -> TableEntry:
    """Write a sample table, whole or not at all.

    Args:
        final: its file.
        table: the rows, sorted, as `rows.arrow_table` builds them.
        block_rows: rows per record batch.

    Returns:
        What the manifest says about it.

    Raises:
        ShardError: the disk is full or failing.
    """
    with durable_file(final) as file:
        hashed = _HashedFile(file)
        with pa.ipc.new_file(pa.PythonFile(hashed, mode="w"), table.schema) as writer:
            for number, batch in enumerate(table.to_batches(max_chunksize=block_rows)):
                if number:
                    hashed.end_block()
                writer.write_batch(batch)
        hashed.end_block()
    return TableEntry(
        name=final.name,
        bytes=file.size,
        rows=table.num_rows,
        sha256=hashed.sha256.hexdigest(),
        block_rows=block_rows,
        block_ends=tuple(hashed.block_ends),
        block_xxh3=tuple(hashed.block_xxh3),
    )


def stored_table(path: Path, entry: TableEntry, in_memory_bytes: int) -> pa.Buffer:
    """Give the table's bytes, once their number is what the manifest says.

    Args:
        path: the table's file.
        entry: what the manifest says about it.
        in_memory_bytes: tables below this size are read into memory, others mapped.

    Raises:
        ShardError: missing, unreadable or of another size.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == entry.bytes and size >= in_memory_bytes:
                return pa.memory_map(str(path)).read_buffer()
            stored = file.read(entry.bytes) if size == entry.bytes else b""
    except FileNotFoundError as error:
        raise ShardError("the sample table is missing") from error
    except OSError as error:
        raise ShardError(f"the sample table cannot be read: {error.strerror}") from error
    if size != entry.bytes:
        raise ShardError(f"size {size:,} bytes, the manifest says {entry.bytes:,}")
    if len(stored) != size:
        raise ShardError(f"the sample table shrank to {len(stored):,} bytes while it was read")
    return pa.py_buffer(stored)


def check_block_bytes(stored: pa.Buffer, number: int, entry: TableEntry) -> None:
    """Compare a block's bytes with their hash in the manifest.

    Raises:
        ShardError: they differ.
    """
    start = entry.block_ends[number - 1] if number else 0
    stop = entry.block_ends[number]
    found = xxhash.xxh3_64_hexdigest(memoryview(stored)[start:stop])
    if found != entry.block_xxh3[number]:
        raise ShardError(
            f"bytes {start:,} to {stop:,} have xxh3 {found}, the manifest says "
            f"{entry.block_xxh3[number]}: the table is damaged"
        )


def opened_reader(stored: pa.Buffer, manifest: Manifest) -> pa.RecordBatchFileReader:
    """Open the Arrow file and check its schema, pack and number of blocks.

    Raises:
        ShardError: no Arrow file, of another pack, or with other columns or blocks.
    """
    expected = table_schema(
        columns=manifest.columns,
        arrays=manifest.arrays,
        pack_id=manifest.pack_id,
        kept=manifest.kept_members,
    )
    try:
        reader = pa.ipc.open_file(stored)
        schema, blocks = reader.schema, reader.num_record_batches
        names = schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardError(f"this is no Arrow file: {error}") from error
    found = (schema.metadata or {}).get(b"pack_id", b"").decode("ascii", "replace")
    if found != manifest.pack_id:
        raise ShardError(
            f"pack id {found!r} in the sample table, {manifest.pack_id!r} in the manifest: they "
            "are of two packs"
        )
    if not schema.equals(expected, check_metadata=True):
        raise ShardError(f"the columns are {names}, expected {expected.names}")
    if blocks != len(manifest.table.block_ends):
        raise ShardError(f"{blocks} blocks, the manifest says {len(manifest.table.block_ends)}")
    return reader


def read_block(reader: pa.RecordBatchFileReader, number: int, entry: TableEntry) -> Block:
    """Take one record batch, which must have the rows the manifest implies.

    Raises:
        ShardError: it is damaged, or has more or fewer rows.
    """
    first = number * entry.block_rows
    expected = min(entry.block_rows, entry.rows - first)
    try:
        batch = reader.get_batch(number)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"block {number} is no sound Arrow: {error}") from error
    if batch.num_rows != expected:
        raise ShardError(f"block {number} has {batch.num_rows} rows, expected {expected}")
    return Block(first_row=first, batch=batch)


class _HashedFile(io.RawIOBase):
    """A file for Arrow to write, digested as it grows."""

    def __init__(self, file: DurableFile) -> None:
        self.sha256 = hashlib.sha256()
        self.block_ends: list[int] = []
        self.block_xxh3: list[str] = []
        self._file = file
        self._block_hash = xxhash.xxh3_64()

    def writable(self) -> bool:
        """Say that Arrow may write."""
        return True

    def write(self, content: Any) -> int:  # noqa: ANN401 - the base class takes any buffer
        """Append and digest `content`."""
        self.sha256.update(content)
        self._block_hash.update(content)
        return self._file.write(content)

    def end_block(self) -> None:
        """Let a block end here and the next one start."""
        self.block_ends.append(self._file.size)
        self.block_xxh3.append(self._block_hash.hexdigest())
        self._block_hash = xxhash.xxh3_64()
