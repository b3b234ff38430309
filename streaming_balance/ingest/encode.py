"""From the files of one case to the bytes of one sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ShardError
from streaming_balance.ingest.arrays import read_array_file
from streaming_balance.ingest.cases import Case, reported_path, without_folder
from streaming_balance.ingest.geometry import (
    affine_after_crop_or_pad,
    affine_after_resample,
    crop_or_pad,
    resample,
    to_ras,
)
from streaming_balance.ingest.nifti import read_nifti
from streaming_balance.ingest.volume import Volume, check_values, spacing_of
from streaming_balance.storage.encoded import EncodedArray, EncodedSample, encode_array
from streaming_balance.storage.manifest import JSON, Rejected

ARRAY_SUFFIXES = (".npy", ".npz")
# Two affines are one if no corner of the volume moves by more than this part of a voxel: programs
# write affines with 4 to 7 digits.
CORNER_TOLERANCE_VOXELS = 0.05
EXACT_INTEGERS_OF_FLOAT64 = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is done to every case."""

    codec: str
    """"blosc" or "npy"."""
    size: tuple[int, ...] | None
    """Voxels along each space axis to resample to; None keeps them."""
    crop_or_pad: tuple[int, ...] | None
    """Voxels along each space axis to cut or pad to; None keeps them."""
    orient: str | None
    """"ras" turns every volume; None keeps the axes of the file."""
    axes: str | None
    """Axes of NumPy files; None takes HW, DHW, CDHW by their number."""
    max_volume_bytes: int
    """The most memory one file's voxels may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One case on its way to a packing process."""

    case: Case
    """The case."""
    split: str
    """The split it goes to."""
    root: Path
    """Folder that reported paths are relative to."""
    recipe: Recipe
    """What is done to it."""


def encode_case(task: Task) -> EncodedSample | Rejected:
    """Read, check and encode one case.

    Returns:
        The sample, or why there is none.

    Raises:
        ShardError: a file changed since it was found; nothing about it can be trusted.
    """
    case = task.case
    try:
        outcome: EncodedSample | Rejected = _encoded(task)
    except ShardError as error:
        outcome = _rejected(task, error)
    for stamp in case.stamps:
        stamp.check_unchanged()
    return outcome


def read_volume(path: Path, recipe: Recipe, *, is_mask: bool) -> Volume:
    """Read one file of a case and check its values.

    Raises:
        ShardError: it cannot be read, or its values are of no use.
    """
    if path.name.lower().endswith(ARRAY_SUFFIXES):
        # A mask has its image's space axes, which may be fewer than the declared axes.
        axes = None if is_mask else recipe.axes
        volume = read_array_file(path, axes=axes, max_bytes=recipe.max_volume_bytes)
    else:
        volume = read_nifti(path, max_bytes=recipe.max_volume_bytes)
    check_values(volume.array, path=path, is_mask=is_mask)
    return volume


def _encoded(task: Task) -> EncodedSample:
    """Turn a case into a sample."""
    case, recipe = task.case, task.recipe
    volumes = [read_volume(path, recipe, is_mask=False) for path in case.images]
    image = _stacked(case, volumes)
    sources = {
        name: volume.source_digest for name, volume in zip(case.modalities, volumes, strict=True)
    }
    mask = None
    if case.seg is not None:
        mask = read_volume(case.seg, recipe, is_mask=True)
        _check_same_grid(case.seg, mask, case.images[0], image)
        sources["seg"] = mask.source_digest
    placed, array = _placed(image, image.array, recipe, is_mask=False)
    arrays = [encode_array("image", array, axes=image.axes, codec=recipe.codec)]
    if mask is not None:
        # The image's affine turns the mask too: they were just found to be the same.
        _, segmented = _placed(image, mask.array, recipe, is_mask=True)
        arrays.append(encode_array("seg", segmented, axes=mask.axes, codec=recipe.codec))
    assert case.label is not None
    return EncodedSample(
        key=case.key,
        patient=case.patient,
        label=case.label,
        split=task.split,
        columns=dict(case.columns),
        arrays=tuple(arrays),
        details=_details(case, arrays[0], placed, sources),
    )


