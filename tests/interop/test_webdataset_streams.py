"""Stages inside webdataset's pipelines, and webdataset's shards inside ours."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

import streaming_balance as sb
from streaming_balance.ingest.index_builder import IndexBuilder
from streaming_balance.stream.accept import Accept

# webdataset leaves files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PROJECT_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 samples of class 0 and 10 of class 1, written by webdataset."""
    folder = tmp_path_factory.mktemp("webdataset")
    with webdataset.ShardWriter(f"{folder}/w-%02d.tar", maxcount=9, verbose=0) as writer:
        for number in range(40):
            volume = np.full((2, 3), number, np.int16)
            writer.write({"__key__": f"P{number:02d}", "cls": number % 4 // 3, "npy": volume})
    return f"{folder}/w-{{00..04}}.tar"


def theirs(shards: str) -> Any:
    """Read with webdataset."""
    return webdataset.WebDataset(shards, shardshuffle=False)


def test_shards_of_webdataset_stream_sample_by_sample(shards: str) -> None:
    ours = list(sb.stream(shards).decode())
    for mine, other in zip(ours, theirs(shards).decode(), strict=True):
        assert mine["__key__"] == other["__key__"]
        assert mine["cls"] == other["cls"]
        np.testing.assert_array_equal(mine["npy"], other["npy"])


@pytest.mark.parametrize("decode_first", [False, True])
def test_a_chain_thins_out_inside_a_pipeline_of_webdataset(shards: str, decode_first: bool) -> None:
    chain = sb.stream([]).accept({0: 1, 1: 1}, frequencies={0: 30, 1: 10})
    pipeline = theirs(shards).decode() if decode_first else theirs(shards)
    counts = Counter(int(sample["cls"]) for sample in pipeline.compose(chain))
    assert counts == {0: 10, 1: 10}
    # The same ones go on as from our own stream with that chain.
    alone = sb.stream(shards).accept({0: 1, 1: 1}, frequencies={0: 30, 1: 10})
    chain = sb.stream([]).accept({0: 1, 1: 1}, frequencies={0: 30, 1: 10})
    assert [s["__key__"] for s in theirs(shards).compose(chain)] == [s["__key__"] for s in alone]


def test_quota_batches_and_decoding_work_inside_a_pipeline_too(shards: str) -> None:
    chain = sb.stream([]).replay({0: 1, 1: 1}, batch_size=4, buffer_bytes=1 << 20).decode()
    batches = list(theirs(shards).compose(chain))
    assert batches[-1]["npy"].shape == (4, 2, 3)
    assert sorted(batches[-1]["cls"].tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("stop", [1, 3, None])
def test_a_chain_inside_a_pipeline_counts_what_passed_through_it(
    shards: str, stop: int | None
) -> None:
    chain = sb.stream([]).repeat({0: 1, 1: 1}, frequencies={0: 30, 1: 10}).decode().batch(4)
    delivered = 0
    for batch in itertools.islice(theirs(shards).compose(chain), stop):
        delivered += len(batch["__key__"])
        totals = chain.stats()["totals"]
        assert totals["delivered"] == delivered
        gone = totals["delivered"] + totals["rejected"] + totals["buffered"]
        assert totals["read"] + totals["copies"] == gone
    if stop is None:
        assert (totals["read"], totals["copies"], delivered) == (40, 20, 60)
        classes = chain.stats()["stages"][0]["classes"]
        assert [found["realised_share"] for found in classes.values()] == [0.5, 0.5]


def test_a_stage_alone_takes_any_iterable() -> None:
    samples = [{"__key__": f"P{n}", "cls": str(n % 4 // 3).encode()} for n in range(40)]
    chain = sb.stream([]).accept({"0": 1, "1": 1}, frequencies={"0": 3, "1": 1})
    assert Counter(sample["cls"] for sample in chain(samples)) == {b"0": 10, b"1": 10}
    assert Accept({"0": 1, "1": 1}, frequencies={"0": 3, "1": 1}) == chain.recipe.stages[0]


def test_our_shards_are_decoded_by_webdataset_and_by_our_stream_alike() -> None:
    tar = next((PROJECT_ROOT / "shards" / "demo").glob("train-*.tar"))
    ours = list(sb.stream(tar).decode())
    others = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode(sb.decode))
    for mine, other in zip(ours, others, strict=True):
        np.testing.assert_array_equal(mine["image.npb"], other["image.npb"])
        assert (mine["__key__"], mine["cls"]) == (other["__key__"], other["cls"])


def test_a_stream_writes_the_index_that_makes_its_second_pass_exact(
    shards: str, tmp_path: Path
) -> None:
    chain = sb.stream(shards)
    with IndexBuilder(tmp_path / "left") as builder:
        next(iter(chain.tee(builder)))
    assert not list((tmp_path / "left").glob("*.json"))
    with IndexBuilder(tmp_path / "index") as builder:
        list(chain.tee(builder).accept({0: 1, 1: 1}))
    indexed = sb.open_shards(tmp_path / "index")
    assert sorted(indexed.keys("train")) == [f"P{number:02d}" for number in range(40)]
    for number, key in enumerate(indexed.keys("train")):
        volume = indexed.read("train", number)["image"]
        assert volume.tolist() == np.full((2, 3), int(key[1:])).tolist()
