"""Listing a cohort: every case found, everything else named."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streaming_balance.errors import ConfigError, ShardError, SplitError
from streaming_balance.ingest.cases import Case, Cohort
from streaming_balance.ingest.checks import (
    check_keys,
    check_labels,
    check_patients,
    check_splits,
    order_classes,
)
from streaming_balance.ingest.cohort import find_cohort

Make = Callable[..., Path]


def reasons(cohort: Cohort) -> dict[str, str]:
    return {entry.path: entry.reason for entry in cohort.rejected}


def case(patient: str, label: str | None = "a", **changes: Any) -> Case:
    made = Case(
        patient=patient, label=label, images=(), modalities=(), place=f"at {patient}", stamps=()
    )
    return replace(made, **changes)


def test_a_brats_folder_gives_a_case_per_folder_with_modalities_in_brats_order(
    tmp_path: Path, make_case: Make
) -> None:
    make_case(tmp_path / "HGG/P1")
    make_case(tmp_path / "LGG/P2")
    cohort = find_cohort(tmp_path)
    assert [(c.patient, c.label, c.place) for c in cohort.cases] == [
        ("P1", "HGG", "HGG/P1"),
        ("P2", "LGG", "LGG/P2"),
    ]
    first = cohort.cases[0]
    assert first.modalities == ("t1", "t1ce", "t2", "flair")
    assert [path.name for path in first.images][1] == "P1_t1ce.nii.gz"
    assert first.seg == tmp_path / "HGG/P1/P1_seg.nii.gz"
    assert len(first.stamps) == 5
    assert (cohort.found, cohort.rejected) == (2, ())


def test_other_modalities_are_sorted_and_may_follow_a_dash(
    tmp_path: Path, make_volume: Make
) -> None:
    for patient in ("BraTS-GLI-00000-000", "BraTS-GLI-00001-000"):
        for modality in ("t2w", "t1n", "adc"):
            make_volume(tmp_path / "x" / patient / f"{patient}-{modality}.nii.gz")
    assert find_cohort(tmp_path).cases[1].modalities == ("adc", "t1n", "t2w")


def test_a_single_image_named_like_its_case_needs_no_modality(
    tmp_path: Path, make_volume: Make
) -> None:
    make_volume(tmp_path / "x/P1/P1.nii")
    assert find_cohort(tmp_path).cases[0].modalities == ("image",)


def test_a_missing_modality_names_patient_and_modality(tmp_path: Path, make_case: Make) -> None:
    make_case(tmp_path / "HGG/P1")
    make_case(tmp_path / "HGG/P2", ("t1", "t2", "flair"))
    make_case(tmp_path / "HGG/P3")
    cohort = find_cohort(tmp_path)
    assert [c.patient for c in cohort.cases] == ["P1", "P3"]
    (entry,) = cohort.rejected
    assert (entry.patient, entry.path) == ("P2", "HGG/P2")
    assert "patient 'P2': modality 't1ce' is missing" in entry.reason


def test_a_modality_few_cases_have_is_reported_and_left_out(
    tmp_path: Path, make_case: Make, make_volume: Make
) -> None:
    for number in range(3):
        make_case(tmp_path / f"HGG/P{number}", ("t1",), seg=False)
    make_volume(tmp_path / "HGG/P1/P1_adc.nii.gz")
    cohort = find_cohort(tmp_path)
    assert {c.modalities for c in cohort.cases} == {("t1",)}
    assert "fewer than half" in reasons(cohort)["HGG/P1/P1_adc.nii.gz"]
    assert cohort.found == 4


def test_masks_without_image_and_images_without_mask_are_named(
    tmp_path: Path, make_case: Make
) -> None:
    make_case(tmp_path / "HGG/P1")
    make_case(tmp_path / "HGG/P2", seg=False)
    make_case(tmp_path / "HGG/P3", ())
    make_case(tmp_path / "HGG/P4")
    cohort = find_cohort(tmp_path)
    assert [c.patient for c in cohort.cases] == ["P1", "P4"]
    named = {entry.patient: entry.reason for entry in cohort.rejected}
    assert "mask ('seg') is missing" in named["P2"]
    assert "mask without image" in named["P3"]


def test_foreign_files_are_reported_and_never_sampled(
    tmp_path: Path, make_case: Make, make_volume: Make
) -> None:
    make_case(tmp_path / "HGG/P1")
    make_case(tmp_path / "HGG/P2")
    (tmp_path / "HGG/P1/._P1_t1.nii.gz").write_bytes(b"mac")
    (tmp_path / "HGG/.DS_Store").write_bytes(b"mac")
    (tmp_path / "__MACOSX/HGG/P1").mkdir(parents=True)
    (tmp_path / "survival.csv").write_text("x\n")
    (tmp_path / "HGG/P1/notes.txt").write_text("x")
    make_volume(tmp_path / "HGG/P1/W39_Segm.nii")
    (tmp_path / "HGG/P1/old").mkdir()
    (tmp_path / "HGG/P2/P2_t2.nii.gz").write_bytes(b"")
    (tmp_path / "LGG/P9").mkdir(parents=True)
    cohort = find_cohort(tmp_path)
    assert [c.patient for c in cohort.cases] == ["P1"]
    found = reasons(cohort)
    assert set(found) == {
        "HGG/P1/._P1_t1.nii.gz",
        "HGG/.DS_Store",
        "__MACOSX",
        "survival.csv",
        "HGG/P1/notes.txt",
        "HGG/P1/W39_Segm.nii",
        "HGG/P1/old",
        "HGG/P2/P2_t2.nii.gz",
        "LGG/P9",
    }
    assert found["HGG/P2/P2_t2.nii.gz"] == "empty file, 0 bytes; expected a header and voxels."
    assert "no images" in found["LGG/P9"]
    assert cohort.found == 10


@pytest.fixture
def is_refused_by_the_system(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder one the system will not list; root, who may list all, included."""
    scanned, listed = os.scandir, os.listdir

    def refuse(folder: Path) -> None:
        def checked(path: Any) -> Any:
            if Path(path) == folder:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return path

        monkeypatch.setattr(os, "scandir", lambda path: scanned(checked(path)))
        monkeypatch.setattr(os, "listdir", lambda path: listed(checked(path)))

    return refuse


