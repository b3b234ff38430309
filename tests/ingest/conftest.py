"""Small cohorts to pack."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import nibabel as untyped_nibabel
import numpy as np
import pytest

nibabel: Any = untyped_nibabel

MakeVolume = Callable[..., Path]
MakeTable = Callable[[Path, Iterable[Mapping[str, str]]], Path]


@pytest.fixture
def make_volume() -> MakeVolume:
    """Writes one NIfTI file whose voxels depend on its path alone."""

    def make(
        path: Path,
        shape: tuple[int, ...] = (4, 4, 4),
        *,
        dtype: str = "int16",
        affine: Any = None,
        highest: int = 1000,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = int.from_bytes(str(path).encode()[-16:], "little")
        array = np.random.default_rng(seed).integers(0, highest, shape).astype(dtype)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
        return path

    return make


@pytest.fixture
def make_case(make_volume: MakeVolume) -> Callable[..., Path]:
    """Writes one BraTS case folder."""

    def make(
        folder: Path,
        modalities: Iterable[str] = ("t1", "t1ce", "t2", "flair"),
        *,
        seg: bool = True,
        shape: tuple[int, ...] = (4, 4, 4),
        suffix: str = ".nii.gz",
    ) -> Path:
        for modality in modalities:
            make_volume(folder / f"{folder.name}_{modality}{suffix}", shape)
        if seg:
            make_volume(folder / f"{folder.name}_seg{suffix}", shape, dtype="uint8", highest=4)
        return folder

    return make


@pytest.fixture
def make_table() -> MakeTable:
    """Writes a CSV file; the first row's names are the columns."""

    def make(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
        listed = list(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(listed[0]))
            writer.writeheader()
            writer.writerows(listed)
        return path

    return make
