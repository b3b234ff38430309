"""An audit for machines: the JSON document, the row per patient, and where patients belong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.report.audit import audit_of
from streaming_balance.report.audit_files import (
    COLUMNS,
    audit_document,
    patient_document,
    write_patient_table,
)
from streaming_balance.report.homes import home_of, homes
from streaming_balance.report.patient import answer_for
from streaming_balance.report.sightings import patient_sightings
from streaming_balance.report.tallies import Tallies
from streaming_balance.storage.shards import ShardSet
from tests.building import Sample
from tests.report.witness import (
    Witness,
    audited_cohort,
    audited_shards,
    build,
    damage,
    tallied,
)
from tests.training.cohorts import packed, voxels

OPTIONS: dict[str, Any] = {
    "balance": "class_balanced",
    "on_error": "substitute",
    "mixing": {"name": "mixup", "probability": 0.5},
    "exclude": ["H06", "L04__a"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """21 training patients, one sample of whom cannot be read."""
    made = audited_shards(tmp_path_factory.mktemp("files") / "cohort")
    damage(made, "L01__a")
    return made


@pytest.fixture(scope="module")
def witness() -> Witness:
    """Who saw the run below."""
    return Witness()


@pytest.fixture(scope="module")
def tallies(shards: ShardSet, witness: Witness) -> Tallies:
    """A run of two plans, five batches and three."""
    (loader,) = build(shards, 1, OPTIONS)
    witness.train([loader], 4)
    witness.train([loader], 1)
    state = loader.state_dict()
    loader.close()
    (loader,) = build(shards, 1, {**OPTIONS, "seed": 6})
    loader.load_state_dict(state, carry_exposure=True)
    witness.train([loader], 3, leg=1)
    counted = tallied(shards, loader.state_dict())
    loader.close()
    return counted


def written(path: Path, tallies: Tallies) -> list[dict[str, str]]:
    """Write a row per patient, and read it again."""
    write_patient_table(path, audit_of(tallies), patient_sightings(tallies), tallies)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_patient_of_every_split_has_a_row_with_what_was_received(
    shards: ShardSet, tallies: Tallies, witness: Witness, tmp_path: Path
) -> None:
    rows = {row["patient"]: row for row in written(tmp_path / "audit.csv", tallies)}
    train = set(shards.patients("train").tolist())
    assert rows.keys() == train | set(shards.patients("val").tolist())
    for name, row in rows.items():
        assert row["split"] == ("train" if name in train else "val")
        assert row["class"] == ("LGG" if name[0] == "L" else "HGG")
        assert int(row["exposure"]) == witness.exposure[name]
        assert int(row["as_partner"]) == witness.as_partner[name]
        assert int(row["as_substitute"]) == witness.as_substitute[name]
        assert int(row["substituted"]) == witness.substituted[name]
        for end, known in (("first", witness.first), ("last", witness.last)):
            place = tuple(row[f"{end}_{part}"] for part in ("leg", "epoch", "step"))
            assert place == tuple(map(str, known.get(name, ("", "", ""))))
    assert sum(int(row["as_substitute"]) for row in rows.values()) > 0
    assert sum(int(row["as_partner"]) for row in rows.values()) > 0
    # H06 has two samples, L04 one.
    excluded = {name: int(row["excluded"]) for name, row in rows.items() if row["excluded"] != "0"}
    assert excluded == {"H06": 2, "L04": 1}


def test_the_columns_are_those_of_the_documentation(tallies: Tallies, tmp_path: Path) -> None:
    written(tmp_path / "audit.csv", tallies)
    head = (tmp_path / "audit.csv").read_text().splitlines()[0]
    assert head == (
        "patient,split,class,exposure,first_epoch,first_step,last_epoch,last_step,as_partner,"
        "as_substitute,substituted,excluded,first_leg,last_leg,in_data_set"
    )
    assert head == ",".join(COLUMNS)


def test_whoever_left_the_data_set_has_a_row_too(
    shards: ShardSet, tallies: Tallies, witness: Witness, tmp_path: Path
) -> None:
    kept = [sample for sample in audited_cohort(hgg=13) if sample.patient != "H02"]
    new = packed(tmp_path / "new", kept)
    (loader,) = build(new, 1, {**OPTIONS, "seed": 6})
    loader.close()
    state = tallies.run.state.to_dict()
    rows = written(tmp_path / "audit.csv", tallied(new, state, tables=[shards]))
    by_patient = {row["patient"]: row for row in rows}
    assert len(by_patient) == len(rows) == 25
    assert by_patient["H02"]["in_data_set"] == "no"
    assert int(by_patient["H02"]["exposure"]) == witness.exposure["H02"]
    assert by_patient["H12"]["in_data_set"] == "yes"
    assert (by_patient["H12"]["exposure"], by_patient["H12"]["first_epoch"]) == ("0", "")


def test_ids_with_commas_quotes_and_letters_of_any_script_come_back(tmp_path: Path) -> None:
    names = ['a,"b"', "Zoë; 李", "plain"]
    samples = [
        Sample(key=f"k{number}", image=voxels(number), patient=name)
        for number, name in enumerate(names)
    ]
    shards = packed(tmp_path / "cohort", samples)
    (loader,) = build(shards, 1, {"global_batch_size": 1})
    state = loader.state_dict()
    loader.close()
    rows = written(tmp_path / "audit.csv", tallied(shards, state))
    assert {row["patient"] for row in rows} == set(names)


def test_an_older_table_is_replaced_as_a_whole_and_nothing_else_is_left(
    tallies: Tallies, tmp_path: Path
) -> None:
    path = tmp_path / "audit.csv"
    path.write_text("something older")
    before = path.stat().st_ino
    assert len(written(path, tallies)) == 24
    # Another file with the same name, so a reader of the old one saw no half of the new.
    assert path.stat().st_ino != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["audit.csv"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("folder", "which is a folder; name a file"), ("none/a.csv", "there is no folder")],
)
def test_a_table_is_never_written_over_a_folder_nor_into_none(
    tallies: Tallies, tmp_path: Path, name: str, complaint: str
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=complaint):
        written(tmp_path / name, tallies)
    assert list((tmp_path / "folder").iterdir()) == []


def test_the_document_holds_what_json_can(tallies: Tallies, witness: Witness) -> None:
    audit, seen = audit_of(tallies), patient_sightings(tallies)
    document = json.loads(json.dumps(audit_document(audit, seen, "a paragraph"), allow_nan=False))
    assert document["methods"] == "a paragraph"
    assert document["complete"] is True
    for name in audit.exposure:
        first, last = witness.first.get(name), witness.last.get(name)
        assert document["first_seen"][name] == (list(first[1:]) if first else None)
        assert document["last_seen"][name] == (list(last[1:]) if last else None)
        assert document["first_leg"][name] == (first[0] if first else None)
        assert document["last_leg"][name] == (last[0] if last else None)
    assert len(document["legs"]) == 2
    assert document["legs"][1]["plan_digest"] == document["plan_digest"]
    names = {"leg", "epoch", "step", "slot", "key", "patient", "reason"}
    assert names <= document["substitutions"][0].keys()


def test_the_document_of_one_patient_names_nobody_else(
    shards: ShardSet, tallies: Tallies, witness: Witness
) -> None:
    audit = audit_of(tallies)
    everybody = set(shards.patients("train").tolist())
    for patient in ("L01", "H03", "H06"):
        document = json.loads(json.dumps(patient_document(audit, answer_for(patient, tallies))))
        assert document["seen"] is (witness.exposure[patient] > 0)
        assert document["exposure"] == {patient: witness.exposure[patient]}
        first = witness.first.get(patient)
        assert document["first_seen"] == {patient: list(first[1:]) if first else None}
        others = everybody - {patient}
        about = {name: value for name, value in document.items() if name != "legs"}
        times = witness.as_substitute[patient] + witness.substituted[patient]
        assert len(document["substitutions"]) == times
        involved = {
            record[part]
            for record in document["substitutions"]
            for part in ("patient", "substitute_patient")
        }
        mentioned = {name for name in others if f'"{name}"' in json.dumps(about)}
        assert mentioned <= involved
        for digest in ("plan_digest", "shards_digest", "table_digest", "state_digest"):
            assert document[digest] == getattr(audit, digest)


def test_homes_are_by_patient_and_of_all_labels(tmp_path: Path) -> None:
    samples = [
        Sample(key="a1", image=voxels(0), patient="A", label="LGG"),
        Sample(key="a2", image=voxels(1), patient="A", label="HGG"),
        Sample(key="b1", image=voxels(2), patient="B", label="LGG"),
        Sample(key="c1", image=voxels(3), patient="C", label="HGG", split="val"),
    ]
    shards = packed(tmp_path / "cohort", samples)
    found = {name: (home.split, home.label) for name, home in homes(shards).items()}
    assert found == {"A": ("train", "HGG|LGG"), "B": ("train", "LGG"), "C": ("val", "HGG")}
    assert home_of("A", shards) == homes(shards)["A"]
    assert home_of("C", shards) == homes(shards)["C"]
    assert home_of("D", shards) is None


def test_findings_of_a_patient_are_joined_each_once(tmp_path: Path) -> None:
    samples = [
        Sample(key=f"a{number}", image=voxels(number), patient="A", label=label)
        for number, label in enumerate(("Nodule", "", "Mass|Nodule"))
    ]
    shards = packed(tmp_path / "cohort", samples, classes=("Mass", "Nodule"), multi_label=True)
    assert homes(shards)["A"].label == "Mass|Nodule"


def test_an_unknown_patient_is_answered_with_the_nearest_or_the_owner_of_the_key(
    tallies: Tallies,
) -> None:
    with pytest.raises(ConfigError, match=r"no patient 'H3'.*Did you mean 'H\d\d'\?"):
        answer_for("H3", tallies)
    with pytest.raises(ConfigError, match=r"It is the key of a sample of patient 'H03'\."):
        answer_for("H03__b", tallies)
    with pytest.raises(ConfigError, match=r"no patient 'nobody' in .*cohort\.$"):
        answer_for("nobody", tallies)
