"""Headers nobody ever wrote: 200,000 here, 10 million in `make fuzz`; none crashes, hangs or grows.

Most get a right checksum, so that what stands in their fields is really read. Python's tarfile
reads a part of them too: what is accepted here must be what is there.
"""

from __future__ import annotations

import io
import random
import resource
import tarfile
import time
from collections.abc import Iterator

import pytest
from hypothesis import settings

from streaming_balance.errors import ShardError
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.sources import expand
from streaming_balance.stream.tarstream import SampleReader, read_members
from tests.stream.tars import END, header, member, pax, with_checksum

PARTS = 8
DEFAULT_HEADERS, FUZZ_HEADERS = 200_000, 10_000_000
GNU = b"ustar  \0"

# The header to change stands in the middle: a sound member before it and one after.
BASES = [
    (b"", header(b"P2.cls", 5)),
    (b"", header(b"P2.cls", 5, magic=GNU)),
    (b"", header(b"P2.cls", b"          5 ", kind=b"\0", magic=bytes(8))),
    (b"", header(b"P2.cls", b"\x80" + (5).to_bytes(11, "big"), magic=GNU)),
    (b"", header(b"L", 5, b"L", GNU)),
    (b"", header(b"K", 5, b"K", GNU)),
    (b"", header(b"x", 10, b"x")),
    (b"", header(b"g", 10, b"g")),
    (b"", header(b"S", 5, b"S", GNU)),
    (b"", header(b"P2", kind=b"5")),
    (pax({"path": "P2.json", "size": "5"}), header(b"P2", 0)),
    (member(b"L", b"P2.image\0", b"L", GNU), header(b"P2", 5, magic=GNU)),
]
FIELDS = [(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155), (482, 30)]
VALUES = [
    *(b"", b"\0" * 12, b" " * 12, b"\xff" * 12, b"\x80" + b"\0" * 11, b"\x80" + b"\xff" * 11),
    *(b"77777777777\0", b"00000000001 ", b"00000001000\0", b"-0000000001\0", b"0x00000001\0"),
    *(
        b"0",
        b"1",
        b"2",
        b"5",
        b"7",
        b"L",
        b"K",
        b"x",
        b"g",
        b"S",
        b"M",
        b"\x80",
        b"/",
        b"..",
        b"../P2",
    ),
    *(
        b"ustar\x0000",
        GNU,
        b"ustar\0\0\0",
        b"a/b.cls",
        b"P2.",
        b".cls",
        b"\xc3\xa9.cls",
        b"\xe9.cls",
    ),
]
PAYLOADS = [b"hello", b"10 path=a\n", b"10 size=7\n", b"11 size=-1\n", b"999 path=a", b"7 path=\n"]


def changed(base: bytes, generator: random.Random) -> bytes:
    """A header with a few fields or bytes changed, mostly with a right checksum."""
    block = bytearray(base)
    for _ in range(generator.choice((1, 1, 2, 3))):
        if generator.random() < 0.5:
            start, width = generator.choice(FIELDS)
            value = generator.choice(VALUES)[:width]
            block[start : start + len(value)] = value
        else:
            block[generator.randrange(512)] = generator.randrange(256)
    return with_checksum(bytes(block)) if generator.random() < 0.8 else bytes(block)


def mutated_tars(part: int, count: int) -> Iterator[bytes]:
    """Tars with one changed header each."""
    generator = random.Random(part)
    first, last = member(b"P1.cls", b"1"), member(b"P3.cls", b"0") + END
    for _ in range(count):
        before, base = generator.choice(BASES)
        payload = generator.choice(PAYLOADS).ljust(512, b"\0")
        yield first + before + changed(base, generator) + payload + last


def headers_per_part() -> int:
    """How many headers each part changes, in this run."""
    in_fuzz = settings.default is not None and settings.default.max_examples > 10_000
    return (FUZZ_HEADERS if in_fuzz else DEFAULT_HEADERS) // PARTS


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_headers_are_read_or_refused_and_nothing_else_happens(part: int) -> None:
    skip = TarRules(on_error="skip")
    read = 0
    slowest = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, content in enumerate(mutated_tars(part, headers_per_part())):
        started = time.thread_time()
        try:
            members = list(read_members(io.BytesIO(content)))
        except ShardError:
            if number % 8 == 0:
                reader = SampleReader(expand(io.BytesIO(content)), rules=skip)
                assert all(sample.key for sample in reader)
                assert reader.counts.reconcile
                assert reader.counts.skips
        else:
            read += 1
            assert members[0].name == "P1.cls"
            assert sum(member.size for member in members) <= len(content)
        slowest = max(slowest, time.thread_time() - started)
    assert slowest < 5  # a second, and collecting the garbage of whatever ran before
    assert read > headers_per_part() // 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB


def test_what_is_accepted_of_mutated_headers_is_what_python_finds_there() -> None:
    compared = 0
    for content in mutated_tars(99, headers_per_part() // 10):
        if b"L" in (content[1180:1181], content[2204:2205]):
            continue  # of a long name, Python takes what stands before a NUL, whatever its size
        try:
            found = list(read_members(io.BytesIO(content)))
        except ShardError:
            continue
        for member_, info, payload in zip(found, *python_finds(content), strict=False):
            assert (member_.payload_offset, member_.payload.read()) == (info.offset_data, payload)
            # Where GNU tar keeps times and sizes, Python takes the folder of the name from.
            assert info.name == member_.name or info.name.endswith("/" + member_.name)
            compared += 1
    assert compared > 1000


def python_finds(content: bytes) -> tuple[list[tarfile.TarInfo], list[bytes]]:
    """The files Python's tarfile finds; it stops in silence where it understands no more."""
    infos, payloads = [], []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), encoding="utf-8") as archive:
            for info in archive:
                if info.isreg() and (file := archive.extractfile(info)):
                    infos.append(info)
                    payloads.append(file.read())
    except tarfile.ReadError:
        pass
    return infos, payloads
