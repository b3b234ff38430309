"""The commands over samples with several findings: what they print for people and machines."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import train_loader
from tests.cli.conftest import Call

# 2 of 12 patients have Hernia, 1 of them Mass too; 4 have Mass alone; 6 have an empty label.
LABELS = ["Hernia", "Mass|Hernia", *["Mass"] * 4, *[""] * 6]
TARGET = ("--balance", "class_balanced", "--set", "target_label=Hernia")


def table(folder: Path, labels: Mapping[str, str]) -> Path:
    """Write an image per patient and the table that lists them."""
    with (folder / "chest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "label", "image"])
        for number, (patient, label) in enumerate(labels.items()):
            np.save(folder / f"{patient}.npy", np.arange(number, number + 16).reshape(4, 4))
            writer.writerow([patient, label, f"{patient}.npy"])
    return folder / "chest.csv"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of twelve patients."""
    folder = tmp_path_factory.mktemp("chest")
    return table(folder, {f"P{number:02d}": label for number, label in enumerate(LABELS)})


@pytest.fixture
def chest(source: Path, tmp_path: Path, call: Call) -> Path:
    """The same, packed by the command."""
    answer = call("pack", source, "--out", tmp_path / "packed", "--multi-label", "--json")
    assert answer.status == 0
    assert (answer.document["found"], answer.document["packed"]) == (12, 12)
    return tmp_path / "packed"


def test_pack_with_multi_label_makes_a_class_of_every_finding(chest: Path) -> None:
    shards = open_shards(chest)
    assert (shards.multi_label, shards.classes) == (True, ["Hernia", "Mass"])
    assert shards.labels("train").sum(axis=0).tolist() == [2, 5]


def test_pack_says_how_many_labels_were_empty(call: Call, source: Path, tmp_path: Path) -> None:
    answer = call("pack", source, "--out", tmp_path / "packed", "--multi-label")
    assert "6 of 12 samples have an empty label" in answer.err


def test_pack_without_multi_label_says_where_it_is_wanted(call: Call, tmp_path: Path) -> None:
    source = table(tmp_path, {"P1": "Mass|Hernia", "P2": "Mass"})
    answer = call("pack", source, "--out", tmp_path / "packed")
    assert answer.status == 0
    assert "'Mass|Hernia' hold '|'" in answer.err
    assert "--multi-label" in answer.err


def test_packing_again_without_multi_label_names_the_setting_that_differs(
    call: Call, tmp_path: Path
) -> None:
    source = table(tmp_path, {"P1": "Mass|Hernia", "P2": "Mass"})
    assert call("pack", source, "--out", tmp_path / "packed", "--multi-label").status == 0
    refused = call("pack", source, "--out", tmp_path / "packed")
    assert refused.status == 2
    assert "multi_label" in refused.err


def test_inspect_counts_a_sample_for_each_of_its_findings(call: Call, chest: Path) -> None:
    document = call("inspect", chest, "--json").document
    assert document["multi_label"] is True
    assert document["splits"]["train"]["samples"] == 12
    assert document["splits"]["train"]["classes"] == {"Hernia": 2, "Mass": 5}
    shown = call("inspect", chest).out
    assert "several findings" in shown


def test_inspect_says_nothing_of_findings_where_samples_have_one_class(
    call: Call, packed_cohort: Path
) -> None:
    assert call("inspect", packed_cohort, "--json").document["multi_label"] is False
    assert "findings" not in call("inspect", packed_cohort).out


def test_verify_finds_nothing_wrong(call: Call, chest: Path) -> None:
    assert call("verify", chest, "--json").document["problems"] == []


def test_plan_shows_what_balancing_on_one_finding_does_to_all(call: Call, chest: Path) -> None:
    document = call("plan", chest, *TARGET, "--global-batch-size", 4, "--json").document
    hernia = document["classes"]["Hernia"]
    # An epoch of 12 draws: 6 with Hernia, so each of its 2 patients 3 times.
    assert (hernia["patients"], hernia["before"], hernia["after"]) == (2, 2, 6)
    assert (hernia["share"], hernia["exposure_min"], hernia["exposure_max"]) == (0.5, 3, 3)
    assert (hernia["quota_least"], hernia["quota_most"]) == (2, 2)
    assert document["classes"]["Mass"]["before"] == 5
    assert document["splits"] == {"train": {"Hernia": 2, "Mass": 5}}
    assert call("plan", chest, *TARGET, "--global-batch-size", 4).status == 0


def test_plan_in_natural_order_shows_what_an_epoch_holds(call: Call, chest: Path) -> None:
    document = call("plan", chest, "--global-batch-size", 4, "--json").document
    shown = {
        label: (entry["before"], entry["after"], entry["share"])
        for label, entry in document["classes"].items()
    }
    assert shown == {"Hernia": (2, 2, pytest.approx(2 / 12)), "Mass": (5, 5, pytest.approx(5 / 12))}


def test_plan_refuses_a_strategy_that_needs_one_class_per_sample(call: Call, chest: Path) -> None:
    refused = call("plan", chest, "--balance", "class_balanced", "--global-batch-size", 4)
    assert refused.status == 2
    assert "target_label" in refused.err


def test_audit_counts_a_delivery_for_each_finding(call: Call, chest: Path, tmp_path: Path) -> None:
    balance = {"name": "class_balanced", "target_label": "Hernia"}
    with train_loader(
        open_shards(chest), global_batch_size=4, balance=balance, num_threads=1
    ) as train:
        for _ in train:
            pass
        (tmp_path / "state.json").write_text(json.dumps(train.state_dict()))
    document = call("audit", chest, "--state", tmp_path / "state.json", "--json").document
    assert document["classes"]["Hernia"]["delivered"] == 6
    # P01 has both findings and was delivered 3 times; the other 6 draws are of 10 patients.
    mass = [document["exposure"][f"P{number:02d}"] for number in range(1, 6)]
    assert document["classes"]["Mass"]["delivered"] == sum(mass)
    assert (document["exposure"]["P00"], document["exposure"]["P01"]) == (3, 3)
