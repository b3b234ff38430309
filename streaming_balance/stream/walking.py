"""From one header of a tar to the next, up to its end: every byte is accounted for.

    for entry in walk_tar(tar, limits): ...     a file to take, or something to pass over or refuse

A tar ends with two blocks of zeros. Reading stops with `TarDamageError` where that is not so, and
wherever the place of the next header is in doubt. A member that cannot be taken, but whose place is
certain, is an entry with a problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from streaming_balance.storage.layout import BLOCK
from streaming_balance.storage.tar import MAX_MEMBER_BYTES
from streaming_balance.stream.headers import Header, TarDamageError, read_header, read_plain_header
from streaming_balance.stream.names import readable_name
from streaming_balance.stream.pax import MAX_EXTENSION_BYTES, MAX_EXTENSIONS, Extensions
from streaming_balance.stream.samples import Payload

# Tape drives pad a tar to at most a few MiB; more zeros than this are a bomb, not a tar.
MAX_TRAILING_BYTES = 64 << 20
_TRAILING_READ_BYTES = 1 << 20
_MAX_SPARSE_HEADERS = 10_000  # 210,000 holes; each header is 512 bytes of the tar itself
_SPARSE_CONTINUES = 504  # a byte of each further header: whether one more follows
_BEYOND_ANY_TAR = 1 << 100
_ZEROS = bytes(BLOCK)

FILE = "file"
FOLDER = "folder"
_FILES = (b"0", b"7")  # 7 is a contiguous file, which only its writer cared about
_EXTENSIONS = (b"g", b"x", b"X", b"L", b"K")
_WITHOUT_PAYLOAD = {
    b"1": "is a hard link",
    b"2": "is a symbolic link",
    b"3": "is a character device",
    b"4": "is a block device",
    b"6": "is a fifo",
    b"V": "is the name of a tape, not a file",
}
_WITH_PAYLOAD = {
    b"S": "is a sparse file: its holes are not stored",
    b"D": "is GNU tar's list of a folder",
    b"M": "is the rest of a file begun on another tape",
}
_FOREIGN_BEGINNINGS = {
    b"\x1f\x8b": "gzip within what was already decompressed",
    b"\x28\xb5\x2f\xfd": "zstd within what was already decompressed",
    b"BZh": "bzip2: write it anew as .tar, .tar.gz or .tar.zst, or use pipe:bzip2 -dc",
    b"\xfd7zXZ": "xz: write it anew as .tar, .tar.gz or .tar.zst, or use pipe:xz -dc",
    b"\x04\x22\x4d\x18": "lz4: write it anew as .tar, .tar.gz or .tar.zst, or use pipe:lz4 -dc",
    b"PK\x03\x04": "a zip file",
    b"<!": "a web page: is a login needed?",
    b"<html": "a web page: is a login needed?",
    b"<?xml": "an XML answer of a server",
}


class TarBytes(Protocol):
    """Where `walk_tar` gets the bytes of a tar."""

    can_seek: bool
    """Whether payloads can be read later, and any number of times."""
    size: int | None
    """Bytes of the tar; None where that is not known before its end."""

    def block(self, offset: int) -> bytes:
        """Give the 512 bytes from `offset` on; fewer where the tar ends."""
        ...

    def take(self, offset: int, size: int) -> bytes:
        """Give `size` bytes from `offset` on; fewer where the tar ends."""
        ...

    def payload(self, name: str, offset: int, size: int) -> Payload:
        """Give the payload of a member; it ends within `size` where that is known."""
        ...

    def close(self) -> None:
        """Let go of the source."""
        ...


class Entry(NamedTuple):
    """One member of a tar, of whatever kind."""

    kind: str
    """`FILE`, `FOLDER`, or what else it is."""
    name: str
    """Its name, after PAX and GNU extensions."""
    offset: int
    """Where the first header that belongs to it starts, extensions included."""
    payload_offset: int
    """Where its payload starts."""
    size: int
    """Bytes of its payload."""
    problem: str | None
    """Why it cannot be taken, though the next header is certain; None for files and folders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkLimits:
    """How far a tar is trusted."""

    max_member_bytes: int = MAX_MEMBER_BYTES
    """Larger members are refused before anything is allocated; 8 GiB - 1 as in shards of ours."""
    accept_missing_end: bool = False
    """Whether a tar may end without its two zero blocks: a cut between members is not seen then."""


