"""How batches are to be read and handed over: checked once, when a loader is built."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import whole_number
from streaming_balance.storage.reader import Verify
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.environment import default_num_threads
from streaming_balance.training.requests import Batch
from streaming_balance.training.transforms import Transform

# Enough to keep several volumes of 33 MB under way without crowding out the training itself.
DEFAULT_PREFETCH_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How batches are read and handed over; the same for training and evaluation."""

    dtype: torch.dtype | None
    """Dtype of the images, or None for the stored one. Masks always keep theirs."""
    size: tuple[int, ...] | None
    """Wanted space (D, H, W) or (H, W), centre cropped or zero padded; None keeps each shape."""
    transform: Transform | None
    """The user's transform per sample, on the reader threads."""
    batch_transform: Callable[[Batch], Batch] | None
    """The user's transform per batch, in the thread that iterates, after the copy to the device."""
    device: torch.device | None
    """Where tensors go; None leaves them in (pinned) memory."""
    num_threads: int
    """Reader threads, in each worker process where there are any."""
    workers: int
    """Worker processes; 0 makes batches in threads of this process."""
    prefetch_bytes: int
    """Most bytes of batches under way."""
    verify: Verify
    """When checksums are compared: `first` touch, `always` or `never`."""


def delivery(
    *,
    dtype: torch.dtype | None,
    size: tuple[int, ...] | None,
    transform: Transform | None,
    batch_transform: Callable[[Batch], Batch] | None,
    device: str | torch.device | None,
    num_threads: int | None,
    prefetch_bytes: int | None,
    verify: Verify,
    workers: int = 0,
) -> Delivery:
    """Check how batches are to be delivered.

    Raises:
        ConfigError: names the setting and the value.
    """
    if verify not in get_args(Verify):
        raise ConfigError(f"verify is {verify!r}; it must be one of {', '.join(get_args(Verify))}.")
    numpy_dtype(dtype)
    processes = _checked_count("workers", workers, 0, least=0)
    most_threads = 1 if processes else default_num_threads()
    return Delivery(
        dtype=dtype,
        size=_checked_size(size),
        transform=transform,
        batch_transform=batch_transform,
        device=_checked_device(device),
        num_threads=_checked_count("num_threads", num_threads, most_threads, least=1),
        workers=processes,
        prefetch_bytes=_checked_count(
            "prefetch_bytes", prefetch_bytes, DEFAULT_PREFETCH_BYTES, least=0
        ),
        verify=verify,
    )


def check_shards(shards: object) -> None:
    """Refuse anything but an open data set, a path to one above all.

    Raises:
        ConfigError: says how to open it.
    """
    if isinstance(shards, ShardSet):
        return
    if isinstance(shards, str | os.PathLike):
        place = os.fspath(shards)
        raise ConfigError(f"shards is the path {place!r}; open it first: open_shards({place!r}).")
    raise ConfigError(
        f"shards is {type(shards).__name__}; it must be what open_shards('cohort/') gives."
    )


def _checked_count(setting: str, value: object, default: int, *, least: int) -> int:
    """Give a whole number of any library as a plain one."""
    count = default if value is None else whole_number(value)
    if count is None or count < least:
        raise ConfigError(f"{setting} is {value!r}; it must be an integer >= {least}, or None.")
    return count


def _checked_size(size: object) -> tuple[int, ...] | None:
    """Give the wanted space as a tuple of lengths."""
    if size is None:
        return None
    given = [whole_number(n) for n in size] if isinstance(size, Sequence) else []
    lengths = tuple(n for n in given if n is not None and n > 0)
    if not lengths or len(lengths) != len(given):
        raise ConfigError(f"size is {size!r}; it must be lengths such as (128, 128, 128), or None.")
    return lengths


def _checked_device(device: str | torch.device | None) -> torch.device | None:
    """Give the device, which torch must know by this name and this machine must have."""
    try:
        known = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device is {device!r}, which torch does not know. Use 'cuda', 'cuda:1' or 'cpu', or "
            f"None to leave batches in memory."
        ) from error
    # Counted by the driver's own list where there is one: a child forked later can still use CUDA.
    there = torch.cuda.device_count() if known is not None and known.type == "cuda" else None
    if known is not None and there is not None and (known.index or 0) >= there:
        raise ConfigError(
            f"device is {str(device)!r}, but torch sees {there} CUDA devices here. Use device=None "
            f"or 'cpu'; or look at nvidia-smi, CUDA_VISIBLE_DEVICES and whether this torch was "
            f"built for CUDA ({torch.version.cuda or 'it was not'})."
        )
    return known


def numpy_dtype(dtype: torch.dtype | None) -> np.dtype[Any] | None:
    """Give the numpy dtype that batches are filled in."""
    if dtype is None:
        return None
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"dtype is {dtype!r}, which cannot be filled in memory. Use torch.float32, "
            f"torch.float16 or an integer, and cast after the batch is on its device."
        ) from error
