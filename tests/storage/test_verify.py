from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import xxhash

from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.storage.verify import Problem, verify_shards
from tests.building import Sample, pack, random_samples, rewrite_column, table_column


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """A packed data set a test may damage."""

    folder: Path
    """Its folder."""
    shards: ShardSet
    """The same, opened while it was sound."""

    def shard(self, number: int = 0) -> Path:
        return self.folder / self.shards.manifest.shards[number].name

    def problems(self) -> tuple[Problem, ...]:
        report = verify_shards(self.folder)
        assert report.ok == (not report.problems)
        return report.problems


@pytest.fixture(params=["npy", "blosc"])
def cohort(request: pytest.FixtureRequest, tmp_path: Path) -> Cohort:
    """Six training samples in two shards and two for validation."""
    samples = [*random_samples(6), *random_samples(2, split="val", seed=5)]
    pack(tmp_path, samples, codec=request.param, shard_bytes=9_000)
    return Cohort(folder=tmp_path, shards=open_shards(tmp_path))


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def tar_members(shard: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as archive:
        return archive.getmembers()


def place_of(cohort: Cohort, field: str, sample: int = 0) -> tuple[Path, int, int, str]:
    """Give shard, offset, bytes and key of a member of a training sample."""
    places = cohort.shards.table.members("train", field, [sample])
    key = str(cohort.shards.keys("train")[sample])
    shard = cohort.shard(int(places.shard[0]))
    return shard, int(places.offset[0]), int(places.stored_bytes[0]), key


def test_a_sound_data_set_has_no_problems(cohort: Cohort) -> None:
    report = verify_shards(str(cohort.folder))
    assert report.ok
    assert report.problems == ()
    assert report.samples == 8
    sizes = [path.stat().st_size for path in cohort.folder.glob("*.tar")]
    assert report.bytes == sum(sizes)


def test_a_sound_data_set_is_sound_to_gnu_tar_too(cohort: Cohort) -> None:
    if shutil.which("tar") is None:
        pytest.skip("tar is not installed")
    listed = subprocess.run(
        ["tar", "--list", "--file", str(cohort.shard())], capture_output=True, text=True, check=True
    )
    with tarfile.open(cohort.shard()) as archive:
        assert listed.stdout.splitlines() == archive.getnames()


@pytest.mark.parametrize("field", ["image", "cls", "json"])
def test_a_flipped_bit_is_named_with_shard_key_and_offset(cohort: Cohort, field: str) -> None:
    shard, offset, size, key = place_of(cohort, field, sample=1)
    with shard.open("rb") as file:
        file.seek(offset + size - 1)
        last = file.read(1)[0]
    overwrite(shard, offset + size - 1, bytes([last ^ 1]))
    digest, member = cohort.problems()
    assert "SHA-256" in digest.problem
    assert (digest.shard, digest.key) == (shard.name, None)
    assert (member.shard, member.key, member.offset) == (shard.name, key, offset)
    assert "xxh3-64" in member.problem


def test_every_problem_is_listed_not_only_the_first(cohort: Cohort) -> None:
    damaged = []
    for sample in (0, 2, 5):
        shard, offset, _, key = place_of(cohort, "image", sample)
        overwrite(shard, offset + 130, b"\xa5\x5a\xa5")
        damaged.append((shard.name, key, offset))
    found = [(p.shard, p.key, p.offset) for p in cohort.problems() if p.key is not None]
    assert sorted(found, key=str) == sorted(damaged, key=str)


def test_a_broken_header_does_not_hide_damage_behind_it(cohort: Cohort) -> None:
    _, first, _, _ = place_of(cohort, "image", sample=0)
    shard = cohort.shard(0)
    members = tar_members(shard)
    last = members[-1]
    overwrite(shard, 0, b"\x00\xff")
    overwrite(shard, last.offset_data, b"#")
    texts = [problem.problem for problem in cohort.problems()]
    assert any("header at byte 0" in text for text in texts)
    assert any(text.startswith(last.name) and "xxh3-64" in text for text in texts)
    assert first % 512 == 0


def test_a_missing_shard_is_one_problem(cohort: Cohort) -> None:
    cohort.shard(1).unlink()
    (problem,) = cohort.problems()
    assert (problem.shard, problem.problem) == (cohort.shard(1).name, "the file is missing")


def test_an_empty_shard_is_called_an_empty_file(cohort: Cohort) -> None:
    cohort.shard(0).write_bytes(b"")
    problems = cohort.problems()
    assert "empty file" in problems[0].problem
    lost = {problem.key for problem in problems} - {None}
    with_rows = cohort.shards.table.members("train", "image")
    assert lost == set(cohort.shards.keys("train")[with_rows.shard == 0].tolist())


def test_a_cut_shard_names_where_it_ends_and_which_samples_are_lost(cohort: Cohort) -> None:
    shard = cohort.shard(0)
    size = shard.stat().st_size
    members = tar_members(shard)
    last = members[-3]
    with shard.open("r+b") as file:
        file.truncate(last.offset_data + 10)
    problems = cohort.problems()
    assert problems[0].problem == f"size {last.offset_data + 10}, the manifest says {size}"
    lost = [problem for problem in problems if problem.key]
    assert {problem.key for problem in lost} == {last.name.partition(".")[0]}
    assert [problem.problem for problem in lost] == [
        f"{member.name}: ends at byte {member.offset_data + member.size}, the file at byte "
        f"{last.offset_data + 10}"
        for member in members[-3:]
    ]


def test_shards_with_exchanged_names_are_both_found(cohort: Cohort) -> None:
    one, other = cohort.shard(0), cohort.shard(1)
    one.rename(cohort.folder / "aside")
    other.rename(one)
    (cohort.folder / "aside").rename(other)
    problems = cohort.problems()
    assert {one.name, other.name} <= {problem.shard for problem in problems}
    assert any("SHA-256" in problem.problem for problem in problems)


def test_an_unknown_member_and_a_missing_one_are_named(cohort: Cohort) -> None:
    shard = cohort.shard(0)
    first = tar_members(shard)[0]
    content = bytearray(shard.read_bytes())
    renamed = tarfile.TarInfo("X" + first.name[1:])
    renamed.size, renamed.mode = first.size, 0o644
    content[:512] = renamed.tobuf(tarfile.USTAR_FORMAT)
    shard.write_bytes(content)
    texts = [problem.problem for problem in cohort.problems()]
    assert any(f"unknown member 'X{first.name[1:]}'" in text for text in texts)
    assert any(text.startswith(f"{first.name} is missing") for text in texts)


def test_a_shard_the_manifest_does_not_list_is_a_problem(cohort: Cohort) -> None:
    shutil.copy(cohort.shard(0), cohort.folder / "train-000077.tar")
    (problem,) = cohort.problems()
    assert problem.shard == "train-000077.tar"
    assert "lists no such shard" in problem.problem


def test_an_unreadable_table_is_a_problem_and_the_shards_are_still_checked(cohort: Cohort) -> None:
    table = cohort.folder / cohort.shards.manifest.table.name
    overwrite(table, table.stat().st_size // 2, b"\xff\xff\xff\xff")
    cohort.shard(0).write_bytes(b"")
    problems = cohort.problems()
    assert {problem.shard for problem in problems} == {table.name, cohort.shard(0).name}


def test_a_missing_manifest_is_a_problem_not_an_error(cohort: Cohort) -> None:
    (cohort.folder / "manifest.json").unlink()
    report = verify_shards(cohort.folder)
    assert not report.ok
    assert [problem.shard for problem in report.problems] == ["manifest.json"]
    assert "unfinished" in report.problems[0].problem


def test_the_same_voxels_in_two_splits_are_a_problem(tmp_path: Path) -> None:
    train, val = random_samples(3), random_samples(2, split="val", seed=5)
    twin = Sample(key="copy", image=train[1].image, split="val", patient="somebody-else")
    pack(tmp_path, [*train, *val, twin])
    report = verify_shards(tmp_path)
    (problem,) = report.problems
    assert (problem.shard, problem.key) == ("val-000000.tar", "copy")
    assert "same voxels as sample 'train-001'" in problem.problem
    assert "split 'train'" in problem.problem


def test_the_same_voxels_twice_in_one_split_are_no_problem(tmp_path: Path) -> None:
    train = random_samples(2)
    pack(tmp_path, [*train, Sample(key="copy", image=train[0].image)])
    assert verify_shards(tmp_path).ok


def test_the_report_counts_what_the_manifest_lists(tmp_path: Path) -> None:
    pack(tmp_path, [Sample(key="P1", image=np.zeros((3, 3), np.uint8))])
    report = verify_shards(tmp_path)
    assert (report.ok, report.samples) == (True, 1)


def replace_payload(cohort: Cohort, field: str, sample: int, content: bytes) -> None:
    """Replace a member's bytes by as many others, and its checksum in the table with it."""
    shard, offset, size, _ = place_of(cohort, field, sample)
    assert len(content) == size
    overwrite(shard, offset, content)
    checksums = table_column(cohort.folder, f"{field}.xxh3")
    checksums[sample] = xxhash.xxh3_64_intdigest(content)
    rewrite_column(cohort.folder, f"{field}.xxh3", checksums)


def payload_of(cohort: Cohort, field: str, sample: int) -> bytes:
    shard, offset, size, _ = place_of(cohort, field, sample)
    return shard.read_bytes()[offset : offset + size]


def member_problem(cohort: Cohort, field: str, sample: int) -> str:
    """Give the one problem that names a sample, which must name this member too."""
    _, offset, _, key = place_of(cohort, field, sample)
    (problem,) = [problem for problem in cohort.problems() if problem.key is not None]
    assert (problem.key, problem.offset) == (key, offset)
    assert problem.problem.startswith(f"{key}.{field}")
    return problem.problem


def test_a_class_file_that_contradicts_the_table_is_found(cohort: Cohort) -> None:
    replace_payload(cohort, "cls", 0, b"1")
    assert "holds b'1', the table says class b'0'" in member_problem(cohort, "cls", 0)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b'"label":"HGG"', b'"label":"LGG"', "says label 'LGG', the table says 'HGG'"),
        (b'"patient":"train', b'"patient":"trail', "says patient 'trail"),
        (b'"label":"HGG"', b'"labelx:"HGG"', "is not JSON"),
    ],
)
def test_details_that_contradict_the_table_are_found(
    cohort: Cohort, old: bytes, new: bytes, expected: str
) -> None:
    content = payload_of(cohort, "json", 1)
    assert old in content
    replace_payload(cohort, "json", 1, content.replace(old, new))
    assert expected in member_problem(cohort, "json", 1)


