"""What a source may do to the packer: bombs, lies, leaks, and names that must not get out."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import time
import traceback
import tracemalloc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nibabel as untyped_nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.errors import BalanceError, ConfigError, ShardError, SplitError
from streaming_balance.ingest.nifti import read_nifti
from streaming_balance.ingest.pack import write_shards
from streaming_balance.storage.shards import open_shards

nibabel: Any = untyped_nibabel

MEBIBYTE = 1 << 20
CANARIES = ("CANARY_descrip", "CANARY_aux", "CANARY_db", "CANARY_int", "CANARY_e2", "CANARY_e16")


def volume(path: Path, seed: int = 0, dtype: str = "int16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 1000, (4, 4, 4)).astype(dtype)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


def table(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    listed = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(listed[0]))
        writer.writeheader()
        writer.writerows(listed)
    return path


def rows_of(folder: Path, *patients: str, **columns: list[str]) -> list[dict[str, str]]:
    """A row per patient, each with an image of its own."""
    rows = []
    for number, patient in enumerate(patients):
        volume(folder / f"{number}.nii", seed=number)
        row = {"patient": patient, "label": "a", "image": f"{number}.nii"}
        rows.append(row | {name: values[number] for name, values in columns.items()})
    return rows


def header_bytes(shape: tuple[int, ...], **fields: Any) -> bytes:
    """A NIfTI-1 header and its four bytes of extension flags, with fields as given."""
    header = nibabel.Nifti1Header()
    header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    header["datatype"], header["bitpix"] = 4, 16
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header["pixdim"] = 1
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock) + bytes(4)


def peak_bytes(path: Path) -> int:
    """Read a file that must be refused; the most memory Python and numpy held meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(ShardError):
            read_nifti(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_key_that_comes_twice_fails_listing_both_places(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "P1", "P2", "P1")
    with pytest.raises(ConfigError, match=r"'P1' stands at m\.csv line 2 and at m\.csv line 4"):
        write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out")


@pytest.mark.parametrize("twin", ["p1", "P1 "])
@pytest.mark.parametrize("splits", [["train", "val"], ["train", "train"]])
def test_two_spellings_of_one_patient_fail_naming_both(
    tmp_path: Path, twin: str, splits: list[str]
) -> None:
    rows = rows_of(tmp_path, "P1", twin, split=splits)
    with pytest.raises(SplitError, match=f"'P1' .* and '{twin}'"):
        write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out")


def test_dotted_ids_stay_three_samples(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "1.2.840.113", "1.2.840.114", "1.2.841", "M\u00fc ller")
    write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out")
    shards = open_shards(tmp_path / "out")
    assert sorted(shards.patients("train").tolist()) == [
        *("1.2.840.113", "1.2.840.114", "1.2.841", "M\u00fc ller")
    ]
    assert not any("." in key for key in shards.keys("train").tolist())


def test_three_of_four_modalities_name_patient_and_modality(tmp_path: Path) -> None:
    for patient in ("P1", "P2"):
        for n, modality in enumerate(("t1", "t1ce", "t2", "flair")):
            volume(tmp_path / f"s/HGG/{patient}/{patient}_{modality}.nii", seed=n + ord(patient[1]))
    (tmp_path / "s/HGG/P2/P2_flair.nii").unlink()
    report = write_shards(tmp_path / "s", tmp_path / "out")
    (entry,) = report.rejected
    assert entry.patient == "P2"
    assert "'P2': modality 'flair' is missing" in entry.reason


@pytest.mark.parametrize("trailing", [200 * MEBIBYTE, 64 * 1024 + 1])
def test_a_gzip_bomb_behind_the_voxels_is_not_unpacked(tmp_path: Path, trailing: int) -> None:
    bomb = gzip.compress(header_bytes((4, 4, 4)) + bytes(128 + trailing))
    (tmp_path / "a.nii.gz").write_bytes(bomb)
    assert peak_bytes(tmp_path / "a.nii.gz") < 8 * MEBIBYTE


def test_a_gzip_bomb_in_front_of_the_voxels_is_not_kept_in_memory(tmp_path: Path) -> None:
    raw = header_bytes((4, 4, 4), vox_offset=60 * MEBIBYTE) + bytes(50 * MEBIBYTE)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw))
    assert peak_bytes(tmp_path / "a.nii.gz") < 8 * MEBIBYTE


def test_a_small_file_that_claims_gigabytes_is_refused_before_memory_is_taken(
    tmp_path: Path,
) -> None:
    # 7.5 GB of voxels pass the cap but cannot be in a few hundred bytes of gzip.
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header_bytes((1550, 1550, 1550)) + bytes(99)))
    (tmp_path / "b.nii").write_bytes(header_bytes((1550, 1550, 1550)) + bytes(99))
    for name in ("a.nii.gz", "b.nii"):
        assert peak_bytes(tmp_path / name) < 4 * MEBIBYTE


def test_the_configured_cap_rejects_a_volume_with_its_reason(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "P1", "P2")
    nibabel.save(
        nibabel.Nifti1Image(np.arange(1000, dtype=np.int16).reshape(10, 10, 10), np.eye(4)),
        tmp_path / "1.nii",
    )
    path = table(tmp_path / "m.csv", rows)
    report = write_shards(path, tmp_path / "out", max_volume_bytes=1000)
    assert [entry.patient for entry in report.rejected] == ["P2"]
    assert "2000 bytes of voxels; expected at most 1000" in report.rejected[0].reason


def test_random_damage_to_headers_is_an_error_or_harmless_and_quick(tmp_path: Path) -> None:
    rng = np.random.default_rng(25)
    whole = volume(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii"
    told: list[str] = []
    began = time.monotonic()
    for _ in range(2000):
        damaged = bytearray(whole)
        for place in rng.integers(0, 352, rng.integers(1, 6)):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            found = read_nifti(path)
        except ShardError as error:
            told.append(str(error))
        else:
            assert found.affine is not None
            assert np.isfinite(found.affine).all()
            assert found.array.size <= 64
    assert len(told) > 400
    assert all(str(path) in text for text in told)
    assert time.monotonic() - began < 60


def test_big_endian_scaled_and_float64_files_are_converted_exactly(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(4, 4, 4))
    header = nibabel.Nifti1Header(endianness=">")
    for number, dtype in enumerate((">f8", ">i2")):
        header.set_data_dtype(dtype)
        image = nibabel.Nifti1Image(array if number == 0 else array * 100, np.eye(4), header)
        nibabel.save(image, tmp_path / f"{number}.nii")
    rows = [{"patient": f"P{n}", "label": "a", "image": f"{n}.nii"} for n in range(2)]
    write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out")
    shards = open_shards(tmp_path / "out")
    for number, patient in enumerate(shards.patients("train").tolist()):
        expected = nibabel.load(tmp_path / f"{patient[1]}.nii").get_fdata()
        assert np.array_equal(shards.read("train", number)["image"], expected)


def test_a_label_outside_the_classes_names_label_count_and_five_ids(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *(f"P{n}" for n in range(7)))
    with pytest.raises(ConfigError, match=r"'a' of 7 sample\(s\).*'P0', .*'P4' and 2 more"):
        write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out", classes=["A", "B"])


def test_a_patient_in_two_splits_fails_listing_the_intersection(tmp_path: Path) -> None:
    for samples in (["", "", "", ""], ["x", "y", "x", "x"]):
        rows = rows_of(
            tmp_path, "P1", "P1", "P2", "P3", split=["train", "val", "val", "val"], sample=samples
        )
        with pytest.raises(SplitError, match=r"1 patient\(s\).*'P1' \(train and val\)"):
            write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out")


def test_equal_voxels_in_two_splits_fail_whatever_the_file_is(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "P1", "P2", "P3", split=["train", "val", "val"])
    # The same voxels, compressed and with another description.
    image = nibabel.load(tmp_path / "0.nii")
    image.header["descrip"] = b"copy"
    nibabel.save(image, tmp_path / "copy.nii.gz")
    rows[2]["image"] = "copy.nii.gz"
    with pytest.raises(
        SplitError, match=r"'P1' in 'train' and 'P3' in 'val' have identical voxels"
    ):
        write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_equal_voxels_in_one_split_are_packed_with_a_warning(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "P1", "P2", split=["train", "train"])
    rows[1]["image"] = "0.nii"
    report = write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out")
    assert report.packed == 2
    (warning,) = report.warnings
    assert "'P1'" in warning
    assert "'P2'" in warning


def test_a_label_that_differs_inside_a_patient_needs_declared_samples(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "P1", "P1", sample=["left", "right"])
    rows[1]["label"] = "b"
    assert write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out").packed == 2
    for row in rows:
        row["sample"] = ""
    with pytest.raises(SplitError, match=r"'P1' stands under the classes 'a'.*'b'"):
        write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out2")


@pytest.mark.parametrize("change", ["rewritten", "removed"])
def test_a_source_that_changes_while_packing_is_an_error(tmp_path: Path, change: str) -> None:
    rows = rows_of(tmp_path, "P1", "P2", "P3")
    pending = {row["patient"]: tmp_path / row["image"] for row in rows}

    def meddle(*step: Any) -> None:
        pending.pop(step[2])
        for path in pending.values():
            if change == "removed":
                path.unlink(missing_ok=True)
            else:
                volume(path, seed=99, dtype="int32")

    with pytest.raises(ShardError, match=r"(changed|went away) while packing"):
        write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out", progress=meddle)
    assert not (tmp_path / "out/manifest.json").exists()


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def private_image(path: Path, array: NDArray[Any], trap: Path) -> None:
    """Write an image with a canary in every field that holds free text."""
    image = nibabel.Nifti1Image(array, np.eye(4))
    header = image.header
    for field, canary in zip(
        ("descrip", "aux_file", "db_name", "intent_name"), CANARIES, strict=False
    ):
        header[field] = canary.encode()
    extension = nibabel.nifti1.Nifti1Extension
    header.extensions.append(extension("comment", b"CANARY_e2"))
    header.extensions.append(extension(40, b"CANARY_e16"))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    raw = bytearray(path.read_bytes())
    # Two extensions of 32 bytes follow the header: make them DICOM (2) and a pickle (16).
    raw[356:360] = (2).to_bytes(4, "little")
    raw[388:392] = (16).to_bytes(4, "little")
    payload = pickle.dumps(Trap(str(trap)))
    longer = len(payload) + (-len(payload) - 8) % 16
    raw[384:388] = (longer + 8).to_bytes(4, "little")
    rest = payload.ljust(longer, b"\0") + b"CANARY_e16".ljust(16, b"\0") + bytes(raw[416:])
    raw[392:] = rest
    raw[108:112] = np.float32(len(raw) - array.nbytes).tobytes()
    path.write_bytes(bytes(raw))


def test_no_free_text_of_a_header_leaves_the_source_and_no_pickle_runs(tmp_path: Path) -> None:
    array = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    constant = np.zeros((4, 4, 4), dtype=np.int16)
    private_image(tmp_path / "s/a/P1/P1_t1.nii", array, tmp_path / "was_run")
    private_image(tmp_path / "s/a/P2/P2_t1.nii", constant, tmp_path / "was_run")
    private_image(tmp_path / "s/a/P3/P3_t1.nii", array, tmp_path / "was_run")
    cut = (tmp_path / "s/a/P3/P3_t1.nii").read_bytes()[:-1]
    (tmp_path / "s/a/P3/P3_t1.nii").write_bytes(cut)
    stored = (tmp_path / "s/a/P1/P1_t1.nii").read_bytes()
    assert all(canary.encode() in stored for canary in CANARIES if canary != "CANARY_e2")
    report = write_shards(tmp_path / "s", tmp_path / "out", codec="npy")
    assert (report.packed, len(report.rejected)) == (1, 2)
    assert np.array_equal(open_shards(tmp_path / "out").read("train", 0)["image"], array)
    packed = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"CANARY" not in packed
    assert "CANARY" not in repr(report)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magic", b"CANA"),
        ("datatype", 77),
        ("bitpix", 9),
        ("sizeof_hdr", 0x414E4143),
        ("vox_offset", 1e8),
        ("qform_code", 1),
        ("scl_inter", float("nan")),
    ],
)
def test_no_error_repeats_the_text_of_a_header(tmp_path: Path, field: str, value: Any) -> None:
    array = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    path = tmp_path / "a.nii"
    private_image(path, array, tmp_path / "was_run")
    raw = path.read_bytes()
    header = np.frombuffer(raw[:348], dtype=nibabel.Nifti1Header.template_dtype).copy()
    header[field] = value
    header["quatern_b"], header["scl_slope"], header["sform_code"] = 9.0, 2.0, 0
    path.write_bytes(header.tobytes() + raw[348:])
    with pytest.raises(BalanceError) as raised:
        read_nifti(path)
    told = "".join(traceback.format_exception(raised.value))
    assert "CANA" not in told


def test_an_array_file_with_text_in_its_header_is_refused_without_repeating_it(
    tmp_path: Path,
) -> None:
    body = (
        b"{'descr': '<i2', 'fortran_order': False, 'shape': (2, 'CANARY_npy')}".ljust(117) + b"\n"
    )
    raw = b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + bytes(64)
    (tmp_path / "bad.npy").write_bytes(raw)
    rows = rows_of(tmp_path, "P1", "P2")
    rows[1]["image"] = "bad.npy"
    report = write_shards(table(tmp_path / "m.csv", rows), tmp_path / "out")
    assert len(report.rejected) == 1
    assert "CANARY" not in json.dumps([entry.reason for entry in report.rejected])
