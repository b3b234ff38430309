"""Streams as torch knows them: datasets under ranks and workers, nodes, loaders that are saved."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torchdata.nodes
from torch.utils.data import DataLoader

import streaming_balance as sb
from streaming_balance.errors import BalanceError, ConfigError, ResumeError
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


def loader_of(shards: Path, workers: int, **options: Any) -> Any:
    """Load shuffled batches of two."""
    return stream_of(shards).to_loader(2, num_workers=workers, **options)


def epochs_of(loader: Any, count: int) -> list[list[Any]]:
    """Give the keys of some epochs."""
    return [plain(loader) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_of_a_loader_is_whole_and_in_another_order(shards: Path, workers: int) -> None:
    epochs = epochs_of(loader_of(shards, workers), 3)
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == EVERYBODY
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_left_by_break_goes_on_where_the_loop_stopped(shards: Path, workers: int) -> None:
    straight = epochs_of(loader_of(shards, workers), 2)
    loader = loader_of(shards, workers)
    for stop in (3, 1):
        got = plain(loader, stop) + plain(loader, 4) + plain(loader)
        assert got == straight.pop(0)


@pytest.mark.parametrize("steps", [None, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_saved_at_any_step_of_two_epochs_goes_on_exactly(
    shards: Path, workers: int, steps: int | None
) -> None:
    straight = epochs_of(loader_of(shards, workers, steps=steps), 3)
    first, second = len(straight[0]), len(straight[1])
    # Every step without workers; with them, those at which something begins or ends.
    stops = range(first + second + 1) if not workers else [0, 1, first - 1, first, first + 2]
    for stop in stops:
        left = loader_of(shards, workers, steps=steps)
        epoch = 0
        if stop > first:
            plain(left)
            epoch, stop = 1, stop - first
        got = plain(left, stop)
        resumed = loader_of(shards, workers, steps=steps)
        resumed.load_state_dict(json.loads(json.dumps(left.state_dict())))
        assert got + plain(resumed) == straight[epoch]
        assert plain(resumed) == straight[epoch + 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_saved_between_two_epochs_begins_the_next_one(shards: Path, workers: int) -> None:
    straight = epochs_of(loader_of(shards, workers), 2)
    left = loader_of(shards, workers)
    plain(left)
    resumed = loader_of(shards, workers)
    resumed.load_state_dict(left.state_dict())
    assert plain(resumed) == straight[1]


def test_with_steps_all_batches_are_full_and_passes_follow_each_other(shards: Path) -> None:
    loader = sb.stream(f"{shards}/s-*.tar").to_loader(5, rank=0, num_ranks=2, steps=9)
    got = list(itertools.chain(*plain(loader)))
    own = EVERYBODY[:8] + EVERYBODY[16:]
    assert got == (own * 3)[:45]


def test_rings_and_counts_of_workers_go_on_from_epoch_to_epoch(shards: Path) -> None:
    def replay(workers: int) -> Any:
        chain = sb.stream(f"{shards}/s-*.tar").replay({"0": 1}, batch_size=7, buffer_bytes=1 << 20)
        return chain.to_loader(num_workers=workers)

    # A reader of 8 samples gives a batch of 7 and keeps 1; 7 passes are worth 8 batches.
    assert [len(plain(loader, None)) for loader in [replay(3)] for _ in range(7)] == [
        *(3, 3, 3, 3, 3, 3),
        6,
    ]


def test_workers_that_would_never_read_are_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match="Use at most 1 workers"):
        stream_of(shards).to_loader(2, num_workers=2, steps=1)
    dataset = stream_of(shards).to_dataset(steps=1)
    with pytest.raises(ConfigError, match="Use at most 1 workers"):
        plain(DataLoader(dataset, batch_size=None, num_workers=2))


def test_a_state_of_other_steps_or_workers_is_refused(shards: Path) -> None:
    saved = loader_of(shards, 0, steps=5)
    plain(saved, 2)
    other = loader_of(shards, 0, steps=6)
    other.load_state_dict(saved.state_dict())
    with pytest.raises(ResumeError, match="5 steps in an epoch, the loader 6"):
        plain(other)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(0, 2), (2, 0), (2, 1)])
def test_a_state_of_other_workers_is_refused_before_anything_is_read(
    shards: Path, saved_by: int, loaded_by: int
) -> None:
    with loader_of(shards, saved_by, steps=5) as saved:
        plain(saved, 2)
        state = saved.state_dict()
    other = loader_of(shards, loaded_by, steps=5)
    with pytest.raises(ResumeError, match=f"{saved_by} workers, this one has {loaded_by}"):
        other.load_state_dict(state)


def test_what_is_no_state_of_a_loader_is_refused(shards: Path) -> None:
    loader = loader_of(shards, 0)
    chain = stream_of(shards)
    for state in ({}, {"_snapshot": None}, chain.state_dict(), None):
        with pytest.raises(ResumeError, match="no state of a stream's loader"):
            loader.load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_function_that_fails_in_a_loader_gets_its_sample_again(
    shards: Path, tmp_path: Path, workers: int
) -> None:
    def flaky(sample: dict[str, Any]) -> dict[str, Any]:
        mark = tmp_path / sample["__key__"]
        if sample["__key__"] == "P05" and not mark.exists():
            mark.touch()
            raise ValueError("no atlas")
        return sample

    got: list[str] = []
    with stream_of(shards).map(flaky).to_loader(2, num_workers=workers) as loader:
        with pytest.raises(ValueError, match="no atlas"):
            got.extend(key for batch in loader for key in batch["__key__"])
        got.extend(key for batch in loader for key in batch["__key__"])
    assert sorted(got) == EVERYBODY


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_loader_tells_the_shares_that_all_its_workers_realised(
    tmp_path: Path, workers: int
) -> None:
    for shard in range(4):
        grades = [(f"P{shard}{n}", "LGG" if n % 4 == 0 else "HGG") for n in range(8)]
        write_tar(tmp_path / f"s-{shard}.tar", grades)
    chain = sb.stream(f"{tmp_path}/s-*.tar", seed=7).accept(
        {"0": 1, "1": 1}, frequencies={"0": 3, "1": 1}
    )
    with chain.to_loader(2, num_workers=workers) as loader:
        before = loader.stats()
        assert before["totals"]["read"] == before["classes"]["0"]["read"] == 0
        got: Counter[str] = Counter()
        for batch in loader:
            got.update(batch["__label__"])
            told = loader.stats()
            counts = told["totals"]
            assert counts["read"] == counts["delivered"] + counts["rejected"] + counts["buffered"]
            assert counts["delivered"] >= got.total()
        told, saved = loader.stats(), loader.state_dict()
    assert len(told["readers"]) == max(1, workers)
    assert told["totals"]["read"] == 32
    assert {label: told["classes"][label]["delivered"] for label in "01"} == got
    assert [told["classes"][label]["read"] for label in "01"] == [24, 8]
    assert [told["classes"][label]["wanted_share"] for label in "01"] == [0.5, 0.5]
    shares = [told["classes"][label]["realised_share"] for label in "01"]
    assert shares == [got["0"] / got.total(), got["1"] / got.total()]
    resumed = chain.to_loader(2, num_workers=workers)
    assert resumed.stats() == before
    resumed.load_state_dict(saved)
    assert resumed.stats()["classes"] == told["classes"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_loader_has_no_workers_and_goes_on_with_new_ones(
    shards: Path, workers: int, children: Callable[[], list[psutil.Process]]
) -> None:
    whole = plain(loader_of(shards, workers), 20)
    with loader_of(shards, workers) as loader:
        got = plain(loader, 5)
        assert len(children()) >= workers
    assert not children()
    got += plain(loader)
    loader.close()
    loader.close()
    assert got == whole[:12]
    assert not children()


def test_a_plain_dataloader_takes_the_pass_it_is_told(shards: Path) -> None:
    dataset = stream_of(shards).to_dataset()
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        orders.append(plain(loader))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == EVERYBODY


def test_ranks_are_those_of_the_environment(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert plain(sb.stream(f"{shards}/s-*.tar").to_dataset()) == EVERYBODY[8:16]
    monkeypatch.setenv("WORLD_SIZE", "three")
    with pytest.raises(ConfigError, match="WORLD_SIZE='three'; it must be a number"):
        stream_of(shards).to_dataset()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match="num_ranks is None"):
        stream_of(shards).to_dataset()


def test_a_node_left_early_begins_its_pass_again_and_is_saved_at_every_step(shards: Path) -> None:
    straight = [[item["__key__"] for item in stream] for stream in [stream_of(shards)] * 3]
    loader = torchdata.nodes.Loader(stream_of(shards).to_node())
    assert plain(loader, 5) == straight[0][:5]
    assert epochs_of(loader, 2) == straight[:2]
    for stop in range(25):
        node = torchdata.nodes.Loader(stream_of(shards).to_node())
        plain(node)
        got = plain(node, stop)
        resumed = torchdata.nodes.Loader(stream_of(shards).to_node())
        resumed.load_state_dict(json.loads(json.dumps(node.state_dict())))
        if stop < 24:
            assert got + plain(resumed) == straight[1]
        # A loader of nodes that was saved at the end of a pass begins the next one.
        assert plain(resumed) == straight[2]


def test_batches_come_as_tensors_of_what_was_stored(shards: Path) -> None:
    batch = next(iter(sb.stream(f"{shards}/s-*.tar").decode().to_loader(4)))
    assert batch["image.npy"].shape == (4, 8, 8, 8)
    assert batch["image.npy"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert (batch["cls"].tolist(), batch["__key__"]) == ([0] * 4, EVERYBODY[:4])
