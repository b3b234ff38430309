"""Putting a batch together: memory, pieces of reading work, and the finished mapping."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.kinds import ABSENT
from streaming_balance.storage.reader import Reader
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.buffers import BufferPool
from streaming_balance.training.pending import DamagedSamplesError, MadeBatch, PendingBatch, Piece
from streaming_balance.training.quarantine import Quarantine
from streaming_balance.training.requests import Batch, BatchRequest
from streaming_balance.training.threads import Signal
from streaming_balance.training.transforms import KeyedTransform, Sample

Submit = Callable[[Callable[[], None]], None]
# Rows are filled in pieces of at least so many bytes; smaller ones cost more in queueing.
PIECE_BYTES = 1 << 20


class BatchAssembler:
    """Knows what a batch of a split looks like and how to fill it.

    Args:
        shards: the data set.
        split: name of the split.
        reader: reads its samples.
        pool: lends the memory.
        dtype: numpy dtype of the images in the batch, or None for the stored one.
        size: wanted space (D, H, W) or (H, W), centre cropped or padded; None keeps each shape.
        transform: the user's transform per sample, or None.
        quarantine: says who stands in for damaged samples; None: damage is an error.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        *,
        reader: Reader,
        pool: BufferPool,
        dtype: np.dtype[Any] | None,
        size: tuple[int, ...] | None,
        transform: KeyedTransform | None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._reader, self._pool, self._quarantine = reader, pool, quarantine
        self._dtype, self._size, self._transform = dtype, size, transform
        self._labels, self._keys = shards.labels(split), shards.keys(split)
        self._patients = shards.patients(split)
        self._fields, self._bytes_fields = shards.arrays, shards.bytes_fields

    def num_bytes(self, request: BatchRequest) -> int:
        """Count the bytes of memory the arrays of a batch take."""
        numbers = request.samples.tolist() if self._transform is not None else []
        kept = sum(
            self._reader.stored_bytes(number, field)
            for field in self._bytes_fields
            for number in numbers
            if self._reader.has(number, field)
        )
        return kept + sum(
            group.count * math.prod(group.row_shape) * self._dtype_of([group], field).itemsize
            for field in self._fields
            for group in self._groups(request, field)
        )

    def settled(self, request: BatchRequest) -> BatchRequest:
        """Replace the samples of a batch that are known to be damaged, where that is asked for.

        Raises:
            ShardError: nobody is left to stand in.
        """
        return request if self._quarantine is None else self._quarantine.settled(request)

    def begin(self, request: BatchRequest, *, num_bytes: int, submit: Submit) -> PendingBatch:
        """Take memory for a batch and queue the reading of its rows.

        Args:
            request: which samples.
            num_bytes: memory it takes, from `num_bytes`.
            submit: queues a piece of work.

        Returns:
            The batch, done once all its pieces have run.
        """
        pieces: list[Piece] = []
        if self._transform is None:
            collect = self._plan_rows(request, pieces)
        else:
            collect = self._plan_samples(request, self._transform, pieces)
        pending = PendingBatch(request, num_bytes=num_bytes, collect=collect, pieces=pieces)
        for number in range(len(pieces)):
            submit(lambda number=number: pending.run(number))  # type: ignore[misc]
        return pending

    def finish(
        self, pending: PendingBatch, *, submit: Submit, wait: Callable[[Signal], None]
    ) -> MadeBatch:
        """Wait for a batch and give it, with others in the place of samples found damaged.

        Args:
            pending: what `begin` gave.
            submit: queues a piece of work.
            wait: waits until that work is done.

        Raises:
            ShardError: a sample is damaged and none may stand in, or none is left.
        """
        while True:
            wait(pending.done)
            try:
                return pending.take()
            except DamagedSamplesError as damage:
                assert self._quarantine is not None, "damage is looked for only to be replaced"
                self._quarantine.add(damage.found)
                request = self._quarantine.settled(pending.request)
            pending = self.begin(request, num_bytes=self.num_bytes(request), submit=submit)

    def _plan_rows(self, request: BatchRequest, pieces: list[Piece]) -> Callable[[], Batch]:
        """Fill the rows of the batch in place, a few neighbours at a time."""
        arrays: Batch = {}
        for field in self._fields:
            groups = self._groups(request, field)
            shapes = {group.row_shape for group in groups}
            everywhere = sum(group.count for group in groups) == len(request.samples)
            if everywhere and len(shapes) == 1:
                shape = (len(request.samples), *shapes.pop())
                stacked = self._pool.lend(shape, self._dtype_of(groups, field))
                arrays[field] = stacked
                pieces += self._row_pieces(stacked.numpy(), request.samples.tolist(), field)
            else:
                arrays[field] = self._plan_single(request, field, pieces)
        return lambda: self._described(request) | arrays

    def _plan_single(
        self, request: BatchRequest, field: str, pieces: list[Piece]
    ) -> list[torch.Tensor | None]:
        """Fill one tensor per sample where shapes differ; None where a sample has no such array."""
        singles: list[torch.Tensor | None] = []
        for sample in request.samples.tolist():
            tensor = self._lend_row(sample, field)
            if tensor is not None:
                pieces += self._row_pieces(tensor.numpy()[None], [sample], field)
            singles.append(tensor)
        return singles

    def _row_pieces(self, rows: NDArray[Any], samples: Sequence[int], field: str) -> list[Piece]:
        """Cut the filling of rows into pieces worth queueing."""
        at_once = max(1, PIECE_BYTES // max(1, rows[:1].nbytes))

        def piece(first: int) -> Piece:
            here, numbers = rows[first : first + at_once], samples[first : first + at_once]
            return Piece(work=lambda: self._read(numbers, here, field), samples=numbers)

        return [piece(first) for first in range(0, len(samples), at_once)]

    def _read(self, samples: Sequence[int], rows: NDArray[Any], field: str) -> None:
        """Fill rows; where others may stand in, find out which samples are damaged."""
        try:
            self._reader.read_into(samples, rows, field=field)
        except ShardError:
            if self._quarantine is None:
                raise
            if found := self._damage(samples, rows, field):
                raise DamagedSamplesError(found) from None

    def _damage(
        self, samples: Sequence[int], rows: NDArray[Any], field: str
    ) -> dict[int, ShardError]:
        """Read samples once more, one by one: a hiccup passes, damage stays."""
        found = {}
        for place, sample in enumerate(samples):
            try:
                self._reader.read_into([sample], rows[place : place + 1], field=field)
            except ShardError as error:
                found[int(sample)] = error
        return found

    def _plan_samples(
        self, request: BatchRequest, transform: KeyedTransform, pieces: list[Piece]
    ) -> Callable[[], Batch]:
        """Read and transform each sample on its own, then stack what fits together."""
        results: list[Sample] = [{} for _ in request.samples]

        def piece(place: int) -> Piece:
            def work() -> None:
                results[place] = transform(
                    self._read_sample(request, place),
                    epoch=request.epoch,
                    step=request.step,
                    slot=int(request.slots[place]),
                )

            return Piece(work=work, samples=[int(request.samples[place])])

        pieces += [piece(place) for place in range(len(results))]
        return lambda: self._described(request) | _collate(results)

    def _read_sample(self, request: BatchRequest, place: int) -> Sample:
        """Read one sample into memory of its own."""
        number = int(request.samples[place])
        sample: Sample = {}
        for field in self._fields:
            tensor = self._lend_row(number, field)
            if tensor is not None:
                self._read([number], tensor.numpy()[None], field)
                sample[field] = tensor
        for field in self._bytes_fields:
            if self._reader.has(number, field):
                sample[field] = self._read_bytes(number, field)
        return sample | {
            "label": self._label(number),
            "key": str(self._keys[number]),
            "patient": str(self._patients[number]),
            "sample": number,
        }

    def _read_bytes(self, number: int, field: str) -> torch.Tensor:
        """Read a member that has no decoder, for the transform to decode: `(n,)` of uint8."""
        try:
            return torch.from_numpy(self._reader.read(number, field))
        except ShardError as first:
            if self._quarantine is None:
                raise
            try:
                return torch.from_numpy(self._reader.read(number, field))
            except ShardError:
                raise DamagedSamplesError({number: first}) from None

    def _label(self, number: int) -> int | torch.Tensor:
        """Give one sample's class number, or (K,) of 0 and 1 where it may have several."""
        label = self._labels[number]
        return int(label) if label.ndim == 0 else torch.from_numpy(label.astype(np.int64))

    def _described(self, request: BatchRequest) -> Batch:
        """Give everything of a batch but its arrays."""
        samples = request.samples
        return {
            "label": torch.from_numpy(self._labels[samples].astype(np.int64)),
            "key": self._keys[samples].tolist(),
            "patient": self._patients[samples].tolist(),
            "sample": torch.from_numpy(samples.copy()),
            "slot": torch.from_numpy(request.slots.copy()),
            "epoch": request.epoch,
            "step": request.step,
            "loss_scale": len(samples) * request.num_ranks / request.global_size,
        }

    def _groups(self, request: BatchRequest, field: str) -> list[_Group]:
        """Group the samples of a request that have an array by how it is stored."""
        numbers = self._reader.members.kind_numbers(request.samples, field)
        # Sorting costs more than all else where batches are small and alike.
        if len(numbers) and numbers[0] != ABSENT and (numbers == numbers[0]).all():
            return [self._group(int(numbers[0]), len(numbers), int(request.samples[0]), field)]
        distinct, first, counts = np.unique(numbers, return_index=True, return_counts=True)
        return [
            self._group(number, count, int(request.samples[place]), field)
            for number, place, count in zip(
                distinct.tolist(), first.tolist(), counts.tolist(), strict=True
            )
            if number != ABSENT
        ]

    def _group(self, number: int, count: int, sample: int, field: str) -> _Group:
        """Describe samples that are stored alike, one of which is `sample`."""
        kind = self._reader.members.kind(number)
        row_shape = kind.row_shape
        if self._size is not None:
            if len(row_shape) != len(self._size) + 1:
                raise ConfigError(
                    f"size is {self._size}, but {self._keys[sample]} has {field} of shape "
                    f"{row_shape}; give one length per axis of space ({len(row_shape) - 1}), "
                    "without the channels."
                )
            row_shape = (row_shape[0], *self._size)
        return _Group(count=count, row_shape=row_shape, dtype=kind.dtype)

    def _lend_row(self, sample: int, field: str) -> torch.Tensor | None:
        """Take memory from the pool for one sample's array, if it has one."""
        (number,) = self._reader.members.kind_numbers(np.array([sample]), field).tolist()
        if number == ABSENT:
            return None
        group = self._group(number, 1, sample, field)
        return self._pool.lend(group.row_shape, self._dtype_of([group], field))

    def _dtype_of(self, groups: Sequence[_Group], field: str) -> np.dtype[Any]:
        """Give the dtype an array takes in the batch: masks keep their own."""
        if field == "image" and self._dtype is not None:
            return self._dtype
        return np.result_type(*{group.dtype for group in groups})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Samples of a batch whose arrays are stored alike."""

    count: int
    """How many they are."""
    row_shape: tuple[int, ...]
    """Shape that each takes in the batch, with its channel axis."""
    dtype: np.dtype[Any]
    """Dtype they are stored in."""


def _collate(samples: Sequence[Sample]) -> Batch:
    """Stack what has equal shapes, keep the rest as lists, name by name."""
    batch: Batch = {}
    # Samples may differ in what they have: a mask, say.
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample.get(name) for sample in samples]
        if any(isinstance(value, np.ndarray | torch.Tensor) for value in values):
            tensors = [value if value is None else torch.as_tensor(value) for value in values]
            shapes = {None if tensor is None else tensor.shape for tensor in tensors}
            same = len(shapes) == 1 and None not in shapes
            batch[name] = torch.stack([t for t in tensors if t is not None]) if same else tensors
        elif all(isinstance(value, int | float) for value in values):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch
