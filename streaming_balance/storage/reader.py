"""Filling the rows of a batch with stored arrays: the hot path.

What happens to a sample depends on how it is stored and what the row asks for:

    npy, same dtype and shape    one read of the header and of the values straight into the row
    npy, cast, crop or pad       planes through a cache-sized scratch, never a whole volume
    blosc, same shape            the small frame, then decoded (and cast) into the row
    blosc, crop or pad           decoded into a scratch of this thread, then its centre copied
    small neighbours             one read for several samples, then each from that memory, or
                                 all by one assignment where they are raw, alike and verified

Every scratch belongs to a thread and is used again, since touching new pages costs more than
reading does. System calls, decoding, casting and hashing run without the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ShardError, did_you_mean
from streaming_balance.storage.casting import check_request, finite_kept
from streaming_balance.storage.codecs import decode_into
from streaming_balance.storage.descriptors import DescriptorPool, ExpectedFile
from streaming_balance.storage.elsewhere import advice_for, remedy_for
from streaming_balance.storage.filling import SLAB_BYTES, RowFiller
from streaming_balance.storage.members import SplitMembers, StoredArray
from streaming_balance.storage.npy import parse_header
from streaming_balance.storage.workspace import Workspace

if TYPE_CHECKING:
    from types import TracebackType

    from streaming_balance.storage.shards import ShardSet

AnyArray: TypeAlias = NDArray[Any]
Verify: TypeAlias = Literal["first", "always", "never"]

# Below this a sample costs more in calls than in bytes, so neighbours share a read.
_SMALL_BYTES = 1 << 16
# Bytes between two neighbours that are cheaper to read along than to skip by another call.
_MAX_GAP_BYTES = 1 << 14
# A shared read stays within one such window of its shard, which bounds the scratch it needs.
_WINDOW_BYTES = 1 << 22


class Reader:
    """Fills rows of a caller's buffer with samples of one split.

    Any number of threads may call any method at once. The reader keeps no reference to a buffer.

    Args:
        shards: an open data set.
        split: which of its splits the sample numbers count in.
        verify: when stored bytes are compared with their xxh3-64: the `first` time this reader
            touches a member, `always` or `never`. Length, shape and dtype are always compared.
        max_open_files: most shards open at once, at least 1.

    Raises:
        ConfigError: no such split, another `verify`, or `max_open_files` below 1.

    Examples:
        >>> from streaming_balance.storage.shards import open_shards
        >>> shards = open_shards("shards/demo")
        >>> reader = shards.reader("train")
        >>> batch = np.empty((2, *reader.shape(0)), np.float32)
        >>> reader.read_into([0, 7], batch)
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        *,
        verify: Verify = "first",
        max_open_files: int = 64,
    ) -> None:
        if verify not in get_args(Verify):
            raise ConfigError(
                f"verify is {verify!r}; allowed: first, always, never."
                + did_you_mean(verify, get_args(Verify))
            )
        self._path = shards.path
        self._verify = verify
        kept = shards.manifest.kept_members or ()
        self._members = SplitMembers(shards.table, split, shards.arrays, kept)
        files = [
            ExpectedFile(path=shards.path / shard.name, bytes=shard.bytes)
            for shard in shards.manifest.shards
        ]
        advice = advice_for(shards.path, shards.manifest)
        self._pool = DescriptorPool(files, max_open_files=max_open_files, advice=advice)
        self._remedy = remedy_for(shards.manifest)
        self._files = files
        self._workspace = Workspace()
        # A byte per sample; the system hands out the pages when they are first written.
        self._verified = {
            field: np.zeros(len(self._members), np.bool_) for field in self._members.fields
        }

    @property
    def members(self) -> SplitMembers:
        """Where the arrays of the split lie, and of what kind they are."""
        return self._members

    def shape(self, sample: int, field: str = "image") -> tuple[int, ...]:
        """Give the shape of a sample with its channel axis: (C, D, H, W) or (C, H, W)."""
        return self._members.stored_array(sample, field).row_shape

    def dtype(self, sample: int, field: str = "image") -> np.dtype[Any]:
        """Give the dtype a sample is stored in."""
        return self._members.stored_array(sample, field).dtype

    def has(self, sample: int, field: str) -> bool:
        """Say whether a sample has this array: `seg` may be there for some samples only."""
        return self._members.has(sample, field)

    def stored_bytes(self, sample: int, field: str = "image") -> int:
        """Give how many bytes a sample takes in its shard."""
        return self._members.stored_array(sample, field).bytes

    def read_into(
        self, samples: Sequence[int] | NDArray[np.int64], out: AnyArray, *, field: str = "image"
    ) -> None:
        """Fill row i of `out` with sample `samples[i]`.

        `out` stays the caller's: it is written during this call only, never kept, and may be pinned
        or strided. The shape of its rows is the request: a sample of another space is centre
        cropped or zero padded along each axis. After an error its contents are undefined.

        Args:
            samples: sample numbers within the split.
            out: `(len(samples), C, *space)`; its dtype may be another than the stored one, as long
                as no stored value can wrap or overflow (int16 to float32, float64 to float32).
            field: `image` or `seg`.

        Raises:
            ConfigError: `out` has another number of rows, axes or channels, its dtype cannot hold
                the stored kind of value or a value would become infinite, or no such field.
            IndexError: no such sample.
            ShardError: a shard is shorter than its index says, was replaced, or a checksum differs.
        """
        if len(samples) != len(out):
            raise ConfigError(
                f"out has {len(out)} rows for {len(samples)} samples; give a row for each."
            )
        numbers = np.asarray(samples, dtype=np.int64)
        for places in self._members.neighbours(
            numbers,
            field,
            small_bytes=_SMALL_BYTES,
            gap_bytes=_MAX_GAP_BYTES,
            window_bytes=_WINDOW_BYTES,
        ):
            if len(places) == 1:
                place = int(places[0])
                self._fill(out[place], int(numbers[place]), field)
            else:
                self._fill_together(out, places, numbers, field)

    def read(self, sample: int, field: str = "image") -> AnyArray:
        """Give a sample as it was packed: its own axes and dtype, in new memory.

        A member of foreign shards that has no decoder comes as its bytes, `(n,)` of uint8.

        Raises:
            ConfigError: no such field.
            IndexError: no such sample.
            ShardError: as `read_into`.
        """
        member = self._members.stored_array(sample, field)
        array = np.empty(member.shape, member.dtype)
        if member.codec == "bytes":
            self._pool.read(member.shard, [array.data], member.offset, member)
            due = self._must_hash(sample, field)
            self._check_checksum(
                xxhash.xxh3_64_intdigest(array.data) if due else None, member, sample
            )
            return array
        self._fill(array.reshape(member.row_shape), sample, field)
        return array

    def will_need(
        self, samples: Sequence[int] | NDArray[np.int64], *, field: str = "image"
    ) -> None:
        """Tell the system that these samples are read soon, so that it fetches them meanwhile.

        Does nothing where the system takes no hints (macOS).
        """
        for sample in samples:
            member = self._members.stored_array(int(sample), field)
            self._pool.will_need(member.shard, member.offset, member.bytes)

    def close(self) -> None:
        """Close the shards; reads that have begun end well. May be called twice."""
        self._pool.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _fill(self, row: AnyArray, sample: int, field: str) -> None:
        """Read one sample into its row, no finite value of which becomes infinite."""
        member = self._members.stored_array(sample, field)
        check_request(row, member)
        with finite_kept(row.dtype, member):
            self._fill_shortest(row, member, sample)

    def _fill_shortest(self, row: AnyArray, member: StoredArray, sample: int) -> None:
        """Read one sample into its row by the shortest way there is."""
        whole = row.shape == member.row_shape
        if member.codec == "npy" and whole and row.dtype == member.dtype and _is_flat(row):
            checksum = self._read_straight(row, member, sample)
        elif member.codec == "npy" and member.bytes > SLAB_BYTES:
            checksum = self._read_planes(row, member, sample)
        else:
            frame = self._workspace.stored(member.bytes)
            self._pool.read(member.shard, [frame.data], member.offset, member)
            self._fill_from_memory(row, member, sample, frame)
            return
        self._check_checksum(checksum, member, sample)

    def _fill_together(
        self, out: AnyArray, places: NDArray[np.int64], numbers: NDArray[np.int64], field: str
    ) -> None:
        """Read neighbours in one shard by one call, then fill their rows from that memory."""
        samples = numbers[places]
        run = self._members.run(samples, field)
        start = int(run.offset[0])
        window = self._workspace.stored(int((run.offset + run.stored_bytes).max()) - start)
        first = self._members.stored_array(int(samples[0]), field)
        self._pool.read(first.shard, [window.data], start, first)
        starts = run.offset - start
        if run.alike and out.shape[1:] == first.row_shape and not self._any_due(samples, field):
            check_request(out[0], first)
            frames = np.lib.stride_tricks.sliding_window_view(window, first.bytes)[starts]
            values = self._values_of(frames, samples, first)
            # A value beyond `out` is found again below, with the sample it belongs to.
            with suppress(ConfigError), finite_kept(out.dtype, first):
                out[places] = values
                return
        for place, begin in zip(places.tolist(), starts.tolist(), strict=True):
            member = self._members.stored_array(int(numbers[place]), field)
            check_request(out[place], member)
            frame = window[begin : begin + member.bytes]
            with finite_kept(out.dtype, member):
                self._fill_from_memory(out[place], member, member.sample, frame)

    def _values_of(
        self, frames: AnyArray, samples: NDArray[np.int64], first: StoredArray
    ) -> AnyArray:
        """Give the values of raw frames that are all stored as `first` is, headers checked."""
        headers = frames[:, : first.header_bytes]
        self._check_header(headers[0].data, first)
        for unlike in np.flatnonzero((headers != headers[0]).any(axis=1)).tolist():
            member = self._members.stored_array(int(samples[unlike]), first.field)
            self._check_header(headers[unlike].data, member)
        values = frames[:, first.header_bytes :].view(first.dtype)
        return values.reshape(len(frames), *first.row_shape)

    def _read_straight(self, row: AnyArray, member: StoredArray, sample: int) -> int | None:
        """Read header and values, the values straight into the row."""
        header = self._workspace.header(member.header_bytes).data
        values = row.reshape(-1).view(np.uint8).data
        if not self._must_hash(sample, member.field):
            self._pool.read(member.shard, [header, values], member.offset, member)
            self._check_header(header, member)
            return None
        # Read whole and hashed afterwards, every byte would come from main memory twice; hashed in
        # pieces, while they are in the cache, a first reading loses a tenth instead of a third.
        self._pool.read(member.shard, [header, values[:SLAB_BYTES]], member.offset, member)
        self._check_header(header, member)
        hasher = xxhash.xxh3_64(header)
        hasher.update(values[:SLAB_BYTES])
        begin = member.offset + len(header)
        for start in range(SLAB_BYTES, len(values), SLAB_BYTES):
            piece = values[start : start + SLAB_BYTES]
            self._pool.read(member.shard, [piece], begin + start, member)
            hasher.update(piece)
        return hasher.intdigest()

    def _read_planes(self, row: AnyArray, member: StoredArray, sample: int) -> int | None:
        """Read a large raw array slab by slab, each cast and placed while it is in the cache."""
        filler = RowFiller(row, member.row_shape, member.dtype)
        header = self._workspace.header(member.header_bytes)
        self._pool.read(member.shard, [header.data], member.offset, member)
        self._check_header(header.data, member)
        hasher = xxhash.xxh3_64(header.data) if self._must_hash(sample, member.field) else None
        scratch = self._workspace.stored(filler.largest_slab_bytes)
        begin = member.offset + member.header_bytes
        for slab in filler.slabs():
            # Planes outside the crop count for the checksum alone.
            if hasher is None and not filler.keeps(slab):
                continue
            raw = scratch[: slab.bytes]
            self._pool.read(member.shard, [raw.data], begin + slab.offset, member)
            if hasher is not None:
                hasher.update(raw.data)
            filler.put(slab, raw.view(member.dtype))
        return None if hasher is None else hasher.intdigest()

    def _fill_from_memory(
        self, row: AnyArray, member: StoredArray, sample: int, frame: AnyArray
    ) -> None:
        """Check the stored bytes of one member, then decode them into the row."""
        if self._must_hash(sample, member.field):
            hasher = xxhash.xxh3_64()
            hasher.update(frame.data)
            self._check_checksum(hasher.intdigest(), member, sample)
        self._check_header(frame.data, member)
        try:
            self._decode(row, member, frame)
        except ShardError as error:
            raise ShardError(self._damage(member, str(error))) from error

    def _decode(self, row: AnyArray, member: StoredArray, frame: AnyArray) -> None:
        """Decode a frame into the row, through a scratch where the row wants another space."""
        if row.shape == member.row_shape and _is_flat(row):
            scratch = self._workspace.decoded(SLAB_BYTES)
            decode_into(frame.data, member.codec, row.reshape(member.shape), scratch)
            return
        if member.codec == "npy":
            values = frame[member.header_bytes :].view(member.dtype)
        else:
            values = self._workspace.decoded(member.raw_bytes).view(member.dtype)
            decode_into(frame.data, member.codec, values.reshape(member.shape))
        filler = RowFiller(row, member.row_shape, member.dtype)
        for slab in filler.slabs():
            first = slab.offset // member.dtype.itemsize
            filler.put(slab, values[first : first + slab.bytes // member.dtype.itemsize])

    def _any_due(self, samples: NDArray[np.int64], field: str) -> bool:
        """Say whether the stored bytes of any of these are due for a comparison."""
        if self._verify == "first":
            return not bool(self._verified[field][samples].all())
        return self._verify == "always"

    def _must_hash(self, sample: int, field: str) -> bool:
        """Say whether the stored bytes of this member are due for a comparison."""
        if self._verify == "first":
            return not self._verified[field][sample]
        return self._verify == "always"

    def _check_checksum(self, found: int | None, member: StoredArray, sample: int) -> None:
        """Compare a checksum with the table's and remember that it agreed."""
        if found is None:
            return
        if found != member.checksum:
            raise ShardError(
                self._damage(
                    member, f"xxh3-64 is {found:016x}, the table says {member.checksum:016x}"
                )
            )
        self._verified[member.field][sample] = True

    def _check_header(self, stored: memoryview, member: StoredArray) -> None:
        """Compare the stored array's own header with the table."""
        try:
            header = parse_header(stored)
        except ShardError as error:
            raise ShardError(self._damage(member, str(error))) from error
        if (header.shape, header.dtype) != (member.shape, member.dtype):
            raise ShardError(
                self._damage(
                    member,
                    f"the header says {header.dtype} {header.shape}, the table says "
                    f"{member.dtype} {member.shape}",
                )
            )

    def _damage(self, member: StoredArray, problem: str) -> str:
        """Word a damaged member: where it is, what is wrong, what to run next."""
        path = self._files[member.shard].path
        return (
            f"{path}: {member} at byte {member.offset} ({member.bytes} bytes) is damaged: "
            f"{problem}. Run `streaming-balance verify {self._path}`, then {self._remedy}."
        )


def _is_flat(row: AnyArray) -> bool:
    """Say whether the row is one block of memory in C order."""
    return row.flags.c_contiguous
