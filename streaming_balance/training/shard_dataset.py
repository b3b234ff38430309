"""A packed split as a map-style dataset, for those who keep their `DataLoader`."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import whole_number
from streaming_balance.storage.reader import Reader, Verify
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.batches import BatchAssembler
from streaming_balance.training.buffers import BufferPool
from streaming_balance.training.delivery import (
    Delivery,
    check_shards,
    delivery,
    numpy_dtype,
)
from streaming_balance.training.requests import BatchRequest
from streaming_balance.training.transforms import Sample, Transform

# Free memory kept from one read for the next, beside two buffers of any size.
KEEP_BYTES = 64 << 20


class ShardDataset(Dataset[Sample]):
    """One split of a packed data set, sample by sample.

    Works in a `DataLoader` with any number of workers, forked or spawned: every process reads
    through files of its own. `train_loader` is faster and knows where a run stands; this is for
    training code that needs a dataset.

    Args:
        shards: from `open_shards`.
        split: name of the split.
        dtype: dtype of the images; None keeps the stored one. Masks always keep theirs.
        size: (D, H, W) or (H, W), centre cropped or zero padded; None keeps each sample's shape.
        transform: `transform(sample)`, giving a dict with at least `image`.
        verify: compare checksums on `first` touch, `always` or `never`.

    Raises:
        ConfigError: a setting is wrong, there is no such split, or the transform asks for a
            generator.

    Examples:
        >>> from streaming_balance.storage.shards import open_shards
        >>> dataset = ShardDataset(open_shards("shards/demo"), "train")
        >>> len(dataset), dataset[0]["key"], dataset.classes[dataset[0]["label"]]
        (14, 'Brats_demo_015', 'LGG')
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        *,
        dtype: torch.dtype | None = torch.float32,
        size: tuple[int, ...] | None = None,
        transform: Transform | None = None,
        verify: Verify = "first",
    ) -> None:
        check_shards(shards)
        if transform is not None and _wants_generator(transform):
            raise ConfigError(
                "transform takes a generator, which depends on the epoch and step of a run, and a "
                "dataset knows neither. Use train_loader(..., transform=...), or a transform of "
                "the sample alone."
            )
        self._shards, self._split = shards, split
        self._how = delivery(
            dtype=dtype,
            size=size,
            transform=transform,
            batch_transform=None,
            device=None,
            num_threads=1,
            prefetch_bytes=0,
            verify=verify,
        )
        self._size = shards.size(split)
        if transform is None:
            shards.check_decodable(split)
        self._files: _Files | None = None

    @property
    def split(self) -> str:
        """Name of the split."""
        return self._split

    @property
    def is_for_training(self) -> bool:
        """Whether the split may be balanced."""
        return self._split in self._shards.train_splits

    @property
    def classes(self) -> list[str]:
        """Label names; the place is the class number."""
        return self._shards.classes

    @property
    def targets(self) -> NDArray[Any]:
        """Class number of every sample, or (n, K) of 0 and 1, read from the table alone."""
        return self._shards.labels(self._split)

    @property
    def labels(self) -> NDArray[np.str_]:
        """Label name of every sample: what a configuration that names classes balances by.

        Of a multi-label data set its findings joined by `|`.
        """
        return self._shards.label_words(self._split)

    @property
    def patients(self) -> NDArray[np.str_]:
        """Patient of every sample."""
        return self._shards.patients(self._split)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Args:
            index: sample number; from the end where negative.

        Returns:
            `image` (C, D, H, W) or (C, H, W), `seg` where it was packed, `label` as class number
            (of a multi-label data set (K,) of 0 and 1), `key`, `patient`, and `sample`, its number.

        Raises:
            IndexError: no such sample.
            ShardError: the stored bytes are damaged.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Read several samples, neighbours in a shard by one call.

        The images of one call share memory where their shapes are equal, and it is used again once
        all of them are gone.

        Args:
            indices: sample numbers.

        Returns:
            A sample per index, as `dataset[index]` gives it.

        Raises:
            IndexError: no such sample.
            ShardError: the stored bytes are damaged.
        """
        if not len(indices):
            return []
        numbers = np.array([self._number(index) for index in indices], dtype=np.int64)
        batch = self._own_files().read(numbers)
        samples = [
            {name: _entry(batch[name][place]) for name in batch if batch[name][place] is not None}
            for place in range(len(numbers))
        ]
        transform = self._how.transform
        return samples if transform is None else [transform(sample) for sample in samples]

    def close(self) -> None:
        """Close the files of this process; the next sample opens them again."""
        files, self._files = self._files, None
        if files is not None:
            files.close()

    def __getstate__(self) -> dict[str, Any]:
        """Travel without open files; they are opened anew where the dataset arrives."""
        return vars(self) | {"_files": None}

    def _number(self, index: object) -> int:
        """Give a sample number of any library as a plain one, counted from the start."""
        number = whole_number(index)
        if number is None:
            raise ConfigError(
                f"index is {index!r}; samples are called by their numbers, 0 to {self._size - 1}. "
                f"The number of a key is its place in shards.keys({self._split!r})."
            )
        if not -self._size <= number < self._size:
            raise IndexError(
                f"split {self._split!r} has samples 0 to {self._size - 1}; {number} is none."
            )
        return number % self._size

    def _own_files(self) -> _Files:
        """Give the open files of this process, opened on first use and anew after a fork.

        Without a lock, which a fork might copy while it is held: two threads that come first
        together open the files twice, and the ones that nobody uses are closed.
        """
        files = self._files
        if files is None or files.process != os.getpid():
            files = self._files = _Files(self._shards, self._split, self._how)
        return files


class _Files:
    """Open files and memory of one process. Never touched by another one."""

    def __init__(self, shards: ShardSet, split: str, how: Delivery) -> None:
        self.process = os.getpid()
        reader = shards.reader(split, verify=how.verify)
        self.close = weakref.finalize(self, _close_reader, reader, self.process)
        self._reader = reader
        # What has no decoder is for the transform to decode.
        self._bytes_fields = () if how.transform is None else shards.bytes_fields
        self._fields = (*shards.arrays, "label", "key", "patient", "sample")
        self._assembler = BatchAssembler(
            shards,
            split,
            reader=reader,
            pool=BufferPool(keep_bytes=KEEP_BYTES),
            dtype=numpy_dtype(how.dtype),
            size=how.size,
            transform=None,
        )

    def read(self, numbers: NDArray[np.int64]) -> dict[str, Any]:
        """Read samples in this thread: name -> an entry per sample."""
        request = BatchRequest(
            epoch=0,
            step=0,
            samples=numbers,
            slots=np.arange(len(numbers), dtype=np.int64),
            global_size=len(numbers),
            num_ranks=1,
        )
        pending = self._assembler.begin(request, num_bytes=0, submit=lambda work: work())
        batch = pending.take().batch
        kept = {
            field: [self._read_bytes(number, field) for number in numbers.tolist()]
            for field in self._bytes_fields
        }
        return {name: batch[name] for name in self._fields if name in batch} | kept

    def _read_bytes(self, number: int, field: str) -> torch.Tensor | None:
        """Read a member without a decoder: `(n,)` of uint8; None where a sample has none."""
        if not self._reader.has(number, field):
            return None
        return torch.from_numpy(self._reader.read(number, field))


def _close_reader(reader: Reader, process: int) -> None:
    """Close files, but not in a forked child, where a lock may be held for ever."""
    if os.getpid() == process:
        reader.close()


def _entry(value: object) -> object:
    """Give a number as a plain one, and arrays and text as they are."""
    return value.item() if isinstance(value, torch.Tensor) and not value.ndim else value


def _wants_generator(transform: Transform) -> bool:
    """Say whether a transform needs more than the sample."""
    try:
        parameters = inspect.signature(transform).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) > 1
