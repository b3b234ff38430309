"""Damaged, swapped, cut and crafted data sets: what opening and reading them must say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from streaming_balance.errors import BalanceError, ShardError, SplitError
from streaming_balance.storage.manifest import manifest_text, read_manifest
from streaming_balance.storage.shards import open_shards
from streaming_balance.storage.verify import verify_shards
from tests.building import (
    Sample,
    open_files,
    pack,
    random_samples,
    rewrite_column,
    table_column,
)

SHAPE = (2, 6, 5, 4)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Six training samples, two to a shard, and two for validation."""
    folder = tmp_path / "cohort"
    samples = [*random_samples(6), *random_samples(2, split="val", seed=9)]
    pack(folder, samples, shard_bytes=9_000)
    return folder


def shard_paths(folder: Path) -> list[Path]:
    return [folder / shard.name for shard in read_manifest(folder).shards]


def read_all(folder: Path, split: str = "train") -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    """Read every sample of a split with checksums compared."""
    shards = open_shards(folder)
    out = np.zeros((shards.size(split), *SHAPE), np.int16)
    with shards.reader(split, verify="always") as reader:
        for sample in range(len(out)):
            reader.read_into([sample], out[sample : sample + 1])
    return out


def member_boundaries(path: Path) -> list[int]:
    """Give where every header, payload, padding and the end blocks of a tar start."""
    cuts = {0}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            end = member.offset_data + member.size
            cuts |= {member.offset, member.offset_data, end, end + -end % 512, end + 512}
    return sorted(cut for cut in cuts if cut < path.stat().st_size)


def test_a_shard_cut_at_any_boundary_is_refused_at_opening(cohort: Path) -> None:
    path = shard_paths(cohort)[1]
    whole = path.read_bytes()
    cuts = member_boundaries(path)
    assert len(cuts) > 20
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ShardError) as caught:
            open_shards(cohort)
        assert str(path) in str(caught.value)
        expected = f"size {cut}, index says {len(whole)}" if cut else "empty file"
        assert expected in str(caught.value)


def test_a_shard_cut_or_grown_anywhere_is_refused_at_opening(cohort: Path) -> None:
    path = shard_paths(cohort)[0]
    whole = path.read_bytes()
    for size in np.random.default_rng(2).integers(1, 2 * len(whole), 250).tolist():
        if size == len(whole):
            continue
        path.write_bytes((whole + bytes(len(whole)))[:size])
        with pytest.raises(ShardError, match=f"size {size}, index says {len(whole)}"):
            open_shards(cohort)


def test_a_missing_shard_is_named_at_opening(cohort: Path) -> None:
    path = shard_paths(cohort)[2]
    path.unlink()
    with pytest.raises(ShardError, match=f"shard {path.name} is missing"):
        open_shards(cohort)


