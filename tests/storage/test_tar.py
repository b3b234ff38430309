"""Our tars are read by every other tool, and only exact tars are read by us."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from pathlib import Path
from shutil import which

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ShardError
from streaming_balance.storage.tar import (
    END_OF_TAR,
    MAX_MEMBER_BYTES,
    TarMember,
    member_header,
    padding,
    scan_tar,
)

CONTENTS = {"P1.image.npy": bytes(700), "P1.cls": b"1", "P1.json": b"{}", "P2.cls": b"x" * 512}


def tar_of(contents: dict[str, bytes]) -> bytes:
    """Build a tar with the functions under test."""
    parts = [
        member_header(name, len(payload)) + payload + padding(len(payload))
        for name, payload in contents.items()
    ]
    return b"".join(parts) + END_OF_TAR


def scanned(path: Path, content: bytes) -> list[TarMember]:
    """Write a file and scan it."""
    path.write_bytes(content)
    return list(scan_tar(path))


def test_members_are_found_where_they_were_written(tmp_path: Path) -> None:
    content = tar_of(CONTENTS)
    members = scanned(tmp_path / "shard.tar", content)
    assert {
        member.name: content[member.payload_offset : member.payload_offset + member.size]
        for member in members
    } == CONTENTS
    assert [member.header_offset for member in members] == [0, 1536, 2560, 3584]
    assert all(member.payload_offset % 512 == 0 for member in members)


@pytest.mark.skipif(which("tar") is None, reason="GNU tar is not installed")
def test_gnu_tar_reads_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(tar_of(CONTENTS))
    listed = subprocess.run(
        ["tar", "--list", "--verbose", "--file", str(tmp_path / "shard.tar")],
        capture_output=True,
        check=True,
        env={"TZ": "UTC", "PATH": "/usr/bin:/bin"},
    )
    assert listed.stderr == b""
    lines = listed.stdout.decode().splitlines()
    assert lines[0].split() == [
        *("-rw-r--r--", "streaming-balance/streaming-balance", "700"),
        *("1970-01-01", "00:00", "P1.image.npy"),
    ]
    subprocess.run(
        ["tar", "--extract", "--file", "shard.tar"], cwd=tmp_path, check=True, capture_output=True
    )
    assert {name: (tmp_path / name).read_bytes() for name in CONTENTS} == CONTENTS


def test_python_tarfile_reads_what_is_written() -> None:
    with tarfile.open(fileobj=io.BytesIO(tar_of(CONTENTS)), mode="r:") as archive:
        infos = archive.getmembers()
        contents = {info.name: file.read() for info in infos if (file := archive.extractfile(info))}
    assert contents == CONTENTS
    assert {(info.mtime, info.uid, info.gid, info.mode, info.type) for info in infos} == {
        (0, 0, 0, 0o644, b"0")
    }


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_tars_that_python_writes_are_read(tmp_path: Path, format_: int) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as archive:
        for name, payload in CONTENTS.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    members = scanned(tmp_path / "shard.tar", file.getvalue())
    assert [(member.name, member.size) for member in members] == [
        (name, len(payload)) for name, payload in CONTENTS.items()
    ]


@given(
    name=st.from_regex(r"[A-Za-z0-9_%-]{1,60}\.[a-z]{1,5}", fullmatch=True),
    size=st.integers(0, MAX_MEMBER_BYTES),
)
def test_a_header_says_what_python_reads_in_it(name: str, size: int) -> None:
    info = tarfile.TarInfo.frombuf(member_header(name, size), "ascii", "strict")
    assert (info.name, info.size, info.mtime) == (name, size, 0)


@pytest.mark.parametrize("folder_length", [1, 60, 154, 155])
def test_names_too_long_for_the_name_field_use_the_prefix(folder_length: int) -> None:
    name = "f" * folder_length + "/" + "n" * (100 if folder_length > 1 else 99)
    header = member_header(name, 3)
    assert tarfile.TarInfo.frombuf(header, "ascii", "strict").name == name


def test_a_prefixed_name_is_read_back(tmp_path: Path) -> None:
    name = "a" * 70 + "/" + "b" * 70
    assert [member.name for member in scanned(tmp_path / "t.tar", tar_of({name: b""}))] == [name]


@pytest.mark.parametrize("name", ["n" * 101, "f" * 156 + "/n", "f/" + "n" * 101])
def test_names_that_do_not_fit_name_the_patient(name: str) -> None:
    with pytest.raises(ShardError, match=r"a shorter id|characters"):
        member_header(name, 1)


@pytest.mark.parametrize(
    "name", ["", "/abs.cls", "../up.cls", "a/../b.cls", "a//b", "./a", "P\0.cls", "Pä.cls", "a\\b"]
)
def test_names_that_lead_elsewhere_are_never_written(name: str) -> None:
    with pytest.raises(ShardError, match="its name"):
        member_header(name, 1)


@pytest.mark.parametrize("size", [-1, MAX_MEMBER_BYTES + 1])
def test_sizes_that_do_not_fit_are_never_written(size: int) -> None:
    with pytest.raises(ShardError, match="pack smaller samples"):
        member_header("P1.cls", size)


def test_zeros_after_the_end_are_allowed_and_anything_else_is_not(tmp_path: Path) -> None:
    content = tar_of(CONTENTS)
    assert len(scanned(tmp_path / "t.tar", content + bytes(3 << 19))) == 4
    with pytest.raises(ShardError, match="bytes follow the end of the tar"):
        scanned(tmp_path / "t.tar", content + bytes(511) + b"x")
    with pytest.raises(ShardError, match="no whole number of 512-byte blocks"):
        scanned(tmp_path / "t.tar", content + b"\0")


def test_padding_must_be_zero(tmp_path: Path) -> None:
    content = bytearray(tar_of(CONTENTS))
    content[512 + 700] = 1
    with pytest.raises(ShardError, match=r"padding at byte 1212, after 'P1.image.npy'"):
        scanned(tmp_path / "t.tar", bytes(content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"absent\.tar cannot be read: No such file"):
        list(scan_tar(tmp_path / "absent.tar"))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(tar_of(CONTENTS))
    members = scan_tar(path)
    next(members)
    path.write_bytes(b"")
    with pytest.raises(ShardError, match=r"read 0 of 512 bytes at byte 1536"):
        next(members)


# What each of other people's tars must give: its members, or the reason it is refused.
FOREIGN = {
    "T01_go_tar_plain/gnu.tar": None,
    "T01_go_tar_plain/ustar.tar": None,
    "T01_go_tar_plain/t.tar.gz": "not relative",
    "T01_go_tar_plain/v7.tar": "checksum",
    "T01_go_tar_plain/pax.tar": "PAX header",
    "T01_go_tar_plain/hardlink.tar": "hard link",
    "T01_go_tar_plain/gnu-multi-hdrs.tar": "GNU long",
    "T01_go_tar_plain/sparse-formats.tar": "sparse|PAX",
    "T01_go_tar_plain/file-and-dir.tar": "a folder",
    "T01_go_tar_plain/nil-uid.tar": "uid .* no octal number",
    "T02_tarrs_plain/link.tar": "symbolic link",
    "T02_tarrs_plain/directory.tar": "a folder",
    "T02_tarrs_plain/reading_files.tar": None,
    "T02_tarrs_plain/simple.tar": None,
    "T02_tarrs_plain/simple_missing_last_header.tar": None,
}


@pytest.mark.parametrize(("name", "problem"), FOREIGN.items())
def test_tars_of_others_are_read_exactly_or_refused_by_reason(
    shared_data: Path, tmp_path: Path, name: str, problem: str | None
) -> None:
    path = shared_data / "tar_corner" / name
    if path.suffix == ".gz":
        (tmp_path / "plain.tar").write_bytes(gzip.decompress(path.read_bytes()))
        path = tmp_path / "plain.tar"
    if problem is not None:
        with pytest.raises(ShardError, match=problem):
            list(scan_tar(path))
        return
    expected = json.loads((shared_data / "expected.json").read_text())[f"tar_corner/{name}"]
    assert [(member.name, member.size, member.payload_offset) for member in scan_tar(path)] == [
        (member["name"], member["size"], member["offset_data"]) for member in expected["members"]
    ]