@pytest.mark.parametrize("place", ["HGG", "HGG/P1"])
def test_a_folder_that_may_not_be_read_is_listed(
    tmp_path: Path,
    make_case: Make,
    is_refused_by_the_system: Callable[[Path], None],
    place: str,
) -> None:
    for name in ("HGG/P1", "HGG/P2", "LGG/P3"):
        make_case(tmp_path / name, ("t1",))
    is_refused_by_the_system(tmp_path / place)
    cohort = find_cohort(tmp_path)
    sound = {"HGG": ["P3"], "HGG/P1": ["P2", "P3"]}[place]
    assert [found.patient for found in cohort.cases] == sound
    (rejected,) = cohort.rejected
    assert (rejected.path, rejected.patient) == (place, "P1" if place == "HGG/P1" else "")
    assert "cannot be read (Permission denied)" in rejected.reason
    assert str(tmp_path) not in rejected.reason


def test_a_source_that_may_not_be_read_is_named(
    tmp_path: Path, make_case: Make, is_refused_by_the_system: Callable[[Path], None]
) -> None:
    make_case(tmp_path / "HGG/P1")
    is_refused_by_the_system(tmp_path)
    with pytest.raises(ShardError, match=f"{tmp_path}: cannot be read .Permission denied"):
        find_cohort(tmp_path)


def test_the_output_may_lie_inside_the_source(tmp_path: Path, make_case: Make) -> None:
    make_case(tmp_path / "HGG/P1")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/train-000000.tar").write_bytes(b"x")
    assert find_cohort(tmp_path).found == 2
    assert find_cohort(tmp_path, ignored=(tmp_path / "packed",)).found == 1


