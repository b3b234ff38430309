"""Streams as torch knows them: datasets under ranks and workers, nodes, loaders that are saved."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torchdata.nodes
from torch.utils.data import DataLoader

import streaming_balance as sb
from streaming_balance.errors import BalanceError, ConfigError
from streaming_balance.stream.nodes import StreamDataset
from streaming_balance.stream.pipeline import Stream
from tests.stream.test_pipeline import write_tar

# torchdata 0.11 calls what newer releases of torch would rather not have called, and torch warns of
# more processes than processors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]
EVERYBODY = [f"P{n:02d}" for n in range(24)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples in three tars."""
    folder = tmp_path_factory.mktemp("nodes")
    for number in range(3):
        names = EVERYBODY[number * 8 : number * 8 + 8]
        write_tar(folder / f"s-{number}.tar", [(key, "HGG") for key in names])
    return folder


def stream_of(shards: Path) -> Stream:
    """Stream all tars, shuffled."""
    return sb.stream(f"{shards}/s-*.tar", seed=3).shuffle(30_000)


def plain(loader: Any, count: int | None = None) -> list[Any]:
    """Give the keys of what a loader gives, at most `count` of them."""
    return [item["__key__"] for item in itertools.islice(iter(loader), count)]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_a_dataloader_gives_every_sample_once_whatever_the_workers(
    shards: Path, workers: int
) -> None:
    loader = DataLoader(stream_of(shards).to_dataset(), batch_size=None, num_workers=workers)
    assert sorted(plain(loader)) == EVERYBODY


def test_ranks_and_workers_together_give_every_sample_once(shards: Path) -> None:
    got = []
    for rank in range(2):
        dataset = StreamDataset(stream_of(shards), rank=rank, num_ranks=2)
        got += plain(DataLoader(dataset, batch_size=None, num_workers=2))
    assert sorted(got) == EVERYBODY


@pytest.mark.parametrize("workers", [0, 2])
def test_every_rank_has_the_steps_that_were_asked_for(shards: Path, workers: int) -> None:
    for rank in range(3):
        loader = stream_of(shards).to_loader(
            batch_size=2, rank=rank, num_ranks=3, steps=7, num_workers=workers
        )
        # 8 samples are 4 batches: it goes on into the next pass.
        for _ in range(2):
            assert len(plain(loader)) == 7


def test_ranks_without_steps_are_refused_with_the_reason(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 ranks .* collectives would hang.*steps="):
        stream_of(shards).to_loader(batch_size=2, rank=0, num_ranks=2)
    with pytest.raises(ConfigError, match="steps is 0"):
        stream_of(shards).to_loader(batch_size=2, rank=0, num_ranks=2, steps=0)
    with pytest.raises(ConfigError, match="rank is 2"):
        stream_of(shards).to_loader(batch_size=2, rank=2, num_ranks=2, steps=1)


def test_a_part_that_gives_nothing_is_an_error_and_no_endless_loop(shards: Path) -> None:
    nobody = sb.stream(f"{shards}/s-*.tar").accept({"0": 0, "1": 1}, unknown="drop")
    with pytest.raises(BalanceError, match="nothing went on"):
        list(nobody.to_loader(rank=0, num_ranks=2, steps=3))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_saved_loader_goes_on_exactly(shards: Path, workers: int) -> None:
    def loader() -> Any:
        return stream_of(shards).to_loader(batch_size=2, num_workers=workers)

    straight = plain(loader())
    for stop in (0, 1, 5, 11):
        left = loader()
        iterator = iter(left)
        got = [next(iterator)["__key__"] for _ in range(stop)]
        state = left.state_dict()
        resumed = loader()
        resumed.load_state_dict(state)
        assert got + plain(resumed) == straight


def test_a_node_of_torchdata_gives_pass_after_pass_and_is_saved(shards: Path) -> None:
    def node() -> Any:
        return torchdata.nodes.Loader(stream_of(shards).to_node())

    stream = stream_of(shards)
    straight = [[item["__key__"] for item in stream] for _ in range(2)]
    loader = node()
    assert [plain(loader), plain(loader)] == straight
    left = node()
    iterator = iter(left)
    got = [next(iterator)["__key__"] for _ in range(9)]
    state = json.loads(json.dumps(left.state_dict()))
    resumed = node()
    resumed.load_state_dict(state)
    assert got + plain(resumed) == straight[0]
    assert plain(resumed) == straight[1]
