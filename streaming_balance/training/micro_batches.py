"""Micro-batches: one rank's part of a global batch in pieces that fit the device's memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import whole_number
from streaming_balance.training.requests import Batch


def micro_batches(batch: Mapping[str, Any], count: int) -> Iterator[Batch]:
    """Cut a batch into pieces whose gradients add up to those of the whole one.

    This is how gradients are accumulated: plan, quotas and state know one global batch, in however
    many pieces it is trained. Multiply the mean loss of each piece by the piece's `loss_scale`,
    call `backward`, and step after the last; under DDP, keep all but the last inside
    `model.no_sync()`. That gives the gradient of the mean loss over the global batch, also where
    ranks or pieces differ in size.

    Args:
        batch: as a loader gives it; not changed.
        count: number of pieces, from 1 to the samples of the smallest part of any rank.

    Returns:
        An iterator over `count` dicts of views: no voxel is copied. Their sizes differ by one at
        most, larger ones first. Tensors, arrays and lists are cut along their first axis, in inner
        dicts too; numbers, texts and None are kept; `loss_scale` is the piece's own. `partner` of a
        mixed batch goes on counting the rows of the whole batch.

    Raises:
        ConfigError: some rank has fewer samples than pieces, or an entry of the batch is neither
            one value per sample nor a plain value.

    Examples:
        >>> batch = {"sample": torch.arange(5), "key": list("abcde"), "step": 7, "loss_scale": 1.0}
        >>> for piece in micro_batches(batch, 2):
        ...     print(piece)
        {'sample': tensor([0, 1, 2]), 'key': ['a', 'b', 'c'], 'step': 7, 'loss_scale': 0.6}
        {'sample': tensor([3, 4]), 'key': ['d', 'e'], 'step': 7, 'loss_scale': 0.4}
    """
    size, scale = _size_and_scale(batch)
    # Size over scale is global batch over ranks: rounded down, the smallest part of any rank. Where
    # it is whole the scale is 1, so nothing is lost by rounding. All ranks find the same number:
    # either all refuse or none, and nobody waits for a rank that did.
    fewest = int(size / scale)
    pieces = whole_number(count)
    if pieces is None or not 1 <= pieces <= fewest:
        raise ConfigError(
            f"count is {count!r}, but the rank with the smallest part of this global batch has "
            f"{fewest} samples. Use an integer in 1..{fewest}, or a larger global_batch_size."
        )
    spans = [_span(piece, pieces, size) for piece in range(pieces)]
    cut = [{name: _cut(name, value, span, size) for name, value in batch.items()} for span in spans]
    for piece, span in zip(cut, spans, strict=True):
        piece["loss_scale"] = scale * (span.stop - span.start) / size
    return iter(cut)


def _size_and_scale(batch: Mapping[str, Any]) -> tuple[int, float]:
    """Give the number of samples in a batch and its loss scale."""
    sample, scale = batch.get("sample"), batch.get("loss_scale")
    if (
        isinstance(sample, torch.Tensor)
        and len(sample)
        and isinstance(scale, int | float)
        and scale > 0
    ):
        return len(sample), float(scale)
    raise ConfigError(
        f"the batch has loss_scale {scale!r} and sample {sample!r}; it must be what a loader "
        f"gives, with at least one sample. Keep both entries in your batch_transform."
    )


def _span(piece: int, pieces: int, size: int) -> slice:
    """Say which rows one piece of a batch holds."""
    each, more = divmod(size, pieces)
    first = piece * each + min(piece, more)
    return slice(first, first + each + (piece < more))


def _cut(name: str, value: object, span: slice, size: int) -> object:
    """Give the rows of one entry of a batch."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: _cut(f"{name}.{key}", inner, span, size) for key, inner in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        return value
    if isinstance(value, torch.Tensor | np.ndarray | list) and len(value) == size:
        return value[span]
    shape = tuple(getattr(value, "shape", [len(value)] if isinstance(value, list) else []))
    raise ConfigError(
        f"{name} of the batch is a {type(value).__name__} of shape {shape}, and the batch has "
        f"{size} samples. Entries are tensors, arrays or lists with one value per sample, or plain "
        f"numbers and texts; take {name} out of the batch before it is cut."
    )
