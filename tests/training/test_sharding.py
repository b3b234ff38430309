"""A second dealing to processes, or none at all, is warned of once; right set-ups hear nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader
from streaming_balance.training.samplers import BalancedBatchSampler, BalancedSampler
from tests.training.sampler_cases import BATCH, LABELS, Numbers, plain

pytestmark = [
    # Frameworks warn of this and that about their surroundings; none of it is ours.
    pytest.mark.filterwarnings("ignore"),
]

PACKAGES = ("lightning.fabric", "lightning_fabric")


class AnySampler(DistributedSampler[Any]):
    """What several libraries put around a sampler to deal out what it gives."""

    def __init__(self, sampler: Any, *, num_replicas: int) -> None:
        super().__init__(sampler, num_replicas=num_replicas, rank=0)

    def __iter__(self) -> Iterator[Any]:
        given: Any = self.dataset
        return iter(list(given)[self.rank :: self.num_replicas])


def by_index(num_replicas: int) -> DataLoader[Any]:
    """Make a loader with the sampler of indices."""
    sampler = BalancedSampler(LABELS, batch_size=BATCH, num_replicas=num_replicas, rank=0)
    return DataLoader(Numbers(), sampler=sampler, batch_size=BATCH)


def by_batch(num_replicas: int) -> DataLoader[Any]:
    """Make a loader with the sampler of batches."""
    sampler = BalancedBatchSampler(LABELS, batch_size=BATCH, num_replicas=num_replicas, rank=0)
    return DataLoader(Numbers(), batch_sampler=sampler)


def prepared(loader: DataLoader[Any], num_processes: int, **options: Any) -> Any:
    """Let Accelerate prepare a loader for the first of so many processes."""
    loading = pytest.importorskip("accelerate.data_loader", reason="Accelerate is not installed")
    return loading.prepare_data_loader(
        loader, num_processes=num_processes, process_index=0, put_on_device=False, **options
    )


def wrapped(package: str, sampler: Any, num_replicas: int) -> Any:
    """Put Lightning's sampler around one of ours, as Trainer and Fabric do."""
    module = pytest.importorskip(f"{package}.utilities.distributed", reason="no Lightning here")
    return module.DistributedSamplerWrapper(sampler, num_replicas=num_replicas, rank=0)


def batches(num_replicas: int) -> BalancedBatchSampler:
    """Make a sampler of batches."""
    return BalancedBatchSampler(LABELS, batch_size=BATCH, num_replicas=num_replicas, rank=0)


