"""Orientation, resampling and cropping against scipy, nibabel and numbers worked out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import nibabel as untyped_nibabel
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.ingest.geometry import (
    affine_after_crop_or_pad,
    affine_after_resample,
    crop_or_pad,
    resample,
    to_ras,
)

nibabel: Any = untyped_nibabel

OBLIQUE = np.array(
    [[-0.1, 0.2, 3.0, 10.0], [-2.0, 0.1, 0.1, -20.0], [0.1, -1.5, 0.2, 30.0], [0, 0, 0, 1]]
)


def noise(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, 100, shape)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_every_orientation_is_turned_to_ras_as_nibabel_does(
    order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.diag([1.0, 2.0, 3.0])[:, order] * signs
    affine[:3, 3] = [7, -8, 9]
    array = noise(3, 4, 5)
    turned, new_affine = to_ras(array, affine)
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    assert np.array_equal(turned, canonical.get_fdata())
    assert np.allclose(new_affine, canonical.affine)
    assert nibabel.aff2axcodes(new_affine) == ("R", "A", "S")
    assert turned.flags.c_contiguous


def test_every_voxel_keeps_its_place_in_the_patient_when_turned() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    turned, new_affine = to_ras(array, OBLIQUE)
    for value in range(24):
        before = OBLIQUE @ [*np.argwhere(array == value)[0], 1]
        after = new_affine @ [*np.argwhere(turned == value)[0], 1]
        assert np.allclose(before, after)


def test_channels_stay_in_front_when_a_volume_is_turned() -> None:
    array = noise(2, 3, 4, 5)
    turned, _ = to_ras(array, OBLIQUE)
    for channel in range(2):
        assert np.array_equal(turned[channel], to_ras(array[channel], OBLIQUE)[0])


def test_resampled_integers_are_the_ones_worked_out_by_hand() -> None:
    # Two voxels 0 and 10 to four: centres at -0.25, 0.25, 0.75, 1.25 -> 0, 2.5, 7.5, 10; halves
    # are rounded to even.
    array = np.array([[[0, 10]]], dtype=np.int16)
    assert resample(array, (1, 1, 4), mode="linear").tolist() == [[[0, 2, 8, 10]]]
    # Four to two: centres at 0.5 and 2.5.
    array = np.array([[[0, 10, 20, 40]]], dtype=np.uint8)
    shrunk = resample(array, (1, 1, 2), mode="linear")
    assert shrunk.tolist() == [[[5, 30]]]
    assert shrunk.dtype == np.uint8


@pytest.mark.parametrize("size", [(4, 9, 6), (10, 3, 7), (1, 1, 1), (7, 9, 5), (13, 5, 1)])
def test_trilinear_resampling_agrees_with_scipy(size: tuple[int, ...]) -> None:
    array = noise(7, 5, 6)
    factors = [wanted / stored for wanted, stored in zip(size, array.shape, strict=True)]
    expected = scipy.ndimage.zoom(array, factors, order=1, mode="nearest", grid_mode=True)
    assert np.allclose(resample(array, size, mode="linear"), expected, rtol=0, atol=1e-9)


def test_nearest_resampling_takes_the_voxel_that_holds_the_centre() -> None:
    array = np.array([[[1, 2, 3]]], dtype=np.uint8)
    # Three to five: centres at 0.3, 0.9, 1.5, 2.1, 2.7 voxel widths.
    assert resample(array, (1, 1, 5), mode="nearest").tolist() == [[[1, 1, 2, 3, 3]]]
    # Five to two: centres at 1.25 and 3.75 voxel widths.
    array = np.array([[[1, 2, 3, 4, 5]]], dtype=np.uint8)
    assert resample(array, (1, 1, 2), mode="nearest").tolist() == [[[2, 4]]]


@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    dtype=st.sampled_from(["uint8", "int16", "int64", "uint64", "float32"]),
)
def test_resampling_never_leaves_the_range_of_the_stored_values(
    shape: tuple[int, ...], size: tuple[int, ...], dtype: str
) -> None:
    array = np.abs(noise(*shape)).astype(dtype)
    if dtype.endswith("int64"):
        array[0, 0, 0] = np.iinfo(dtype).max
    linear = resample(array, size, mode="linear")
    assert linear.shape == size
    assert linear.dtype == array.dtype
    assert linear.min() >= array.min()
    assert linear.max() <= array.max()
    assert set(resample(array, size, mode="nearest").ravel()) <= set(array.ravel())


def test_a_constant_volume_stays_exactly_what_it_was() -> None:
    array = np.full((5, 6, 7), 0.1, dtype=np.float32)
    assert (resample(array, (8, 3, 11), mode="linear") == array[0, 0, 0]).all()


def test_channels_are_resampled_one_by_one() -> None:
    array = noise(3, 4, 5, 6).astype(np.float32)
    together = resample(array, (6, 4, 3), mode="linear")
    assert together.shape == (3, 6, 4, 3)
    for channel in range(3):
        assert np.array_equal(together[channel], resample(array[channel], (6, 4, 3), mode="linear"))
    assert resample(array, (6, 4, 3), mode="nearest").shape == (3, 6, 4, 3)


def test_booleans_and_two_axes_are_resampled_too() -> None:
    array = np.array([[True, False]])
    assert resample(array, (1, 4), mode="linear").tolist() == [[True, True, False, False]]


def test_crop_or_pad_keeps_the_centre() -> None:
    array = np.arange(1, 6)[None, None]
    assert crop_or_pad(array, (1, 1, 3)).ravel().tolist() == [2, 3, 4]
    assert crop_or_pad(array, (1, 1, 2)).ravel().tolist() == [2, 3]
    assert crop_or_pad(array, (1, 1, 8)).ravel().tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert crop_or_pad(array, (3, 1, 5))[:, 0].tolist() == [[0] * 5, [1, 2, 3, 4, 5], [0] * 5]


def test_crop_or_pad_keeps_dtype_and_channels() -> None:
    array = noise(2, 4, 4, 4).astype(np.float32)
    cut = crop_or_pad(array, (2, 6, 4))
    assert cut.shape == (2, 2, 6, 4)
    assert cut.dtype == np.float32
    assert np.array_equal(cut[:, :, 1:5], array[:, 1:3])
    assert not cut[:, :, [0, 5]].any()


@pytest.mark.parametrize("size", [(4, 4), (1, 2, 3, 4), (0, 4, 4), ()])
def test_a_size_that_does_not_fit_is_refused(size: tuple[int, ...]) -> None:
    array = noise(2, 4, 4, 4)
    for function in (crop_or_pad, lambda a, s: resample(a, s, mode="linear")):
        with pytest.raises(ConfigError, match="does not fit"):
            function(array if len(size) != 4 else array[0], size)


def test_the_affine_follows_resampling_so_that_the_outer_borders_stay() -> None:
    new = affine_after_resample(OBLIQUE, (4, 6, 8), (2, 9, 8))
    for corner in itertools.product((0, 1), repeat=3):
        # Borders are half a voxel outside the outermost centres.
        old_index = [c * n - 0.5 for c, n in zip(corner, (4, 6, 8), strict=True)]
        new_index = [c * n - 0.5 for c, n in zip(corner, (2, 9, 8), strict=True)]
        assert np.allclose(OBLIQUE @ [*old_index, 1], new @ [*new_index, 1])


def test_the_affine_follows_cropping_and_padding_voxel_by_voxel() -> None:
    array = np.arange(1, 61).reshape(3, 4, 5)
    new = affine_after_crop_or_pad(OBLIQUE, (3, 4, 5), (6, 3, 5))
    cut = crop_or_pad(array, (6, 3, 5))
    for value in set(cut.ravel().tolist()) - {0}:
        before = OBLIQUE @ [*np.argwhere(array == value)[0], 1]
        after = new @ [*np.argwhere(cut == value)[0], 1]
        assert np.allclose(before, after)
