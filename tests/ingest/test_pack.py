"""Packing end to end: real patients, BraTS names, the same bytes for any number of processes."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as untyped_nibabel
import numpy as np
import pytest

from streaming_balance.errors import ConfigError, ShardError, SplitError
from streaming_balance.ingest.pack import write_shards
from streaming_balance.ingest.processes import encode_in_order
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import open_shards
from streaming_balance.storage.verify import verify_shards

nibabel: Any = untyped_nibabel
Make = Callable[..., Path]
THREE = "train=0.7,val=0.15,test=0.15"


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def members(folder: Path, suffix: str) -> dict[str, bytes]:
    """Every tar member with a suffix, read by the standard library."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(suffix):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name.removesuffix(suffix)] = file.read()
    return found


@pytest.fixture
def small_source(tmp_path: Path, make_case: Make) -> Path:
    """Twelve BraTS-like cases, 9 : 3."""
    for number in range(12):
        label = "LGG" if number % 4 == 0 else "HGG"
        make_case(tmp_path / f"source/{label}/P{number:02}", ("t1", "flair"))
    return tmp_path / "source"


@pytest.fixture(scope="module")
def hippocampus(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real patients and the folder they were packed into."""
    folder = tmp_path_factory.mktemp("hippocampus")
    real = shared_data / "labelled/hippocampus"
    with (real / "derived_labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "label", "image", "seg"])
        for row in rows:
            name = f"{row['patient']}.nii.gz"
            label = row["label_small_hippocampus"]
            writer.writerow([row["patient"], label, real / "images" / name, real / "labels" / name])
    report = write_shards(folder / "cohort.csv", folder / "packed", split=THREE, jobs=2)
    assert (report.found, report.packed, report.rejected) == (130, 130, ())
    return real, folder / "packed"


def test_every_hippocampus_patient_has_nibabels_voxels(
    hippocampus: tuple[Path, Path], shared_data: Path
) -> None:
    real, packed = hippocampus
    items = json.loads((shared_data / "expected.json").read_text())
    expected = items["__labelled__"]["L04_msd_hippocampus_A"]["items"]
    shards = open_shards(packed)
    shapes, seen = set(), 0
    for split in shards.splits:
        for number, patient in enumerate(shards.patients(split).tolist()):
            arrays = shards.read(split, number)
            image = nibabel.load(real / "images" / f"{patient}.nii.gz")
            mask = nibabel.load(real / "labels" / f"{patient}.nii.gz")
            assert np.array_equal(arrays["image"], np.asanyarray(image.dataobj))
            assert np.array_equal(arrays["seg"], np.asanyarray(mask.dataobj))
            item = expected[patient]
            assert arrays["image"].dtype == np.dtype(item["dtype"])
            assert list(arrays["image"].shape) == item["shape"]
            total = arrays["image"].sum(dtype=np.float64)
            assert total == pytest.approx(item["sum"], rel=1e-12)
            counts = [int((arrays["seg"] == value).sum()) for value in (1, 2)]
            assert counts == item["seg_voxels_1_2"]
            shapes.add(arrays["image"].shape)
            seen += 1
    assert (seen, len(shapes)) == (130, 124)


def test_the_hippocampus_splits_have_the_counts_worked_out_by_hand(
    hippocampus: tuple[Path, Path],
) -> None:
    shards = open_shards(hippocampus[1])
    assert shards.classes == ["0", "1"]
    counts = {split: np.bincount(shards.labels(split)).tolist() for split in shards.splits}
    # 117 -> 81.9, 17.55, 17.55; 13 -> 9.1, 1.95, 1.95: the largest remainders get one more.
    assert counts == {"train": [82, 9], "val": [18, 2], "test": [17, 2]}
    assert verify_shards(hippocampus[1]).ok


def test_the_285_brats_names_pack_210_to_75(
    shared_data: Path, tmp_path: Path, make_volume: Make, make_table: Make
) -> None:
    with (shared_data / "tree/brats18_names/brats18_cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for modality in ("t1", "t1ce", "t2", "flair"):
            name = f"{row['case']}_{modality}.nii"
            make_volume(tmp_path / "source" / row["grade"] / row["case"] / name)
    labels = make_table(
        tmp_path / "sites.csv",
        [
            {"patient": r["case"], "site": r["site"], "split": r["split_used_by_source"]}
            for r in rows
        ],
    )
    report = write_shards(
        tmp_path / "source", tmp_path / "out", labels=labels, classes="LGG,HGG", jobs=2
    )
    assert (report.found, report.packed, report.rejected) == (285, 285, ())
    shards = open_shards(tmp_path / "out")
    assert shards.classes == ["LGG", "HGG"]
    found = json.loads((shared_data / "expected.json").read_text())["__labelled__"]
    expected = found["S01_brats18_names"]
    sites: Counter[str] = Counter()
    for split in shards.splits:
        counts = np.bincount(shards.labels(split), minlength=2)
        assert counts[1] == expected["split"][f"{split}/HGG"]
        assert counts[0] == expected["split"][f"{split}/LGG"]
        sites.update(shards.column(split, "site").tolist())
        assert shards.read(split, 0)["image"].shape == (4, 4, 4, 4)
    assert sites == expected["site"]
    assert set(shards.splits) == {"train", "valid", "test"}


def test_any_number_of_processes_writes_the_same_bytes(small_source: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        write_shards(
            small_source, tmp_path / f"out{jobs}", split=THREE, jobs=jobs, shard_bytes=8_000
        )
    assert hashes(tmp_path / "out1") == hashes(tmp_path / "out2")
    assert len(list((tmp_path / "out1").glob("train-*.tar"))) > 1


def test_the_bytes_do_not_depend_on_where_the_source_lies(
    small_source: Path, tmp_path: Path
) -> None:
    (small_source / "HGG/P01/P01_t1.nii.gz").write_bytes(b"\0" * 400)
    write_shards(small_source, tmp_path / "a", split=THREE)
    moved = small_source.rename(tmp_path / "elsewhere")
    write_shards(moved, tmp_path / "b", split=THREE)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_another_seed_gives_another_split_and_another_order(
    small_source: Path, tmp_path: Path
) -> None:
    reports = [
        write_shards(small_source, tmp_path / str(seed), split="train=0.5,val=0.5", seed=seed)
        for seed in (0, 1)
    ]
    assert reports[0].digest != reports[1].digest


def test_shards_mix_the_classes(tmp_path: Path, make_case: Make) -> None:
    for number in range(40):
        make_case(tmp_path / f"s/{'HGG' if number < 20 else 'LGG'}/P{number}", ("t1",), seg=False)
    write_shards(tmp_path / "s", tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".cls")]
    labels = [int(name[1:].split(".")[0]) < 20 for name in names]
    runs = [len(list(group)) for _, group in itertools.groupby(labels)]
    assert max(runs) < 10


def test_a_patients_modalities_are_its_channels(small_source: Path, tmp_path: Path) -> None:
    write_shards(small_source, tmp_path / "out", codec="npy")
    shards = open_shards(tmp_path / "out")
    number = shards.patients("train").tolist().index("P01")
    image = shards.read("train", number)["image"]
    for channel, modality in enumerate(("t1", "flair")):
        path = small_source / f"HGG/P01/P01_{modality}.nii.gz"
        assert np.array_equal(image[channel], np.asanyarray(nibabel.load(path).dataobj))


def test_the_description_of_a_sample_holds_its_geometry_and_sources(
    tmp_path: Path, make_volume: Make, make_table: Make
) -> None:
    affine = np.array([[-2.0, 0, 0, 9], [0, 3, 0, 8], [0, 0, 4, 7], [0, 0, 0, 1]])
    image = make_volume(tmp_path / "x.nii.gz", (2, 3, 4), affine=affine)
    table = make_table(
        tmp_path / "m.csv",
        [{"patient": "P.1", "label": "a", "image.ct": "x.nii.gz", "sample": "s1", "site": "S"}],
    )
    write_shards(table, tmp_path / "out")
    described = {name: json.loads(raw) for name, raw in members(tmp_path / "out", ".json").items()}
    assert described == {
        "P%2E1__s1": {
            "affine": affine.tolist(),
            "axes": "DHW",
            "dtype": "int16",
            "label": "a",
            "modalities": ["ct"],
            "patient": "P.1",
            "sample": "s1",
            "shape": [2, 3, 4],
            "sources": {"ct": hashlib.sha256(image.read_bytes()).hexdigest()},
            "spacing": [2.0, 3.0, 4.0],
        }
    }


def test_size_resamples_image_and_mask_and_their_geometry(
    small_source: Path, tmp_path: Path
) -> None:
    report = write_shards(small_source, tmp_path / "out", size=(8, 4, 2))
    assert report.packed == 12
    arrays = open_shards(tmp_path / "out").read("train", 0)
    assert arrays["image"].shape == (2, 8, 4, 2)
    assert arrays["image"].dtype == np.int16
    assert arrays["seg"].shape == (8, 4, 2)
    patient = open_shards(tmp_path / "out").patients("train")[0]
    (path,) = small_source.glob(f"*/{patient}/{patient}_seg.nii.gz")
    mask = np.asanyarray(nibabel.load(path).dataobj)
    # Each of two thin slices takes its one source slice; each thick one the later of two.
    assert np.array_equal(arrays["seg"], mask.repeat(2, axis=0)[:, :, 1::2])
    described = json.loads(next(iter(members(tmp_path / "out", ".json").values())))
    assert described["spacing"] == [0.5, 1.0, 2.0]
    assert [row[3] for row in described["affine"]] == [-0.25, 0.0, 0.5, 1.0]


def test_crop_or_pad_keeps_values_and_moves_the_origin(small_source: Path, tmp_path: Path) -> None:
    write_shards(small_source, tmp_path / "whole")
    write_shards(small_source, tmp_path / "cut", crop_or_pad=(2, 4, 6))
    whole = open_shards(tmp_path / "whole").read("train", 0)
    cut = open_shards(tmp_path / "cut").read("train", 0)
    assert np.array_equal(cut["image"][:, :, :, 1:5], whole["image"][:, 1:3])
    assert np.array_equal(cut["seg"][:, :, 1:5], whole["seg"][1:3])
    described = json.loads(next(iter(members(tmp_path / "cut", ".json").values())))
    assert [row[3] for row in described["affine"]] == [1.0, 0.0, -1.0, 1.0]


def test_orient_ras_turns_image_and_mask_alike(tmp_path: Path, make_volume: Make) -> None:
    flipped = np.diag([-1.0, 1.0, 2.0, 1.0])
    folder = tmp_path / "source/a/P1"
    image = make_volume(folder / "P1_t1.nii.gz", (2, 3, 4), affine=flipped)
    make_volume(folder / "P1_seg.nii.gz", (2, 3, 4), affine=flipped, dtype="uint8", highest=3)
    write_shards(tmp_path / "source", tmp_path / "out", orient="ras")
    arrays = open_shards(tmp_path / "out").read("train", 0)
    canonical = nibabel.as_closest_canonical(nibabel.load(image))
    assert np.array_equal(arrays["image"], np.asanyarray(canonical.dataobj))
    mask = np.asanyarray(nibabel.load(folder / "P1_seg.nii.gz").dataobj)
    assert np.array_equal(arrays["seg"], mask[::-1])
    described = json.loads(members(tmp_path / "out", ".json")["P1"])
    assert np.allclose(described["affine"], canonical.affine)


def test_numpy_images_in_two_axes_with_channels(tmp_path: Path, make_table: Make) -> None:
    rng = np.random.default_rng(0)
    for name in ("P1", "P2"):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 255, (3, 8, 9), dtype=np.uint8))
        np.savez(tmp_path / f"{name}.npz", rng.integers(0, 2, (8, 9), dtype=np.uint8))
    table = make_table(
        tmp_path / "m.csv",
        [
            {"patient": n, "label": "a", "image": f"{n}.npy", "seg": f"{n}.npz"}
            for n in ("P1", "P2")
        ],
    )
    write_shards(table, tmp_path / "out", axes="CHW", size=(4, 9))
    arrays = open_shards(tmp_path / "out").read("train", 0)
    assert (arrays["image"].shape, arrays["seg"].shape) == ((3, 4, 9), (4, 9))
    described = json.loads(members(tmp_path / "out", ".json")["P1"])
    assert (described["axes"], described["affine"], described["spacing"]) == ("CHW", None, None)


def test_modalities_of_two_dtypes_meet_in_one_that_holds_both(
    tmp_path: Path, make_volume: Make
) -> None:
    make_volume(tmp_path / "s/a/P1/P1_t1.nii", dtype="int16")
    make_volume(tmp_path / "s/a/P1/P1_t2.nii", dtype="float32")
    write_shards(tmp_path / "s", tmp_path / "out")
    assert open_shards(tmp_path / "out").read("train", 0)["image"].dtype == np.float32


def test_integers_too_large_for_the_common_dtype_are_rejected_rather_than_rounded(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "s/a/P1"
    folder.mkdir(parents=True)
    large = np.arange(8, dtype=np.int64).reshape(2, 2, 2) + 2**53
    nibabel.save(nibabel.Nifti1Image(large, np.eye(4), dtype=np.int64), folder / "P1_t1.nii")
    small = large.astype(np.float32)
    small[0, 0, 0] = 1.0
    nibabel.save(nibabel.Nifti1Image(small, np.eye(4)), folder / "P1_t2.nii")
    with pytest.raises(ShardError, match=r"P1_t1\.nii: its values from 90.* do not fit float64"):
        write_shards(tmp_path / "s", tmp_path / "out")


def test_an_array_without_affine_cannot_be_turned(tmp_path: Path, make_table: Make) -> None:
    np.save(tmp_path / "a.npy", np.arange(8).reshape(2, 2, 2))
    table = make_table(tmp_path / "m.csv", [{"patient": "P", "label": "a", "image": "a.npy"}])
    with pytest.raises(ShardError, match=r"orient='ras' needs a 3-D volume.* and no affine"):
        write_shards(table, tmp_path / "out", orient="ras")


def test_a_packing_process_that_dies_is_an_error_with_a_way_out() -> None:
    class Deadly:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os._exit, (1,))

    deadly: Any = Deadly()
    with pytest.raises(ShardError, match=r"a packing process died.*fewer jobs"):
        list(encode_in_order([deadly, deadly, deadly, deadly, deadly], 2))


def test_given_splits_are_kept_and_every_class_table_entry_survives(
    tmp_path: Path, make_volume: Make, make_table: Make
) -> None:
    rows = []
    for n, split in enumerate(["test", "train", "train", "fold_9", "val"]):
        make_volume(tmp_path / f"{n}.nii")
        rows.append({"patient": f"P{n}", "label": "1", "image": f"{n}.nii", "split": split})
    table = make_table(tmp_path / "m.csv", rows)
    report = write_shards(table, tmp_path / "out", classes=["0", "1"])
    shards = open_shards(tmp_path / "out")
    assert shards.splits == ("train", "val", "test", "fold_9")
    assert shards.patients("test").tolist() == ["P0"]
    assert (shards.classes, report.manifest.train_splits) == (["0", "1"], ("train",))
    with pytest.raises(ConfigError, match="leave out one"):
        write_shards(table, tmp_path / "out2", split=THREE)


def test_train_splits_may_be_named(tmp_path: Path, make_volume: Make, make_table: Make) -> None:
    rows = []
    for n in range(4):
        make_volume(tmp_path / f"{n}.nii")
        rows.append(
            {"patient": f"P{n}", "label": "1", "image": f"{n}.nii", "split": f"fold{n % 2}"}
        )
    table = make_table(tmp_path / "m.csv", rows)
    report = write_shards(table, tmp_path / "out", train_splits=["fold1"])
    assert report.manifest.train_splits == ("fold1",)
    with pytest.raises(ConfigError, match=r"'fold2'; the splits are fold0, fold1.*Did you mean"):
        write_shards(table, tmp_path / "out2", train_splits=["fold2"])


def test_every_rejection_is_listed_and_counts_reconcile(
    small_source: Path, tmp_path: Path, make_volume: Make
) -> None:
    hgg = small_source / "HGG"
    image = nibabel.load(hgg / "P01/P01_t1.nii.gz")
    nan = np.asarray(image.dataobj, dtype=np.float32)
    nan[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(nan, np.eye(4)), hgg / "P01/P01_t1.nii.gz")
    constant = np.full((4, 4, 4), 7, dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(constant, np.eye(4)), hgg / "P02/P02_t1.nii.gz")
    make_volume(hgg / "P03/P03_flair.nii.gz", (4, 4, 5))
    make_volume(hgg / "P05/P05_seg.nii.gz", (4, 4, 3), dtype="uint8", highest=2)
    make_volume(hgg / "P06/P06_flair.nii.gz", affine=np.diag([1.0, 1.0, 2.0, 1.0]))
    (hgg / "P07/P07_t1.nii.gz").write_bytes(b"\x1f\x8bnot gzip")
    make_volume(hgg / "P09/P09_t1.nii.gz", (4, 4, 4, 3))
    (hgg / ".DS_Store").write_bytes(b"x")
    report = write_shards(small_source, tmp_path / "out")
    assert (report.found, report.packed, len(report.rejected)) == (13, 5, 8)
    told = {entry.path: entry.reason for entry in report.rejected}
    assert "1 of 64 voxels are NaN" in told["HGG/P01/P01_t1.nii.gz"]
    assert "every voxel is 7" in told["HGG/P02/P02_t1.nii.gz"]
    assert "shape (4, 4, 5), but P03_t1.nii.gz has (4, 4, 4)" in told["HGG/P03/P03_flair.nii.gz"]
    assert "shape (4, 4, 3), but P05_t1.nii.gz has (4, 4, 4)" in told["HGG/P05/P05_seg.nii.gz"]
    assert "affines put a corner 3 mm apart" in told["HGG/P06/P06_flair.nii.gz"]
    assert "cut short or damaged" in told["HGG/P07/P07_t1.nii.gz"]
    assert "channels of its own" in told["HGG/P09/P09_t1.nii.gz"]
    assert {entry.patient for entry in report.rejected} == {
        *("P01", "P02", "P03", "P05", "P06", "P07", "P09", "")
    }
    stored = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (stored["found"], len(stored["rejected"])) == (13, 8)
    assert str(tmp_path) not in json.dumps(stored)


def test_a_source_without_anything_to_pack_is_an_error(tmp_path: Path, make_volume: Make) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="nothing to pack"):
        write_shards(tmp_path / "empty", tmp_path / "out")
    make_volume(tmp_path / "bad/a/P1/P1_t1.nii", highest=1)
    with pytest.raises(ShardError, match=r"nothing packed: all of 1 found were rejected[\s\S]*P1"):
        write_shards(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_the_same_command_again_leaves_a_complete_pack_alone(
    small_source: Path, tmp_path: Path
) -> None:
    first = write_shards(small_source, tmp_path / "out", split=THREE)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = write_shards(small_source, tmp_path / "out", split=THREE, jobs=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert (first.is_new, again.is_new) == (True, False)
    assert (again.found, again.packed, again.digest) == (12, 12, first.digest)
    with pytest.raises(ConfigError, match="overwrite"):
        write_shards(small_source, tmp_path / "out", split=THREE, codec="npy")
    replaced = write_shards(
        small_source, tmp_path / "out", split=THREE, codec="npy", overwrite=True
    )
    assert (replaced.is_new, replaced.digest) == (True, first.digest)


def test_overwrite_repairs_a_damaged_pack_of_the_same_command(
    small_source: Path, tmp_path: Path
) -> None:
    write_shards(small_source, tmp_path / "out")
    before = hashes(tmp_path / "out")
    shard = tmp_path / "out/train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ShardError, match="overwrite"):
        write_shards(small_source, tmp_path / "out")
    assert write_shards(small_source, tmp_path / "out", overwrite=True).is_new
    assert hashes(tmp_path / "out") == before


def test_a_corrected_label_makes_another_pack(small_source: Path, tmp_path: Path) -> None:
    write_shards(small_source, tmp_path / "out")
    (small_source / "HGG/P01").rename(small_source / "LGG/P01")
    with pytest.raises(ConfigError, match="overwrite"):
        write_shards(small_source, tmp_path / "out")


def test_an_interrupted_pack_goes_on_and_ends_with_the_same_bytes(
    small_source: Path, tmp_path: Path
) -> None:
    write_shards(small_source, tmp_path / "whole", split=THREE, shard_bytes=8_000)

    def interrupt(*step: Any) -> None:
        if step[0] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(
            small_source, tmp_path / "out", split=THREE, shard_bytes=8_000, progress=interrupt
        )
    assert not (tmp_path / "out/manifest.json").exists()
    told: list[tuple[int, int, str]] = []
    report = write_shards(
        small_source,
        tmp_path / "out",
        split=THREE,
        shard_bytes=8_000,
        progress=lambda *step: told.append(step),
    )
    assert report.packed == 12
    assert 0 < len(told) < 12
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_voxels_packed_before_an_interruption_still_count_as_a_leak(
    tmp_path: Path, make_volume: Make, make_table: Make
) -> None:
    names = [f"P{n}" for n in range(6)]
    for name in names:
        make_volume(tmp_path / f"{name}.nii")
    (tmp_path / "P5.nii").write_bytes((tmp_path / "P0.nii").read_bytes())
    rows = [
        {"patient": n, "label": "a", "image": f"{n}.nii", "split": "val" if n == "P5" else "train"}
        for n in names
    ]
    table = make_table(tmp_path / "m.csv", rows)
    for _ in range(2):
        with pytest.raises(SplitError, match=r"'P0' in 'train' and 'P5' in 'val'"):
            write_shards(table, tmp_path / "out", shard_bytes=1)
    assert list((tmp_path / "out").glob("train-*.tar"))


def test_progress_is_told_after_every_case(small_source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    write_shards(small_source, tmp_path / "out", progress=lambda *step: told.append(step))
    assert [(done, total) for done, total, _ in told] == [(n, 12) for n in range(1, 13)]
    assert {key for _, _, key in told} == {f"P{n:02}" for n in range(12)}


def test_a_split_too_small_for_a_class_is_warned_about(small_source: Path, tmp_path: Path) -> None:
    report = write_shards(small_source, tmp_path / "out", split="train=0.9,val=0.1")
    assert (
        "split 'val' has no sample of class 'LGG': too few patients to divide." in report.warnings
    )


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("size", (0, 4, 4), "size is"),
        ("size", (4,), "size is"),
        ("size", 4, "size is 4; it must be D, H, W"),
        ("size", "4,4,4", "size is '4,4,4'; it must be D, H, W"),
        ("crop_or_pad", 4.5, "crop_or_pad is 4.5"),
        ("crop_or_pad", (4, 4, 4.0), "crop_or_pad is"),
        ("codec", "zip", "codec 'zip'"),
        ("orient", "lps", "orient is 'lps'"),
        ("axes", "HWC", "axes is 'HWC'"),
        ("jobs", 0, "jobs is 0"),
        ("jobs", True, "jobs is True"),
        ("shard_bytes", 0, "shard_bytes is 0"),
        ("seed", -1, "seed is -1"),
        ("classes", "HGG,", "classes is 'HGG,'"),
        ("split", "train=0.5", "sum"),
        ("layout", "dicom", "layout is 'dicom'"),
        ("max_volume_bytes", 0, "max_volume_bytes is 0"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_written(
    small_source: Path, tmp_path: Path, setting: str, value: Any, named: str
) -> None:
    arguments: dict[str, Any] = {setting: value}
    with pytest.raises(ConfigError, match=named):
        write_shards(small_source, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_size_and_crop_or_pad_together_are_refused(small_source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        write_shards(small_source, tmp_path / "out", size=(4, 4, 4), crop_or_pad=(4, 4, 4))


def test_a_size_of_the_wrong_number_of_axes_rejects_every_case(
    small_source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match="has 2 numbers, the volume 3 space axes"):
        write_shards(small_source, tmp_path / "out", size=(4, 4))


def test_a_declared_class_order_is_kept_and_makes_a_list_of_weights_unmistakable(
    small_source: Path, tmp_path: Path
) -> None:
    listed = {"name": "manual_weights", "weights": [3.0, 1.0]}
    write_shards(small_source, tmp_path / "found")
    found = open_shards(tmp_path / "found")
    assert not found.classes_declared
    with pytest.raises(ConfigError, match="swapped list"):
        BalancedPlan.for_shards(found, global_batch_size=4, balance=listed)

    with pytest.raises(ConfigError, match=r"other settings \(classes_declared\)"):
        write_shards(small_source, tmp_path / "found", classes="HGG,LGG")
    write_shards(small_source, tmp_path / "declared", classes="LGG,HGG")
    declared = open_shards(tmp_path / "declared")
    assert declared.classes_declared
    plan = BalancedPlan.for_shards(declared, global_batch_size=4, balance=listed)
    # 3 LGG of weight 3 against 9 HGG of weight 1.
    assert plan.shares == {"LGG": 0.5, "HGG": 0.5}
    named = {"name": "manual_weights", "weights": {"HGG": 1.0, "LGG": 3.0}}
    assert (
        plan.digest == BalancedPlan.for_shards(declared, global_batch_size=4, balance=named).digest
    )
    with pytest.raises(ConfigError, match="3 entries for 2 classes"):
        BalancedPlan.for_shards(
            declared, global_batch_size=4, balance={**listed, "weights": [1, 2, 3]}
        )


def test_a_rejected_file_outside_the_source_is_named_without_the_way_to_it(
    tmp_path: Path, make_volume: Make, make_table: Make
) -> None:
    manifests = []
    for place in ("a", "deep/below/b"):
        # The same table at two places, naming the same two unusable files and a sound one.
        outside = [tmp_path / name for name in ("cut.nii", "gone.nii")]
        make_volume(tmp_path / "cut.nii")
        (tmp_path / "cut.nii").write_bytes((tmp_path / "cut.nii").read_bytes()[:-1])
        folder = tmp_path / place
        make_volume(folder / "in/sound.nii", affine=np.eye(4))
        (folder / "in/sound.nii").write_bytes(make_volume(tmp_path / "sound.nii").read_bytes())
        images = [os.path.relpath(path, folder) for path in outside]
        rows = [
            {"patient": f"P{n}", "label": "1", "image": image}
            for n, image in enumerate(["in/sound.nii", *images, str(outside[1]), "in/gone.nii"])
        ]
        table = make_table(folder / "m.csv", rows)
        manifests.append(write_shards(table, folder / "out").manifest)
    assert [(entry.patient, entry.path) for entry in manifests[0].rejected] == [
        ("P2", "gone.nii"),
        ("P3", "gone.nii"),
        ("P4", "in/gone.nii"),
        ("P1", "cut.nii"),
    ]
    assert manifests[0] == manifests[1]


def given_splits(folder: Path, make_volume: Make, make_table: Make, splits: list[str]) -> Path:
    """Write a table of patients with labels 0 and 1 in turn, in the splits named."""
    for n in range(len(splits)):
        make_volume(folder / f"{n}.nii")
    return make_table(
        folder / "m.csv",
        [
            {"patient": f"P{n}", "label": str(n % 2), "image": f"{n}.nii", "split": split}
            for n, split in enumerate(splits)
        ],
    )


def test_splits_that_differ_only_in_case_are_refused(
    tmp_path: Path, small_source: Path, make_volume: Make, make_table: Make
) -> None:
    table = given_splits(tmp_path, make_volume, make_table, ["train", "Train", "val"])
    with pytest.raises(ConfigError, match="splits 'train' and 'Train' differ only in letter case"):
        write_shards(table, tmp_path / "out")
    with pytest.raises(ConfigError, match="splits 'train' and 'TRAIN' differ only in letter case"):
        write_shards(small_source, tmp_path / "out", split="train=0.5,TRAIN=0.5")
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_a_training_split_is_warned_about(
    tmp_path: Path, make_volume: Make, make_table: Make
) -> None:
    table = given_splits(tmp_path, make_volume, make_table, ["fold0", "fold0", "fold1", "fold1"])
    (warning,) = write_shards(table, tmp_path / "out").warnings
    assert "no split is for training (fold0, fold1)" in warning
    assert "--train-splits" in warning
    assert write_shards(table, tmp_path / "out2", train_splits=["fold0"]).warnings == ()


def test_a_class_missing_from_a_given_split_is_not_blamed_on_dividing(
    tmp_path: Path, make_volume: Make, make_table: Make
) -> None:
    table = given_splits(tmp_path, make_volume, make_table, ["train", "train", "val"])
    (warning,) = write_shards(table, tmp_path / "out").warnings
    assert warning == "split 'val' has no sample of class '1'."


def test_a_pack_without_any_split_says_so_and_how_to_ask_for_one(
    tmp_path: Path, small_source: Path, make_volume: Make, make_table: Make
) -> None:
    (warning,) = write_shards(small_source, tmp_path / "out").warnings
    assert "all samples are in 'train'" in warning
    assert "--split train=0.7,val=0.15,test=0.15" in warning
    table = given_splits(tmp_path, make_volume, make_table, ["train", "train"])
    assert write_shards(table, tmp_path / "given").warnings == ()
    assert write_shards(small_source, tmp_path / "asked", split="train=1").warnings == ()