def test_details_must_be_an_object(cohort: Cohort) -> None:
    size = len(payload_of(cohort, "json", 1))
    replace_payload(
        cohort,
        "json",
        1,
        b"[" + b"1," * ((size - 3) // 2) + b"1".ljust(size - 2 - 2 * ((size - 3) // 2)) + b"]",
    )
    assert "is no JSON object" in member_problem(cohort, "json", 1)


def test_voxels_that_contradict_their_digest_are_found(cohort: Cohort) -> None:
    digests = table_column(cohort.folder, "image.voxels")
    digests[3] = "0" * 32
    rewrite_column(cohort.folder, "image.voxels", digests)
    text = member_problem(cohort, "image", 3)
    assert f"the table says {'0' * 32}" in text


def test_a_header_that_contradicts_the_table_is_found(cohort: Cohort) -> None:
    shapes = table_column(cohort.folder, "image.shape")
    shapes[2] = [2, 5, 6, 4]
    rewrite_column(cohort.folder, "image.shape", shapes)
    text = member_problem(cohort, "image", 2)
    assert "holds int16 (2, 6, 5, 4), the table says int16 (2, 5, 6, 4)" in text


def test_an_array_that_cannot_be_decoded_is_found(cohort: Cohort) -> None:
    content = payload_of(cohort, "image", 4)
    replace_payload(cohort, "image", 4, b"NOT-NUMPY" + content[9:])
    assert "cannot be decoded" in member_problem(cohort, "image", 4)


def test_a_shard_that_cannot_be_reached_is_a_problem(cohort: Cohort) -> None:
    cohort.shard(0).unlink()
    cohort.shard(0).symlink_to(cohort.shard(0))
    (problem,) = cohort.problems()
    assert problem.shard == cohort.shard(0).name
    assert "cannot be read: Too many levels" in problem.problem


def test_members_the_disk_cannot_read_are_listed_one_by_one(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int, _buffers: list[memoryview], _offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    problems = cohort.problems()
    assert len(problems) == 8 * 3
    assert all("cannot be read: Input/output error" in problem.problem for problem in problems)


def test_a_member_of_another_size_than_its_row_says_is_found(cohort: Cohort) -> None:
    sizes = table_column(cohort.folder, "json.bytes")
    sizes[0] -= 1
    rewrite_column(cohort.folder, "json.bytes", sizes)
    texts = [problem.problem for problem in cohort.problems()]
    assert any(f"has {sizes[0] + 1} bytes at byte" in text for text in texts)