def test_pairs_count_as_one_image_and_lone_voxels_are_named(tmp_path: Path) -> None:
    import nibabel as untyped
    import numpy as np

    nibabel: Any = untyped
    folder = tmp_path / "HGG/P1"
    folder.mkdir(parents=True)
    image = nibabel.Nifti1Pair(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    nibabel.save(image, folder / "P1_t1.hdr")
    (folder / "P1_t2.img").write_bytes(b"voxels")
    (folder / "P1_t1.nii").write_bytes(b"another")
    cohort = find_cohort(tmp_path)
    assert cohort.cases[0].modalities == ("t1",)
    assert [stamp.path.suffix for stamp in cohort.cases[0].stamps] == [".hdr", ".img"]
    assert "without their header" in reasons(cohort)["HGG/P1/P1_t2.img"]
    assert reasons(cohort)["HGG/P1/P1_t1.nii"] == "a second file of 't1' beside P1_t1.hdr."


def test_a_labels_table_labels_a_flat_folder_and_keeps_strata(
    tmp_path: Path, make_case: Make, make_table: Make
) -> None:
    for number in range(3):
        make_case(tmp_path / f"P{number}", ("t1",), seg=False)
    labels = make_table(
        tmp_path / "labels.csv",
        [
            {"patient": f"P{n}", "label": str(n % 2), "split": "train", "site": f"S{n}"}
            for n in (0, 1, 2, 7)
        ],
    )
    cohort = find_cohort(tmp_path, labels=labels)
    assert [(c.label, c.split, dict(c.columns)) for c in cohort.cases] == [
        ("0", "train", {"site": "S0"}),
        ("1", "train", {"site": "S1"}),
        ("0", "train", {"site": "S2"}),
    ]
    assert cohort.columns == ("site",)
    assert cohort.rejected == ()
    assert cohort.warnings == ("labels.csv: 1 row(s) belong to no case found, first 'P7'.",)


def test_a_labels_table_overrides_the_class_folder(
    tmp_path: Path, make_case: Make, make_table: Make
) -> None:
    make_case(tmp_path / "HGG/P1", ("t1",))
    make_case(tmp_path / "HGG/P2", ("t1",))
    labels = make_table(tmp_path / "labels.csv", [{"patient": "P2", "label": "LGG"}])
    cohort = find_cohort(tmp_path, labels=labels)
    assert [c.label for c in cohort.cases] == ["HGG", "LGG"]


def test_a_labels_table_with_a_patient_twice_or_nothing_to_say_is_refused(
    tmp_path: Path, make_case: Make, make_table: Make
) -> None:
    make_case(tmp_path / "in/HGG/P1", ("t1",))
    twice = make_table(tmp_path / "a.csv", [{"patient": "P1", "label": x} for x in "ab"])
    with pytest.raises(ConfigError, match="'P1' stands at line 2 and at line 3"):
        find_cohort(tmp_path / "in", labels=twice)
    bare = make_table(tmp_path / "b.csv", [{"patient": "P1"}])
    with pytest.raises(ConfigError, match="only the column 'patient'"):
        find_cohort(tmp_path / "in", labels=bare)
    with pytest.raises(ConfigError, match=r"none\.csv: cannot be read \(No such file"):
        find_cohort(tmp_path / "in", labels=tmp_path / "none.csv")
    other = make_table(tmp_path / "c.csv", [{"Patient": "P1", "label": "x"}])
    with pytest.raises(ConfigError, match=r"no column 'patient'.*Did you mean 'Patient'"):
        find_cohort(tmp_path / "in", labels=other)


def test_a_manifest_gives_a_case_per_row_with_channels_in_column_order(
    tmp_path: Path, make_volume: Make, make_table: Make
) -> None:
    for name in ("x", "y", "m"):
        make_volume(tmp_path / f"images/{name}.nii.gz")
    manifest = make_table(
        tmp_path / "tables/cohort.csv",
        [
            {
                "patient": "1.2.840.1 ü",
                "image.flair": "../images/x.nii.gz",
                "image.t1": "../images/y.nii.gz",
                "label": "HGG",
                "seg": "../images/m.nii.gz",
                "sample": "day1",
                "split": "val",
                "site": "A",
                "sex": "",
            }
        ],
    )
    cohort = find_cohort(manifest)
    (only,) = cohort.cases
    assert (only.patient, only.sample, only.key) == (
        "1.2.840.1 ü",
        "day1",
        "1%2E2%2E840%2E1%20%C3%BC__day1",
    )
    assert only.modalities == ("flair", "t1")
    assert (only.label, only.split, dict(only.columns)) == ("HGG", "val", {"site": "A", "sex": ""})
    assert cohort.columns == ("site", "sex")


def test_rows_that_cannot_be_packed_are_rejected_with_their_line(
    tmp_path: Path, make_volume: Make, make_table: Make
) -> None:
    make_volume(tmp_path / "x.nii.gz")
    (tmp_path / "zero.nii.gz").write_bytes(b"")
    make_volume(tmp_path / "._y.nii.gz")
    (tmp_path / "y.txt").write_text("x")
    (tmp_path / "half.hdr").write_bytes(b"x")
    (tmp_path / "folder.nii").mkdir()
    rows = [
        ("P1", "x.nii.gz", "x.nii.gz"),
        ("P2", "absent.nii.gz", "x.nii.gz"),
        ("P3", "zero.nii.gz", "x.nii.gz"),
        ("P4", "", "x.nii.gz"),
        ("P5", "x.nii.gz", ""),
        ("", "x.nii.gz", "x.nii.gz"),
        ("P7", "._y.nii.gz", "x.nii.gz"),
        ("P8", "y.txt", "x.nii.gz"),
        ("P9", "", ""),
        ("P10", str(tmp_path / "absent.nii"), "x.nii.gz"),
        ("P11", "half.hdr", "x.nii.gz"),
        ("P12", "folder.nii", "x.nii.gz"),
    ]
    manifest = make_table(
        tmp_path / "m.csv",
        [{"patient": p, "image": i, "seg": s, "label": "a"} for p, i, s in rows],
    )
    cohort = find_cohort(manifest)
    assert [c.patient for c in cohort.cases] == ["P1"]
    assert [(e.patient, e.path, e.reason.split(":")[0]) for e in cohort.rejected] == [
        ("P2", "absent.nii.gz", "line 3"),
        ("P3", "zero.nii.gz", "line 4"),
        ("P4", "x.nii.gz", "line 5"),
        ("P5", "x.nii.gz", "line 6"),
        ("", "x.nii.gz", "line 7"),
        ("P7", "._y.nii.gz", "line 8"),
        ("P8", "y.txt", "line 9"),
        ("P9", "m.csv", "line 10"),
        ("P10", "absent.nii", "line 11"),
        ("P11", "half.hdr", "line 12"),
        ("P12", "folder.nii", "line 13"),
    ]
    told = [entry.reason for entry in cohort.rejected]
    for text, part in zip(
        told,
        [
            "No such file",
            "0 bytes",
            "mask without image",
            "image without mask",
            "no patient id",
            "operating system",
            "not a NIfTI",
            "modality 'image' is missing",
            "No such file",
            "the file with its voxels is missing",
            "not a regular file",
        ],
        strict=True,
    ):
        assert part in text
    assert not any(str(tmp_path) in text for text in told)
    assert cohort.found == 12


def test_a_parquet_manifest_says_the_same_as_its_csv(tmp_path: Path, make_volume: Make) -> None:
    make_volume(tmp_path / "x.nii.gz")
    columns = {
        "patient": ["P1", "P2"],
        "image": ["x.nii.gz", "x.nii.gz"],
        "label": [1, 0],
        "age": pa.array([64.0, None]),
        "dose": pa.array([0.5, float("nan")]),
        "done": [True, False],
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    (tmp_path / "m.csv").write_text(
        "patient,image,label,age,dose,done\nP1,x.nii.gz,1,64,0.5,True\nP2,x.nii.gz,0,,,False\n",
        encoding="utf-8",
    )
    parquet, text = find_cohort(tmp_path / "m.parquet"), find_cohort(tmp_path / "m.csv")
    assert [replace(c, place="") for c in parquet.cases] == [
        replace(c, place="") for c in text.cases
    ]
    assert parquet.cases[0].place == "m.parquet row 1"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"patient,label\nP1,a\n", "no column 'image'"),
        (b"image,label\nx,a\n", "no column 'patient'"),
        (b"patient,image,image.t1\n", "has 'image' beside 'image.t1'"),
        (b"patient,image,site,site\n", r"columns \['site'\] come twice"),
        (b"patient,image,\n", "column 3 has no name"),
        (b"patient,image\nP1,x,y\n", "line 2 has 3 cells, the first line 2"),
        (b"patient,image\nP\xff,x\n", "not UTF-8 at byte 15"),
        (b'patient,image\n"P1,x\n', "is not CSV"),
        (b"", "no column 'patient'"),
        (b"PAR1", "cannot be read as Parquet"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, content: bytes, named: str
) -> None:
    path = tmp_path / ("m.parquet" if content.startswith(b"PAR1") else "m.csv")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=named):
        find_cohort(path)


