"""Small data sets whose every voxel says which sample it belongs to, and what a loader gave."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streaming_balance.storage.shards import ShardSet, open_shards
from tests.building import Sample, pack

PROJECT_ROOT = Path(__file__).resolve().parents[2]
SHAPE = (2, 4, 3, 5)
Seen = tuple[int, int, tuple[int, ...], str]


def voxels(number: int, shape: tuple[int, ...] = SHAPE, dtype: str = "int16") -> NDArray[Any]:
    """Give an image that no other sample has."""
    return (np.arange(np.prod(shape)).reshape(shape) % 97 + 100 * number).astype(dtype)


def cohort(
    *,
    hgg: int = 9,
    lgg: int = 5,
    val: int = 7,
    shape: tuple[int, ...] = SHAPE,
    dtype: str = "int16",
) -> list[Sample]:
    """Make samples H00.., L00.. in `train` and V00.. in `val`, one per patient."""
    names = [*(f"H{n:02d}" for n in range(hgg)), *(f"L{n:02d}" for n in range(lgg))]
    samples = [
        Sample(
            key=name,
            image=voxels(number, shape, dtype),
            label="HGG" if name[0] == "H" else "LGG",
        )
        for number, name in enumerate(names)
    ]
    return samples + [
        Sample(key=f"V{n:02d}", image=voxels(200 + n, shape, dtype), split="val")
        for n in range(val)
    ]


def packed(folder: Path, samples: list[Sample], **options: Any) -> ShardSet:
    """Pack and open."""
    pack(folder, samples, **options)
    return open_shards(folder)


def seen(batch: dict[str, Any]) -> Seen:
    """Say what a batch is: its place, its members in order, and a hash of every voxel."""
    image = batch["image"]
    hasher = hashlib.sha256()
    for row in image:
        hasher.update(repr((tuple(row.shape), row.dtype)).encode())
        hasher.update(row.numpy().tobytes())
    return batch["epoch"], batch["step"], tuple(batch["sample"].tolist()), hasher.hexdigest()


def take(loader: Iterable[dict[str, Any]], count: int) -> list[Seen]:
    """Iterate over as many epochs as `count` batches need, and stop right after the last."""
    got: list[Seen] = []
    while True:
        for batch in loader:
            got.append(seen(batch))
            if len(got) == count:
                return got


def merged(parts: list[dict[str, Any]]) -> dict[int, tuple[int, bytes]]:
    """Unite the parts of all ranks of one global batch: slot -> (sample number, voxels)."""
    return {
        slot: (sample, image.numpy().tobytes())
        for part in parts
        for slot, sample, image in zip(
            part["slot"].tolist(), part["sample"].tolist(), part["image"], strict=True
        )
    }


def as_float(images: list[NDArray[Any]]) -> torch.Tensor:
    """Stack images the plain way."""
    return torch.from_numpy(np.stack(images).astype(np.float32))


def run_python(
    script: str, *arguments: object, deadline_seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, on two threads at most."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=deadline_seconds,
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
