"""The manifest says back what was written, and says so when it cannot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage import manifest as module
from streaming_balance.storage.layout import MANIFEST_NAME
from streaming_balance.storage.manifest import (
    Manifest,
    Rejected,
    manifest_text,
    parse_manifest,
    read_manifest,
    settings_digest,
)
from tests.building import pack, random_samples

PATH = Path("cohort/manifest.json")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The manifest of a small data set of two splits."""
    folder = tmp_path_factory.mktemp("cohort")
    return pack(folder, random_samples(5) + random_samples(2, split="val"), shard_bytes=4096)


def rewritten(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Change a manifest's JSON and make its checksum right again."""
    body = json.loads(manifest_text(manifest))
    del body["checksum"]
    change(body)
    text = json.dumps(body, separators=(",", ":"))
    body["checksum"] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return json.dumps(body).encode()


def test_a_manifest_says_back_what_was_written(manifest: Manifest) -> None:
    rejected = Rejected(patient="P9", path="P9/flair.nii.gz", reason="cut short")
    full = replace(manifest, rejected=(rejected,), found=8)
    assert parse_manifest(manifest_text(full).encode(), PATH) == full


def test_a_manifest_is_plain_json_that_says_what_to_read(manifest: Manifest) -> None:
    body = json.loads(manifest_text(manifest))
    assert (body["format"], body["version"], body["needs"]) == ("streaming-balance", 1, "0.1")
    assert body["splits"] == {
        "train": {"samples": 5, "patients": 5},
        "val": {"samples": 2, "patients": 2},
    }
    assert body["classes"] == ["HGG", "LGG"]
    assert body["shards"][0]["name"] == "train-000000.tar"


def test_a_newer_version_names_the_release_it_needs(manifest: Manifest) -> None:
    def bump(body: dict[str, Any]) -> None:
        body.update(version=2, needs="0.9")

    with pytest.raises(ShardError, match=r"version 2.*needs streaming-balance >= 0\.9"):
        parse_manifest(rewritten(manifest, bump), PATH)


def test_a_newer_version_is_recognised_before_its_checksum(manifest: Manifest) -> None:
    text = manifest_text(manifest).replace('"version": 1', '"version": 7')
    with pytest.raises(ShardError, match=r"version 7.*needs streaming-balance >= 0\.1"):
        parse_manifest(text.encode(), PATH)


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        (b"", "not whole JSON"),
        (b'{"format": ', "not whole JSON"),
        (b"\xff\xfe", "not whole JSON"),
        (b"[" * 100_000, "not whole JSON"),
        (b"[]", "not a streaming-balance manifest"),
        (b'{"format": "zip"}', "not a streaming-balance manifest"),
        (b'{"format": "streaming-balance", "version": 1}', "its checksum is None"),
    ],
)
def test_bytes_that_are_no_manifest_are_refused(stored: bytes, problem: str) -> None:
    with pytest.raises(ShardError, match=problem) as caught:
        parse_manifest(stored, PATH)
    assert "cohort/manifest.json" in str(caught.value)


def test_a_changed_digit_shows_in_the_checksum(manifest: Manifest) -> None:
    text = manifest_text(manifest).replace('"samples": 5', '"samples": 4', 1)
    with pytest.raises(ShardError, match=r"is damaged: its checksum.*--overwrite"):
        parse_manifest(text.encode(), PATH)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing name": (lambda body: body.pop("digest"), "unknown or missing names.*digest"),
    "unknown name": (lambda body: body.update(extra=1), "unknown or missing names.*extra"),
    "text for a count": (lambda body: body.update(found="8"), "'8' is no count"),
    "truth for a count": (lambda body: body.update(found=True), "True is no count"),
    "negative count": (lambda body: body.update(found=-1), "-1 is no count"),
    "number for text": (lambda body: body.update(codec=1), "1 is no text"),
    "text for a list": (lambda body: body.update(classes="HGG"), "'HGG' is no list"),
    "list for a mapping": (lambda body: body.update(settings=[1]), "does not follow"),
    "split without samples": (lambda body: body["splits"]["val"].pop("samples"), "'samples'"),
    "counts disagree": (
        lambda body: body["splits"]["val"].update(samples=3),
        "different numbers of samples",
    ),
    "shard of no split": (lambda body: body["shards"][0].update(split="x"), "not listed"),
    "train split of no split": (lambda body: body.update(train_splits=["x"]), "not listed"),
    "shard twice": (
        lambda body: body["shards"][1].update(name=body["shards"][0]["name"]),
        "listed twice",
    ),
    "shard elsewhere": (lambda body: body["shards"][0].update(name="../x.tar"), "leads out"),
    "table elsewhere": (lambda body: body["table"].update(name=".."), "leads out"),
    "no block": (lambda body: body["table"].update(block_ends=[]), "do not make 0 blocks"),
    "empty blocks": (lambda body: body["table"].update(block_rows=0), "do not make"),
    "block without a hash": (lambda body: body["table"].update(block_xxh3=[]), "do not follow"),
    "block beyond the file": (lambda body: body["table"].update(block_ends=[7]), "do not end"),
    "no rows": (
        lambda body: (
            body["table"].update(rows=0, block_ends=[], block_xxh3=[]),
            body.update(shards=[], splits={}, train_splits=[]),
        ),
        "no samples",
    ),
    "other rejected": (lambda body: body.update(rejected=[{"x": "y"}]), "does not follow"),
}


@pytest.mark.parametrize(("change", "problem"), WRONG.values(), ids=WRONG)
def test_a_manifest_that_breaks_the_format_is_refused(
    manifest: Manifest, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    with pytest.raises(ShardError, match=problem):
        parse_manifest(rewritten(manifest, change), PATH)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="absent is not a folder"):
        read_manifest(tmp_path / "absent")


def test_an_empty_folder_is_not_a_data_set(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    with pytest.raises(ShardError, match=r"not a data set.*streaming-balance pack"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("train-000000.tar", ".train-000000.tar.tmp", "samples.arrow", ".pack.lock"),
        *(".journal-train-000000.json", ".manifest.json.tmp"),
    ],
)
def test_a_folder_with_traces_of_a_pack_is_an_unfinished_pack(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ShardError, match=r"unfinished pack\. Run the same pack command again"):
        read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(ShardError, match=r"manifest\.json cannot be read: Is a directory"):
        read_manifest(tmp_path)


def test_a_file_too_large_for_a_manifest_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_MANIFEST_BYTES", 1000)
    (tmp_path / MANIFEST_NAME).write_bytes(b" " * 1001)
    with pytest.raises(ShardError, match="more than 1,000 bytes"):
        read_manifest(tmp_path)


def test_settings_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="plain JSON"):
        settings_digest({"size": float("nan")})