@pytest.mark.parametrize("codec", ["npy", "blosc"])
def test_any_flipped_payload_bit_is_found_at_the_first_touch(tmp_path: Path, codec: str) -> None:
    pack(tmp_path, random_samples(1), codec=codec)
    shards = open_shards(tmp_path)
    places = shards.table.members("train", "image")
    offset, size = int(places.offset[0]), int(places.stored_bytes[0])
    path = tmp_path / shards.manifest.shards[0].name
    whole = path.read_bytes()
    out = np.zeros((1, *SHAPE), np.int16)
    for bit in np.random.default_rng(4).permutation(size * 8)[:400].tolist():
        damaged = bytearray(whole)
        damaged[offset + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with (
            shards.reader("train") as reader,
            pytest.raises(ShardError, match=rf"sample 'train-000' at byte {offset} "),
        ):
            reader.read_into([0], out)


def test_a_flipped_tar_header_bit_is_found_by_verify_and_harms_no_read(cohort: Path) -> None:
    path = shard_paths(cohort)[0]
    sound = read_all(cohort)
    whole = path.read_bytes()
    for bit in np.random.default_rng(5).permutation(4096)[:60].tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert any(problem.offset == 0 for problem in verify_shards(cohort).problems)
        np.testing.assert_array_equal(read_all(cohort), sound)


def test_an_empty_shard_is_called_empty(cohort: Path) -> None:
    path = shard_paths(cohort)[0]
    path.write_bytes(b"")
    with pytest.raises(ShardError, match="is an empty file"):
        open_shards(cohort)


def test_a_valid_tar_of_nothing_is_refused_where_samples_are_due(cohort: Path) -> None:
    path = shard_paths(cohort)[0]
    path.write_bytes(bytes(1024))
    with pytest.raises(ShardError, match="size 1024, index says"):
        open_shards(cohort)


def test_a_shard_of_another_pack_with_the_same_size_is_found_at_the_first_read(
    tmp_path: Path,
) -> None:
    pack(tmp_path / "one", random_samples(2, seed=1))
    pack(tmp_path / "other", random_samples(2, seed=2))
    name = shard_paths(tmp_path / "one")[0].name
    shutil.copy(tmp_path / "other" / name, tmp_path / "one" / name)
    shards = open_shards(tmp_path / "one")
    out = np.zeros((1, *SHAPE), np.int16)
    with shards.reader("train") as reader, pytest.raises(ShardError, match="xxh3-64"):
        reader.read_into([0], out)
    assert any("SHA-256" in problem.problem for problem in verify_shards(shards.path).problems)


def test_two_shards_with_exchanged_names_are_found_at_the_first_read(cohort: Path) -> None:
    one, other = shard_paths(cohort)[:2]
    assert one.stat().st_size == other.stat().st_size
    one.rename(cohort / "aside")
    other.rename(one)
    (cohort / "aside").rename(other)
    with pytest.raises(ShardError, match="xxh3-64"):
        read_all(cohort)
    assert {p.shard for p in verify_shards(cohort).problems} == {one.name, other.name}


def test_a_shard_replaced_while_open_is_read_from_the_old_file_or_refused(cohort: Path) -> None:
    sound = read_all(cohort)
    shards = open_shards(cohort)
    out = np.zeros((1, *SHAPE), np.int16)
    first = int(shards.packed_order("train")[0])
    last = int(shards.packed_order("train")[-1])
    path = shard_paths(cohort)[0]
    with (
        shards.reader("train") as roomy,
        shards.reader("train", max_open_files=1) as tight,
    ):
        for reader in (roomy, tight):
            reader.read_into([first], out)
        tight.read_into([last], out)  # the shard of the first sample is closed for it
        (cohort / "new").write_bytes(path.read_bytes())
        (cohort / "new").rename(path)
        roomy.read_into([first], out)
        np.testing.assert_array_equal(out[0], sound[first])
        with pytest.raises(ShardError, match="replaced while in use"):
            tight.read_into([first], out)


@pytest.mark.parametrize("codec", ["npy", "blosc"])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_shard_cut_during_use_is_an_error_and_no_sigbus(
    tmp_path: Path, codec: str, dtype: str
) -> None:
    shape = (2, 40, 128, 129)
    pack(tmp_path, random_samples(2, shape=shape), codec=codec, shard_bytes=1 << 26)
    shards = open_shards(tmp_path)
    out = np.zeros((1, *shape), dtype)
    order = shards.packed_order("train").tolist()
    offset = int(shards.table.members("train", "image", [order[1]]).offset[0])
    with shards.reader("train") as reader:
        reader.read_into([order[0]], out)
        os.truncate(shard_paths(tmp_path)[0], offset + 100_000)
        reader.read_into([order[0]], out)
        with pytest.raises(ShardError, match=rf"ends at byte {offset + 100_000}.*cut while in use"):
            reader.read_into([order[1]], out)


def test_a_missing_table_names_the_way_to_rebuild_it(cohort: Path) -> None:
    (cohort / "samples.arrow").unlink()
    with pytest.raises(
        ShardError, match=r"samples\.arrow: the sample table is missing.*pack command again"
    ):
        open_shards(cohort)


def test_a_table_cut_anywhere_is_refused(cohort: Path) -> None:
    path = cohort / "samples.arrow"
    whole = path.read_bytes()
    for cut in [0, 1, len(whole) - 1, *range(8, len(whole), 97)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=r"samples\.arrow"):
            open_shards(cohort)


def test_a_table_with_any_flipped_bit_is_refused(cohort: Path) -> None:
    path = cohort / "samples.arrow"
    whole = path.read_bytes()
    for bit in np.random.default_rng(6).permutation(len(whole) * 8)[:400].tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"samples\.arrow"):
            open_shards(cohort)


