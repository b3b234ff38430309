"""Batch memory that is used again, and never while anybody can still see it.

Reading into fresh memory costs a page fault per 4 KiB, more than the reading itself. So batches
live in pooled memory. Who may see a lent buffer is not ours to know: `.detach()`, `.numpy()`, views
and slices all outlive the tensor object that was handed out. What they share is the storage, and
the storage holds the one array it was made from. When that array dies, and not before, the memory
returns to the pool.

With CUDA the memory is pinned and comes from torch's caching host allocator, which does the same
and also waits for copies to the device that are still under way.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

# Sizes are rounded up to eighths of a power of two, so that volumes of similar shape share memory.
STEPS_PER_DOUBLING = 8
SMALLEST_BYTES = 4096


class BufferPool:
    """Lends tensors over memory that is used again once every view of it is gone.

    Args:
        keep_bytes: most free memory kept for later, in bytes; more is given back to the system,
            but two buffers of any size are kept, or large batches would never be warm.
        pinned: take pinned memory from torch's caching host allocator instead.
    """

    def __init__(self, *, keep_bytes: int, pinned: bool = False) -> None:
        self._keep_bytes, self._pinned = keep_bytes, pinned
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._free_bytes = 0
        # Reader threads lend too, for samples that are transformed.
        self._lock = threading.Lock()
        # Buffers come home from garbage collection, in any thread at any moment, so that the way
        # back must not lock: `SimpleQueue.put` is safe there.
        self._returned: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        self.fresh_bytes = 0
        """Bytes ever allocated: stops growing once the pool is warm."""

    def lend(self, shape: Sequence[int], dtype: DTypeLike) -> torch.Tensor:
        """Give a tensor of undefined content.

        Args:
            shape: its shape.
            dtype: its numpy dtype.

        Returns:
            A contiguous CPU tensor; nobody else sees its memory until all its views are gone.
        """
        kind = np.dtype(dtype)
        wanted = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if self._pinned:
            # Torch's own storage, not an array around it: only there does a copy of a slice to the
            # device find the block that it must keep from being used again.
            element = torch.from_numpy(np.empty(0, kind)).dtype
            return torch.empty(tuple(shape), dtype=element, pin_memory=True)
        memory = self._take(_rounded(wanted))
        lent = memory[:wanted].view(kind).reshape(tuple(shape))
        # The storage of the tensor keeps `lent`, and nothing else does.
        weakref.finalize(lent, self._returned.put, memory).atexit = False
        return torch.from_numpy(lent)

    @property
    def free_bytes(self) -> int:
        """Bytes that wait to be lent again."""
        with self._lock:
            self._collect()
            return self._free_bytes

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Give memory of this size: used before if there is any."""
        with self._lock:
            self._collect()
            shelf = self._free.get(num_bytes)
            if shelf:
                self._free_bytes -= num_bytes
                return shelf.pop()
            self.fresh_bytes += num_bytes
        return np.empty(num_bytes, dtype=np.uint8)

    def _collect(self) -> None:
        """Shelve what came home, and let go of what is too much."""
        while True:
            try:
                memory = self._returned.get_nowait()
            except queue.Empty:
                return
            if self._free_bytes + memory.nbytes > max(self._keep_bytes, 2 * memory.nbytes):
                continue
            self._free.setdefault(memory.nbytes, []).append(memory)
            self._free_bytes += memory.nbytes


def _rounded(num_bytes: int) -> int:
    """Round a size up to the next eighth of a power of two."""
    size = max(num_bytes, SMALLEST_BYTES)
    step = 1 << max(0, size.bit_length() - STEPS_PER_DOUBLING.bit_length())
    return -(-size // step) * step
