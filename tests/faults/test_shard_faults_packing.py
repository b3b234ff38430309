"""Damaged, crafted and hostile shards and tables, at the level of tar, codec and table.

The numbers are the rows of the fault catalogue: 1-9 and 16-23.
"""

from __future__ import annotations

import io
import json
import resource
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.codecs import decode
from streaming_balance.storage.index import SampleTable
from streaming_balance.storage.layout import MANIFEST_NAME, TABLE_NAME
from streaming_balance.storage.manifest import read_manifest
from streaming_balance.storage.tar import END_OF_TAR, TarMember, member_header, padding, scan_tar
from streaming_balance.storage.writer import PackWriter
from tests.building import Sample, pack, random_samples

HEADER_FIELDS = {"name": 0, "size": 124, "checksum": 148, "type": 156, "magic": 257, "prefix": 345}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small packed shard: three samples, nine members."""
    folder = tmp_path_factory.mktemp("packed")
    manifest = pack(folder, random_samples(3, shape=(2, 3, 4)), codec="blosc")
    return (folder / manifest.shards[0].name).read_bytes()


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A small data set in its folder."""
    pack(tmp_path / "cohort", random_samples(6) + random_samples(3, split="val"))
    return tmp_path / "cohort"


def opened(folder: Path) -> SampleTable:
    """Open a data set's table as readers do."""
    return SampleTable.open(folder / TABLE_NAME, read_manifest(folder))


