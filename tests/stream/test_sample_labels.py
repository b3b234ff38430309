"""A class has one name, whether its tar is streamed or indexed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.errors import BalanceError
from streaming_balance.ingest.index import index_shards
from streaming_balance.stream.pipeline import stream
from tests.stream.tars import put, tar_of

NAMES = [
    ({"a": {"b": " LGG "}}, "LGG"),
    ({"a": {"b": True}}, "true"),
    ({"a": {"b": 1}}, "1"),
    ({"a": {"b": 1.0}}, "1"),
    ({"a": {"b": -0.0}}, "0"),
    ({"a": {"b": 1.5}}, "1.5"),
    ({"a.b": "whole", "a": {"b": "nested"}}, "whole"),
    ({"a.b": "whole"}, "whole"),
]
NO_CLASS: list[Any] = [
    {"a": {"b": None}},
    {"a": {"b": "  "}},
    {"a": {"b": [1]}},
    {"a": {"b": float("nan")}},
    {"a": {"b": float("inf")}},
    {"a": {}},
    {"a": "b"},
    ["a"],
]


def document_in_a_tar(tmp_path: Path, document: bytes) -> str:
    """Write a tar of one sample."""
    return put(tmp_path, tar_of({"P1.json": document}))


@pytest.mark.parametrize(("document", "name"), NAMES)
def test_a_class_in_json_has_the_same_name_in_a_stream_and_in_an_index(
    document: Any, name: str, tmp_path: Path
) -> None:
    path = document_in_a_tar(tmp_path, json.dumps(document).encode())
    streamed = [sample["__label__"] for sample in stream(path, label="json:a.b").reservoir(1)]
    report = index_shards(path, out=tmp_path / "index", label="json:a.b")
    assert (streamed, report.manifest.classes) == ([name], (name,))


@pytest.mark.parametrize("document", NO_CLASS)
def test_what_is_no_class_is_refused_by_streams_and_indexes(document: Any, tmp_path: Path) -> None:
    path = document_in_a_tar(tmp_path, json.dumps(document).encode())
    with pytest.raises(BalanceError, match="no class in its json"):
        list(stream(path, label="json:a.b").reservoir(1))
    with pytest.raises(BalanceError, match=r"no label \(json:a.b\)"):
        index_shards(path, out=tmp_path / "index", label="json:a.b")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_in_any_of_its_encodings_is_read_by_streams_and_indexes(
    encoding: str, tmp_path: Path
) -> None:
    path = document_in_a_tar(tmp_path, '{"grade": "é"}'.encode(encoding))
    streamed = [sample["__label__"] for sample in stream(path, label="json:grade").reservoir(1)]
    report = index_shards(path, out=tmp_path / "index", label="json:grade")
    assert (streamed, report.manifest.classes) == (["é"], ("é",))


def test_half_a_character_in_a_class_or_a_patient_names_its_sample(tmp_path: Path) -> None:
    path = document_in_a_tar(tmp_path, b'{"grade": "\\ud800", "fine": "LGG"}')
    with pytest.raises(BalanceError, match="sample 'P1' at byte 0"):
        list(stream(path, label="json:grade").reservoir(1))
    for label, patient in (("json:grade", None), ("json:fine", "json:grade")):
        with pytest.raises(BalanceError, match="sample 'P1' at byte 0"):
            index_shards(path, out=tmp_path / "index", label=label, patient=patient)


def test_patients_that_are_not_a_number_are_not_taken_for_one_patient(tmp_path: Path) -> None:
    details = b'{"patient": NaN, "grade": 1}'
    path = put(tmp_path, tar_of({"P1.json": details, "P2.json": details}))
    with pytest.raises(BalanceError, match="2 of 2 samples have no patient"):
        index_shards(path, out=tmp_path / "index", label="json:grade", patient="json:patient")