def test_a_byte_order_mark_and_blank_lines_are_no_harm(tmp_path: Path, make_volume: Make) -> None:
    make_volume(tmp_path / "x.nii.gz")
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbfpatient,image\r\nP1,x.nii.gz\r\n\r\n")
    assert find_cohort(tmp_path / "m.csv").cases[0].patient == "P1"


def test_a_source_that_does_not_fit_the_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ShardError, match="the source is missing"):
        find_cohort(tmp_path / "none")
    with pytest.raises(ConfigError, match="neither a folder nor a table"):
        find_cohort(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="'manifest', which needs a table"):
        find_cohort(tmp_path, layout="manifest")
    with pytest.raises(ConfigError, match="Did you mean 'brats'"):
        find_cohort(tmp_path, layout="brat")


@pytest.mark.parametrize("twin", ["p1", "P1 ", " P1", "\uff301"])
def test_ids_that_people_take_for_one_patient_are_refused(twin: str) -> None:
    with pytest.raises(SplitError, match=r"'P1' \(at P1\) and .* differ only in letter case"):
        check_patients([case("P1"), case("P2"), case(twin)])
    check_patients([case("P1"), case("P1", sample="b"), case("P 1")])


def test_an_accent_composed_in_two_ways_is_one_patient() -> None:
    with pytest.raises(SplitError):
        check_patients([case("M\u00fcller"), case("Mu\u0308ller")])


