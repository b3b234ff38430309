"""Headers by anyone are read exactly, and no flipped bit gets past one."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.stream.headers import (
    TarDamageError,
    check_checksum,
    read_header,
    read_plain_header,
)
from tests.stream.tars import header, with_checksum

STYLES = {
    "ustar": header(b"P1.cls", 1),
    "GNU": header(b"P1.cls", 1, magic=b"ustar  \0"),
    "PAX": header(b"PaxHeaders/x", 30, kind=b"x"),
    "long link": header(b"././@LongLink", 200, kind=b"L", magic=b"ustar  \0"),
    "UTF-8": header("Patiënt.cls".encode(), 1),
    # As programs before ustar wrote it: numbers padded with spaces, no magic.
    "spaces": header(b"P1.cls", b"          1 ", kind=b"\0", magic=bytes(8)),
    "base-256": header(b"P1.image", b"\x80" + (9 << 30).to_bytes(11, "big")),
    "prefix": with_checksum(header(b"P1.cls", 1)[:345] + b"folder".ljust(167, b"\0")),
}


def flips(block: bytes) -> list[bytes]:
    """The block with each of its bits flipped."""
    flipped = []
    for bit in range(8 * len(block)):
        copy = bytearray(block)
        copy[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(copy))
    return flipped


@pytest.mark.parametrize("block", STYLES.values(), ids=STYLES)
def test_each_of_4096_flipped_bits_is_found(block: bytes) -> None:
    read_header(block)
    for flipped in flips(block):
        assert read_plain_header(flipped) is None
        with pytest.raises(TarDamageError):
            read_header(flipped)


@pytest.mark.parametrize("form", [b"%06o\0 ", b"%06o \0", b"%07o\0"])
def test_checksums_are_read_as_tar_programs_write_them(form: bytes) -> None:
    block = bytearray(header(b"P1.cls", 7))
    block[148:156] = b" " * 8
    block[148:156] = form % sum(block)
    assert read_plain_header(bytes(block)) == ("P1.cls", 7)
    check_checksum(bytes(block))


def test_a_sum_padded_otherwise_than_the_size_is_refused() -> None:
    block = header(b"P1.cls", 7)
    assert block[148:149] == b"0"
    with pytest.raises(TarDamageError, match="checksum"):
        read_header(block[:148] + b" " + block[149:])


@given(
    name=st.from_regex(r"[A-Za-z0-9_./%-]{1,99}", fullmatch=True),
    size=st.integers(0, 0o77777777777),
    magic=st.sampled_from([b"ustar\x0000", b"ustar  \0"]),
    kind=st.sampled_from([b"0", b"\0", b"5", b"x"]),
)
def test_both_readers_find_what_python_finds(
    name: str, size: int, magic: bytes, kind: bytes
) -> None:
    block = header(name.encode(), size, kind, magic)
    expected = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    found = read_header(block)
    assert (found.name.decode().rstrip("/"), found.size) == (expected.name.rstrip("/"), size)
    plain = read_plain_header(block)
    if plain is not None:
        assert plain == (found.name.decode(), found.size)
        assert kind == b"0"


@given(st.binary(min_size=512, max_size=512))
def test_arbitrary_bytes_are_no_header(block: bytes) -> None:
    assert read_plain_header(block) is None
    with pytest.raises(TarDamageError):
        read_header(block)


def test_the_quick_reader_knows_the_names_of_cohorts() -> None:
    for name in ("P1.cls", "a/b/P_1-x.image.npb", "000012.jpg", "HGG%20x/BraTS18_1.json"):
        assert read_plain_header(header(name.encode(), 3)) == (name, 3)


@pytest.mark.parametrize(
    "name",
    [
        *(b"/P1.cls", b"../P1.cls", b"a/../P1.cls", b"./P1.cls", b".P1.cls", b"a//b.cls"),
        *(b"P1.cls/", b"P1\x01.cls", b"P1\0x.cls", b"", b"a..b"),
    ],
)
def test_the_quick_reader_leaves_strange_names_to_the_other(name: bytes) -> None:
    assert read_plain_header(header(name, 3)) is None
    read_header(header(name, 3))


@pytest.mark.parametrize("field", [b"00000000018\0", b"0000000001x\0", b"-0000000001\0", b"0_1"])
def test_sizes_that_are_no_octal_number_are_refused(field: bytes) -> None:
    block = header(b"P1.cls", field)
    assert read_plain_header(block) is None
    with pytest.raises(TarDamageError, match="is no octal number"):
        read_header(block)


@pytest.mark.parametrize(
    ("field", "size"),
    [
        (b"00000000017\0", 15),
        (b"000000000017", 15),
        (b"         17 ", 15),
        (b"17\0\0\0\0\0\0\0\0\0\0", 15),
        (bytes(12), None),
        (b" " * 12, None),
        (b"\x80" + (10**12).to_bytes(11, "big"), 10**12),
        (b"\x80" + b"\xff" * 11, 2**88 - 1),
    ],
)
def test_sizes_are_read_as_tar_programs_write_them(field: bytes, size: int | None) -> None:
    assert read_header(header(b"P1.cls", field)).size == size


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(TarDamageError, match="is negative"):
        read_header(header(b"P1.cls", b"\xff" * 12))


def test_another_magic_is_refused() -> None:
    with pytest.raises(TarDamageError, match="magic"):
        read_header(header(b"P1.cls", 1, magic=b"USTAR\x0000"))


def test_a_prefix_stands_before_the_name_only_where_ustar_has_one() -> None:
    assert read_header(STYLES["prefix"]).name == b"folder/P1.cls"
    gnu = header(b"P1.cls", 1, magic=b"ustar  \0")
    # GNU tar keeps times there.
    assert read_header(with_checksum(gnu[:345] + b"1".ljust(167, b"\0"))).name == b"P1.cls"


def test_the_prefix_of_star_is_shorter_with_two_times_behind_it() -> None:
    block = header(b"P1.cls", 1)
    times = b"14000000000 14000000001 "
    star = with_checksum(block[:345] + b"folder".ljust(131, b"\0") + times + bytes(8) + b"tar\0")
    found = read_header(star)
    assert (found.name, found.has_rest) == (b"folder/P1.cls", False)


def test_the_sum_taken_from_adler_32_is_the_sum() -> None:
    generator = random.Random(5)
    for _ in range(2000):
        block = bytearray(generator.choices(range(128), k=512))
        block[156:158], block[257:265], block[124:136] = b"0\0", b"ustar  \0", b"00000000001\0"
        block[0:100] = b"P1.cls".ljust(100, b"\0")
        assert read_plain_header(with_checksum(bytes(block))) == ("P1.cls", 1)
    heaviest = b"P1.cls".ljust(100, b"\0") + b"\x7f" * 412
    heaviest = heaviest[:124] + b"00000000001\0" + heaviest[136:]
    heaviest = heaviest[:156] + b"0\0" + heaviest[158:257] + b"ustar  \0" + heaviest[265:]
    assert read_plain_header(with_checksum(heaviest)) == ("P1.cls", 1)


def test_real_headers_are_nearly_all_plain(shared_data: Path) -> None:
    content = (shared_data / "wds_tar/W02_wdsjl_sample/sample.tar").read_bytes()
    with tarfile.open(shared_data / "wds_tar/W02_wdsjl_sample/sample.tar") as archive:
        for info in archive:
            assert read_plain_header(content[info.offset : info.offset + 512]) == (
                info.name,
                info.size,
            )
