"""Packing samples with several findings each: read, checked, divided, real X-rays among them."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streaming_balance.errors import ConfigError
from streaming_balance.ingest.cases import Case, Cohort
from streaming_balance.ingest.ordering import PackOrder, order_cases
from streaming_balance.ingest.pack import PackReport, write_shards
from streaming_balance.storage.shards import open_shards
from streaming_balance.storage.verify import verify_shards

Make = Callable[..., Path]
Rows = Sequence[Mapping[str, str]]


def cases(labels: Mapping[str, str | None]) -> Cohort:
    """List a case per "patient" or "patient/sample", without any file."""
    listed = []
    for name, label in labels.items():
        patient, _, sample = name.partition("/")
        listed.append(
            Case(
                patient=patient,
                sample=sample or None,
                label=label,
                images=(),
                modalities=(),
                place=f"at {name}",
                stamps=(),
            )
        )
    return Cohort(cases=tuple(listed), rejected=(), found=len(listed), columns=())


def ordered(labels: Mapping[str, str | None], **changes: Any) -> PackOrder:
    """Order such cases as a multi-label pack does."""
    options = {"classes": None, "split": None, "seed": 0, "train_splits": None}
    return order_cases(cases(labels), **{**options, "multi_label": True, **changes})


def labels_by_key(order: PackOrder) -> dict[str, str | None]:
    return {case.key: case.label for case, _ in order.cases}


@pytest.fixture
def pack_table(tmp_path: Path, make_table: Make) -> Callable[..., PackReport]:
    """Packs a table of small images into `packed`."""

    def pack(rows: Rows, **options: Any) -> PackReport:
        listed = [{"image": f"{row['patient']}.npy", **row} for row in rows]
        for number, row in enumerate(listed):
            if not (tmp_path / row["image"]).exists():
                np.save(tmp_path / row["image"], np.arange(number, number + 4).reshape(2, 2))
        table = make_table(tmp_path / "t.csv", listed)
        return write_shards(table, tmp_path / "packed", **{"multi_label": True, **options})

    return pack


def test_findings_are_classes_and_a_set_is_written_in_their_order() -> None:
    order = ordered({"P1": "Mass|Effusion", "P2": "Nodule", "P3": "Effusion|Mass"})
    assert order.classes == ("Effusion", "Mass", "Nodule")
    assert labels_by_key(order) == {"P1": "Effusion|Mass", "P2": "Nodule", "P3": "Effusion|Mass"}


def test_findings_that_are_numbers_are_ordered_as_numbers() -> None:
    order = ordered({"P1": "10|9", "P2": "2"})
    assert order.classes == ("2", "9", "10")
    assert labels_by_key(order) == {"P1": "9|10", "P2": "2"}


def test_the_declared_order_of_the_classes_orders_the_sets_too() -> None:
    order = ordered({"P1": "Effusion|Mass"}, classes=["Mass", "Nodule", "Effusion"])
    assert labels_by_key(order) == {"P1": "Mass|Effusion"}


def test_an_empty_label_is_no_finding_and_the_packer_says_how_many_there_are() -> None:
    order = ordered({"P1": "Mass", "P2": "", "P3": ""})
    assert labels_by_key(order) == {"P1": "Mass", "P2": "", "P3": ""}
    assert order.warnings[0] == (
        "2 of 3 samples have an empty label: packed as without any finding."
    )


def test_no_finding_is_a_class_where_the_table_writes_it() -> None:
    assert ordered({"P1": "No Finding", "P2": "Mass"}).classes == ("Mass", "No Finding")


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("Mass||Nodule", "has the finding ''"),
        ("|", "has the finding ''"),
        ("Mass | Nodule", "has the finding 'Mass '.*without blanks"),
        ("Mass|Nodule|Mass", "has the finding 'Mass'.*each finding once"),
        ("Mass|mass", "labels 'Mass' and 'mass' differ only in letter case"),
    ],
)
def test_a_label_whose_findings_cannot_be_told_apart_is_refused(label: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ordered({"P1": label, "P2": "Effusion"})


def test_the_refusal_of_a_label_names_its_sample_and_place() -> None:
    with pytest.raises(ConfigError, match=r"label 'Mass\|' of 'P2' \(at P2\)"):
        ordered({"P1": "Mass", "P2": "Mass|"})


def test_a_finding_that_was_not_declared_is_named_with_its_samples() -> None:
    with pytest.raises(ConfigError, match=r"label 'Masss' of 1 sample\(s\).*'P2'.*mean 'Mass'"):
        ordered({"P1": "Mass", "P2": "Nodule|Masss"}, classes=["Mass", "Nodule"])


def test_a_declared_class_may_not_hold_the_separator(pack_table: Callable[..., PackReport]) -> None:
    with pytest.raises(ConfigError, match=r"classes name 'A\|B'.*name each finding alone"):
        pack_table([{"patient": "P1", "label": "A"}], classes=["A", "A|B"])


def test_without_any_finding_the_packer_asks_for_the_classes() -> None:
    with pytest.raises(ConfigError, match=r"every label is empty.*name the findings.*classes"):
        ordered({"P1": "", "P2": ""})
    assert ordered({"P1": "", "P2": ""}, classes=["Mass"]).classes == ("Mass",)


def test_a_sample_nobody_labelled_is_not_taken_for_one_without_findings(
    tmp_path: Path, make_case: Make, make_table: Make
) -> None:
    for patient in ("P1", "P2", "P3"):
        make_case(tmp_path / "in" / patient, ("t1",), seg=False)
    rows = [{"patient": "P1", "label": "Mass|Edema"}, {"patient": "P2", "label": ""}]
    table = make_table(tmp_path / "labels.csv", rows)
    with pytest.raises(ConfigError, match=r"1 sample\(s\) have no label: 'P3'"):
        write_shards(tmp_path / "in", tmp_path / "out", labels=table, multi_label=True)
    table = make_table(tmp_path / "labels.csv", [*rows, {"patient": "P3", "label": "Edema"}])
    write_shards(tmp_path / "in", tmp_path / "out", labels=table, multi_label=True)
    shards = open_shards(tmp_path / "out")
    words = dict(zip(shards.keys("train"), shards.label_words("train"), strict=True))
    assert words == {"P1": "Edema|Mass", "P2": "", "P3": "Edema"}


def test_a_table_without_a_label_column_has_no_labels(
    pack_table: Callable[..., PackReport],
) -> None:
    with pytest.raises(ConfigError, match=r"1 sample\(s\) have no label: 'P1'"):
        pack_table([{"patient": "P1"}], classes=["Mass"])


def test_an_empty_label_is_still_missing_where_samples_have_one_class(
    pack_table: Callable[..., PackReport],
) -> None:
    rows = [{"patient": "P1", "label": "Mass"}, {"patient": "P2", "label": ""}]
    with pytest.raises(ConfigError, match=r"1 sample\(s\) have no label: 'P2'"):
        pack_table(rows, multi_label=False)


def test_joined_labels_without_multi_label_are_one_class_each_and_the_packer_says_so(
    pack_table: Callable[..., PackReport],
) -> None:
    rows = [{"patient": "P1", "label": "Mass|Edema"}, {"patient": "P2", "label": "Mass"}]
    report = pack_table(rows, multi_label=False)
    assert report.manifest.classes == ("Mass", "Mass|Edema")
    said = [warning for warning in report.warnings if "'Mass|Edema'" in warning]
    assert len(said) == 1
    assert "--multi-label" in said[0]


def test_the_order_findings_are_written_in_makes_no_other_pack(
    pack_table: Callable[..., PackReport],
) -> None:
    first = pack_table([{"patient": "P1", "label": "Mass|Edema"}])
    again = pack_table([{"patient": "P1", "label": "Edema|Mass"}])
    assert (first.is_new, again.is_new) == (True, False)
    assert first.manifest.settings["multi_label"] is True


def test_the_setting_multi_label_must_be_true_or_false(
    pack_table: Callable[..., PackReport],
) -> None:
    with pytest.raises(ConfigError, match=r"multi_label is 'yes'; it must be True or False"):
        pack_table([{"patient": "P1", "label": "Mass"}], multi_label="yes")


def test_several_processes_pack_the_same_findings(
    pack_table: Callable[..., PackReport],
) -> None:
    rows = [{"patient": f"P{n}", "label": "|".join("ABC"[: n % 4])} for n in range(8)]
    digests = {pack_table(rows, jobs=jobs, overwrite=True).digest for jobs in (1, 2)}
    assert len(digests) == 1


def test_each_split_gets_its_share_of_every_finding_and_of_those_without() -> None:
    # 4 with Hernia, half of them with Mass too; 8 with Mass alone; 4 without any finding.
    labels = {f"H{n}": "Hernia|Mass" if n % 2 else "Hernia" for n in range(4)}
    labels |= {f"M{n}": "Mass" for n in range(8)} | {f"N{n}": "" for n in range(4)}
    for seed in range(20):
        order = ordered(labels, split="train=0.5,val=0.5", seed=seed)
        train = [case for case, split in order.cases if split == "train"]
        assert len(train) == 8
        assert sum("Hernia" in str(case.label) for case in train) == 2
        assert sum("Mass" in str(case.label) for case in train) == 5


def test_many_rare_findings_do_not_all_go_to_the_first_split() -> None:
    labels = {f"P{n}": f"finding {n}" for n in range(10)}
    order = ordered(labels, split="train=0.5,val=0.5")
    assert Counter(split for _, split in order.cases) == {"train": 5, "val": 5}


def test_a_patient_with_many_samples_counts_once_and_goes_to_one_split() -> None:
    labels = {f"A/{n}": "Hernia|Mass" for n in range(50)} | {"B/1": "Hernia", "B/2": "Mass"}
    order = ordered(labels, split="train=0.5,val=0.5")
    places = {(case.patient, split) for case, split in order.cases}
    assert {patient for patient, _ in places} == {"A", "B"}
    assert {split for _, split in places} == {"train", "val"}
    assert len(places) == 2


def test_the_division_depends_on_the_seed_and_not_on_the_order_of_the_table() -> None:
    labels = {f"P{n}": ("Hernia", "Mass", "Hernia|Mass", "")[n % 4] for n in range(40)}
    backwards = dict(reversed(labels.items()))

    def divided(table: Mapping[str, str], seed: int) -> dict[str, str]:
        order = ordered(table, split="train=0.5,val=0.5", seed=seed)
        return {case.key: split for case, split in order.cases}

    assert divided(labels, 1) == divided(backwards, 1)
    assert divided(labels, 1) != divided(labels, 2)


def test_a_class_that_a_split_lacks_is_named_finding_by_finding() -> None:
    order = ordered({"P1": "Mass|Edema", "P2": "Mass"}, split="train=0.5,val=0.5")
    said = [warning for warning in order.warnings if "no sample of class" in warning]
    assert said == ["split 'val' has no sample of class 'Edema': too few patients to divide."]


@pytest.fixture(scope="module")
def x_rays(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, str]], Path, PackReport]:
    """The real X-rays as .npy files, cut to 64 x 64, and the folder they were packed into."""
    folder = tmp_path_factory.mktemp("x_rays")
    real = shared_data / "labelled/nih_chest_xray"
    with (real / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "chest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "sample", "label", "image", "view"])
        for row in rows:
            name = row["image"].removesuffix(".png")
            pixels = np.asarray(Image.open(real / "images" / row["image"]).convert("L"))
            np.save(folder / f"{name}.npy", pixels[400:464, 400:464])
            cells = [row["patient"], name, row["finding_labels"], f"{name}.npy", row["view"]]
            writer.writerow(cells)
    report = write_shards(
        folder / "chest.csv", folder / "packed", split="train=0.7,val=0.3", multi_label=True
    )
    return rows, folder, report


def test_real_x_rays_keep_every_finding_of_their_table(
    x_rays: tuple[list[dict[str, str]], Path, PackReport],
) -> None:
    rows, folder, report = x_rays
    assert (report.found, report.packed, report.rejected) == (30, 30, ())
    shards = open_shards(folder / "packed")
    expected = {row["image"].removesuffix(".png"): row for row in rows}
    findings = {name for row in rows for name in row["finding_labels"].split("|")}
    assert shards.classes == sorted(findings)
    seen = 0
    for split in shards.splits:
        labels, keys = shards.labels(split), shards.keys(split).tolist()
        for number, key in enumerate(keys):
            patient, _, name = key.partition("__")
            row = expected[name]
            held = {shards.classes[column] for column in np.flatnonzero(labels[number])}
            assert held == set(row["finding_labels"].split("|"))
            assert patient == row["patient"] == shards.patients(split)[number]
            pixels = np.load(folder / f"{name}.npy")
            assert np.array_equal(shards.read(split, number)["image"], pixels)
            seen += 1
    assert seen == 30
    assert not {*shards.patients("train").tolist()} & {*shards.patients("val").tolist()}
    assert verify_shards(folder / "packed").ok


def test_the_real_table_is_divided_by_patient_within_one_of_the_share_of_every_finding(
    shared_data: Path,
) -> None:
    table = shared_data / "labelled/nih_label_table/Data_Entry_2017_v2020.csv.gz"
    labels, patients = {}, defaultdict(set)
    with gzip.open(table, "rt", newline="") as file:
        for row in csv.DictReader(file):
            patient, image = row["Patient ID"], row["Image Index"]
            labels[f"{patient}/{image}"] = row["Finding Labels"]
            for name in row["Finding Labels"].split("|"):
                patients[name].add(patient)
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    order = ordered(labels, split=shares)
    assert len(order.cases) == 112_120
    split_of: dict[str, str] = {}
    for case, split in order.cases:
        assert split_of.setdefault(case.patient, split) == split
    assert len(split_of) == 30_805
    assert set(order.classes) == patients.keys()
    sizes = Counter(split_of.values())
    for split, share in shares.items():
        # Findings are divided exactly; all patients together follow to a thousandth.
        assert abs(sizes[split] - share * len(split_of)) < 31
        for owners in patients.values():
            here = sum(split_of[patient] == split for patient in owners)
            assert abs(here - share * len(owners)) < 1
    assert json.dumps(order.split_rule) == '{"train": "7/10", "val": "1/10", "test": "1/5"}'