def test_a_manifest_cut_or_flipped_is_refused(cohort: Path) -> None:
    path = cohort / "manifest.json"
    whole = path.read_bytes()
    for cut in range(0, len(whole) - 1, 61):
        path.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=r"manifest\.json"):
            open_shards(cohort)
    for bit in np.random.default_rng(7).permutation(len(whole) * 8)[:200].tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"manifest\.json"):
            open_shards(cohort)


def test_a_folder_without_a_manifest_is_an_unfinished_pack(cohort: Path) -> None:
    (cohort / "manifest.json").unlink()
    with pytest.raises(ShardError, match="unfinished pack"):
        open_shards(cohort)


def test_a_table_of_another_pack_is_refused_by_its_pack_id(tmp_path: Path) -> None:
    pack(tmp_path / "one", random_samples(2, seed=1))
    pack(tmp_path / "other", random_samples(2, seed=2))
    shutil.copy(tmp_path / "other" / "samples.arrow", tmp_path / "one" / "samples.arrow")
    with pytest.raises(ShardError, match=r"samples\.arrow"):
        open_shards(tmp_path / "one")
    # A table whose blocks the manifest vouches for is still of the pack it names.
    manifest = read_manifest(tmp_path / "one")
    other = read_manifest(tmp_path / "other")
    mixed = replace(manifest, table=other.table)
    (tmp_path / "one" / "manifest.json").write_text(manifest_text(mixed))
    with pytest.raises(ShardError, match="pack id"):
        open_shards(tmp_path / "one")


def test_a_newer_format_names_the_release_that_reads_it(cohort: Path) -> None:
    path = cohort / "manifest.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "version": 2, "needs": "3.4"}))
    with pytest.raises(ShardError, match=r"needs streaming-balance >= 3\.4"):
        open_shards(cohort)


def craft(folder: Path, name: str, row: int, value: object) -> None:
    """Change one value of the sample table and let the manifest vouch for the result."""
    values = table_column(folder, name)
    values[row] = value
    rewrite_column(folder, name, values)


BEYOND = {
    "negative": -512,
    "zero": 0,
    "before the first header ends": 100,
    "unaligned": 513,
    "beyond the end": 1 << 20,
    "largest": (1 << 63) - 512,
    "smallest": -(1 << 63),
}


@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize("member", ["image", "cls", "json"])
def test_an_offset_outside_its_shard_is_refused_before_anything_is_read(
    cohort: Path, member: str, name: str
) -> None:
    craft(cohort, f"{member}.offset", 1, BEYOND[name])
    with pytest.raises(ShardError, match=r"row 1, sample 'train-00\d'"):
        open_shards(cohort)


@pytest.mark.parametrize("size", [0, -1, 1 << 20, (1 << 63) - 1, -(1 << 63)])
def test_a_size_that_does_not_fit_its_shard_is_refused(cohort: Path, size: int) -> None:
    craft(cohort, "image.bytes", 2, size)
    with pytest.raises(ShardError, match="row 2, sample 'train-00"):
        open_shards(cohort)


def test_overlapping_members_are_refused(cohort: Path) -> None:
    shards = open_shards(cohort)
    first, second = shards.packed_order("train")[:2].tolist()
    places = shards.table.members("train", "image")
    craft(cohort, "image.offset", second, int(places.offset[first]))
    with pytest.raises(ShardError, match="claim the same bytes"):
        open_shards(cohort)


@pytest.mark.parametrize("shard", [-1, 99, 1 << 30])
def test_a_shard_number_the_manifest_does_not_have_is_refused(cohort: Path, shard: int) -> None:
    craft(cohort, "shard", 0, shard)
    with pytest.raises(ShardError, match="row 0"):
        open_shards(cohort)


@pytest.mark.parametrize("side", [0, -1, 1 << 30])
def test_a_shape_that_its_bytes_cannot_hold_is_refused(cohort: Path, side: int) -> None:
    craft(cohort, "image.shape", 0, [side, *SHAPE[1:]])
    with pytest.raises(ShardError, match="row 0, sample 'train-00"):
        open_shards(cohort)


def test_an_offset_of_2_to_the_63_has_no_place_in_the_table(cohort: Path) -> None:
    values = table_column(cohort, "image.offset")
    values[0] = 1 << 63
    rewrite_column(cohort, "image.offset", values, kind=pa.uint64())
    with pytest.raises(ShardError, match=r"samples\.arrow"):
        open_shards(cohort)


