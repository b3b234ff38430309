"""Pinned memory and copies to the device; everything here needs a CUDA device."""

from __future__ import annotations

import os

import pytest
import torch

from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.buffers import BufferPool
from streaming_balance.training.loader import train_loader
from tests.building import by_key
from tests.training.cohorts import as_float, cohort

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_batches_are_pinned_where_a_device_is(small: ShardSet) -> None:
    with train_loader(small, global_batch_size=4) as loader:
        assert all(batch["image"].is_pinned() for batch in loader)


def test_batches_come_on_the_device_asked_for_with_the_packed_voxels(small: ShardSet) -> None:
    images = by_key(cohort())
    with train_loader(small, global_batch_size=4, device="cuda") as loader:
        for _ in range(20):
            for batch in loader:
                assert batch["image"].is_cuda
                assert batch["label"].is_cuda
                wanted = as_float([images[key].image for key in batch["key"]])
                assert torch.equal(batch["image"].cpu(), wanted)


@pytest.mark.parametrize("part", [slice(None), slice(1, None), slice(2, 3)])
def test_pinned_memory_is_used_again_only_after_copies_of_any_slice_have_ended(part: slice) -> None:
    pool = BufferPool(keep_bytes=0, pinned=True)
    busy = torch.randn(4096, 4096, device="cuda")
    copies = []
    for number in range(12):
        # Work that keeps the stream busy, so that the copies are still to come.
        for _ in range(8):
            busy = torch.nn.functional.normalize(busy @ busy)
        memory = pool.lend((4, 1 << 20), "float32")
        memory.fill_(number)
        copies.append(memory[part].to("cuda", non_blocking=True))
        del memory
    torch.cuda.synchronize()
    assert [copy.min().item() for copy in copies] == list(range(12))
    assert [copy.max().item() for copy in copies] == list(range(12))


def test_a_child_forked_after_cuda_began_says_what_is_wrong_or_iterates(small: ShardSet) -> None:
    torch.zeros(1, device="cuda")
    with train_loader(small, global_batch_size=4) as loader:
        next(iter(loader))
        child = os.fork()
        if not child:
            os._exit(0 if len(list(loader)) else 1)
        assert os.waitpid(child, 0)[1] == 0
