"""Pooled memory: used again as soon as nobody sees it, and never a moment earlier."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.buffers import BufferPool
from streaming_balance.training.iteration import ThreadEngine
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import as_float, cohort

MANY = 1 << 30
# Parts of torch that have no types.
dlpack: Any = torch.utils.dlpack

# What a training loop may keep of a tensor: name -> from the tensor to what is kept.
KEPT: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda t: t,
    "detached": lambda t: t.detach(),
    "numpy": lambda t: t.numpy(),
    "asarray": np.asarray,
    "numpy slice": lambda t: t.numpy()[3:],
    "numpy view": lambda t: t.numpy().view(np.uint32),
    "memoryview": lambda t: t.numpy().data,
    "slice": lambda t: t[2:],
    "one element": lambda t: t[1, 1],
    "view": lambda t: t.view(-1),
    "permuted": lambda t: t.permute(1, 0),
    "expanded": lambda t: t[:1].expand(9, -1),
    "unbound rows": lambda t: t.unbind(0)[3],
    "same dtype": lambda t: t.to(torch.float32),
    "storage": lambda t: t.untyped_storage(),
    "tensor over the storage": lambda t: torch.tensor([]).set_(t.untyped_storage()),
    "dlpack to numpy": np.from_dlpack,
    "dlpack to torch": lambda t: dlpack.from_dlpack(dlpack.to_dlpack(t)),
    "dlpack capsule": dlpack.to_dlpack,
    "from the buffer protocol": lambda t: torch.frombuffer(
        t.numpy().data.cast("B"), dtype=torch.float32
    ),
    "saved for backward": lambda t: torch.ones(5, 4, requires_grad=True) @ t,
    "shared with a process": lambda t: t.share_memory_(),  # type: ignore[no-untyped-call]
    "nested": lambda t: {"batches": [(t[0],), t[1:]]},
    "parameter": lambda t: torch.nn.Parameter(t),
}


def sees_only_ones(kept: Any) -> bool:
    """Look at memory through whatever was kept of it."""
    if isinstance(kept, dict):
        return all(sees_only_ones(part) for row in kept["batches"] for part in row)
    if isinstance(kept, torch.UntypedStorage):
        kept = torch.frombuffer(bytearray(list(kept)), dtype=torch.float32)
    if isinstance(kept, tuple):
        return all(map(sees_only_ones, kept))
    if type(kept).__name__ == "PyCapsule":
        kept = dlpack.from_dlpack(kept)
    if isinstance(kept, torch.Tensor) and kept.grad_fn is not None:
        result: Any = kept
        weights = result.grad_fn.next_functions[0][0].variable
        result.sum().backward()
        kept = weights.grad / 4
    array = np.asarray(kept.detach() if isinstance(kept, torch.Tensor) else kept)
    if array.dtype == np.uint32:
        array = array.view(np.float32)
    return bool((array == 1).all()) and array.size > 0


def scribble(pool: BufferPool, times: int = 4) -> None:
    """Lend memory of the same size and write all over it."""
    lent = [pool.lend((4, 4), np.float32).fill_(7) for _ in range(times)]
    del lent


@pytest.mark.parametrize("name", KEPT)
def test_memory_that_anything_can_see_is_never_lent_again(name: str) -> None:
    pool = BufferPool(keep_bytes=MANY)
    tensor = pool.lend((4, 4), np.float32).fill_(1)
    kept = KEPT[name](tensor)
    del tensor
    for _ in range(3):
        scribble(pool)
    assert sees_only_ones(kept)


@pytest.mark.parametrize("name", KEPT)
def test_memory_is_lent_again_once_all_is_gone_without_the_garbage_collector(name: str) -> None:
    pool = BufferPool(keep_bytes=MANY)
    gc.disable()
    try:
        for _ in range(20):
            tensor = pool.lend((4, 4), np.float32)
            kept = KEPT[name](tensor)
            del tensor, kept
    finally:
        gc.enable()
    assert pool.fresh_bytes == 4096
    assert pool.free_bytes == 4096


def test_a_view_of_a_view_keeps_the_memory_after_all_links_between_are_gone() -> None:
    pool = BufferPool(keep_bytes=MANY)
    kept = np.asarray(pool.lend((4, 4), np.float32).fill_(1).detach()[1:].T.numpy()[:2])[:, 1:]
    scribble(pool)
    assert (kept == 1).all()


def test_two_lent_tensors_never_overlap() -> None:
    pool = BufferPool(keep_bytes=MANY)
    lent = [pool.lend((100,), np.float64).fill_(number) for number in range(50)]
    del lent[::2]
    lent += [pool.lend((100,), np.float64).fill_(number) for number in range(50, 75)]
    values = [sorted(set(tensor.tolist())) for tensor in lent]
    assert values == [[n] for n in [*range(1, 50, 2), *range(50, 75)]]


def test_what_was_lent_outlives_the_pool() -> None:
    pool = BufferPool(keep_bytes=MANY)
    tensor = pool.lend((1 << 20,), np.uint8).fill_(9)
    del pool
    gc.collect()
    other = torch.zeros(1 << 20, dtype=torch.uint8)
    assert (tensor == 9).all()
    assert (other == 0).all()


def test_free_memory_beyond_the_limit_goes_back_to_the_system() -> None:
    pool = BufferPool(keep_bytes=3 * 4096)
    lent = [pool.lend((4096,), np.uint8) for _ in range(8)]
    assert pool.free_bytes == 0
    del lent
    assert pool.free_bytes == 3 * 4096
    again = [pool.lend((4096,), np.uint8) for _ in range(4)]
    assert pool.fresh_bytes == (8 + 1) * 4096
    del again


@pytest.mark.parametrize("num_bytes", [1, 4095, 4097, 5000, 8191, 33_554_433, 10**8 + 1])
def test_rounding_wastes_at_most_an_eighth_above_a_page(num_bytes: int) -> None:
    pool = BufferPool(keep_bytes=0)
    tensor = pool.lend((num_bytes,), np.uint8)
    assert tensor.shape == (num_bytes,)
    assert num_bytes <= pool.fresh_bytes <= max(4096, num_bytes * 9 // 8)


def test_volumes_of_similar_shape_share_memory() -> None:
    pool = BufferPool(keep_bytes=MANY)
    for depth in range(128, 135):
        pool.lend((4, depth, 128, 128), np.int16)
    assert pool.fresh_bytes == pool.free_bytes
    assert pool.fresh_bytes == (16 + 18) << 20


def test_eight_threads_lend_and_return_every_buffer_exactly_once() -> None:
    # Each thread gives the others a chance after every line, the worst moment for an unlocked pool.
    pool = BufferPool(keep_bytes=MANY)
    overwritten: list[int] = []

    def yield_often(_frame: object, _event: str, _argument: object) -> Any:
        os.sched_yield()
        return yield_often

    def work(number: int) -> None:
        for turn in range(40):
            tensor = pool.lend((64,), np.int32).fill_(number)
            view = tensor[5:].numpy() if turn % 2 else tensor.detach()
            del tensor
            if not bool((view == number).all()):
                overwritten.append(number)
            del view

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threading.settrace(yield_often)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.settrace(None)
        sys.setswitchinterval(interval)
    assert overwritten == []
    assert pool.fresh_bytes <= 8 * 4096
    assert pool.free_bytes == pool.fresh_bytes


@pytest.mark.parametrize("closing", ["close", "collect", "keep"])
def test_batches_kept_in_every_way_hold_their_voxels_for_ever(
    small: ShardSet, closing: str
) -> None:
    images = {sample.key: sample.image for sample in cohort()}
    loader = train_loader(small, global_batch_size=4, balance="class_balanced", num_threads=2)
    ways = [
        lambda t: t,
        lambda t: t.numpy(),
        lambda t: t.detach()[:],
        lambda t: t.permute(1, 0, 2, 3, 4),
    ]
    kept = []
    for _ in range(4):
        for number, batch in enumerate(loader):
            way = number % len(ways)
            kept.append((way, ways[way](batch["image"]), batch["key"]))
            del batch
    if closing == "close":
        loader.close()
    if closing == "collect":
        del loader
        gc.collect()
    again = train_loader(small, global_batch_size=4, seed=5)
    for _ in again:
        pass
    for way, image, keys in kept:
        found = torch.as_tensor(image)
        found = found.permute(1, 0, 2, 3, 4) if way == 3 else found
        assert torch.equal(found, as_float([images[key] for key in keys]))


@pytest.mark.parametrize("num_threads", [1, 8])
def test_a_loop_that_keeps_nothing_stops_allocating(small: ShardSet, num_threads: int) -> None:
    with train_loader(
        small, global_batch_size=4, balance="class_balanced", num_threads=num_threads
    ) as loader:
        gc.disable()
        try:
            for _ in range(10):
                for _ in loader:
                    pass
            assert isinstance(loader._engine, ThreadEngine)
            warm = loader._engine.pool.fresh_bytes
            for _ in range(40):
                for _ in loader:
                    pass
        finally:
            gc.enable()
        # A reader thread may hold its last piece a moment longer than the loop holds the batch.
        assert loader._engine.pool.fresh_bytes <= warm + num_threads * 4096
