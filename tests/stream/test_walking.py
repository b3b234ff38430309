"""Every byte of a tar is accounted for, whoever wrote it; nothing it claims is believed."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from shutil import which

import pytest

from streaming_balance.errors import ShardError
from streaming_balance.stream.rules import MissingEnd, TarRules
from streaming_balance.stream.tarstream import StreamMember, read_members
from tests.stream.tars import COHORT, END, header, member, pax, put, tar_of, with_checksum

SKIP = TarRules(on_error="skip")


def members(content: bytes, rules: TarRules | None = None) -> list[StreamMember]:
    """Walk bytes as they come from a pipe."""
    return list(read_members(io.BytesIO(content), rules=rules))


def both(tmp_path: Path, content: bytes, rules: TarRules | None = None) -> dict[str, bytes]:
    """Walk bytes as a stream and as a file on disk; both must find the same."""
    streamed = [
        (m.name, m.offset, m.payload_offset, m.payload.read()) for m in members(content, rules)
    ]
    local = [
        (m.name, m.offset, m.payload_offset, m.payload.read())
        for m in read_members(put(tmp_path, content), rules=rules)
    ]
    assert streamed == local
    return {name: payload for name, _, _, payload in local}


def refused(tmp_path: Path, content: bytes, problem: str, rules: TarRules | None = None) -> None:
    """Check that bytes are refused for a reason, as a stream and as a file on disk."""
    with pytest.raises(ShardError, match=problem):
        members(content, rules)
    with pytest.raises(ShardError, match=problem):
        list(read_members(put(tmp_path, content), rules=rules))


LONG = {
    "P" * 99 + ".cls": b"1",
    "P" * 101 + ".cls": b"22",
    "folder/" * 20 + "P.cls": b"333",
    "ü" * 60 + ".cls": b"4444",
    "n" * 600 + ".cls": bytes(513),
}


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_large_numbers_of_python_are_read(tmp_path: Path, format_: int) -> None:
    assert both(tmp_path, tar_of(LONG, format_)) == LONG


@pytest.mark.skipif(which("tar") is None, reason="GNU tar is not installed")
@pytest.mark.parametrize("format_", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_every_format_of_gnu_tar_is_read(tmp_path: Path, format_: str) -> None:
    folder = tmp_path / "files"
    (folder / "in").mkdir(parents=True)
    short = {"P1.cls": b"1", "P1.image.npb": bytes(5000), "in/P2.cls": b"", "in/Ö.cls": b"0"}
    stored = short if format_ in ("v7", "ustar") else {**short, "L" * 150 + ".cls": b"x"}
    for name, payload in stored.items():
        (folder / name).write_bytes(payload)
    command = ["tar", "--create", f"--format={format_}", "--file", "../a.tar", "--sort=name"]
    subprocess.run([*command, *stored], cwd=folder, check=True)
    content = (tmp_path / "a.tar").read_bytes()
    assert both(tmp_path, content) == stored
    subprocess.run([*command, "."], cwd=folder, check=True)
    content = (tmp_path / "a.tar").read_bytes()
    assert both(tmp_path, content) == {f"./{name}": payload for name, payload in stored.items()}


def test_a_pax_header_shifts_name_size_and_payload(tmp_path: Path) -> None:
    content = (
        pax({"path": "really.cls", "size": "700", "mtime": "1.5"})
        + header(b"other", 3)
        + b"x" * 700
        + bytes(324)
        + member(b"next.cls", b"1")
        + END
    )
    found = members(content)
    assert [(m.name, m.offset, m.payload_offset, m.size) for m in found] == [
        ("really.cls", 0, 1536, 700),
        ("next.cls", 2560, 3072, 1),
    ]
    assert both(tmp_path, content) == {"really.cls": b"x" * 700, "next.cls": b"1"}


def test_a_global_header_at_the_beginning_holds_for_all_that_follow(tmp_path: Path) -> None:
    content = (
        pax({"comment": "0123456789abcdef"}, b"g")
        + pax({"size": "2"}, b"g")
        + header(b"P1.cls", 1)
        + b"ab".ljust(512, b"\0")
        + pax({"size": "1"})
        + header(b"P2.cls", 5)
        + b"c".ljust(512, b"\0")
        + pax({"comment": "only words"}, b"g")
        + header(b"P3.cls", 0)
        + b"de".ljust(512, b"\0")
        + END
    )
    assert both(tmp_path, content) == {"P1.cls": b"ab", "P2.cls": b"c", "P3.cls": b"de"}


def test_a_global_header_that_changes_names_or_sizes_later_on_is_refused(tmp_path: Path) -> None:
    for record in ({"size": "2"}, {"path": "x"}, {"GNU.sparse.size": "2"}):
        content = member(b"P1.cls", b"1") + pax(record, b"g") + member(b"P2.cls", b"2") + END
        refused(tmp_path, content, "at byte 1024: a PAX global header between members sets")


def test_gnu_sizes_beyond_octal_are_read(tmp_path: Path) -> None:
    wide = header(b"P1.cls", b"\x80" + (700).to_bytes(11, "big"))
    assert both(tmp_path, wide + b"x" * 700 + bytes(324) + END) == {"P1.cls": b"x" * 700}


REFUSED = {
    b"1": "is a hard link",
    b"2": "is a symbolic link",
    b"3": "is a character device",
    b"4": "is a block device",
    b"6": "is a fifo",
    b"V": "is the name of a tape",
    b"S": "is a sparse file",
    b"D": "is GNU tar's list of a folder",
    b"M": "is the rest of a file begun on another tape",
}


@pytest.mark.parametrize(("kind", "what"), REFUSED.items(), ids=[k.decode() for k in REFUSED])
def test_what_is_no_file_is_refused_by_name_and_place(
    tmp_path: Path, kind: bytes, what: str
) -> None:
    payload = b"list" if kind in b"SDM" else b""
    content = member(b"P0.cls", b"1") + member(b"P1.cls", payload, kind) + member(b"P2.cls") + END
    refused(tmp_path, content, f"member 'P1.cls' at byte 1024 {what}")
    assert both(tmp_path, content, SKIP) == {"P0.cls": b"1", "P2.cls": b""}


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"5", b"6"])
def test_a_payload_where_none_belongs_ends_the_reading(tmp_path: Path, kind: bytes) -> None:
    content = member(b"P1.cls", b"bytes", kind) + member(b"P2.cls") + END
    refused(tmp_path, content, "claims 5 bytes, which may or may not follow", SKIP)


@pytest.mark.parametrize("kind", [b"8", b"A", b"N", b"Z", b"\x80", b"\1"])
def test_a_type_nobody_knows_ends_the_reading(tmp_path: Path, kind: bytes) -> None:
    refused(tmp_path, member(b"P1.cls", b"1", kind) + END, "of the unknown type", SKIP)


def test_folders_are_passed_over_by_type_and_by_slash(tmp_path: Path) -> None:
    content = (
        member(b"a/", kind=b"5")
        + member(b"b", kind=b"5")
        + member(b"c/", kind=b"\0", magic=bytes(8))
        + member(b"c/P1.cls", b"1", kind=b"7")
        + END
    )
    assert both(tmp_path, content) == {"c/P1.cls": b"1"}


NAMES = {
    b"/etc/P1.cls": "absolute",
    b"../P1.cls": r"leads out of its folder",
    b"P1\0x.cls": "NUL",
    b"P1\x1b[2J.cls": "control character",
    b"P\xff.cls": "no UTF-8",
    b"": "no name",
}


@pytest.mark.parametrize(("name", "problem"), NAMES.items(), ids=[repr(name) for name in NAMES])
def test_names_that_lead_elsewhere_are_refused_and_can_be_left_out(
    tmp_path: Path, name: bytes, problem: str
) -> None:
    content = member(b"P0.cls", b"1") + member(name, b"x") + member(b"P2.cls", b"0") + END
    refused(tmp_path, content, f"at byte 1024 .*{problem}")
    assert both(tmp_path, content, SKIP) == {"P0.cls": b"1", "P2.cls": b"0"}


def test_a_name_of_ten_kilobytes_is_refused(tmp_path: Path) -> None:
    content = tar_of({"n" * 10_000 + ".cls": b"1", "P2.cls": b"0"})
    refused(tmp_path, content, "has a name of 10,004 bytes, over 4,096")
    assert both(tmp_path, content, SKIP) == {"P2.cls": b"0"}


def test_nul_in_a_pax_path_is_refused(tmp_path: Path) -> None:
    content = pax({"path": "P1\0.cls"}) + member(b"P1.cls", b"1") + END
    refused(tmp_path, content, "NUL")


def test_two_long_names_for_one_member_are_refused(tmp_path: Path) -> None:
    gnu = b"ustar  \0"
    content = (
        member(b"././@LongLink", b"first.cls\0", b"L", gnu)
        + member(b"././@LongLink", b"second.cls\0", b"L", gnu)
        + member(b"P1.cls", b"1", magic=gnu)
        + member(b"./P2.cls", b"0")
        + END
    )
    refused(tmp_path, content, "'first.cls' at byte 0 has two GNU long names")
    assert both(tmp_path, content, SKIP) == {"./P2.cls": b"0"}


def test_two_pax_headers_for_one_member_are_refused(tmp_path: Path) -> None:
    content = pax({"size": "1"}) + pax({"size": "2"}) + member(b"P1.cls", b"1") + END
    refused(tmp_path, content, "second PAX header", SKIP)


@pytest.mark.parametrize("kind", [b"x", b"L", b"K"])
def test_an_extension_without_its_member_is_an_error(tmp_path: Path, kind: bytes) -> None:
    extension = pax({"path": "P1.cls"}) if kind == b"x" else member(b"l", b"P1.cls\0", kind)
    refused(tmp_path, member(b"P0.cls") + extension + END, "between an extended header and")
    refused(
        tmp_path,
        member(b"P0.cls") + extension,
        "was cut",
        TarRules(missing_end="accept"),
    )


def hole_list(count: int) -> bytes:
    """A GNU sparse member with `count` further headers."""
    first = bytearray(header(b"P1.cls", 3, b"S", b"ustar  \0"))
    first[482] = count > 0
    more = b"".join(bytes(504) + bytes([at < count - 1]) + bytes(7) for at in range(count))
    return with_checksum(bytes(first)) + more + b"abc".ljust(512, b"\0")


@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_follows_a_sparse_member_is_found(tmp_path: Path, count: int) -> None:
    content = hole_list(count) + member(b"P2.cls", b"0") + END
    refused(tmp_path, content, "is a sparse file")
    assert both(tmp_path, content, SKIP) == {"P2.cls": b"0"}


# What a header can claim to take memory or time away, and the reason it is refused for.
GREEDY = {
    "5,000 nested PAX headers": (
        pax({"comment": "x"}) * 5000 + member(b"P1.cls") + END,
        "second PAX header",
    ),
    "5,000 global headers": (
        pax({"comment": "x"}, b"g") * 5000 + member(b"P1.cls") + END,
        "more than 16 extended headers",
    ),
    "5,000 long names": (
        member(b"L", b"P1.cls\0", b"L") * 5000 + member(b"P1.cls") + END,
        "more than 16 extended headers",
    ),
    "long name of 4 GiB": (
        header(b"L", 4 << 30, b"L") + bytes(4096),
        "claims 4,294,967,296 bytes; at most 1,048,576",
    ),
    "PAX header of 8 EiB": (
        header(b"x", b"\x80" + (8 << 60).to_bytes(11, "big"), b"x") + bytes(4096),
        "at most 1,048,576",
    ),
    "member of 8 EiB": (
        header(b"P1.cls", b"\x80" + (8 << 60).to_bytes(11, "big")) + bytes(4096),
        "needs bytes up to|over max_member_bytes",
    ),
    "member of 8 EiB by PAX": (
        pax({"size": str(8 << 60)}) + header(b"P1.cls", 1) + bytes(4096),
        "needs bytes up to|over max_member_bytes",
    ),
    "member of 7 GiB that is not there": (
        header(b"P1.cls", 7 << 30) + bytes(4096),
        "needs bytes up to",
    ),
    "negative size": (header(b"P1.cls", b"\xff" * 12) + END, "is negative"),
    "negative size by PAX": (
        pax({"size": "-1"}) + header(b"P1.cls", 1) + END,
        "is no number",
    ),
    "endless list of holes": (hole_list(20_000), "more holes than any file has"),
    "100,000 PAX records": (
        pax({f"k{number}": "" for number in range(90_000)}) + member(b"P1.cls", b"1") + bytes(512),
        "was cut",
    ),
}


@pytest.mark.parametrize(("content", "problem"), GREEDY.values(), ids=GREEDY)
def test_greedy_headers_cost_neither_memory_nor_time(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = put(tmp_path, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    for source in (path, io.BytesIO(content)):
        with pytest.raises(ShardError, match=problem):
            list(read_members(source))
    assert time.process_time() - started < 2  # both sources
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_memory_follows_what_arrives_not_what_a_header_claims() -> None:
    """A pipe says 7 GiB will come, to a process that may have two."""
    program = (
        "import resource, sys\n"
        "from streaming_balance.stream.tarstream import read_samples\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "list(read_samples('-'))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        input=header(b"P1.image", 7 << 30) + bytes(1 << 20),
        capture_output=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert b"ShardError" in answer.stderr
    assert b"the stream ends at 1049088: it was cut" in answer.stderr


def test_members_over_the_cap_are_refused_and_can_be_left_out(tmp_path: Path) -> None:
    content = tar_of({"P1.cls": b"1", "P2.cls": b"12345", "P3.cls": b"1"})
    refused(tmp_path, content, "over max_member_bytes .4.", TarRules(max_member_bytes=4))
    found = both(tmp_path, content, TarRules(max_member_bytes=4, on_error="skip"))
    assert found == {"P1.cls": b"1", "P3.cls": b"1"}


def test_a_cut_at_every_byte_is_an_error_or_loses_nothing(tmp_path: Path) -> None:
    contents = dict(list(COHORT.items())[:3])
    content = tar_of(contents)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    for cut in range(len(content)):
        if cut >= end + 1024 and cut % 512 == 0:
            assert {m.name: m.payload.read() for m in members(content[:cut])} == contents
            continue
        with pytest.raises(ShardError, match=r"cut|empty"):
            members(content[:cut])
    for cut in range(0, len(content), 37):
        if not (cut >= end + 1024 and cut % 512 == 0):
            with pytest.raises(ShardError, match=r"cut|empty"):
                list(read_members(put(tmp_path, content[:cut])))


def test_an_end_that_is_not_written_can_be_done_without(tmp_path: Path) -> None:
    accept = TarRules(missing_end="accept")
    content = member(b"P1.cls", b"1") + member(b"P2.cls", b"0")
    refused(
        tmp_path, content, "at byte 2048: .*where a header or the end of the tar is due: it was cut"
    )
    assert both(tmp_path, content, accept) == {"P1.cls": b"1", "P2.cls": b"0"}
    assert both(tmp_path, content + bytes(512), accept) == {"P1.cls": b"1", "P2.cls": b"0"}
    assert both(tmp_path, content[:-500], accept) == {"P1.cls": b"1", "P2.cls": b"0"}
    refused(tmp_path, content[:-512], "cut", accept)
    refused(tmp_path, content[:-513], "cut", accept)
    refused(tmp_path, content + bytes(511), "cut", accept)


def test_bytes_behind_the_end_are_an_error(tmp_path: Path) -> None:
    content = tar_of({"P1.cls": b"1"})
    refused(tmp_path, content + content, "bytes follow after the end of the tar at byte 1024")
    refused(tmp_path, content + bytes(3 << 20) + b"x" + bytes(511), "bytes follow after the end")
    assert both(tmp_path, content + bytes(3 << 20)) == {"P1.cls": b"1"}
    refused(tmp_path, content + bytes(100), "was cut")


def test_a_block_of_zeros_between_members_is_an_error(tmp_path: Path) -> None:
    content = member(b"P1.cls", b"1") + bytes(512) + member(b"P2.cls", b"0") + END
    refused(tmp_path, content, "one block of zeros", SKIP)


def test_endless_zeros_are_given_up(tmp_path: Path) -> None:
    path = tmp_path / "zeros.tar"
    path.write_bytes(tar_of({"P1.cls": b"1"}))
    with path.open("r+b") as file:
        file.truncate(70 << 20)  # a hole: takes no room
    with pytest.raises(ShardError, match="over 67,108,864 zeros"):
        list(read_members(str(path)))
    with Path("/dev/zero").open("rb") as zeros, pytest.raises(ShardError, match="holds no member"):
        list(read_members(zeros))


@pytest.mark.parametrize("content", [b"", END, bytes(10240)])
def test_a_tar_without_members_is_an_error_not_an_end(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, content, "is empty, not a tar|holds no member")


FOREIGN = {
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"\n  <!DOCTYPE html>": "a web page",
    b"<HTML><body>login": "a web page",
    b"<?xml version": "XML",
    b"\x89PNG\r\n": "checksum",
}


@pytest.mark.parametrize(
    ("beginning", "what"), FOREIGN.items(), ids=[repr(text) for text in FOREIGN]
)
def test_what_is_no_tar_at_all_is_called_by_its_name(
    tmp_path: Path, beginning: bytes, what: str
) -> None:
    refused(tmp_path, beginning.ljust(2048, b"x"), what)


def test_padding_may_hold_anything(tmp_path: Path) -> None:
    content = header(b"P1.cls", 1) + b"1" + b"\xff" * 511 + member(b"P2.cls", b"0") + END
    assert both(tmp_path, content) == {"P1.cls": b"1", "P2.cls": b"0"}


@pytest.mark.skipif(sys.platform != "linux", reason="holes in files are made as on Linux")
def test_passing_over_volumes_reads_none_of_them(tmp_path: Path) -> None:
    path = tmp_path / "volumes.tar"
    volume = 6 << 30
    with path.open("wb") as file:
        for number in range(20):
            file.write(header(b"P%d.image" % number, volume))
            file.seek(volume, io.SEEK_CUR)
            file.write(member(b"P%d.cls" % number, b"1"))
        file.write(END)
    started = time.process_time()
    found = list(read_members(str(path)))
    assert time.process_time() - started < 1  # 120 GiB
    assert [m.size for m in found] == [volume, 1] * 20
    assert all(m.payload.read() == b"1" for m in found[1::2])


@pytest.mark.parametrize("missing_end", ["refuse", "accept"])
def test_a_cut_within_a_header_whose_rest_is_zeros_is_a_cut(
    missing_end: MissingEnd, tmp_path: Path
) -> None:
    # tarfile writes zeros behind the magic of ustar, so what is left of the header adds up.
    content = tar_of({"P1.cls": b"1", "P2.cls": b""}, tarfile.USTAR_FORMAT)
    assert content[1024 + 265 : 1024 + 329] == bytes(64)
    rules = TarRules(missing_end=missing_end)
    for length in (265, 300, 329, 345, 346, 400, 511):
        refused(tmp_path, content[: 1024 + length], f"ends at byte {1024 + length}", rules)
