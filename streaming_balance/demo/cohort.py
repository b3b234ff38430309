"""A cohort of generated brains, laid out as BraTS is: rare low-grade, common high-grade gliomas.

The class shows in the voxels as it does in patients, only simpler: the ring of a high-grade tumour
takes up more contrast (`t1ce`) than that of a low-grade one. The grades overlap, as in patients, so
no network tells all of them apart, and what it makes of the doubtful ones depends on how often it
has seen either grade.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.ingest.nifti_writing import write_nifti
from streaming_balance.plan.keys import check_seed, stream_key, words

MODALITIES = ("t1", "t1ce", "t2", "flair")
# BraTS 2018 has 210 high-grade and 75 low-grade patients: 2.8 to 1.
HIGH_PER_LOW = 2.8
SMALLEST_SIDE = 8

NECROSIS, OEDEMA, ENHANCING = 1, 2, 4  # the labels of BraTS masks
NOISE = 40.0
"""Standard deviation of the voxel noise."""
# Mean uptake of contrast by grade, and its standard deviation between patients: the means lie 2.7
# deviations apart, so that about one patient in ten looks more like the other grade.
UPTAKE: Mapping[str, float] = {"HGG": 0.75, "LGG": 0.35}
UPTAKE_SPREAD = 0.15
# Healthy tissue, and what each part of a tumour adds to it.
TISSUE: Mapping[str, float] = {"t1": 620.0, "t1ce": 640.0, "t2": 420.0, "flair": 460.0}
CONTRAST: Mapping[str, Mapping[int, float]] = {
    "t1": {NECROSIS: -160.0, OEDEMA: -60.0, ENHANCING: -110.0},
    "t1ce": {NECROSIS: -150.0, OEDEMA: -50.0, ENHANCING: 600.0},
    "t2": {NECROSIS: 260.0, OEDEMA: 170.0, ENHANCING: 150.0},
    "flair": {NECROSIS: 90.0, OEDEMA: 200.0, ENHANCING: 130.0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tumour:
    """Where a patient's tumour lies and how far its parts reach."""

    centre: tuple[float, float, float]
    """Middle, in [-1, 1] per axis of the volume."""
    core: float
    """Radius of the core, in the same unit."""
    rim: float
    """Thickness of the enhancing ring around the core."""
    oedema: float
    """Thickness of the oedema around core and ring."""


def make_cohort(
    out: Path,
    *,
    patients: int = 95,
    shape: tuple[int, int, int] = (24, 24, 24),
    seed: int = 0,
) -> dict[str, int]:
    """Write a BraTS-like cohort of generated patients, 2.8 high-grade for each low-grade one.

    The tree is `OUT/{HGG,LGG}/Brats_demo_NNN/Brats_demo_NNN_{t1,t1ce,t2,flair,seg}.nii.gz`. Equal
    arguments write equal bytes, so making it twice does no harm.

    Args:
        out: the folder to fill; made if it is not there.
        patients: how many, at least 2.
        shape: voxels per volume, at least 8 along each axis.
        seed: names the random streams, in [0, 2**64 - 1].

    Returns:
        label -> number of patients.

    Raises:
        ConfigError: too few patients or voxels, or the folder holds patients that are not of this
            cohort.

    Examples:
        >>> import tempfile
        >>> make_cohort(Path(tempfile.mkdtemp()), patients=4, shape=(8, 8, 8))
        {'HGG': 3, 'LGG': 1}
    """
    check_seed(seed)
    if patients < 2:
        raise ConfigError(f"patients is {patients}; two classes need at least 2.")
    if len(shape) != 3 or min(shape) < SMALLEST_SIDE:
        raise ConfigError(f"shape is {shape}; give three sides of at least {SMALLEST_SIDE} voxels.")
    low_grade = max(1, round(patients / (1 + HIGH_PER_LOW)))
    counts = {"HGG": patients - low_grade, "LGG": low_grade}
    cases = list(_cases(counts))
    _refuse_strangers(out, {f"{label}/{name}" for label, name in cases})
    for label, name in cases:
        _write_patient(out / label / name, label, name, shape=shape, seed=seed)
    return counts


