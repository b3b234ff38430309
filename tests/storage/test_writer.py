"""Packing gives the same bytes every time, whatever interrupts it."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from streaming_balance.errors import BalanceError, ConfigError, ShardError, SplitError
from streaming_balance.storage.codecs import decode_member
from streaming_balance.storage.index import SampleTable
from streaming_balance.storage.layout import LOCK_NAME, MANIFEST_NAME, TABLE_NAME
from streaming_balance.storage.manifest import Manifest, Rejected, read_manifest
from streaming_balance.storage.tar import scan_tar
from streaming_balance.storage.writer import EncodedSample, PackWriter, encode_array

PROJECT_ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "val")


def encoded(
    key: str,
    *,
    patient: str | None = None,
    label: str = "LGG",
    split: str = "train",
    value: int = 1,
    side: int = 8,
    codec: str = "npy",
    with_seg: bool = False,
    **details: Any,
) -> EncodedSample:
    """Encode one sample of random voxels."""
    generator = np.random.default_rng(value)
    image = generator.integers(0, 300, (2, side, 6, 5)).astype(np.int16)
    arrays = [encode_array("image", image, axes="CDHW", codec=codec)]
    if with_seg:
        arrays.append(encode_array("seg", (image[0] > 9).view(np.uint8), axes="DHW", codec=codec))
    return EncodedSample(
        key=key,
        patient=patient or key,
        label=label,
        split=split,
        columns={"site": "A"},
        arrays=tuple(arrays),
        details={"spacing": [1.0, 1.0, 2.0], **details},
    )


def cohort(codec: str = "npy") -> list[EncodedSample]:
    """Encode nine samples of two splits, in the order they are packed."""
    return [
        encoded(
            f"P{number}",
            label="HGG" if number % 3 else "LGG",
            split="val" if number > 5 else "train",
            value=number,
            codec=codec,
            with_seg=number % 2 == 0,
        )
        for number in range(9)
    ]


def writer_for(folder: Path, **changes: Any) -> PackWriter:
    """Open a writer with the settings of these tests, some of them changed."""
    settings: dict[str, Any] = {
        "classes": ["LGG", "HGG"],
        "splits": SPLITS,
        "train_splits": ["train"],
        "codec": "npy",
        "columns": ["site"],
        "shard_bytes": 12_000,
        "settings": {"seed": 1},
        "overwrite": False,
    }
    return PackWriter(folder, **{**settings, **changes})


def pack(folder: Path, samples: Sequence[EncodedSample], **changes: Any) -> Manifest:
    """Pack samples, all of them, and finish."""
    with writer_for(folder, **changes) as writer:
        for sample in samples:
            writer.add(sample)
        return writer.finish(found=len(samples), rejected=[])


def contents(folder: Path) -> dict[str, str]:
    """Digest every file in a folder, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed pack of the cohort leaves."""
    folder = tmp_path_factory.mktemp("expected")
    pack(folder, cohort())
    return contents(folder)


def test_a_pack_holds_shards_table_and_manifest_and_nothing_else(
    expected: dict[str, str],
) -> None:
    assert sorted(expected) == [
        *("manifest.json", "samples.arrow"),
        *("train-000000.tar", "train-000001.tar", "train-000002.tar"),
        *("val-000000.tar", "val-000001.tar"),
    ]


def test_packing_twice_gives_the_same_bytes(tmp_path: Path, expected: dict[str, str]) -> None:
    pack(tmp_path / "again", cohort())
    assert contents(tmp_path / "again") == expected


@pytest.mark.parametrize("codec", ["npy", "blosc"])
def test_every_file_is_as_its_manifest_says(tmp_path: Path, codec: str) -> None:
    manifest = pack(tmp_path, cohort(codec), codec=codec)
    found = contents(tmp_path)
    sizes = {shard.name: (shard.sha256, shard.bytes) for shard in manifest.shards}
    sizes[manifest.table.name] = (manifest.table.sha256, manifest.table.bytes)
    for name, said in sizes.items():
        assert (found[name], (tmp_path / name).stat().st_size) == said
    assert manifest == read_manifest(tmp_path)
    assert [split.samples for split in manifest.splits] == [6, 3]
    assert all(shard.bytes <= 12_000 for shard in manifest.shards)
    assert {shard.samples for shard in manifest.shards} <= {1, 2, 3}
    assert SampleTable.open(tmp_path / TABLE_NAME, manifest).rows == 9


def test_members_stand_in_order_and_say_class_and_details(tmp_path: Path) -> None:
    manifest = pack(tmp_path, cohort())
    path = tmp_path / manifest.shards[0].name
    names = [member.name for member in scan_tar(path)]
    assert names[:7] == [
        *("P0.image.npy", "P0.seg.npy", "P0.cls", "P0.json"),
        *("P1.image.npy", "P1.cls", "P1.json"),
    ]
    with tarfile.open(path) as archive:
        file = archive.extractfile("P1.json")
        assert file is not None
        text = file.read().decode()
    assert text == '{"label":"HGG","patient":"P1","spacing":[1.0,1.0,2.0]}'


def read_with_webdataset(folder: Path, manifest: Manifest, *decoders: Any) -> list[dict[str, Any]]:
    """Read and decode every sample as a user of webdataset does."""
    urls = [str(folder / shard.name) for shard in manifest.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode(*decoders))
        gc.collect()
    return samples


@pytest.mark.parametrize("codec", ["npy", "blosc"])
def test_webdataset_decodes_every_sample(tmp_path: Path, codec: str) -> None:
    samples = cohort(codec)
    manifest = pack(tmp_path, samples, codec=codec)
    found = {
        sample["__key__"]: sample
        for sample in read_with_webdataset(tmp_path, manifest, decode_member)
    }
    assert list(found) == [sample.key for sample in samples]
    extension = {"npy": "npy", "blosc": "npb"}[codec]
    for sample in samples:
        image = np.random.default_rng(int(sample.key[1:])).integers(0, 300, (2, 8, 6, 5))
        np.testing.assert_array_equal(found[sample.key][f"image.{extension}"], image)
        assert found[sample.key]["cls"] == manifest.classes.index(sample.label)
        assert found[sample.key]["json"]["patient"] == sample.patient


def test_webdataset_reads_the_npy_codec_with_its_own_decoders(tmp_path: Path) -> None:
    manifest = pack(tmp_path, cohort())
    samples = read_with_webdataset(tmp_path, manifest)
    assert len(samples) == 9
    image = np.random.default_rng(3).integers(0, 300, (2, 8, 6, 5))
    np.testing.assert_array_equal(samples[3]["image.npy"], image)


def test_the_digest_depends_on_content_alone(tmp_path: Path) -> None:
    digest = pack(tmp_path / "a", cohort()).digest
    others = [
        pack(tmp_path / "b", cohort("blosc"), codec="blosc").digest,
        pack(tmp_path / "c", cohort(), shard_bytes=1 << 20).digest,
        pack(tmp_path / "d", [*cohort()[5::-1], *cohort()[6:]]).digest,
    ]
    assert set(others) == {digest}
    relabelled = [replace(cohort()[0], label="HGG"), *cohort()[1:]]
    moved = [replace(cohort()[0], columns={"site": "B"}), *cohort()[1:]]
    changed = [encoded("P0", value=99, with_seg=True), *cohort()[1:]]
    digests = [
        pack(tmp_path / name, samples).digest
        for name, samples in (("e", relabelled), ("f", moved), ("g", changed))
    ]
    digests.append(pack(tmp_path / "h", cohort(), classes=["LGG", "HGG", "other"]).digest)
    assert len({digest, *digests}) == 5


def test_the_pack_id_tells_packs_of_equal_content_apart(tmp_path: Path) -> None:
    first = pack(tmp_path / "a", cohort())
    second = pack(tmp_path / "b", cohort(), shard_bytes=1 << 20)
    assert first.digest == second.digest
    assert first.pack_id != second.pack_id


def test_a_sample_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    samples = [encoded("P0", side=4), encoded("P1", side=100), encoded("P2", side=4)]
    manifest = pack(tmp_path, samples)
    assert [shard.samples for shard in manifest.shards] == [1, 1, 1]
    assert manifest.shards[1].bytes > 12_000


def test_a_shard_is_filled_to_the_byte(tmp_path: Path) -> None:
    # Per sample: a 512-byte header each, payloads of 1,088, 1 and 54 bytes up to whole blocks.
    per_sample = (512 + 1536) + (512 + 512) + (512 + 512)
    samples = [encoded(f"P{number}") for number in range(4)]
    exact = pack(tmp_path / "exact", samples, shard_bytes=2 * per_sample + 1024)
    assert [(shard.samples, shard.bytes) for shard in exact.shards] == [
        (2, 2 * per_sample + 1024),
        (2, 2 * per_sample + 1024),
    ]
    short = pack(tmp_path / "short", samples, shard_bytes=2 * per_sample + 1023)
    assert [shard.samples for shard in short.shards] == [1, 1, 1, 1]


def test_rejected_cases_stand_in_the_manifest(tmp_path: Path) -> None:
    rejected = Rejected(patient="P9", path="P9/t1.nii.gz", reason="no t1")
    with writer_for(tmp_path) as writer:
        writer.add(encoded("P0"))
        manifest = writer.finish(found=2, rejected=[rejected])
    assert (manifest.found, manifest.rejected) == (2, (rejected,))
    assert manifest.splits[1].samples == 0


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({"classes": []}, "at least one class"),
    "no split": ({"splits": [], "train_splits": []}, "at least one class and one split"),
    "class twice": ({"classes": ["a", "a"]}, "each must be named once"),
    "empty class": ({"classes": [""]}, "none empty"),
    "split twice": ({"splits": ["train", "train"]}, "each must be named once"),
    "split with a dot": ({"splits": ["a.b"], "train_splits": []}, "cannot name a shard"),
    "unknown train split": ({"train_splits": ["test"]}, "not all among"),
    "column of the table": ({"columns": ["label"]}, "clash"),
    "column with a dot": ({"columns": ["image.offset"]}, "clash"),
    "codec": ({"codec": "zip"}, "codec 'zip' is unknown"),
    "shard_bytes": ({"shard_bytes": 0}, "shard_bytes is 0"),
    "settings": ({"settings": {"a": float("inf")}}, "plain JSON"),
}


@pytest.mark.parametrize(("changes", "problem"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        writer_for(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


BAD_SAMPLES: dict[str, tuple[EncodedSample, type[BalanceError], str]] = {
    "label": (encoded("P1", label="HG"), ConfigError, "label 'HG'; known: LGG, HGG.*mean 'HGG'"),
    "split": (encoded("P1", split="test"), ConfigError, "split 'test'; known: train, val"),
    "columns": (replace(encoded("P1"), columns={}), ConfigError, "columns .*expected .'site'"),
    "no image": (replace(encoded("P1"), arrays=()), ConfigError, "image, then seg or none"),
    "key": (encoded("P0"), ConfigError, "'P0' .*packed already"),
    "folded key": (encoded("p0"), ConfigError, "'p0' .*packed already: as 'P0'"),
    "two splits": (
        encoded("P1", patient="P0", split="val"),
        SplitError,
        "'P0' stands in splits 'train' and 'val'",
    ),
    "own label": (
        replace(encoded("P1"), details={"label": "x"}),
        ConfigError,
        "may not set .'label'",
    ),
    "no JSON": (replace(encoded("P1"), details={"x": float("nan")}), ConfigError, "no plain JSON"),
    "long key": (encoded("P" * 95), ShardError, "a shorter id"),
}


@pytest.mark.parametrize(("sample", "kind", "problem"), BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_a_sample_that_does_not_fit_is_refused(
    tmp_path: Path, sample: EncodedSample, kind: type[BalanceError], problem: str
) -> None:
    with writer_for(tmp_path) as writer:
        writer.add(encoded("P0"))
        with pytest.raises(kind, match=problem):
            writer.add(sample)
    assert contents(tmp_path) == {}, "nothing is left of a pack that did not finish a shard"


def test_samples_come_split_after_split(tmp_path: Path) -> None:
    with writer_for(tmp_path) as writer:
        writer.add(encoded("P0", split="val"))
        with pytest.raises(ConfigError, match=r"'train' comes after split 'val' was begun"):
            writer.add(encoded("P1"))


@pytest.mark.parametrize(
    ("field", "axes", "shape", "problem"),
    [
        ("mask", "HW", (2, 2), "'mask' with axes 'HW'"),
        ("image", "WH", (2, 2), "axes 'WH' cannot be packed"),
        ("image", "DHW", (2, 2), "need 3 sides"),
        ("image", "HW", (2, 0), "sides >= 1"),
    ],
)
def test_arrays_that_do_not_go_with_their_axes_are_refused(
    field: str, axes: str, shape: tuple[int, ...], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        encode_array(field, np.zeros(shape, dtype=np.int8), axes=axes, codec="npy")


def test_a_complete_pack_is_recognised_by_its_settings(tmp_path: Path) -> None:
    assert PackWriter.already_complete(tmp_path / "absent", {"seed": 1}) is None
    manifest = pack(tmp_path, cohort())
    assert PackWriter.already_complete(tmp_path, {"seed": 1}) == manifest
    assert PackWriter.already_complete(tmp_path, {"seed": 2}) is None


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.unlink(), lambda path: path.write_bytes(b"")],
    ids=["missing", "empty"],
)
@pytest.mark.parametrize("name", ["val-000000.tar", TABLE_NAME])
def test_a_damaged_pack_is_not_taken_for_complete(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    pack(tmp_path, cohort())
    damage(tmp_path / name)
    with pytest.raises(ShardError, match=rf"{name} has .*damaged.*--overwrite"):
        PackWriter.already_complete(tmp_path, {"seed": 1})


def test_a_data_set_is_replaced_only_when_asked(tmp_path: Path, expected: dict[str, str]) -> None:
    pack(tmp_path, cohort())
    before = contents(tmp_path)
    with pytest.raises(
        ConfigError, match=r"packed with other settings \(seed, size\).*--overwrite"
    ):
        writer_for(tmp_path, settings={"seed": 2, "size": 3})
    with pytest.raises(ConfigError, match="packed with these settings"):
        writer_for(tmp_path)
    assert contents(tmp_path) == before == expected


def test_overwriting_leaves_no_shard_of_the_old_pack(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    pack(tmp_path, cohort(), shard_bytes=1, settings={"seed": 2})
    assert len(contents(tmp_path)) > len(expected)
    pack(tmp_path, cohort(), overwrite=True)
    assert contents(tmp_path) == expected


def test_overwriting_starts_by_removing_the_manifest(tmp_path: Path) -> None:
    pack(tmp_path, cohort())
    with (
        writer_for(tmp_path, overwrite=True),
        pytest.raises(ShardError, match="unfinished pack"),
    ):
        read_manifest(tmp_path)


def test_a_damaged_data_set_is_rebuilt_by_overwriting(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    pack(tmp_path, cohort())
    (tmp_path / "val-000000.tar").write_bytes(b"")
    (tmp_path / MANIFEST_NAME).write_bytes(b"{")
    with pytest.raises(ShardError, match="--overwrite"):
        writer_for(tmp_path)
    pack(tmp_path, cohort(), overwrite=True)
    assert contents(tmp_path) == expected


def test_shards_whose_manifest_is_lost_are_replaced_only_when_asked(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    pack(tmp_path, cohort())
    (tmp_path / MANIFEST_NAME).unlink()
    before = contents(tmp_path)
    for seed in (1, 2):  # nothing in the folder tells whose shards they are
        with pytest.raises(
            ConfigError, match=r"holds shards of another or unfinished command.*--overwrite"
        ):
            writer_for(tmp_path, settings={"seed": seed})
    assert contents(tmp_path) == before
    pack(tmp_path, cohort(), overwrite=True)
    assert contents(tmp_path) == expected


def test_a_table_without_shards_and_manifest_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / TABLE_NAME).write_bytes(b"precious")
    with pytest.raises(ConfigError, match="holds shards of another or unfinished command"):
        writer_for(tmp_path)
    assert (tmp_path / TABLE_NAME).read_bytes() == b"precious"


def test_journals_left_beside_a_manifest_do_no_harm_and_are_removed(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after=5)
    journals = {path.name: path.read_bytes() for path in tmp_path.glob(".journal-*")}
    pack(tmp_path, cohort())
    for name, content in journals.items():
        (tmp_path / name).write_bytes(content)
    manifest = read_manifest(tmp_path)
    assert PackWriter.already_complete(tmp_path, {"seed": 1}) == manifest
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("content", [b"", b"precious" * 200])
def test_tars_of_others_are_never_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train-000000.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"train-000000\.tar was not written by this packer"):
        writer_for(tmp_path)
    assert contents(tmp_path) == {"train-000000.tar": hashlib.sha256(content).hexdigest()}


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".mine.tmp").write_text("mine")
    (tmp_path / "test-000007.tar").mkdir()
    with pytest.raises(ConfigError, match="test-000007"):
        writer_for(tmp_path)
    (tmp_path / "test-000007.tar").rmdir()
    pack(tmp_path, cohort())
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / ".mine.tmp").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/out cannot be made a folder: Not a directory"):
        writer_for(tmp_path / "file" / "out")


def interrupted_pack(folder: Path, samples: Sequence[EncodedSample], stop_after: int) -> None:
    """Pack some samples, then let the writer go without finishing."""
    with writer_for(folder) as writer:
        for sample in samples[:stop_after]:
            writer.add(sample)


@pytest.mark.parametrize("stop_after", range(10))
@pytest.mark.parametrize("does_skip", [True, False])
def test_an_interrupted_pack_goes_on_to_the_same_bytes(
    tmp_path: Path, expected: dict[str, str], stop_after: int, does_skip: bool
) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after)
    assert not (tmp_path / MANIFEST_NAME).exists()
    assert not [name for name in contents(tmp_path) if name.endswith(".tmp")]
    with writer_for(tmp_path) as writer:
        finished = writer.finished_keys()
        for sample in cohort():
            if not (does_skip and sample.key in finished):
                writer.add(sample)
        writer.finish(found=9, rejected=[])
    assert contents(tmp_path) == expected


def test_only_whole_shards_need_no_packing_again(tmp_path: Path) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after=5)  # two in shard 0, two in 1, one in 2
    with writer_for(tmp_path) as writer:
        assert writer.finished_keys() == {"P0", "P1", "P2", "P3"}


def test_what_follows_a_damaged_shard_is_packed_again(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after=9)
    content = bytearray((tmp_path / "train-000001.tar").read_bytes())
    content[700] ^= 1
    (tmp_path / "train-000001.tar").write_bytes(content)
    with writer_for(tmp_path) as writer:
        assert writer.finished_keys() == {"P0", "P1"}
        for sample in cohort()[2:]:
            writer.add(sample)
        writer.finish(found=9, rejected=[])
    assert contents(tmp_path) == expected


def broken_checksum(text: str) -> str:
    """Change a row without its checksum."""
    return text.replace('"patient":"P0"', '"patient":"P9"')


DAMAGED_JOURNALS: dict[str, Callable[[str], str]] = {
    "changed": broken_checksum,
    "cut": lambda text: text[:-30],
    "no object": lambda _: "[]",
    "empty": lambda _: "",
    "no checksum": lambda _: "{}",
    "wrong checksum": lambda _: '{"checksum": 1}',
    "other version": lambda text: resealed(text, version=2),
    "other names": lambda text: resealed(text, rows=[{}]),
}


def resealed(text: str, **changes: Any) -> str:
    """Change a journal and make its checksum right again."""
    body = {**json.loads(text), **changes}
    del body["checksum"]
    content = json.dumps(body, separators=(",", ":")).encode()
    body["checksum"] = hashlib.blake2b(content, digest_size=16).hexdigest()
    return json.dumps(body)


@pytest.mark.parametrize("damage", DAMAGED_JOURNALS.values(), ids=DAMAGED_JOURNALS)
def test_a_damaged_journal_is_not_trusted(
    tmp_path: Path, expected: dict[str, str], damage: Callable[[str], str]
) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after=5)
    journal = tmp_path / ".journal-train-000000.json"
    journal.write_text(damage(journal.read_text()))
    with writer_for(tmp_path) as writer:
        assert writer.finished_keys() == set()
        assert not list(tmp_path.glob(".journal-*"))
        for sample in cohort():
            writer.add(sample)
        writer.finish(found=9, rejected=[])
    assert contents(tmp_path) == expected


def test_a_journal_without_its_shard_is_not_trusted(tmp_path: Path) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after=5)
    (tmp_path / "train-000000.tar").unlink()
    with writer_for(tmp_path) as writer:
        assert writer.finished_keys() == set()


def test_an_unfinished_pack_is_left_to_its_own_command(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after=5)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="run that command again"):
        writer_for(tmp_path, settings={"seed": 2})
    assert contents(tmp_path) == before
    pack(tmp_path, cohort())
    assert contents(tmp_path) == expected


def test_overwriting_starts_over(tmp_path: Path) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after=5)
    with writer_for(tmp_path, overwrite=True) as writer:
        assert writer.finished_keys() == set()


def test_temporary_files_alone_are_in_nobodys_way(tmp_path: Path, expected: dict[str, str]) -> None:
    (tmp_path / ".train-000000.tar.tmp").write_bytes(b"half a shard of another command")
    pack(tmp_path, cohort())
    assert contents(tmp_path) == expected


def test_a_pack_interrupted_twice_after_damage_still_goes_on(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after=9)
    (tmp_path / "train-000000.tar").write_bytes((tmp_path / "train-000001.tar").read_bytes())
    interrupted_pack(tmp_path, cohort(), stop_after=1)  # trusts no shard, then stops early
    pack(tmp_path, cohort())
    assert contents(tmp_path) == expected


def test_a_source_that_changed_since_is_noticed(tmp_path: Path) -> None:
    interrupted_pack(tmp_path, cohort(), stop_after=5)
    with writer_for(tmp_path) as writer:
        writer.add(cohort()[0])
        with pytest.raises(ConfigError, match=r"'P1' changed since.*--overwrite"):
            writer.add(encoded("P1", label="HGG", value=99))
        with pytest.raises(ConfigError, match="'P1' changed since"):
            writer.add(replace(cohort()[1], columns={"site": "B"}))


def fail_while_packing(folder: Path, error: type[BaseException]) -> None:
    """Pack a sample, then fail."""
    with writer_for(folder) as writer:
        writer.add(encoded("P0"))
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_any_exception_gives_the_lock_back(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail_while_packing(tmp_path, error)
    assert contents(tmp_path) == {}


def test_two_packs_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    with writer_for(tmp_path):
        holder = f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(ConfigError, match=f"is being packed by {re.escape(holder)}"):
            writer_for(tmp_path)
    with writer_for(tmp_path):
        pass
    assert contents(tmp_path) == {}


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path, expected: dict[str, str]) -> None:
    (tmp_path / LOCK_NAME).write_text("999999999 on elsewhere\n" * 9)
    pack(tmp_path, cohort())
    assert contents(tmp_path) == expected


def test_a_second_process_is_told_who_packs(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; "
        "from streaming_balance.storage.folder import FolderLock; FolderLock(Path(sys.argv[1]))"
    )
    with writer_for(tmp_path):
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(PROJECT_ROOT)],
            capture_output=True,
            text=True,
        )
    assert second.returncode == 1
    assert f"is being packed by process {os.getpid()}" in second.stderr


HOLD_AND_FORK = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from streaming_balance.storage.folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:
    print("forked", flush=True)
sys.stdin.read()
os._exit(0)  # the lock stays as a killed process leaves it
"""


def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_packer(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_FORK, str(tmp_path), str(PROJECT_ROOT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as packer:
        assert packer.stdout is not None
        assert packer.stdin is not None
        assert packer.stdout.readline() == b"forked\n"
        with pytest.raises(ConfigError, match=f"process {packer.pid} "):
            writer_for(tmp_path)
        packer.kill()
        os.waitid(os.P_PID, packer.pid, os.WEXITED | os.WNOWAIT)
        pack(tmp_path, cohort())  # while the forked worker still lives
        assert contents(tmp_path) == expected
        packer.stdin.close()
