"""`streaming-balance inspect -` says what a tar holds, or at which byte it is damaged."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from tests.cli.conftest import Call

PROGRAM = "import sys; from streaming_balance.cli.app import run; sys.exit(run(sys.argv[1:]))"


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """Ten samples of somebody else's, of two classes and two shapes."""
    path = tmp_path / "theirs.tar"
    with webdataset.TarWriter(str(path)) as sink:
        for number in range(10):
            image = np.zeros((4, 4) if number < 7 else (2, 3), np.int16)
            told = {"grade": "LGG" if number < 2 else "HGG"}
            sink.write({"__key__": f"k{number}", "npy": image, "json": told})
    return path


def piped(content: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    """Inspect bytes that come from standard input."""
    words = [sys.executable, "-c", PROGRAM, "inspect", "-", *options]
    return subprocess.run(words, input=content, capture_output=True, check=False)


def test_standard_input_is_told_by_samples_members_classes_and_shapes(tar: Path) -> None:
    answer = piped(tar.read_bytes(), "--label", "json:grade", "--json")
    assert answer.returncode == 0
    document = json.loads(answer.stdout)
    assert (document["ok"], document["samples"], document["problems"]) == (True, 10, [])
    assert document["classes"] == {"HGG": 8, "LGG": 2}
    assert document["without_label"] == 0
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    for name in ("npy", "json"):
        found = document["fields"][name]
        assert found["members"] == 10
        assert found["bytes"] == sum(m.size for m in members if m.name.endswith(name))
    assert document["fields"]["npy"]["shapes"] == {"int16 4x4": 7, "int16 2x3": 3}
    counts = document["counts"]
    assert counts["bytes_read"] == tar.stat().st_size
    parts = ("bytes_delivered", "bytes_skipped", "bytes_headers")
    assert counts["bytes_read"] == sum(counts[part] for part in parts)


def test_people_read_the_same(tar: Path) -> None:
    answer = piped(tar.read_bytes(), "--label", "json:grade")
    text = answer.stdout.decode()
    assert answer.returncode == 0
    assert "standard input: 10 samples" in text
    assert "int16 4x4 (7), int16 2x3 (3)" in text
    assert "classes: HGG (8), LGG (2); without a class: 0" in text


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda content: content[:3000], "byte 3072"),
        (lambda content: content[:4096], "byte 4096"),
        (lambda content: content[:148] + b"x" + content[149:], "byte 0"),
        (lambda _: b"", "byte 0"),
    ],
    ids=["cut", "cut between two samples", "a changed header", "nothing"],
)
def test_damage_ends_with_1_and_says_where(
    damage: Callable[[bytes], bytes], place: str, tar: Path
) -> None:
    answer = piped(damage(tar.read_bytes()), "--label", "json:grade", "--json")
    assert answer.returncode == 1
    document = json.loads(answer.stdout)
    assert not document["ok"]
    (problem,) = document["problems"]
    assert place in problem["reason"]
    assert problem["url"] == "<standard input>"
    told = piped(damage(tar.read_bytes()))
    assert told.returncode == 1
    assert problem["reason"].split(";")[0] in told.stdout.decode()


def test_files_patterns_and_compressed_tars_are_inspected_too(
    call: Call, tar: Path, tmp_path: Path
) -> None:
    expected = call("inspect", tar, "--json").document["fields"]
    zipped = tmp_path / "theirs.tar.gz"
    zipped.write_bytes(gzip.compress(tar.read_bytes()))
    for source in (zipped, tmp_path / "*.tar", f"pipe:cat {tar}"):
        answer = call("inspect", source, "--allow-pipe", "--json")
        assert answer.status == 0
        assert answer.document["fields"] == expected
    refused = call("inspect", f"pipe:cat {tar}")
    assert refused.status == 2
    assert "would start a program" in refused.err


def test_a_packed_data_set_is_inspected_as_before_and_its_tars_are_tars(
    call: Call, packed_cohort: Path
) -> None:
    folder = call("inspect", packed_cohort, "--json").document
    tars = call("inspect", f"{packed_cohort}/train-*.tar", "--json").document
    assert tars["samples"] == folder["splits"]["train"]["samples"] == 19
    assert tars["classes"] == {"0": 14, "1": 5} or tars["classes"] == {"1": 14, "0": 5}
    assert tars["fields"]["image.npb"]["shapes"] == {"int16 4x8x8x8": 19}


def test_a_tar_that_is_not_there_and_a_folder_that_is_not_there_are_told_apart(
    call: Call, tmp_path: Path
) -> None:
    missing = call("inspect", tmp_path / "no.tar", "--json")
    assert missing.status == 1
    assert "no.tar cannot be opened" in missing.document["problems"][0]["reason"]
    assert "is not a folder" in call("inspect", tmp_path / "no").err


def test_samples_without_a_class_and_arrays_of_other_kinds_are_counted_not_damage(
    call: Call, tmp_path: Path
) -> None:
    def stored(array: Any) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    with webdataset.TarWriter(str(tmp_path / "odd.tar")) as sink:
        turned = stored(np.asfortranarray(np.zeros((2, 3))))
        sink.write({"__key__": "P1", "npy": turned, "cls": 1})
        sink.write({"__key__": "P2", "npy": b"no array"})
        sink.write({"__key__": "P3", "npy": stored(np.float32(1))})
    document = call("inspect", tmp_path / "odd.tar", "--json").document
    assert (document["ok"], document["samples"], document["without_label"]) == (True, 3, 2)
    assert document["classes"] == {"1": 1}
    assert document["fields"]["npy"]["unread_headers"] == 2
    assert document["fields"]["npy"]["shapes"] == {"float32 scalar": 1}


def test_shapes_of_volumes_are_known_without_reading_them(tmp_path: Path) -> None:
    big = tmp_path / "big.tar"
    with webdataset.TarWriter(str(big)) as sink:
        sink.write({"__key__": "P1", "npy": np.zeros((64, 64, 64), np.float32), "cls": 1})
    program = (
        "import os, sys\n"
        "read = 0\n"
        "pread = os.pread\n"
        "def counted(*args):\n"
        "    global read\n"
        "    found = pread(*args)\n"
        "    read += len(found)\n"
        "    return found\n"
        "os.pread = counted\n"
        "from streaming_balance.stream.inspecting import inspect_tars\n"
        "summary = inspect_tars(sys.argv[1])\n"
        "print(read, dict(summary.fields['npy'].shapes))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, big], capture_output=True, text=True, check=True
    )
    read, _, shapes = answer.stdout.strip().partition(" ")
    assert shapes == "{'float32 64x64x64': 1}"
    assert int(read) < 64_000 < big.stat().st_size
