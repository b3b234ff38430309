"""Tars of regular files only: headers written byte for byte alike, read strictly.

Readers of tars commonly stop in silence at a cut, skip what they do not know, and trust sizes.
Here a file is either exactly a plain ustar archive, or an error that says at which byte it is not.
Nothing is ever extracted to disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from streaming_balance.errors import ShardError
from streaming_balance.storage.layout import BLOCK

OWNER = b"streaming-balance"  # also tells the packer that a shard is its own work
END_OF_TAR = bytes(2 * BLOCK)
MAX_MEMBER_BYTES = 0o77777777777  # eleven octal digits: 8 GiB - 1

_NAME_BYTES = 100
_PREFIX_BYTES = 155
_CHECKSUM = slice(148, 156)
_OCTAL = re.compile(rb"[0-7]+[ \0]*")
_TRAILING_READ_BYTES = 1 << 20
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a fifo",
    b"7": "a contiguous file",
    b"g": "a PAX global header",
    b"x": "a PAX header",
    b"L": "a GNU long name",
    b"K": "a GNU long link",
    b"S": "a GNU sparse file",
    b"\0": "a file of the format before ustar",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """One regular file in a tar."""

    name: str
    """Its name, relative, ASCII."""
    header_offset: int
    """Where its 512-byte header starts."""
    payload_offset: int
    """Where its bytes start, a multiple of 512."""
    size: int
    """How many bytes it has."""


def member_header(name: str, size: int) -> bytes:
    r"""Write the header of a regular file, the same whoever packs it and when.

    Args:
        name: its name, printable ASCII, relative; over 100 characters it must have a slash that
            leaves at most 155 before and 100 after it.
        size: its bytes, below 8 GiB.

    Returns:
        512 bytes.

    Raises:
        ShardError: the name or the size does not fit a ustar header.

    Examples:
        >>> header = member_header("P1.cls", 1)
        >>> header[:6], header[124:136], len(header)
        (b'P1.cls', b'00000000001\x00', 512)
    """
    problem = _name_problem(name)
    if problem:
        raise ShardError(f"a shard cannot hold a member called {name[:200]!r}: its name {problem}")
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise ShardError(
            f"member {name!r} has {size:,} bytes; a tar member holds at most "
            f"{MAX_MEMBER_BYTES:,}: pack smaller samples"
        )
    prefix, short = _split_name(name)
    fields = (
        (short, 100),
        (b"0000644\0", 8),  # mode: readable by all, writable by the owner
        (b"0000000\0", 8),  # owner's number
        (b"0000000\0", 8),  # group's number
        (b"%011o\0" % size, 12),
        (b"00000000000\0", 12),  # modification time: bytes must not depend on the clock
        (b" " * 8, 8),  # the checksum counts itself as spaces
        (b"0", 1),
        (b"", 100),
        (b"ustar\x0000", 8),
        (OWNER, 32),
        (OWNER, 32),
        (b"0000000\0", 8),
        (b"0000000\0", 8),
        (prefix, 155),
        (b"", 12),
    )
    header = bytearray(b"".join(value.ljust(width, b"\0") for value, width in fields))
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


def padding(size: int) -> bytes:
    """Give the zeros that follow a payload of `size` bytes up to the next block.

    Examples:
        >>> len(padding(1)), len(padding(512))
        (511, 0)
    """
    return bytes(-size % BLOCK)


def scan_tar(path: Path) -> Iterator[TarMember]:
    """Walk the members of a tar, checking everything but the payloads.

    Args:
        path: the tar.

    Yields:
        Its members in order.

    Raises:
        ShardError: the file is missing, empty, cut, longer than its end, or holds anything but
            regular files with relative names; path and byte offset are named.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ShardError(f"{path}: empty file, not a tar")
            yield from _members(file, path, size)
    except OSError as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error


def _members(file: BinaryIO, path: Path, size: int) -> Iterator[TarMember]:
    """Walk the members of an opened tar of `size` bytes up to its end."""
    offset = 0
    while True:
        header = _read(file, path, offset, BLOCK, size)
        if not any(header):
            _check_end(file, path, offset, size)
            return
        try:
            member = parse_member_header(header, offset)
        except ShardError as error:
            raise ShardError(f"{path}: {error}") from error
        end = member.payload_offset + member.size
        after = end + -end % BLOCK
        if after > size:
            raise ShardError(
                f"{path}: member {member.name!r} at byte {offset} needs bytes up to {after}, the "
                f"file ends at {size}: it was cut"
            )
        if any(_read(file, path, end, after - end, size)):
            raise ShardError(f"{path}: padding at byte {end}, after {member.name!r}, is not zero")
        yield member
        offset = after


