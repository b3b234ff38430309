"""The sample table says where every byte lies, and refuses a row that cannot be."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from streaming_balance.errors import ConfigError, ShardError, SplitError
from streaming_balance.storage.index import SampleTable
from streaming_balance.storage.layout import TABLE_NAME
from streaming_balance.storage.manifest import Manifest
from streaming_balance.storage.table_file import write_table
from tests.building import Sample, pack, random_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """A packed data set."""

    folder: Path
    """Where it lies."""
    manifest: Manifest
    """What it says about itself."""
    samples: tuple[Sample, ...]
    """What was packed."""

    def table(self) -> pa.Table:
        """Read the sample table with Arrow alone."""
        return pa.ipc.open_file(pa.py_buffer((self.folder / TABLE_NAME).read_bytes())).read_all()

    def rewritten(self, table: pa.Table, folder: Path, *, block_rows: int = 65_536) -> Manifest:
        """Write another table, with a manifest that vouches for it."""
        entry = write_table(folder / TABLE_NAME, table, block_rows=block_rows)
        return replace(self.manifest, table=entry)

    def opened(self) -> SampleTable:
        """Open it as readers do."""
        return SampleTable.open(self.folder / TABLE_NAME, self.manifest)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Eleven samples in two splits and several shards, two of them with a segmentation."""
    folder = tmp_path_factory.mktemp("cohort")
    mask = np.ones((6, 5, 4), dtype=np.uint8)
    samples = [
        replace(
            sample,
            patient=f"patient {number // 2}" if sample.split == "train" else "patient é",
            seg=mask if number in (1, 2) else None,
            columns={"site": "A" if number % 2 else "B", "scanner": f"s{number}"},
            axes="CHW" if number == 3 else None,
            image=sample.image[0] if number == 3 else sample.image,
        )
        for number, sample in enumerate(random_samples(8) + random_samples(3, split="val"))
    ]
    manifest = pack(folder, samples, shard_bytes=8192)
    return Cohort(folder=folder, manifest=manifest, samples=tuple(samples))


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """Replace a column, keeping the schema."""
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), values)