def test_a_patient_in_two_splits_is_refused_at_opening_and_listed_by_verify(cohort: Path) -> None:
    # The last patient of training also owns the last sample, which is one for validation.
    values = table_column(cohort, "patient")
    craft(cohort, "patient", -1, values[5])
    with pytest.raises((SplitError, ShardError)):
        open_shards(cohort)
    assert [problem.shard for problem in verify_shards(cohort).problems] == ["samples.arrow"]


READING_SCRIPT = """
import sys
import numpy as np
from streaming_balance.errors import ShardError
from streaming_balance.storage.shards import open_shards
shards = open_shards(sys.argv[1])
out = np.zeros((1, 2, 6, 5, 4), np.int16)
with shards.reader("train", max_open_files=64) as reader:
    try:
        for sample in range(shards.size("train")):
            reader.read_into([sample], out)
    except ShardError as error:
        print(f"ShardError {error.errno}: {error}")
    else:
        print(f"read {shards.size('train')}")
"""


def read_with_injection(folder: Path, injection: str, tmp_path: Path) -> tuple[str, str]:
    """Read a data set in a process whose reads fail as told; give its output and its calls."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace.txt"
    # CPython's os.preadv is the system call preadv2.
    command = ["strace", "-f", "-o", str(trace), "-e", "trace=preadv2,openat"]
    command += ["-e", f"inject=preadv2:{injection}"]
    script = [sys.executable, "-c", READING_SCRIPT, str(folder)]
    finished = subprocess.run([*command, *script], capture_output=True, text=True, check=False)
    if "ptrace" in finished.stderr.lower():
        pytest.skip("strace may not trace here")
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, trace.read_text()


def test_an_input_output_error_names_shard_sample_and_offset(cohort: Path, tmp_path: Path) -> None:
    output, _ = read_with_injection(cohort, "error=EIO", tmp_path)
    assert output.startswith("ShardError 5: ")
    assert "Input/output error" in output
    for part in (
        "train-000000.tar",
        "sample 'train-00",
        "at byte 4096",
        "streaming-balance verify",
    ):
        assert part in output


def test_a_stale_handle_is_opened_again_once(cohort: Path, tmp_path: Path) -> None:
    output, calls = read_with_injection(cohort, "error=ESTALE:when=1", tmp_path)
    assert output == "read 6\n"
    opened = [call for call in calls.splitlines() if "cohort/train-" in call and "openat" in call]
    assert len(opened) == 4  # three shards, one of them twice


def test_a_handle_that_stays_stale_is_an_error(cohort: Path, tmp_path: Path) -> None:
    output, calls = read_with_injection(cohort, "error=ESTALE", tmp_path)
    assert output.startswith("ShardError 116: ")
    assert sum("preadv2" in call for call in calls.splitlines()) == 2


def test_a_call_that_asks_to_be_repeated_is_repeated(cohort: Path, tmp_path: Path) -> None:
    output, _ = read_with_injection(cohort, "error=EAGAIN:when=1..2", tmp_path)
    assert output == "read 6\n"
    output, _ = read_with_injection(cohort, "error=EAGAIN", tmp_path)
    assert output.startswith("ShardError 11: ")


def test_a_file_that_ends_where_it_should_not_is_a_short_read(cohort: Path, tmp_path: Path) -> None:
    output, _ = read_with_injection(cohort, "retval=0:when=2", tmp_path)
    assert "short read" in output


def test_a_hundred_shards_are_read_with_sixty_four_open_files(tmp_path: Path) -> None:
    pack(tmp_path, random_samples(100), shard_bytes=4_000)
    assert len(read_manifest(tmp_path).shards) == 100
    limited = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
    finished = subprocess.run(
        [sys.executable, "-c", limited + READING_SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout == "read 100\n", finished.stderr


def test_a_refused_data_set_leaves_no_file_open(cohort: Path) -> None:
    path = shard_paths(cohort)[1]
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(BalanceError):
        open_shards(cohort)
    assert not any(place.startswith(str(cohort)) for place in open_files())


def test_a_sample_is_never_delivered_in_part_after_an_error(cohort: Path) -> None:
    # The message is all a caller gets: no partial count, no flag to forget to look at.
    samples = [Sample(key="P1", image=np.ones(SHAPE, np.int16))]
    folder = cohort / "one"
    pack(folder, samples)
    path = shard_paths(folder)[0]
    whole = bytearray(path.read_bytes())
    whole[512 + 200] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ShardError, match="sample 'P1'"):
        open_shards(folder).read("train", 0)