def _cases(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Name the patients, numbered through both classes."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    for number, label in enumerate(labels, start=1):
        yield label, f"Brats_demo_{number:03d}"


def _refuse_strangers(out: Path, expected: set[str]) -> None:
    """Refuse a folder that would end up holding patients of two cohorts."""
    found = {path.relative_to(out).as_posix() for path in out.glob("*/*")}
    strangers = sorted(found - expected)
    if strangers:
        raise ConfigError(
            f"{out} holds {len(strangers)} entries that are not of this cohort, such as "
            f"{strangers[0]!r}. Name another folder, or remove that one."
        )


def _write_patient(
    folder: Path, label: str, name: str, *, shape: tuple[int, int, int], seed: int
) -> None:
    """Write one patient's four modalities and the mask."""
    folder.mkdir(parents=True, exist_ok=True)
    brain, parts = _anatomy(name, shape, seed)
    uptake = _uptake(label, stream_key(seed, "demo-uptake", name))
    gain = 0.85 + 0.3 * float(_uniform(stream_key(seed, "demo-gain", name), 1)[0])
    for modality in MODALITIES:
        added = CONTRAST[modality]
        if modality == "t1ce":
            added = {**added, ENHANCING: uptake * added[ENHANCING]}
        noise = NOISE * _bell(stream_key(seed, "demo-noise", name, modality), parts.size)
        voxels = _voxels(TISSUE[modality], added, brain, parts) + noise.reshape(shape) * brain
        scaled = np.asarray(np.rint(np.maximum(voxels * gain, 0.0)), dtype=np.int16)
        write_nifti(folder / f"{name}_{modality}.nii.gz", scaled)
    write_nifti(folder / f"{name}_seg.nii.gz", parts)


def _uptake(label: str, key: int) -> float:
    """Draw how much contrast a patient's ring takes up, as a part of the most; never negative."""
    return max(0.0, UPTAKE[label] + UPTAKE_SPREAD * float(_bell(key, 1)[0]))


def _anatomy(
    name: str, shape: tuple[int, int, int], seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.int16]]:
    """Give the brain's mask and the tumour's parts, both `shape`."""
    draws = _uniform(stream_key(seed, "demo-anatomy", name), 9)
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij", sparse=True)
    radii = np.array([0.72, 0.86, 0.68]) * (0.94 + 0.12 * draws[:3])
    brain = sum((axis / radius) ** 2 for axis, radius in zip(axes, radii, strict=True)) <= 1.0
    tumour = _tumour(draws[3:])
    distance = np.sqrt(
        sum((axis - middle) ** 2 for axis, middle in zip(axes, tumour.centre, strict=True))
    )
    parts = np.zeros(shape, dtype=np.int16)
    reaches = (
        (tumour.core + tumour.rim + tumour.oedema, OEDEMA),
        (tumour.core + tumour.rim, ENHANCING),
        (tumour.core, NECROSIS),
    )
    for radius, part in reaches:
        parts[(distance <= radius) & brain] = part
    return np.asarray(brain, dtype=np.bool_), parts


def _tumour(draws: NDArray[np.float64]) -> Tumour:
    """Place a tumour; place and size say nothing about its grade."""
    x, y, z = (float(draw) for draw in (draws[:3] - 0.5) * np.array([0.7, 0.9, 0.6]))
    core, rim, oedema = np.array([0.14, 0.10, 0.08]) + np.array([0.12, 0.05, 0.14]) * draws[3:6]
    return Tumour(centre=(x, y, z), core=float(core), rim=float(rim), oedema=float(oedema))


def _voxels(
    tissue: float,
    added: Mapping[int, float],
    brain: NDArray[np.bool_],
    parts: NDArray[np.int16],
) -> NDArray[np.float64]:
    """Give one modality without noise: tissue and tumour inside the brain, zero outside."""
    voxels = np.full(parts.shape, tissue)
    for part, more in added.items():
        voxels[parts == part] += more
    return np.asarray(np.where(brain, voxels, 0.0), dtype=np.float64)


def _uniform(key: int, count: int) -> NDArray[np.float64]:
    """Give `(count,)` numbers uniform on [0, 1), 53 bits each."""
    return np.asarray((words(key, count) >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def _bell(key: int, count: int) -> NDArray[np.float64]:
    """Give `(count,)` numbers near a standard normal: the four 16-bit parts of a word, summed."""
    summed = words(key, count).astype("<u8").view("<u2").reshape(count, 4).sum(axis=1)
    return np.asarray((summed / 65536.0 - 2.0) * np.sqrt(3.0), dtype=np.float64)
