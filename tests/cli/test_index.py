"""`streaming-balance index` answers people and machines, and ends with the right status."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.cli.conftest import Call


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three shards of ten images each, two classes, two images to a patient."""
    folder = tmp_path / "tars"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "s-%03d.tar"), maxcount=10, verbose=0) as sink:
        for number in range(30):
            image = np.full((4, 4), number, np.int16)
            told = {"who": f"P{number // 2}", "grade": "HGG" if number % 6 > 1 else "LGG"}
            sink.write({"__key__": f"k{number:02d}", "image.npy": image, "json": told})
    return folder


def test_json_says_what_was_found_indexed_and_rejected(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    options = ("--out", tmp_path / "i", "--label", "json:grade", "--patient", "json:who")
    answer = call("index", f"{tars}/s-{{000..002}}.tar", *options, "--json")
    assert answer.status == 0
    document = answer.document
    assert (document["found"], document["indexed"], document["rejected"]) == (30, 30, [])
    assert (document["new"], document["patients"], document["warnings"]) == (True, "json:who", [])
    inspected = call("inspect", tmp_path / "i", "--json").document
    assert inspected["digest"] == document["digest"]
    assert inspected["splits"]["train"]["classes"] == {"HGG": 20, "LGG": 10}
    assert inspected["splits"]["train"]["patients"] == 15
    assert inspected["foreign"]["label"] == "json:grade"


def test_the_other_commands_work_on_an_index_as_on_a_pack(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    out = tmp_path / "i"
    assert call("index", *sorted(tars.iterdir()), "--out", out, "--label", "json:grade").status == 0
    assert call("verify", out, "--json").document["ok"]
    plan = call("plan", out, "--global-batch-size", 6, "--balance", "class_balanced", "--json")
    assert plan.document["classes"]["LGG"]["share"] == 0.5
    said = call("inspect", out).out
    assert "indexed in place: 3 shard(s) such as ../tars/s-000.tar" in said
    assert "every key counts as a patient of its own" in said


def test_people_are_told_what_stands_in_the_index(call: Call, tars: Path, tmp_path: Path) -> None:
    arguments = ("index", f"{tars}/*.tar", "--out", tmp_path / "i", "--label", "json:grade")
    first = call(*arguments, "--classes", "LGG,HGG")
    assert first.status == 0
    assert "found 30 = indexed 30 + rejected 0" in first.out
    assert "classes: LGG, HGG" in first.out
    assert "indexed 3 of 3 shards" in first.err
    assert "warning: no patient was named" in first.err
    again = call(*arguments, "--classes", "LGG,HGG")
    assert again.status == 0
    assert "left alone" in again.out


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (("{tars}/*.tar",), 2, "samples have no label (cls)"),
        (("{tars}/*.tar", "--label", "csv:/nowhere.csv"), 2, "/nowhere.csv: cannot be read"),
        (("https://host/a.tar",), 2, "cannot be indexed in place"),
        (("{tars}/none-*.tar",), 2, "none-*.tar"),
        (("{tars}/none.tar",), 1, "none.tar"),
        (("{tars}/s-000.tar", "--keys", "dots"), 2, "keys is 'dots'"),
    ],
)
def test_what_cannot_be_indexed_ends_with_the_right_status(
    arguments: tuple[str, ...], status: int, problem: str, call: Call, tars: Path, tmp_path: Path
) -> None:
    given = [argument.format(tars=tars) for argument in arguments]
    answer = call("index", *given, "--out", tmp_path / "i", "--json")
    assert answer.status == status
    assert problem in json.loads(answer.out)["error"]["message"]


def test_a_cut_shard_is_bad_data(call: Call, tars: Path, tmp_path: Path) -> None:
    path = tars / "s-001.tar"
    path.write_bytes(path.read_bytes()[:2048])
    options = ("--out", tmp_path / "i", "--label", "json:grade")
    answer = call("index", f"{tars}/*.tar", *options)
    assert answer.status == 1
    assert "s-001.tar" in answer.err