class TarWalk:
    """Walks the members of one tar, once.

    Args:
        tar: its bytes.
        limits: how far to trust it.
        start: byte of the header to start at. What stands before it is read past, but for global
            PAX headers at the very beginning, which hold for all that follows.
        stop: byte of a header to stop before; None walks to the end of the tar.
    """

    def __init__(
        self, tar: TarBytes, limits: WalkLimits, start: int = 0, stop: int | None = None
    ) -> None:
        self.offset = start
        """Where the header looked at last starts; after the walk, where the tar's end starts."""
        self.num_bytes = start
        """After the walk: bytes of the tar, its end and the zeros behind it included."""
        self._stop = _BEYOND_ANY_TAR if stop is None else stop
        self._tar = tar
        self._limits = limits
        self._start = start
        self._extensions = Extensions()
        self._num_extensions = 0
        self._is_first = True
        self._payload_end = start

    def __iter__(self) -> Iterator[Entry]:
        """Walk to the end of the tar.

        Yields:
            Its members in order.

        Raises:
            TarDamageError: the tar is damaged or cut, and where the next header stands is in doubt.
        """
        self._read_beginning()
        block_at = self._tar.block
        total = _BEYOND_ANY_TAR if self._tar.size is None else self._tar.size
        most = self._limits.max_member_bytes
        begin = offset = self._start
        while offset < self._stop:
            self.offset = offset
            block = block_at(offset)
            # Nearly all headers are plain and alone: nothing before them, nothing to look up.
            if begin == offset and not self._extensions.everywhere:
                plain = read_plain_header(block)
                if plain is not None:
                    name, size = plain
                    end = offset + BLOCK + size
                    if size <= most and end <= total:
                        self._is_first = False
                        self._payload_end = end
                        yield Entry(FILE, name, offset, offset + BLOCK, size, None)
                        begin = offset = end + (-size & (BLOCK - 1))
                        continue
            entry, after = self._look(block, begin, offset)
            if after is None:
                return
            if entry is not None:
                yield entry
            if not self._extensions.wait_for_a_member:
                begin = after
            offset = after
        self.offset = offset

    def _read_beginning(self) -> None:
        """Take in the global headers before the first member when starting further on."""
        offset = 0
        while offset < self._start:
            header = self._header(self._tar.block(offset), offset)
            if header.kind != b"g":
                break
            offset = self._extend(header, offset)
        self._num_extensions = 0
        self._is_first = self._start == 0

    def _look(self, block: bytes, begin: int, offset: int) -> tuple[Entry | None, int | None]:
        """Read any header: give the member it belongs to, if any, and where the next one stands."""
        if len(block) < BLOCK:
            self._check_cut(block, offset)
            return None, None
        if block == _ZEROS:
            self._check_end(offset)
            return None, None
        header = self._header(block, offset)
        if header.kind in _EXTENSIONS:
            return None, self._extend(header, offset)
        entry = self._entry(header, begin, offset)
        self._is_first = False
        self._num_extensions = 0
        self._extensions.start_next()
        self._payload_end = entry.payload_offset + entry.size
        return entry, entry.payload_offset + entry.size + (-entry.size & (BLOCK - 1))

    def _header(self, block: bytes, offset: int) -> Header:
        """Read a header; at the very beginning, say what the bytes look like if they are none."""
        try:
            return read_header(block)
        except TarDamageError as error:
            for beginning, what in _FOREIGN_BEGINNINGS.items():
                if offset == 0 and block.lstrip()[:8].lower().startswith(beginning.lower()):
                    raise TarDamageError(f"this is no tar but {what} ({error})") from error
            raise

    def _extend(self, header: Header, offset: int) -> int:
        """Take in an extension; give where the next header stands."""
        size = header.size
        if size is None or size > MAX_EXTENSION_BYTES:
            raise TarDamageError(
                f"an extended header of type {header.kind.decode('ascii', 'replace')!r} claims "
                f"{size if size is None else format(size, ',')} bytes; at most "
                f"{MAX_EXTENSION_BYTES:,} are taken"
            )
        self._num_extensions += 1
        if self._num_extensions > MAX_EXTENSIONS:
            raise TarDamageError(
                f"more than {MAX_EXTENSIONS} extended headers stand before one member"
            )
        payload = self._tar.take(offset + BLOCK, size)
        if len(payload) < size:
            raise self._cut(f"an extended header of {size:,} bytes", offset + BLOCK + len(payload))
        if header.kind == b"g":
            self._extensions.add_everywhere(payload, is_first=self._is_first)
        else:
            self._extensions.add(header.kind, payload)
        return offset + BLOCK + size + (-size & (BLOCK - 1))

    def _entry(self, header: Header, begin: int, offset: int) -> Entry:
        """Judge a member by its header and what stood before it."""
        raw_name, size, problem = self._extensions.applied_to(header)
        name, wrong_name = readable_name(raw_name)
        payload_offset = offset + BLOCK
        if header.kind == b"5" or (header.kind == b"0" and name.endswith("/")):
            self._refuse_bytes(name, "is a folder", size)
            return Entry(FOLDER, name, begin, payload_offset, 0, None)
        if header.kind in _WITHOUT_PAYLOAD:
            what = _WITHOUT_PAYLOAD[header.kind]
            self._refuse_bytes(name, what, size)
            return Entry(FILE, name, begin, payload_offset, 0, what)
        if header.kind not in _FILES and header.kind not in _WITH_PAYLOAD:
            kind = header.kind.decode("ascii", "backslashreplace")
            raise TarDamageError(f"member {name!r} is of the unknown type {kind!r}")
        if size is None:
            raise TarDamageError(f"member {name!r} has no size")
        if header.kind == b"S":
            payload_offset = self._after_sparse_headers(header, name, payload_offset)
        self._check_fits(name, payload_offset + size)
        problem = _WITH_PAYLOAD.get(header.kind) or problem or wrong_name
        if size > self._limits.max_member_bytes:
            problem = problem or (
                f"has {size:,} bytes, over max_member_bytes ({self._limits.max_member_bytes:,})"
            )
        return Entry(FILE, name, begin, payload_offset, size, problem)

    def _after_sparse_headers(self, header: Header, name: str, offset: int) -> int:
        """Pass over the further headers of a GNU sparse file; give where its payload starts."""
        more = header.is_gnu_extended
        for _ in range(_MAX_SPARSE_HEADERS):
            if not more:
                return offset
            block = self._tar.block(offset)
            if len(block) < BLOCK:
                raise self._cut(f"the list of holes of {name!r}", offset + len(block))
            more = block[_SPARSE_CONTINUES] != 0
            offset += BLOCK
        raise TarDamageError(f"member {name!r} lists more holes than any file has")

    def _refuse_bytes(self, name: str, what: str, size: int | None) -> None:
        """Raise if a member that has no payload claims one: readers differ on what follows then."""
        if size:
            raise TarDamageError(
                f"member {name!r} {what} and claims {size:,} bytes, which may or may not follow"
            )

    def _check_fits(self, name: str, end: int) -> None:
        """Raise if a payload ends behind the end of the tar, where that is known."""
        if self._tar.size is not None and end > self._tar.size:
            raise TarDamageError(
                f"member {name!r} needs bytes up to {end}, but only {self._tar.size} are there: "
                "it was cut"
            )

    def _check_cut(self, block: bytes, offset: int) -> None:
        """Raise unless a tar may end here, where its next header or its end is due."""
        size = self._tar.size
        # Payloads that nobody takes are passed over: of a stream, only now is it known that it
        # ended within one.
        if size is not None and size < self._payload_end:
            self.offset = size
            raise self._cut(f"the payload of a member up to byte {self._payload_end}", size)
        if offset == 0 and not block:
            raise TarDamageError("it is empty, not a tar")
        whole = not block and not self._is_first and not self._extensions.wait_for_a_member
        if not (whole and self._limits.accept_missing_end):
            raise self._cut("a header or the end of the tar", offset + len(block))
        self.num_bytes = offset if self._tar.size is None else min(offset, self._tar.size)

    def _check_end(self, offset: int) -> None:
        """Check that two zero blocks end the tar, that something came before, and zeros follow."""
        if self._extensions.wait_for_a_member:
            raise TarDamageError("the tar ends between an extended header and its member")
        if self._is_first:
            raise TarDamageError("it holds no member, only zeros")
        second = self._tar.block(offset + BLOCK)
        if len(second) < BLOCK and (second or not self._limits.accept_missing_end):
            raise self._cut("the second of two zero blocks", offset + BLOCK + len(second))
        if second.strip(b"\0"):
            raise TarDamageError(
                "one block of zeros stands where a header or two such blocks are due"
            )
        at = offset + BLOCK + len(second)
        while chunk := self._tar.take(at, _TRAILING_READ_BYTES):
            if chunk != bytes(len(chunk)):
                raise TarDamageError(f"bytes follow after the end of the tar at byte {offset}")
            at += len(chunk)
            if at - offset > MAX_TRAILING_BYTES:
                raise TarDamageError(f"over {MAX_TRAILING_BYTES:,} zeros follow the end of the tar")
        if at % BLOCK:
            raise self._cut(f"a block of {BLOCK} zeros", at)
        self.num_bytes = at

    def _cut(self, due: str, end: int) -> TarDamageError:
        """Say that the tar ends too early."""
        end = end if self._tar.size is None else min(end, self._tar.size)
        return TarDamageError(f"the tar ends at byte {end}, where {due} is due: it was cut")