def parse_member_header(header: bytes, offset: int) -> TarMember:
    """Read one header strictly.

    Args:
        header: 512 bytes, not all zero.
        offset: where they stand in the file.

    Returns:
        The member.

    Raises:
        ShardError: any bit of the header is not as a plain ustar file's must be.
    """
    place = f"header at byte {offset}"
    expected = sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ")
    found = header[_CHECKSUM]
    if found not in (b"%06o\0 " % expected, b"%06o \0" % expected, b"%07o\0" % expected):
        raise ShardError(f"{place}: checksum {found!r}, its bytes give {expected:06o}")
    if header[257:265] not in (b"ustar\x0000", b"ustar  \0"):
        raise ShardError(f"{place}: magic {header[257:265]!r} is not ustar's")
    kind = header[156:157]
    if kind != b"0":
        called = _REFUSED_TYPES.get(kind, f"of unknown type {kind!r}")
        raise ShardError(f"{place}: the member is {called}; a shard holds regular files only")
    numbers = {"mode": 100, "uid": 108, "gid": 116}
    for name, start in numbers.items():
        _octal(header[start : start + 8], f"{place}: {name}")
    size = _octal(header[124:136], f"{place}: size")
    _octal(header[136:148], f"{place}: modification time")
    name = _member_name(header, place)
    return TarMember(name=name, header_offset=offset, payload_offset=offset + BLOCK, size=size)


def _octal(field: bytes, what: str) -> int:
    """Read an octal number; base-256 and negative numbers are refused."""
    if not _OCTAL.fullmatch(field):
        raise ShardError(f"{what} {field!r} is no octal number")
    return int(field.rstrip(b" \0"), 8)


def _member_name(header: bytes, place: str) -> str:
    """Join name and prefix, and refuse what leads out of a folder or is no plain ASCII."""
    short, is_whole = _field_text(header[:_NAME_BYTES])
    prefix, is_prefix_whole = b"", True
    if header[257:265] == b"ustar\x0000":
        prefix, is_prefix_whole = _field_text(header[345 : 345 + _PREFIX_BYTES])
    name = (prefix + b"/" + short if prefix else short).decode("latin-1")
    problem = _name_problem(name)
    if not (is_whole and is_prefix_whole):
        problem = "holds NUL"
    if problem:
        raise ShardError(f"{place}: the member's name {name[:80]!r} {problem}")
    return name


def _field_text(field: bytes) -> tuple[bytes, bool]:
    """Cut a field at its first NUL; also say whether only NULs follow."""
    text, _, rest = field.partition(b"\0")
    return text, not any(rest)


def _name_problem(name: str) -> str | None:
    """Say what is wrong with a member's name, or None."""
    if not name:
        return "is empty"
    if not all(" " <= letter <= "~" for letter in name) or "\\" in name:
        return "is not printable ASCII without backslashes"
    if any(part in {"", ".", ".."} for part in name.split("/")):
        return "is not relative, or leads out of its folder"
    return None


def _split_name(name: str) -> tuple[bytes, bytes]:
    """Cut a long name at a slash into ustar's prefix and name."""
    encoded = name.encode("ascii")
    if len(encoded) <= _NAME_BYTES:
        return b"", encoded
    cut = encoded.find(b"/", len(encoded) - _NAME_BYTES - 1)
    if not 0 < cut <= _PREFIX_BYTES:
        raise ShardError(
            f"member name {name!r} has {len(name)} characters; a tar header holds "
            f"{_NAME_BYTES}: give the patient {name.partition('.')[0]!r} a shorter id"
        )
    return encoded[:cut], encoded[cut + 1 :]


def _check_end(file: BinaryIO, path: Path, offset: int, size: int) -> None:
    """Check that two zero blocks end the tar and only zeros follow, in whole blocks."""
    if offset + len(END_OF_TAR) > size:
        raise ShardError(f"{path}: one zero block at byte {offset} where a tar ends with two")
    if size % BLOCK:
        raise ShardError(f"{path}: {size} bytes are no whole number of {BLOCK}-byte blocks")
    for start in range(offset, size, _TRAILING_READ_BYTES):
        count = min(_TRAILING_READ_BYTES, size - start)
        if any(_read(file, path, start, count, size)):
            raise ShardError(f"{path}: bytes follow the end of the tar at byte {offset}")


def _read(file: BinaryIO, path: Path, offset: int, count: int, size: int) -> bytes:
    """Read exactly `count` bytes, which must lie inside the file."""
    if offset + count > size:
        raise ShardError(
            f"{path}: the file ends at byte {size}, where a header at byte {offset} or the end "
            "of the tar is due: it was cut"
        )
    found = os.pread(file.fileno(), count, offset)
    if len(found) != count:
        raise ShardError(f"{path}: read {len(found)} of {count} bytes at byte {offset}")
    return found