@pytest.mark.parametrize("make", [by_index, by_batch])
@pytest.mark.parametrize("split", [False, True])
def test_accelerate_around_one_rank_s_part_is_warned_of_once(
    make: Callable[[int], DataLoader[Any]], split: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loader = prepared(make(2), 2, split_batches=split)
    assert not caplog.records
    for _ in range(2):
        list(loader)
    (record,) = caplog.records
    assert record.name.startswith("streaming_balance.")
    assert "this sampler gives one of 2 ranks' part" in record.message
    assert "accelerate.data_loader.BatchSamplerShard deals that out once more" in record.message
    assert "Leave its DataLoader out of accelerator.prepare" in record.message
    assert "num_replicas=1, rank=0" in record.message


@pytest.mark.parametrize("make", [by_index, by_batch])
@pytest.mark.parametrize(("num_replicas", "num_processes"), [(1, 2), (2, 1), (1, 1)])
def test_accelerate_that_alone_deals_or_does_not_is_right(
    make: Callable[[int], DataLoader[Any]],
    num_replicas: int,
    num_processes: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert plain(prepared(make(num_replicas), num_processes))
    assert not caplog.records


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_s_wrapper_around_one_rank_s_part_is_warned_of_once(
    package: str, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = wrapped(package, batches(2), 2)
    assert not caplog.records
    for _ in range(2):
        list(DataLoader(Numbers(), sampler=sampler, batch_size=None))
    (record,) = caplog.records
    assert f"{package}.utilities.distributed.DistributedSamplerWrapper" in record.message
    assert "use_distributed_sampler=False" in record.message


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_s_wrapper_around_whole_batches_is_right(
    package: str, caplog: pytest.LogCaptureFixture
) -> None:
    for num_replicas, num_processes in ((1, 2), (2, 1)):
        list(wrapped(package, batches(num_replicas), num_processes))
    assert not caplog.records


def test_any_distributed_sampler_around_one_rank_s_part_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    list(AnySampler(batches(1), num_replicas=2))
    assert not caplog.records
    list(AnySampler(batches(2), num_replicas=2))
    assert "tests.training.test_sharding.AnySampler deals that out" in caplog.text


@pytest.mark.parametrize("make", [by_index, by_batch])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_of_one_rank_s_part_is_right(
    make: Callable[[int], DataLoader[Any]],
    kind: Any,
    workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    ours = make(2)
    place = {"sampler": ours.sampler, "batch_size": BATCH} if make is by_index else {}
    place = place or {"batch_sampler": ours.batch_sampler}
    assert len(list(kind(Numbers(), **place, num_workers=workers)))
    assert not caplog.records


class Iterated(IterableDataset[Any]):
    """Iterates a loader that was built outside."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch["sample"]


class BuiltInside(IterableDataset[Any]):
    """Builds a loader where it is iterated, dealt by worker where asked to."""

    def __init__(self, shards: ShardSet, *, by_worker: bool) -> None:
        self.shards, self.by_worker = shards, by_worker

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None
        ranks: dict[str, Any] = {}
        if self.by_worker:
            ranks = {"rank": worker.id, "num_ranks": worker.num_workers}
        with train_loader(self.shards, global_batch_size=6, num_threads=1, **ranks) as loader:
            for batch in loader:
                yield batch["sample"]


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """A file that forked processes log to as well."""
    handler = logging.FileHandler(tmp_path / "log.txt")
    logger = logging.getLogger("streaming_balance")
    logger.addHandler(handler)
    handler.setLevel(logging.WARNING)
    yield tmp_path / "log.txt"
    logger.removeHandler(handler)
    handler.close()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_loader_iterated_in_worker_processes_is_warned_of(
    small: ShardSet, workers: int, evaluates: bool, log_file: Path
) -> None:
    options: dict[str, Any] = {"rank": 0, "num_ranks": 1, "num_threads": 1}
    ours: Any = (
        eval_loader(small, split="val", batch_size=2, **options)
        if evaluates
        else train_loader(small, global_batch_size=6, **options)
    )
    with ours:
        loader = DataLoader(
            Iterated(ours), batch_size=None, num_workers=workers, multiprocessing_context="fork"
        )
        received = len(list(loader))
        # What the warning is about: everything comes once from every worker.
        assert received == workers * len(ours)
    (line,) = log_file.read_text().splitlines()
    assert "this loader is iterated in a worker process of a DataLoader" in line
    assert ("each of 2 workers delivers every batch once more" in line) == (workers == 2)
    assert "Iterate the loader itself" in line


def test_a_loader_built_in_every_worker_is_warned_of_unless_it_is_dealt_by_worker(
    small: ShardSet, log_file: Path
) -> None:
    for workers, by_worker in ((1, False), (2, True)):
        dataset = BuiltInside(small, by_worker=by_worker)
        list(DataLoader(dataset, batch_size=None, num_workers=workers))
    assert log_file.read_text() == ""
    list(DataLoader(BuiltInside(small, by_worker=False), batch_size=None, num_workers=2))
    assert "each of 2 workers delivers every batch once more" in log_file.read_text()


def test_a_loader_s_own_workers_are_right(
    small: ShardSet, log_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with train_loader(small, global_batch_size=6, workers=2) as loader:
        assert len(list(loader)) == len(loader)
    assert log_file.read_text() == ""
    assert not caplog.records


def test_a_loader_in_an_iterable_dataset_that_accelerate_deals_out_is_warned_of(
    small: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    for num_ranks, num_processes, wrong in ((1, 2, False), (2, 1, False), (2, 2, True)):
        with train_loader(small, global_batch_size=6, rank=0, num_ranks=num_ranks) as ours:
            loader = DataLoader(Iterated(ours), batch_size=1)
            list(prepared(loader, num_processes, dispatch_batches=False))
        assert bool(caplog.records) == wrong
    (record,) = caplog.records
    assert "this loader gives one of 2 ranks' part" in record.message
    assert "accelerate.data_loader.IterableDatasetShard" in record.message
    assert "num_ranks=1, rank=0" in record.message


def test_ranks_other_than_the_first_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    sampler = BalancedBatchSampler(LABELS, batch_size=BATCH, num_replicas=2, rank=1)
    list(AnySampler(sampler, num_replicas=2))
    assert not caplog.records