def test_a_key_that_comes_twice_names_both_places() -> None:
    with pytest.raises(ConfigError, match="'P1' stands at here and at there"):
        check_keys([case("P1", place="here"), case("P2"), case("P1", place="there")])
    with pytest.raises(ConfigError, match="'P1__B' stands at"):
        check_keys([case("P1", sample="b"), case("P1", sample="B")])
    with pytest.raises(ConfigError, match="'a__b' stands at"):
        check_keys([case("a__b"), case("a", sample="b")])


def test_a_patient_under_two_classes_is_refused_with_both() -> None:
    with pytest.raises(SplitError, match=r"'P1' stands under the classes 'HGG'.*'LGG'"):
        check_keys([case("P1", "HGG"), case("P1", "LGG")])


def test_missing_labels_are_listed_with_their_keys() -> None:
    cases = [case(f"P{n}", None) for n in range(7)]
    with pytest.raises(ConfigError, match=r"7 sample\(s\) have no label: 'P0', .*'P4' and 2 more"):
        check_labels(cases)


def test_labels_that_differ_only_in_case_or_blanks_are_refused() -> None:
    with pytest.raises(ConfigError, match="'LGG' and 'lgg ' differ only"):
        check_labels([case("P1", "LGG"), case("P2", "lgg ")])


def test_a_label_may_differ_inside_a_patient_only_between_named_samples() -> None:
    check_labels([case("P1", "a", sample="left"), case("P1", "b", sample="right")])
    with pytest.raises(ConfigError, match=r"'P1' has the label 'a'.*and 'b'"):
        check_labels([case("P1", "a"), case("P1", "b", sample="right")])


def test_splits_given_to_some_samples_only_are_refused() -> None:
    assert check_splits([case("P1", split="train"), case("P2", split="val")])
    assert not check_splits([case("P1"), case("P2")])
    with pytest.raises(ConfigError, match=r"1 of 2 samples have no split.*'P2'"):
        check_splits([case("P1", split="train"), case("P2")])


def test_classes_come_in_numeric_else_lexicographic_else_declared_order() -> None:
    def ordered(*labels: str, declared: list[str] | None = None) -> tuple[str, ...]:
        return order_classes([case(f"P{n}", lab) for n, lab in enumerate(labels)], declared)

    assert ordered("10", "9", "2", "-1") == ("-1", "2", "9", "10")
    assert ordered("10", "9", "x") == ("10", "9", "x")
    assert ordered("nan", "2", "10") == ("10", "2", "nan")
    assert ordered("LGG", "HGG") == ("HGG", "LGG")
    assert ordered("LGG", "HGG", declared=["LGG", "HGG", "none"]) == ("LGG", "HGG", "none")


def test_a_label_outside_the_declared_classes_names_count_and_first_five_ids() -> None:
    cases = [case(f"P{n}", "HGG") for n in range(7)] + [case("Q", "LGG")]
    with pytest.raises(
        ConfigError, match=r"'HGG' of 7 sample\(s\).*'P0', 'P1', 'P2', 'P3', 'P4' and 2 more"
    ):
        order_classes(cases, ["LGG", "hgg"])
    with pytest.raises(ConfigError, match="different, non-empty names"):
        order_classes(cases, ["LGG", "LGG"])