def checksummed(header: bytearray) -> bytes:
    """Make a crafted header's checksum right, so that nothing else hides the fault."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def crafted(field: str, value: bytes, *, name: str = "P1.cls", size: int = 1) -> bytes:
    """Give a header with one field overwritten and a right checksum."""
    header = bytearray(member_header(name, size))
    start = HEADER_FIELDS[field]
    header[start : start + len(value)] = value
    return checksummed(header)


def refusal(path: Path, content: bytes) -> str:
    """Scan a file that must be refused, and give the reason."""
    path.write_bytes(content)
    with pytest.raises(ShardError) as caught:
        list(scan_tar(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_1_and_2_a_shard_cut_at_any_block_is_refused(shard: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(shard)
    boundaries = {member.header_offset for member in scan_tar(path)}
    cuts = range(0, len(shard), 512)
    assert boundaries <= set(cuts)
    assert len(boundaries) == 9
    for cut in cuts:
        assert "cut" in refusal(path, shard[:cut]) or cut in (0, len(shard) - 512)


def test_2_no_member_is_given_out_that_the_cut_reached(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(member_header("P1.cls", 1024) + bytes(512))  # a payload without padding
    given: list[TarMember] = []
    with pytest.raises(
        ShardError, match=r"'P1\.cls' at byte 0 needs bytes up to 1536.*ends at 1024"
    ):
        given.extend(scan_tar(path))
    assert given == []


def test_2_a_shard_cut_anywhere_inside_a_block_is_refused(shard: bytes, tmp_path: Path) -> None:
    for cut in range(1, len(shard), 7):
        refusal(tmp_path / "shard.tar", shard[:cut])


def test_4_every_flipped_header_bit_is_refused(shard: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    rejected = 0
    for bit in range(4096):
        flipped = bytearray(shard)
        flipped[bit // 8] ^= 1 << bit % 8
        assert "byte 0" in refusal(path, bytes(flipped))
        rejected += 1
    assert rejected == 4096


def test_5_a_wrong_checksum_is_refused_with_its_offset(shard: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(shard)
    third = list(scan_tar(path))[2].header_offset
    wrong = shard[: third + 148] + b"000000\0 " + shard[third + 156 :]
    assert f"header at byte {third}: checksum b'000000" in refusal(path, wrong)


def test_6_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    assert "empty file" in refusal(tmp_path / "shard.tar", b"")


def test_7_an_empty_tar_has_no_members_and_an_empty_pack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(bytes(1024))
    assert list(scan_tar(tmp_path / "shard.tar")) == []
    with pytest.raises(ValueError, match="nothing to pack"):
        pack_nothing(tmp_path / "cohort")


def pack_nothing(folder: Path) -> None:
    """Finish a pack without samples."""
    with PackWriter(
        folder,
        classes=["HGG"],
        splits=["train"],
        train_splits=["train"],
        codec="npy",
        columns=[],
        shard_bytes=1 << 20,
        settings={},
        overwrite=False,
    ) as writer:
        writer.finish(found=2, rejected=[])


@pytest.mark.parametrize("places", [(0, 1), (0, 2), (0, 5)])
def test_8_a_key_packed_twice_is_refused_with_both_places(
    tmp_path: Path, places: tuple[int, int]
) -> None:
    samples = random_samples(6)
    first, second = places
    samples[second] = Sample(
        key=samples[first].key, image=samples[second].image, patient="other", split="train"
    )
    with pytest.raises(ConfigError, match=r"'other'.*packed already: as 'train-000' of patient"):
        pack(tmp_path, samples, shard_bytes=2048)  # every sample in a shard of its own


def test_9_keys_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    image = random_samples(1)[0].image
    with pytest.raises(ConfigError, match=r"'p1' .*packed already: as 'P1'.*more than case"):
        pack(tmp_path, [Sample(key="P1", image=image), Sample(key="p1", image=image)])
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_16_a_missing_table_or_manifest_names_the_way_out(cohort: Path) -> None:
    (cohort / TABLE_NAME).rename(cohort / "elsewhere")
    with pytest.raises(ShardError, match=r"table is missing.*pack command again with --overwrite"):
        opened(cohort)
    (cohort / MANIFEST_NAME).unlink()
    with pytest.raises(ShardError, match=r"unfinished pack. Run the same pack command again"):
        opened(cohort)


@pytest.mark.parametrize("name", [TABLE_NAME, MANIFEST_NAME])
def test_16_a_table_or_manifest_cut_anywhere_is_refused(cohort: Path, name: str) -> None:
    content = (cohort / name).read_bytes()
    for cut in range(0, len(content) - 1, 37):
        (cohort / name).write_bytes(content[:cut])
        with pytest.raises(ShardError, match="--overwrite"):
            opened(cohort)


@pytest.mark.parametrize("name", [TABLE_NAME, MANIFEST_NAME])
def test_16_a_flipped_bit_anywhere_in_table_or_manifest_is_refused(cohort: Path, name: str) -> None:
    content = (cohort / name).read_bytes()
    for place in range(0, len(content) - 1, 11):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (cohort / name).write_bytes(flipped)
        if name == MANIFEST_NAME and same_json(content, bytes(flipped)):
            continue  # whitespace for whitespace: nothing that is said has changed
        with pytest.raises(ShardError):
            opened(cohort)


def same_json(left: bytes, right: bytes) -> bool:
    """Say whether two texts are the same JSON document."""
    try:
        return bool(json.loads(left) == json.loads(right))
    except ValueError:
        return False


def test_17_a_table_of_another_pack_is_refused_by_its_pack_id(cohort: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack(other, random_samples(6, seed=1) + random_samples(3, split="val", seed=1))
    mine, theirs = read_manifest(cohort), read_manifest(other)
    (cohort / TABLE_NAME).write_bytes((other / TABLE_NAME).read_bytes())
    if mine.table.bytes == theirs.table.bytes:
        with pytest.raises(ShardError, match="xxh3"):
            opened(cohort)
    with pytest.raises(ShardError, match=r"pack id .* are of two packs"):
        SampleTable.open(cohort / TABLE_NAME, replace(mine, table=theirs.table))


def pax(records: bytes) -> bytes:
    """Give a PAX header member."""
    header = crafted("type", b"x", name="PaxHeader", size=len(records))
    return header + records + padding(len(records))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "base-256 size": (crafted("size", b"\x80" + bytes(10) + b"\x05"), "size .* no octal"),
    "negative size": (crafted("size", b"\xff" * 12), "size .* no octal"),
    "minus sign": (crafted("size", b"-0000000001\0"), "size .* no octal"),
    "8 EiB size": (crafted("size", b"\x80\0\0\0\x80" + bytes(7)), "size .* no octal"),
    "64 GiB size": (crafted("size", b"7" * 12), "it was cut"),
    "blank size": (crafted("size", b" " * 12), "size .* no octal"),
    "PAX size override": (pax(b"19 size=4294967296\n"), "a PAX header"),
    "5,000 nested PAX headers": (pax(b"11 path=a\n") * 5000, "a PAX header"),
    "global PAX header": (crafted("type", b"g"), "a PAX global header"),
    "4 GiB long name": (crafted("type", b"L", size=0o37777777777), "a GNU long name"),
    "GNU long link": (crafted("type", b"K"), "a GNU long link"),
    "GNU sparse": (crafted("type", b"S"), "a GNU sparse file"),
    "name leads up": (crafted("name", b"../../x.cls"), "leads out of its folder"),
    "absolute name": (crafted("name", b"/etc/passwd"), "not relative"),
    "NUL in name": (crafted("name", b"P1\0.cls"), "holds NUL"),
    "NUL in prefix": (crafted("prefix", b"a\0b"), "holds NUL"),
    "Latin-1 name": (crafted("name", b"P\xe4.cls"), "not printable ASCII"),
    "control character": (crafted("name", b"P\x1b.cls"), "not printable ASCII"),
    "no name": (crafted("name", bytes(6)), "is empty"),
    "hard link": (crafted("type", b"1"), "a hard link"),
    "symbolic link": (crafted("type", b"2"), "a symbolic link"),
    "character device": (crafted("type", b"3"), "a character device"),
    "block device": (crafted("type", b"4"), "a block device"),
    "folder": (crafted("type", b"5"), "a folder"),
    "fifo": (crafted("type", b"6"), "a fifo"),
    "old file": (crafted("type", b"\0"), "before ustar"),
    "unknown type": (crafted("type", b"Z"), "unknown type b'Z'"),
    "no magic": (crafted("magic", bytes(8)), "magic"),
}


@pytest.mark.parametrize(("content", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_20_to_22_hostile_members_are_refused_by_name_without_taking_memory(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(content + bytes(512) + END_OF_TAR)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ShardError, match=rf"byte 0.*{problem}|{problem}"):
        list(scan_tar(path))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 << 10  # KiB
    assert list(tmp_path.iterdir()) == [path], "nothing is ever extracted"


def test_21_a_name_of_ten_thousand_characters_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("n" * 10_000))
    assert "a GNU long name" in refusal(tmp_path / "shard.tar", file.getvalue())
    with pytest.raises(ShardError, match=r"10000 characters|shorter id"):
        member_header("n" * 10_000, 1)


TERABYTES = "<f8', 'fortran_order': False, 'shape': (1024, 1024, 480000)"  # 3.7 TiB
OBJECTS = "|O', 'fortran_order': False, 'shape': (1,)"


@pytest.mark.parametrize("described", [TERABYTES, OBJECTS])
@pytest.mark.parametrize("codec", ["npy", "blosc"])
def test_23_an_npy_header_that_claims_terabytes_or_objects_is_refused(
    described: str, codec: str
) -> None:
    text = f"{{'descr': '{described}, }}".ljust(117).encode() + b"\n"
    stored = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ShardError, match=r"claims (shape|dtype)"):
        decode(stored, codec)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
