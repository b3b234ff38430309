"""Readers that share a stream: together all of it, nothing twice, whatever their number."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streaming_balance as sb
from streaming_balance.errors import ConfigError
from streaming_balance.stream.dealing import Part
from tests.stream.test_pipeline import shards, stream_of, write_tar

__all__ = ["shards"]  # a fixture that both files use
VOLUME = 32**3 * 8


def test_parts_of_parts_are_all_different_and_cover_everything() -> None:
    readers = [Part(number=rank, count=3).of(worker, 4) for rank in range(3) for worker in range(4)]
    assert sorted(reader.number for reader in readers) == list(range(12))
    assert {reader.count for reader in readers} == {12}


@pytest.mark.parametrize("readers", [2, 5])
def test_every_pass_is_shared_whole_when_shards_are_shuffled(shards: Path, readers: int) -> None:
    parts = [stream_of(shards).shuffle(30_000).share(number, readers) for number in range(readers)]
    for _ in range(3):
        got = Counter(item["__key__"] for part in parts for item in part)
        assert got == Counter(f"P{n:02d}" for n in range(24))


def test_volumes_dealt_sample_by_sample_are_read_once_over_all_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "s-0.tar", [(f"P{n:02d}", "HGG") for n in range(12)], side=32)
    total = [0]

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            got = read(*arguments)
            total[0] += got if isinstance(got, int) else len(got)
            return got

        return call

    monkeypatch.setattr(os, "pread", counted(os.pread))
    monkeypatch.setattr(os, "preadv", counted(os.preadv))
    parts = [stream_of(tmp_path).share(number, 4) for number in range(4)]
    assert [len(list(part)) for part in parts] == [3, 3, 3, 3]
    assert 12 * VOLUME < total[0] < 13 * VOLUME
    for part in parts:
        totals = part.stats()["totals"]
        assert (totals["read"], totals["left_to_others"]) == (3, 9)


def test_samples_of_a_compressed_tar_are_not_dealt(shards: Path, tmp_path: Path) -> None:
    packed = tmp_path / "s-0.tar.gz"
    packed.write_bytes(gzip.compress((shards / "s-0.tar").read_bytes(), 1))
    with pytest.raises(ConfigError, match=r"s-0\.tar\.gz.*Use at most 1 readers"):
        list(sb.stream(packed).share(0, 2))


def test_reservoirs_of_parts_choose_by_one_key_and_shuffles_by_their_own(shards: Path) -> None:
    whole = stream_of(shards).reservoir({"HGG": 4, "LGG": 4})
    kept = {item["__key__"] for item in whole}
    parts = [stream_of(shards).reservoir({"HGG": 4, "LGG": 4}).share(n, 2) for n in range(2)]
    of_parts = {item["__key__"] for part in parts for item in part}
    assert kept < of_parts
    seeds = {
        stage.seed
        for number in range(2)
        for stage in stream_of(shards).shuffle().share(number, 2).recipe.begin_stages(0)
    }
    assert len(seeds) == 2


@pytest.mark.parametrize(("number", "count"), [(2, 2), (-1, 2), (0, 0), (True, 2), (0.0, 1)])
def test_a_reader_that_does_not_exist_is_refused(number: Any, count: Any) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Part(number=number, count=count)