def with_value(name: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    """Make a change of one value of a plain column."""

    def change(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        values[row] = value
        return with_column(table, name, pa.array(values, table.schema.field(name).type))

    return change


def with_code(name: str, row: int, code: int | None) -> Callable[[pa.Table], pa.Table]:
    """Make a change of one number of a dictionary column."""

    def change(table: pa.Table) -> pa.Table:
        column = table.column(name).combine_chunks()
        codes = column.indices.to_pylist()
        codes[row] = code
        indices = pa.array(codes, column.type.index_type)
        changed = pa.DictionaryArray.from_arrays(indices, column.dictionary, safe=False)
        return with_column(table, name, changed)

    return change


def with_words(name: str, words: Sequence[str]) -> Callable[[pa.Table], pa.Table]:
    """Make a change of a dictionary's words."""

    def change(table: pa.Table) -> pa.Table:
        indices = table.column(name).combine_chunks().indices
        changed = pa.DictionaryArray.from_arrays(indices, pa.array(words, pa.utf8()), safe=False)
        return with_column(table, name, changed)

    return change


def swapped(first: int, second: int) -> Callable[[pa.Table], pa.Table]:
    """Make a change of the order of two rows."""

    def change(table: pa.Table) -> pa.Table:
        order = list(range(table.num_rows))
        order[first], order[second] = order[second], order[first]
        return table.take(order)

    return change


def expected_order(cohort: Cohort, split: str) -> list[Sample]:
    """Sort the packed samples by class, patient, key, as Python sorts."""
    classes = list(cohort.manifest.classes)
    return sorted(
        (sample for sample in cohort.samples if sample.split == split),
        key=lambda sample: (classes.index(sample.label), str(sample.patient), sample.key),
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_stand_in_order_of_class_patient_and_key(cohort: Cohort, split: str) -> None:
    table, expected = cohort.opened(), expected_order(cohort, split)
    assert table.keys(split).tolist() == [sample.key for sample in expected]
    assert table.patients(split).tolist() == [sample.patient for sample in expected]
    assert table.column(split, "scanner").tolist() == [s.columns["scanner"] for s in expected]
    labels = [cohort.manifest.classes.index(sample.label) for sample in expected]
    assert table.labels(split).tolist() == labels
    assert table.labels(split).dtype == np.int64


def test_offsets_lead_to_the_members_that_tarfile_finds(cohort: Cohort) -> None:
    table = cohort.opened()
    for split in ("train", "val"):
        keys = table.keys(split)
        for field in ("image", "seg", "cls", "json"):
            members = table.members(split, field)
            for number in np.flatnonzero(members.present):
                shard = cohort.manifest.shards[members.shard[number]]
                with tarfile.open(cohort.folder / shard.name) as archive:
                    name = f"{keys[number]}.{field}" + (".npy" if field in ("image", "seg") else "")
                    info = archive.getmember(name)
                    file = archive.extractfile(info)
                    assert file is not None
                    payload = file.read()
                assert info.offset_data == members.offset[number]
                assert info.size == members.stored_bytes[number]
                assert xxhash.xxh3_64_intdigest(payload) == members.xxh3[number]


def test_formats_describe_the_arrays_numpy_loads(cohort: Cohort) -> None:
    table = cohort.opened()
    expected = expected_order(cohort, "train")
    formats = table.formats("train", "image")
    for number, sample in enumerate(expected):
        assert formats.member[number] == f"{sample.key}.image.npy"
        assert tuple(formats.shape[number][: len(formats.axes[number])]) == sample.image.shape
        assert not formats.shape[number][len(formats.axes[number]) :].any()
        assert formats.dtype[number] == "int16"
        assert formats.codec[number] == "npy"
        stored = io.BytesIO(member_bytes(cohort, table, "train", number))
        np.testing.assert_array_equal(np.load(stored), sample.image)
    assert set(formats.axes) == {"CDHW", "CHW"}


def member_bytes(cohort: Cohort, table: SampleTable, split: str, number: int) -> bytes:
    """Read an image's bytes where the table says they lie."""
    members = table.members(split, "image", [number])
    content = (cohort.folder / cohort.manifest.shards[members.shard[0]].name).read_bytes()
    start = int(members.offset[0])
    return bytes(content[start : start + int(members.stored_bytes[0])])


def test_an_absent_member_is_marked_and_empty(cohort: Cohort) -> None:
    table = cohort.opened()
    has_seg = [sample.seg is not None for sample in expected_order(cohort, "train")]
    members, formats = table.members("train", "seg"), table.formats("train", "seg")
    assert members.present.tolist() == has_seg
    assert sum(has_seg) == 2
    absent = ~members.present
    assert not members.stored_bytes[absent].any()
    assert set(formats.codec[absent]) == set(formats.dtype[absent]) == {""}
    assert not formats.shape[absent].any()
    assert not table.members("val", "seg").present.any()


@pytest.mark.parametrize("block_rows", [1, 3, 4, 11])
@pytest.mark.parametrize(("eager_rows", "in_memory_bytes"), [(10**6, 1 << 30), (0, 0)])
def test_blocks_and_mapping_do_not_change_what_is_read(
    cohort: Cohort, tmp_path: Path, block_rows: int, eager_rows: int, in_memory_bytes: int
) -> None:
    manifest = cohort.rewritten(cohort.table(), tmp_path, block_rows=block_rows)
    blocked = SampleTable.open(
        tmp_path / TABLE_NAME, manifest, eager_rows=eager_rows, in_memory_bytes=in_memory_bytes
    )
    whole = cohort.opened()
    wanted = [7, 0, 5, 5]
    for samples in (None, wanted, [2], []):
        assert_same(blocked.keys("train", samples), whole.keys("train", samples))
        assert_same(blocked.labels("train", samples), whole.labels("train", samples))
        assert_same(blocked.patients("train", samples), whole.patients("train", samples))
        for field in ("image", "seg"):
            mine, theirs = (t.members("train", field, samples) for t in (blocked, whole))
            assert_same(mine.offset, theirs.offset)
            assert_same(mine.xxh3, theirs.xxh3)
            assert_same(mine.present, theirs.present)
            formats = [t.formats("train", field, samples) for t in (blocked, whole)]
            assert_same(formats[0].shape, formats[1].shape)
            assert_same(formats[0].voxels, formats[1].voxels)
    assert whole.keys("train")[wanted].tolist() == whole.keys("train", wanted).tolist()


def assert_same(found: Any, expected: Any) -> None:
    """Compare values and that nobody can write them."""
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="read-only"):
        found[...] = found


def test_a_split_without_samples_has_empty_columns(cohort: Cohort, tmp_path: Path) -> None:
    empty = replace(cohort.manifest.splits[0], name="test", samples=0, patients=0)
    manifest = replace(cohort.manifest, splits=(*cohort.manifest.splits, empty))
    words = with_words("split", ["train", "val", "test"])(cohort.table())
    manifest = replace(manifest, table=cohort.rewritten(words, tmp_path, block_rows=1).table)
    table = SampleTable.open(tmp_path / TABLE_NAME, manifest)
    assert table.split_rows("test") == (11, 11)
    assert table.labels("test").tolist() == table.keys("test").tolist() == []
    assert len(table.members("test", "image").offset) == 0
    assert table.patients("test").tolist() == []


def test_a_large_table_is_checked_block_by_block_when_first_touched(
    cohort: Cohort, tmp_path: Path
) -> None:
    manifest = cohort.rewritten(cohort.table(), tmp_path, block_rows=2)
    content = bytearray((tmp_path / TABLE_NAME).read_bytes())
    content[manifest.table.block_ends[1] - 9] ^= 1  # in the second of six blocks
    (tmp_path / TABLE_NAME).write_bytes(content)
    with pytest.raises(ShardError, match="xxh3"):
        SampleTable.open(tmp_path / TABLE_NAME, manifest)
    table = SampleTable.open(tmp_path / TABLE_NAME, manifest, eager_rows=10)
    assert (
        table.keys("train", [0, 1, 4]).tolist() == cohort.opened().keys("train")[[0, 1, 4]].tolist()
    )
    for touch in (lambda: table.members("train", "image", [3]), lambda: table.labels("train")):
        with pytest.raises(ShardError, match="table is damaged"):
            touch()
    with pytest.raises(ShardError, match="table is damaged"):
        table.check_all()


@pytest.mark.parametrize("block", [0, -1])
def test_schema_dictionaries_and_footer_are_checked_at_opening(
    cohort: Cohort, tmp_path: Path, block: int
) -> None:
    manifest = cohort.rewritten(cohort.table(), tmp_path, block_rows=2)
    content = bytearray((tmp_path / TABLE_NAME).read_bytes())
    content[manifest.table.block_ends[block] - 9] ^= 1
    (tmp_path / TABLE_NAME).write_bytes(content)
    with pytest.raises(ShardError, match="table is damaged"):
        SampleTable.open(tmp_path / TABLE_NAME, manifest, eager_rows=0)


def test_overlaps_inside_a_block_of_a_large_table_are_found(cohort: Cohort, tmp_path: Path) -> None:
    offset = cohort.table().column("cls.offset")[0].as_py()
    table = with_value("json.offset", 0, offset)(cohort.table())
    manifest = cohort.rewritten(table, tmp_path, block_rows=4)
    opened = SampleTable.open(tmp_path / TABLE_NAME, manifest, eager_rows=0)
    with pytest.raises(ShardError, match="claim the same bytes"):
        opened.labels("train", [0])


# A change of one thing in a sound table, and what must be said about it.
REFUSED: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "negative offset": (with_value("image.offset", 2, -512), "image outside its shard"),
    "offset in a header": (with_value("image.offset", 2, 0), "image outside its shard"),
    "offset off the grid": (with_value("cls.offset", 2, 513), "cls outside its shard"),
    "offset beyond the file": (with_value("image.offset", 2, 1 << 40), "image outside its shard"),
    "offset near 2^63": (with_value("image.offset", 2, (1 << 63) - 512), "outside its shard"),
    "bytes near 2^63": (with_value("image.bytes", 2, (1 << 63) - 1), "outside its shard"),
    "no bytes": (with_value("json.bytes", 2, 0), "json outside its shard"),
    "negative bytes": (with_value("cls.bytes", 2, -1), "cls outside its shard"),
    "overlap": (
        lambda t: with_value("cls.offset", 1, t["json.offset"][1].as_py())(t),
        "same bytes",
    ),
    "shard beyond the list": (with_value("shard", 2, 99), "outside the manifest's"),
    "negative shard": (with_value("shard", 2, -1), "outside the manifest's"),
    "shard of another split": (
        lambda table: with_value("shard", 2, table["shard"][10].as_py())(table),
        "another split",
    ),
    "side of zero": (with_value("image.shape", 2, [2, 6, 0, 4]), "side below 1"),
    "negative side": (with_value("image.shape", 2, [2, -6, 5, -4]), "side below 1"),
    "too few sides": (with_value("image.shape", 2, [6, 5]), "unlike its axes"),
    "five sides": (with_value("image.shape", 2, [1, 2, 6, 5, 4]), "unlike its axes"),
    "terabytes": (with_value("image.shape", 2, [1024, 1024, 1024, 480]), "bytes cannot hold"),
    "product past 2^64": (with_value("image.shape", 2, [1 << 30] * 4), "bytes cannot hold"),
    "another dtype": (with_code("image.dtype", 2, 3), "bytes cannot hold"),
    "digest of capitals": (with_value("image.voxels", 2, "A" * 32), "no digest"),
    "short digest": (with_value("seg.voxels", 2, "0"), "half a seg|no digest"),
    "no name": (with_value("image.member", 2, ""), "without a name"),
    "half a seg": (with_value("seg.bytes", 0, None), "half a seg"),
    "unknown codec": (with_words("image.codec", ["zip", "npy"]), "known:"),
    "object dtype": (
        lambda t: with_words("image.dtype", ["object"] * len(words_of(t, "image.dtype")))(t),
        "object",
    ),
    "unknown axes": (with_words("image.axes", ["ABC", "DHW", "CHW", "HW"]), "known:"),
    "code beyond the dictionary": (with_code("image.codec", 2, 7), "no sound Arrow"),
    "negative code": (with_code("image.codec", 2, -3), "no sound Arrow"),
    "unsorted rows": (swapped(1, 2), "does not follow the row before"),
    # The last row is alone in its class, so that no order but that of keys is broken.
    "a key twice": (
        lambda table: with_value("key", 10, table["key"][0].as_py())(table),
        "'train-.*' stands in more than one row",
    ),
    "a key in two cases": (
        lambda table: with_value("key", 10, table["key"][0].as_py().upper())(table),
        "'train-.*' stands in more than one row, or differs in case",
    ),
    "other classes": (with_words("label", ["LGG", "HGG"]), "label words"),
    "other splits": (with_words("split", ["train", "test"]), "split words"),
    "split too early": (with_code("split", 7, 1), "another split|does not follow"),
    "unsorted patients": (
        lambda t: with_words("patient", list(reversed(words_of(t, "patient"))))(t),
        "dictionary is not sorted",
    ),
    "a patient twice": (
        lambda t: with_words("patient", ["p"] * len(words_of(t, "patient")))(t),
        "dictionary is not sorted",
    ),
}


def words_of(table: pa.Table, name: str) -> list[str]:
    """Give a dictionary's words."""
    return list(table.column(name).combine_chunks().dictionary.to_pylist())


@pytest.mark.parametrize(("change", "problem"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("block_rows", [65_536, 4])
def test_18_a_row_that_cannot_be_is_refused(
    cohort: Cohort,
    tmp_path: Path,
    change: Callable[[pa.Table], pa.Table],
    problem: str,
    block_rows: int,
) -> None:
    manifest = cohort.rewritten(change(cohort.table()), tmp_path, block_rows=block_rows)
    with pytest.raises(ShardError, match=problem) as caught:
        SampleTable.open(tmp_path / TABLE_NAME, manifest)
    assert str(tmp_path / TABLE_NAME) in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_blocks_out_of_order_are_refused(cohort: Cohort, tmp_path: Path) -> None:
    order = [2, 3, 0, 1, *range(4, 11)]
    manifest = cohort.rewritten(cohort.table().take(order), tmp_path, block_rows=2)
    with pytest.raises(ShardError, match=r"row 2, sample .* does not follow"):
        SampleTable.open(tmp_path / TABLE_NAME, manifest)


def test_a_missing_value_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    table = cohort.table()
    keys = pa.array([None, *table.column("key").to_pylist()[1:]], pa.utf8())
    manifest = cohort.rewritten(with_column(table, "key", keys), tmp_path)
    with pytest.raises(ShardError, match="row 0 has no value in column 'key'"):
        SampleTable.open(tmp_path / TABLE_NAME, manifest)


def test_a_row_without_a_patient_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    table = with_code("patient", 3, None)(cohort.table())
    manifest = cohort.rewritten(table, tmp_path, block_rows=2)
    with pytest.raises(ShardError, match=r"row 3, sample .* has no patient"):
        SampleTable.open(tmp_path / TABLE_NAME, manifest, eager_rows=0)


@pytest.mark.parametrize("eager_rows", [0, 10**6])
def test_31_a_patient_in_two_splits_is_refused_however_large_the_table(
    cohort: Cohort, tmp_path: Path, eager_rows: int
) -> None:
    table = cohort.table()
    patient = table.column("patient").combine_chunks().indices[0].as_py()
    rows = [row for row in range(8, 11) if table["label"][row].as_py() == "HGG"]
    manifest = cohort.rewritten(with_code("patient", rows[0], patient)(table), tmp_path)
    with pytest.raises(SplitError, match="'patient 0' stands in splits 'train' and 'val'"):
        SampleTable.open(tmp_path / TABLE_NAME, manifest, eager_rows=eager_rows)


def test_a_table_of_another_size_names_both_sizes(cohort: Cohort, tmp_path: Path) -> None:
    content = (cohort.folder / TABLE_NAME).read_bytes()
    (tmp_path / TABLE_NAME).write_bytes(content + b"\0")
    expected = f"size {len(content) + 1:,} bytes, the manifest says {len(content):,}"
    with pytest.raises(ShardError, match=expected):
        SampleTable.open(tmp_path / TABLE_NAME, cohort.manifest)


def test_a_table_that_cannot_be_read_is_named(cohort: Cohort, tmp_path: Path) -> None:
    (tmp_path / TABLE_NAME).mkdir()
    with pytest.raises(ShardError, match="cannot be read: Is a directory"):
        SampleTable.open(tmp_path / TABLE_NAME, cohort.manifest)


def test_a_table_that_shrinks_while_it_is_read_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    # The kernel's own files claim a page and give less: a file cut between size check and read.
    short = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not short.exists():
        pytest.skip("needs a file that gives less than its size")
    (tmp_path / TABLE_NAME).symlink_to(short)
    entry = replace(cohort.manifest.table, bytes=short.stat().st_size)
    with pytest.raises(ShardError, match=r"shrank to .* while it was read"):
        SampleTable.open(tmp_path / TABLE_NAME, replace(cohort.manifest, table=entry))


def vouched(manifest: Manifest, content: bytes, path: Path) -> Manifest:
    """Write any bytes as the table, with a manifest that vouches for them."""
    path.write_bytes(content)
    entry = replace(
        manifest.table,
        bytes=len(content),
        block_ends=(len(content),),
        block_xxh3=(xxhash.xxh3_64_hexdigest(content),),
    )
    return replace(manifest, table=entry)


def test_bytes_that_are_no_arrow_are_refused(cohort: Cohort, tmp_path: Path) -> None:
    manifest = vouched(cohort.manifest, b"x" * 1000, tmp_path / TABLE_NAME)
    with pytest.raises(ShardError, match="no Arrow file"):
        SampleTable.open(tmp_path / TABLE_NAME, manifest)


def test_a_vouched_table_with_flipped_bits_is_refused_or_sound(
    cohort: Cohort, tmp_path: Path
) -> None:
    content = (cohort.folder / TABLE_NAME).read_bytes()
    for place in range(0, len(content), 29):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        manifest = vouched(cohort.manifest, bytes(flipped), tmp_path / TABLE_NAME)
        try:
            table = SampleTable.open(tmp_path / TABLE_NAME, manifest)
        except (ShardError, SplitError):
            continue
        assert len(table.members("train", "image").offset) == 8


def test_other_columns_are_refused(cohort: Cohort, tmp_path: Path) -> None:
    table = cohort.table().drop_columns(["site"])
    with pytest.raises(ShardError, match=r"the columns are .* expected .*'site'"):
        SampleTable.open(tmp_path / TABLE_NAME, cohort.rewritten(table, tmp_path))


def test_another_number_of_blocks_or_rows_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    manifest = cohort.rewritten(cohort.table(), tmp_path, block_rows=4)
    content = (tmp_path / TABLE_NAME).read_bytes()
    whole = vouched(manifest, content, tmp_path / TABLE_NAME)
    with pytest.raises(ShardError, match="3 blocks, the manifest says 1"):
        SampleTable.open(tmp_path / TABLE_NAME, whole)
    uneven = replace(manifest.table, block_rows=5)
    with pytest.raises(ShardError, match="block 0 has 4 rows, expected 5"):
        SampleTable.open(tmp_path / TABLE_NAME, replace(manifest, table=uneven))


def test_unknown_names_list_the_known_ones(cohort: Cohort) -> None:
    table = cohort.opened()
    with pytest.raises(ConfigError, match=r"no split 'vall'; splits: train, val.*mean 'val'"):
        table.labels("vall")
    with pytest.raises(
        ConfigError, match=r"no column 'sites'; columns: scanner, site.*mean 'site'"
    ):
        table.column("train", "sites")


@pytest.mark.parametrize("sample", [-1, 8])
def test_a_sample_number_beyond_the_split_is_an_index_error(cohort: Cohort, sample: int) -> None:
    with pytest.raises(IndexError, match="split 'train', which has 8"):
        cohort.opened().labels("train", [0, sample])


def test_any_arrow_tool_finds_the_facts_in_the_metadata(cohort: Cohort) -> None:
    metadata = cohort.table().schema.metadata
    assert metadata[b"format"] == b"streaming-balance"
    assert metadata[b"version"] == b"1"
    assert json.loads(metadata[b"columns"]) == ["scanner", "site"]
    assert metadata[b"pack_id"].decode() == cohort.manifest.pack_id
