"""The generated cohort: BraTS's tree and ratio, equal bytes every time, a signal in the voxels."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.demo.cohort import make_cohort
from streaming_balance.errors import ConfigError

SUFFIXES = ("flair", "seg", "t1", "t1ce", "t2")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort")
    make_cohort(out, patients=19, shape=(24, 20, 22), seed=3)
    return out


def load(path: Path) -> Any:
    return nibabel.load(path)


def voxels(path: Path) -> NDArray[np.int16]:
    return np.asarray(load(path).dataobj)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.nii.gz"))
    }


def test_the_tree_is_that_of_brats_with_14_high_grades_for_5_low_ones(cohort: Path) -> None:
    cases = sorted(path.relative_to(cohort).as_posix() for path in cohort.glob("*/*"))
    high = [f"HGG/Brats_demo_{number:03d}" for number in range(1, 15)]
    low = [f"LGG/Brats_demo_{number:03d}" for number in range(15, 20)]
    assert cases == high + low
    names = sorted(path.name for path in (cohort / low[0]).iterdir())
    assert names == [f"Brats_demo_015_{suffix}.nii.gz" for suffix in SUFFIXES]


def test_every_volume_is_int16_of_the_asked_shape_with_the_background_at_zero(cohort: Path) -> None:
    for path in cohort.rglob("*.nii.gz"):
        image = load(path)
        assert image.get_data_dtype() == np.int16
        assert image.shape == (24, 20, 22)
        assert voxels(path)[0, 0, 0] == 0
    for path in cohort.rglob("*_t1.nii.gz"):
        assert 0.1 < np.mean(voxels(path) > 0) < 0.4


def test_every_tumour_has_all_parts_and_rings_light_up_more_in_high_grades(cohort: Path) -> None:
    uptake: dict[str, list[float]] = {"HGG": [], "LGG": []}
    for case in cohort.glob("*/*"):
        mask = voxels(case / f"{case.name}_seg.nii.gz")
        contrast = voxels(case / f"{case.name}_t1ce.nii.gz").astype(float)
        healthy = contrast[(mask == 0) & (contrast > 0)].mean()
        assert set(np.unique(mask)) == {0, 1, 2, 4}
        uptake[case.parent.name].append(contrast[mask == 4].mean() / healthy)
    # A ring adds 600 to 640 of tissue, times an uptake of 0.75 or 0.35.
    assert abs(np.mean(uptake["HGG"]) - (1 + 0.75 * 600 / 640)) < 0.1
    assert abs(np.mean(uptake["LGG"]) - (1 + 0.35 * 600 / 640)) < 0.15


def test_equal_arguments_write_equal_bytes_and_another_seed_does_not(
    cohort: Path, tmp_path: Path
) -> None:
    make_cohort(tmp_path / "again", patients=19, shape=(24, 20, 22), seed=3)
    make_cohort(tmp_path / "other", patients=19, shape=(24, 20, 22), seed=4)
    assert digests(tmp_path / "again") == digests(cohort)
    assert not set(digests(tmp_path / "other").values()) & set(digests(cohort).values())


def test_making_it_twice_in_one_folder_changes_nothing(cohort: Path) -> None:
    before = digests(cohort)
    make_cohort(cohort, patients=19, shape=(24, 20, 22), seed=3)
    assert digests(cohort) == before


def test_a_folder_with_other_patients_is_left_alone(cohort: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds 16 entries .* such as 'HGG/Brats_demo_004'"):
        make_cohort(cohort, patients=4)


@pytest.mark.parametrize(
    ("patients", "shape", "complaint"),
    [(1, (24, 24, 24), "at least 2"), (4, (24, 24, 7), "at least 8"), (4, (24, 24), "three sides")],
)
def test_a_cohort_too_small_to_be_one_is_refused(
    tmp_path: Path, patients: int, shape: tuple[int, int, int], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_cohort(tmp_path, patients=patients, shape=shape)


def test_the_tool_makes_the_same_cohort(project_root: Path, tmp_path: Path) -> None:
    tool = [sys.executable, str(project_root / "tools" / "make_demo_cohort.py")]
    options = ["--patients", "4", "--side", "8", "--seed", "5"]
    answer = subprocess.run(
        [*tool, str(tmp_path / "tool"), *options], capture_output=True, text=True, check=True
    )
    assert answer.stdout.endswith(": 3 HGG, 1 LGG\n")
    make_cohort(tmp_path / "call", patients=4, shape=(8, 8, 8), seed=5)
    assert digests(tmp_path / "tool") == digests(tmp_path / "call")
    wrong = subprocess.run([*tool, str(tmp_path / "x"), "--patients", "1"], capture_output=True)
    assert wrong.returncode == 2