def _stacked(case: Case, volumes: list[Volume]) -> Volume:
    """Put the modalities of a case into one array, channels first."""
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for path, volume in zip(case.images, volumes, strict=True):
        if volume.axes[0] == "C":
            raise ShardError(
                f"{path}: has channels of its own, shape {volume.array.shape}; expected one volume "
                "per modality."
            )
        _check_same_grid(path, volume, case.images[0], first)
    array = np.stack([volume.array for volume in volumes])
    for path, volume in zip(case.images, volumes, strict=True):
        _check_fits(path, volume.array, array.dtype)
    return Volume(
        array=array,
        axes=f"C{first.axes}",
        affine=first.affine,
        spacing=first.spacing,
        source_digest="",
    )


def _check_fits(path: Path, values: NDArray[np.generic], common: np.dtype[Any]) -> None:
    """Make sure that the dtype common to all modalities holds every value exactly."""
    # numpy's common dtype is exact but for one case: 64-bit integers beside floats become float64.
    if common.kind != "f" or values.dtype.kind not in "iu" or values.dtype.itemsize < 8:
        return
    lowest, highest = int(values.min()), int(values.max())
    if max(-lowest, highest) > EXACT_INTEGERS_OF_FLOAT64:
        raise ShardError(
            f"{path}: its values from {lowest} to {highest} do not fit {common}, the type common "
            "to all modalities."
        )


def _check_same_grid(path: Path, volume: Volume, first_path: Path, first: Volume) -> None:
    """Make sure that two volumes of a case lie on the same grid."""
    if volume.space != first.space:
        raise ShardError(
            f"{path}: shape {volume.space}, but {first_path.name} has {first.space}; all files of "
            "a case must have one shape."
        )
    if volume.affine is None or first.affine is None:
        return
    space = (*first.space, 1)[:3]
    corners = np.array(
        [(*np.multiply(place, np.subtract(space, 1)), 1) for place in np.ndindex(2, 2, 2)]
    )
    moved = np.abs(corners @ (volume.affine - first.affine).T).max()
    if moved > CORNER_TOLERANCE_VOXELS * min(spacing_of(first.affine, len(first.space))):
        raise ShardError(
            f"{path}: shape {volume.space} as {first_path.name} with {first.space}, but their "
            f"affines put a corner {moved:.3g} mm apart; all files of a case must lie in one place."
        )


def _placed(
    image: Volume, array: NDArray[np.generic], recipe: Recipe, *, is_mask: bool
) -> tuple[NDArray[np.float64] | None, NDArray[np.generic]]:
    """Turn, resample, cut or pad an array on the image's grid; give the new affine too."""
    affine = image.affine
    if recipe.orient == "ras":
        if affine is None or len(image.space) != 3:
            raise ShardError(
                f"orient='ras' needs a 3-D volume with an affine; this one has shape {image.space}"
                f"{'' if affine is not None else ' and no affine'}."
            )
        array, affine = to_ras(array, affine)
    axes = len(image.space)
    space = array.shape[-axes:]
    wanted = recipe.size or recipe.crop_or_pad
    if wanted is None:
        return affine, array
    if len(wanted) != axes:
        raise ShardError(f"size {wanted} has {len(wanted)} numbers, the volume {axes} space axes.")
    whole = wanted if axes == 3 else (*wanted, 1)
    space3 = space if axes == 3 else (*space, 1)
    if recipe.size is not None:
        moved = None if affine is None else affine_after_resample(affine, space3, whole)
        return moved, resample(array, wanted, mode="nearest" if is_mask else "linear")
    moved = None if affine is None else affine_after_crop_or_pad(affine, space3, whole)
    return moved, crop_or_pad(array, wanted)


def _details(
    case: Case, image: EncodedArray, affine: NDArray[np.float64] | None, sources: dict[str, str]
) -> dict[str, JSON]:
    """Describe a sample for its JSON member: numbers and names of modalities, no header text."""
    axes = len(image.axes.lstrip("C"))
    return {
        "affine": None if affine is None else affine.tolist(),
        "axes": image.axes,
        "dtype": image.dtype,
        "modalities": list(case.modalities),
        "sample": case.sample,
        "shape": list(image.shape),
        "sources": sources,
        "spacing": None if affine is None else list(spacing_of(affine, axes)),
    }


def _rejected(task: Task, error: ShardError) -> Rejected:
    """List a case that cannot be packed, with the file at fault."""
    case = task.case
    files = (*case.images, *((case.seg,) if case.seg is not None else ()))
    files += tuple(stamp.path for stamp in case.stamps if stamp.path not in files)
    reason = str(error)
    at_fault = next((path for path in files if reason.startswith(f"{path}: ")), files[0])
    return Rejected(
        patient=case.patient,
        path=reported_path(at_fault, task.root),
        reason=without_folder(reason, files),
    )
