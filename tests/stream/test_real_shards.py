"""Shards by other people, read exactly, cut everywhere, and with every bit of a header flipped.

The oracle is `expected.json`: what tarfile, GNU tar and webdataset found, computed elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from streaming_balance.errors import ShardError
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.tarstream import read_members
from tests.stream.tars import put, read_all

WDS = [
    "W01_webdataset_compressed/compressed.tar",
    "W02_wdsjl_sample/sample.tar",
    "W03_webdataset_mpdata/mpdata.tar",
    "W04_aistore_small_mnist/small-mnist-3.tar",
    "W05_lhotse_features/features.000000.tar",
    "W06_wenet_shard/shards_000000000.tar",
    "W07_torchdata_fakedata/json.tar",
    "W07_torchdata_fakedata/csv.tar",
]
# One in GNU's format, one in ustar's, one with a PAX header before every member.
THREE = [WDS[3], WDS[5], WDS[6]]
CORNER = {
    "T01_go_tar_plain/gnu.tar": None,
    "T01_go_tar_plain/ustar.tar": None,
    "T01_go_tar_plain/v7.tar": None,
    "T01_go_tar_plain/pax.tar": "member 'a/b' at byte 2048 is a symbolic link",
    "T01_go_tar_plain/hardlink.tar": "member 'hard.txt' at byte 1024 is a hard link",
    "T01_go_tar_plain/gnu-multi-hdrs.tar": "'GNU1/GNU1/long-path-name' at byte 0 is a symbolic",
    "T01_go_tar_plain/sparse-formats.tar": "member 'sparse-gnu' at byte 0 is a sparse file",
    "T01_go_tar_plain/trailing-slash.tar": None,
    "T01_go_tar_plain/file-and-dir.tar": None,
    "T01_go_tar_plain/pax-records.tar": None,
    # It ends with its only member: 1,024 bytes, no end of a tar.
    "T01_go_tar_plain/nil-uid.tar": "the tar ends at byte 1024, where a header or the end",
    "T01_go_tar_plain/longlink.tar.gz": None,
    "T01_go_tar_plain/t.tar.gz": None,
    "T02_tarrs_plain/link.tar": "member 'lnk' at byte 0 is a symbolic link",
    "T02_tarrs_plain/simple_missing_last_header.tar": None,
    "T02_tarrs_plain/reading_files.tar": None,
    "T02_tarrs_plain/directory.tar": None,
    "T02_tarrs_plain/simple.tar": None,
    "T02_tarrs_plain/pax.tar": None,
}
Opener = Callable[[Path], Any]
OPENERS: dict[str, Opener] = {"path": str, "stream": lambda path: io.BytesIO(path.read_bytes())}


def expectation(shared_data: Path, name: str) -> dict[str, Any]:
    """What independent readers found in a shard."""
    found: dict[str, Any] = json.loads((shared_data / "expected.json").read_text())[name]
    return found


def files_of(expected: dict[str, Any]) -> list[tuple[str, int, int, str]]:
    """The files an expectation lists: name, size, place and digest."""
    return [
        (item["name"], item["size"], item["offset_data"], item["sha256_16"])
        for item in expected["members"]
        if item["type"] == "file" and "offset_data" in item
    ]


def found_in(urls: object, rules: TarRules | None = None) -> Iterator[tuple[str, int, int, str]]:
    """The files our reader finds."""
    for member in read_members(urls, rules=rules):  # type: ignore[arg-type]
        digest = hashlib.sha256(member.payload.read()).hexdigest()[:16]
        yield member.name, member.size, member.payload_offset, digest


@pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)
@pytest.mark.parametrize("name", WDS)
def test_members_places_and_digests_of_webdatasets_are_as_expected(
    shared_data: Path, name: str, opener: Opener
) -> None:
    expected = expectation(shared_data, f"wds_tar/{name}")
    path = shared_data / "wds_tar" / name
    found = list(found_in(opener(path)))
    assert len(found) == expected["n_files"]
    assert set(files_of(expected)) <= set(found)
    with tarfile.open(path) as archive:
        assert [file[:3] for file in found] == [
            (info.name, info.size, info.offset_data) for info in archive if info.isreg()
        ]


@pytest.mark.parametrize("name", WDS)
def test_samples_of_webdatasets_are_those_webdataset_makes(shared_data: Path, name: str) -> None:
    path = shared_data / "wds_tar" / name
    expected = expectation(shared_data, f"wds_tar/{name}")["webdataset_1.0.2"]
    samples, counts = read_all(str(path))
    keys = [sample.key for sample in samples]
    assert (len(keys), keys[: len(expected["first_keys"])], keys[-1]) == (
        expected["n_samples"],
        expected["first_keys"],
        expected["last_key"],
    )
    sets = [",".join(sorted(sample.members)) for sample in samples]
    assert {fields: sets.count(fields) for fields in set(sets)} == expected["ext_sets"]
    assert sum(sample.num_bytes for sample in samples) == expected["payload_bytes"]
    theirs = list(webdataset_samples(path.read_bytes()))
    assert [
        {key: value for key, value in sample.to_dict().items() if key != "__url__"}
        for sample in samples
    ] == theirs
    assert counts.bytes_read == path.stat().st_size
    assert counts.bytes_delivered == expected["payload_bytes"]


@pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)
@pytest.mark.parametrize(("name", "problem"), CORNER.items(), ids=CORNER)
def test_corner_cases_come_out_as_expected_or_are_refused_by_reason(
    shared_data: Path, name: str, problem: str | None, opener: Opener
) -> None:
    expected = files_of(expectation(shared_data, f"tar_corner/{name}"))
    urls = opener(shared_data / "tar_corner" / name)
    if problem is None:
        assert list(found_in(urls)) == expected
        return
    before: list[tuple[str, int, int, str]] = []
    with pytest.raises(ShardError, match=problem):
        before.extend(found_in(urls))  # keeps what came before the error
    assert before == expected[: len(before)]


def test_what_cannot_be_taken_is_left_out_and_the_rest_is_as_expected(shared_data: Path) -> None:
    rules = TarRules(on_error="skip", missing_end="accept")
    for name in CORNER:
        expected = files_of(expectation(shared_data, f"tar_corner/{name}"))
        assert list(found_in(str(shared_data / "tar_corner" / name), rules)) == expected


def test_links_and_sparse_members_are_counted_when_left_out(shared_data: Path) -> None:
    for name, problem in CORNER.items():
        path = shared_data / "tar_corner" / name
        _, counts = read_all(str(path), TarRules(on_error="skip"))
        content = path.read_bytes()
        size = len(gzip.decompress(content)) if name.endswith(".gz") else len(content)
        assert counts.bytes_read == size
        assert bool(counts.skips) == (problem is not None)
        if problem is not None:
            assert problem in counts.skips[0].reason


@pytest.mark.parametrize("name", THREE)
def test_no_cut_at_any_block_of_a_real_shard_is_silent(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    content = (shared_data / "wds_tar" / name).read_bytes()
    whole = list(found_in(io.BytesIO(content)))
    end = len(content.rstrip(b"\0")) + 511 & ~511
    silent = 0
    for cut in range(0, len(content), 512):
        for urls in (io.BytesIO(content[:cut]), put(tmp_path, content[:cut])):
            try:
                found = list(found_in(urls))
            except ShardError as error:
                assert "cut" in str(error) or "empty" in str(error)  # noqa: PT017 - not all raise
            else:
                # Zeros behind the two blocks that end a tar are not part of it.
                silent += found != whole
                assert cut >= end + 1024
    assert silent == 0


@pytest.mark.parametrize("name", THREE)
def test_no_flipped_bit_of_a_header_of_a_real_shard_is_silent(shared_data: Path, name: str) -> None:
    content = bytearray((shared_data / "wds_tar" / name).read_bytes())
    flipped = 0
    for offset in header_offsets(bytes(content)):
        for bit in range(4096):
            content[offset + bit // 8] ^= 1 << bit % 8
            with pytest.raises(ShardError, match=rf"at byte {offset}: "):
                for _ in read_members(io.BytesIO(content)):
                    pass
            content[offset + bit // 8] ^= 1 << bit % 8
            flipped += 1
    assert flipped >= 6 * 4096 or name == THREE[1]


def test_what_is_left_out_at_each_cut_and_flip_reconciles(shared_data: Path) -> None:
    content = (shared_data / "wds_tar" / THREE[0]).read_bytes()
    skip = TarRules(on_error="skip")
    whole = [sample.to_dict() for sample in read_all(io.BytesIO(content))[0]]
    for cut in range(0, 15360 + 1024, 512):
        samples, counts = read_all(io.BytesIO(content[:cut]), skip)
        assert [without_url(s.to_dict()) for s in samples] == [
            without_url(s) for s in whole[: len(samples)]
        ]
        assert (counts.shards_read, counts.shards_lost) == (0, 1)
        assert counts.skips[-1].rest_of_shard
    for offset in header_offsets(content):
        for bit in range(0, 4096, 61):
            damaged = bytearray(content)
            damaged[offset + bit // 8] ^= 1 << bit % 8
            samples, counts = read_all(io.BytesIO(damaged), skip)
            assert len(samples) < len(whole)
            assert counts.skips[-1].reason.count(f"at byte {offset}:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE)
def test_webdataset_loses_in_silence_what_is_an_error_here(shared_data: Path, name: str) -> None:
    """What `tools/compare_tar_readers.py` reports for the documents, counted once more."""
    content = bytearray((shared_data / "wds_tar" / name).read_bytes())
    whole = list(webdataset_samples(bytes(content)))
    silent = 0
    for offset in header_offsets(bytes(content)):
        for bit in range(4096):
            content[offset + bit // 8] ^= 1 << bit % 8
            with suppress(Exception):  # whatever it raises, it is not silent
                silent += list(webdataset_samples(bytes(content))) != whole
            content[offset + bit // 8] ^= 1 << bit % 8
    assert silent > 1000


def webdataset_samples(content: bytes) -> Iterator[dict[str, Any]]:
    """What webdataset makes of a tar."""
    files = ({**file, "__url__": ""} for file in tar_file_iterator(io.BytesIO(content)))
    for sample in group_by_keys(files):
        yield {key: value for key, value in sample.items() if key != "__url__"}


def header_offsets(content: bytes) -> list[int]:
    """Where headers stand, extended ones included, found by Python's tarfile."""
    offsets = set()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for info in archive:
            offsets |= {info.offset, info.offset_data - 512}
    return sorted(offsets)


def without_url(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample without the name of its shard."""
    return {key: value for key, value in sample.items() if key != "__url__"}
