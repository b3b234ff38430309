"""NIfTI files: the voxels nibabel gives, for real files and for every trap we know."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import nibabel as untyped_nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.errors import ShardError
from streaming_balance.ingest import sources
from streaming_balance.ingest.nifti import read_nifti, scale_exactly, stamps_of_nifti
from streaming_balance.ingest.volume import check_values

nibabel: Any = untyped_nibabel


def nibabel_voxels(path: Path) -> NDArray[Any]:
    """What nibabel reads, with the fourth axis in front as channels."""
    voxels: NDArray[Any] = np.asanyarray(nibabel.load(path).dataobj)
    if voxels.ndim == 4:
        voxels = voxels[..., 0] if voxels.shape[3] == 1 else np.moveaxis(voxels, 3, 0)
    return voxels


def written(path: Path, array: NDArray[Any], *, kind: Any = None, **fields: Any) -> Path:
    """Write an image with nibabel, then overwrite header fields as given."""
    image = (kind or nibabel.Nifti1Image)(array, np.diag([2.0, 3.0, 4.0, 1.0]))
    nibabel.save(image, path)
    edit_header(path, **fields)
    return path


def edit_header(path: Path, **fields: Any) -> None:
    """Overwrite fields of a stored NIfTI-1 header without any check."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        raw = bytearray(file.read())
    header = np.frombuffer(raw[:348], dtype=nibabel.Nifti1Header.template_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.tobytes()
    with opened(path, "wb") as file:
        file.write(bytes(raw))


def small(dtype: str = "int16") -> NDArray[Any]:
    return np.arange(24, dtype=dtype).reshape(2, 3, 4)


def test_every_shared_file_has_the_voxels_nibabel_finds(shared_data: Path) -> None:
    expected = json.loads((shared_data / "expected.json").read_text())
    names = [name for name in expected if name.startswith("nifti/")]
    assert len(names) == 27
    for name in names:
        found = expected[name]
        if "nibabel_error" in found:
            with pytest.raises(ShardError, match="not a NIfTI file"):
                read_nifti(shared_data / name)
            continue
        volume = read_nifti(shared_data / name)
        voxels = nibabel_voxels(shared_data / name)
        assert np.array_equal(volume.array, voxels), name
        assert volume.array.dtype.newbyteorder("=") == voxels.dtype.newbyteorder("="), name
        assert volume.array.dtype.isnative, name
        assert volume.array.flags.c_contiguous, name
        assert volume.affine is not None
        assert np.allclose(volume.affine, found["affine"], atol=1e-6), name
        assert volume.spacing == pytest.approx(found["zooms"][:3], abs=1e-5), name
        total = volume.array.sum(dtype=np.float64)
        assert total == pytest.approx(found["sum"], rel=1e-12), name
        shape = [length for length in found["shape"] if length > 1 or len(found["shape"]) == 3]
        assert list(volume.space) == shape[:3], name


def test_both_halves_of_a_pair_lead_to_the_same_volume(shared_data: Path) -> None:
    folder = shared_data / "nifti/N03_niftirs_minimal_pairs"
    single = read_nifti(folder / "minimal.nii")
    for name in ("minimal.hdr", "minimal.img", "minimal.hdr.gz", "minimal.img.gz"):
        assert np.array_equal(read_nifti(folder / name).array, single.array)
        assert len(stamps_of_nifti(folder / name)) == 2


def test_a_compressed_header_finds_uncompressed_voxels(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(small(), np.eye(4)), tmp_path / "a.hdr")
    (tmp_path / "a.hdr.gz").write_bytes(gzip.compress((tmp_path / "a.hdr").read_bytes()))
    (tmp_path / "a.hdr").unlink()
    assert np.array_equal(read_nifti(tmp_path / "a.hdr.gz").array, small())


def test_a_pair_with_one_half_missing_names_the_other(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(small(), np.eye(4)), tmp_path / "a.hdr")
    (tmp_path / "a.img").unlink()
    with pytest.raises(ShardError, match=r"a\.hdr: the file with its voxels.*a\.img"):
        read_nifti(tmp_path / "a.hdr")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("code", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".hdr", ".hdr.gz"])
def test_every_dtype_byte_order_and_version_reads_exactly(
    tmp_path: Path, order: str, version: int, code: str, suffix: str
) -> None:
    kind = "Pair" if "hdr" in suffix else "Image"
    image_class = getattr(nibabel, f"Nifti{version}{kind}")
    limits = np.iinfo(code) if code[0] in "iu" else np.finfo(code)
    array = np.array([[[limits.min, limits.max, 0, 1]], [[2, 3, 5, 7]]], dtype=code)
    header = image_class.header_class(endianness=order)
    header.set_data_dtype(np.dtype(f"{order}{code}"))
    path = tmp_path / f"a{suffix}"
    nibabel.save(image_class(array, np.eye(4), header, dtype=np.dtype(f"{order}{code}")), path)
    volume = read_nifti(path)
    assert volume.array.dtype == np.dtype(code)
    assert volume.array.tolist() == array.tolist()


@pytest.mark.parametrize("slope", [0.0, float("nan"), float("inf")])
def test_a_slope_of_zero_or_nan_means_no_scaling(tmp_path: Path, slope: float) -> None:
    path = written(tmp_path / "a.nii", small(), scl_slope=slope, scl_inter=99.0)
    assert read_nifti(path).array.tolist() == small().tolist()
    assert nibabel_voxels(path).tolist() == small().tolist()


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [
        (2.0, 0.0, "int16"),
        (1.0, -1024.0, "int16"),
        (0.5, 0.25, "float32"),
        (1.0, 40000.0, "float32"),
        (0.1, 0.0, "float64"),
        (1e300**0.12, 3.0, "float64"),
    ],
)
def test_slope_and_intercept_give_nibabels_values_in_the_narrowest_exact_dtype(
    tmp_path: Path, slope: float, intercept: float, dtype: str
) -> None:
    path = written(tmp_path / "a.nii", small(), scl_slope=slope, scl_inter=intercept)
    volume = read_nifti(path)
    assert volume.array.dtype == dtype
    assert np.array_equal(volume.array, nibabel_voxels(path))


@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8),
    slope=st.sampled_from([1.0, 2.0, -1.0, 0.5, 3.7]),
    intercept=st.sampled_from([0.0, 1.0, -1024.0, 0.1, 2.0**62]),
)
def test_no_scaled_value_ever_differs_from_the_float64_result(
    values: list[int], slope: float, intercept: float
) -> None:
    for dtype in ("int64", "int16"):
        stored = np.array(values).astype(dtype)
        expected = stored.astype(np.float64) * slope + intercept
        scaled = scale_exactly(stored, slope=slope, intercept=intercept)
        assert np.array_equal(scaled.astype(np.float64), expected)
        if scaled.dtype.kind == "i":
            assert [int(value) for value in scaled] == [int(value) for value in expected]


def test_the_fourth_axis_becomes_the_channels(tmp_path: Path) -> None:
    array = np.arange(120, dtype=np.int16).reshape(2, 3, 4, 5)
    volume = read_nifti(written(tmp_path / "a.nii.gz", array))
    assert (volume.axes, volume.array.shape, volume.space) == ("CDHW", (5, 2, 3, 4), (2, 3, 4))
    assert np.array_equal(volume.array[4], array[..., 4])


def test_a_fifth_axis_of_vectors_becomes_the_channels_too(tmp_path: Path) -> None:
    array = np.arange(72, dtype=np.int16).reshape(2, 3, 4, 1, 3)
    volume = read_nifti(written(tmp_path / "a.nii", array))
    assert volume.axes == "CDHW"
    assert np.array_equal(volume.array[1], array[..., 0, 1])


def test_a_fourth_axis_of_one_is_squeezed_and_a_third_is_kept(tmp_path: Path) -> None:
    volume = read_nifti(written(tmp_path / "a.nii", small()[..., None]))
    assert (volume.axes, volume.array.shape) == ("DHW", (2, 3, 4))
    slab = read_nifti(written(tmp_path / "b.nii", small()[:, :, :1]))
    assert (slab.axes, slab.array.shape) == ("DHW", (2, 3, 1))


def test_an_image_of_two_axes_stays_an_image(tmp_path: Path) -> None:
    volume = read_nifti(written(tmp_path / "a.nii", small()[0]))
    assert (volume.axes, volume.array.tolist()) == ("HW", small()[0].tolist())
    assert volume.spacing == (2.0, 3.0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dim": [3, -2, 3, 4, 1, 1, 1, 1]}, r"dim\[1\] is -2"),
        ({"dim": [3, 2, 0, 4, 1, 1, 1, 1]}, r"dim\[2\] is 0"),
        ({"dim": [9, 2, 3, 4, 1, 1, 1, 1]}, r"dim\[0\] is 9"),
        ({"dim": [0, 2, 3, 4, 1, 1, 1, 1]}, r"dim\[0\] is 0"),
        ({"dim": [1, 24, 1, 1, 1, 1, 1, 1]}, r"dim\[0\] is 1"),
        ({"dim": [5, 2, 1, 1, 3, 4, 1, 1]}, r"dim is .*at most one axis beyond the third"),
        ({"dim": [7] + [32767] * 7}, r"dim is"),
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, r"dim is .*70362301923326 bytes"),
        ({"bitpix": 8}, "bitpix is 8"),
        ({"datatype": 32}, "datatype is 32"),
        ({"datatype": 128, "bitpix": 24}, "datatype is 128"),
        ({"vox_offset": 1e6}, "begin at byte 1000000"),
        ({"vox_offset": 1e9}, "vox_offset is 1000000000.0"),
        ({"vox_offset": float("nan")}, "vox_offset is nan"),
        ({"vox_offset": -352.0}, "vox_offset is -352.0"),
        ({"vox_offset": 0.0}, "vox_offset is 0.0"),
        ({"vox_offset": 380.0}, "expected 48 bytes of voxels from byte 380"),
        ({"srow_y": [0, float("nan"), 0, 0]}, r"srow_y is \[0.0, nan, 0.0, 0.0\]"),
        ({"srow_x": 0, "srow_y": 0, "srow_z": 0}, "srow_x, srow_y, srow_z is without volume"),
        ({"qform_code": 1, "quatern_c": float("inf")}, "quatern_c is"),
        ({"qform_code": 1, "qoffset_z": float("nan")}, "qoffset_z is"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 2.0}, "quatern_b, quatern_c, quatern_d"),
        ({"sform_code": 0, "pixdim": [1, 1, float("nan"), 1, 0, 0, 0, 0]}, "pixdim is"),
        ({"sform_code": 0, "pixdim": [1, 1, 0, 1, 0, 0, 0, 0]}, "pixdim is without volume"),
        ({"scl_slope": 2.0, "scl_inter": float("nan")}, "scl_inter is nan"),
        ({"magic": b"ni1"}, "magic is that of a pair"),
        ({"magic": b"JOE"}, "magic is that of no NIfTI file"),
        ({"sizeof_hdr": 123}, "sizeof_hdr is neither 348"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_wrong_header_field_is_named(
    tmp_path: Path, fields: dict[str, Any], named: str, suffix: str
) -> None:
    path = written(tmp_path / f"a{suffix}", small(), **fields)
    with pytest.raises(ShardError, match=named) as raised:
        read_nifti(path)
    assert str(path) in str(raised.value)


def test_an_analyze_file_without_nifti_magic_is_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.AnalyzeImage(small(), np.eye(4)), tmp_path / "a.hdr")
    with pytest.raises(ShardError, match="magic is that of no NIfTI file"):
        read_nifti(tmp_path / "a.hdr")


def test_a_volume_beyond_the_cap_is_refused_and_one_at_the_cap_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.nii", small())
    assert read_nifti(path, max_bytes=48).array.nbytes == 48
    with pytest.raises(ShardError, match=r"means 48 bytes of voxels; expected at most 47"):
        read_nifti(path, max_bytes=47)
    # Scaling passes through float64: 24 voxels of 8 bytes.
    scaled = written(tmp_path / "b.nii", small(), scl_slope=2.0, scl_inter=0.0)
    with pytest.raises(ShardError, match="means 192 bytes"):
        read_nifti(scaled, max_bytes=48)


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 100, 347, 348, 351, 352, 399])
def test_a_file_cut_short_is_refused_wherever_it_was_cut(tmp_path: Path, kept: int) -> None:
    whole = written(tmp_path / "a.nii", small()).read_bytes()
    assert len(whole) == 400
    (tmp_path / "cut.nii").write_bytes(whole[:kept])
    with pytest.raises(ShardError, match=r"cut\.nii"):
        read_nifti(tmp_path / "cut.nii")


def test_a_compressed_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.nii.gz", small()).read_bytes()
    for kept in range(len(whole)):
        (tmp_path / "cut.nii.gz").write_bytes(whole[:kept])
        with pytest.raises(ShardError, match=r"cut\.nii\.gz"):
            read_nifti(tmp_path / "cut.nii.gz")


def test_a_flipped_bit_in_a_compressed_file_never_changes_voxels_silently(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.nii.gz", small()).read_bytes()
    refused = 0
    for place in range(10, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "bad.nii.gz").write_bytes(damaged)
        try:
            voxels = read_nifti(tmp_path / "bad.nii.gz").array
        except ShardError:
            refused += 1
        else:
            # The stored name inside the gzip header is covered by no checksum and changes nothing.
            assert voxels.tolist() == small().tolist()
    assert refused > 0.8 * len(whole)


def test_a_compressed_file_under_an_uncompressed_name_is_read(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.nii.gz", small()).read_bytes()
    (tmp_path / "b.nii").write_bytes(whole)
    assert read_nifti(tmp_path / "b.nii").array.tolist() == small().tolist()


def test_without_isal_the_standard_library_reads_and_refuses_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(tmp_path / "a.nii.gz", small()).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[:-9])
    (tmp_path / "bad.nii.gz").write_bytes(whole[:30] + bytes(20) + whole[50:])
    monkeypatch.setitem(sys.modules, "isal", None)
    sources._read_errors.cache_clear()
    assert read_nifti(tmp_path / "a.nii.gz").array.tolist() == small().tolist()
    for name in ("cut.nii.gz", "bad.nii.gz"):
        with pytest.raises(ShardError, match="cut short or damaged"):
            read_nifti(tmp_path / name)
    sources._read_errors.cache_clear()


def test_padding_after_the_voxels_is_no_harm(tmp_path: Path) -> None:
    path = written(tmp_path / "a.nii", small())
    padded = path.read_bytes() + bytes(4096)
    (tmp_path / "b.nii").write_bytes(padded)
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(padded))
    for name in ("b.nii", "c.nii.gz"):
        assert read_nifti(tmp_path / name).array.tolist() == small().tolist()


def test_missing_empty_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "zero.nii").touch()
    with pytest.raises(ShardError, match=r"zero\.nii: empty file, 0 bytes"):
        read_nifti(tmp_path / "zero.nii")
    with pytest.raises(ShardError, match=r"none\.nii: cannot be opened"):
        read_nifti(tmp_path / "none.nii")
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(ShardError, match=r"folder\.nii: cannot be opened"):
        read_nifti(tmp_path / "folder.nii")


def test_the_source_digest_is_that_of_the_stored_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.nii.gz", small())
    assert read_nifti(path).source_digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_nan_infinite_and_constant_images_are_refused_but_constant_masks_are_not() -> None:
    path = Path("P1.nii")
    array = np.arange(8, dtype=np.float32)
    check_values(array, path=path, is_mask=False)
    for value in (np.nan, np.inf, -np.inf):
        broken = array.copy()
        broken[3] = value
        for is_mask in (False, True):
            with pytest.raises(ShardError, match="1 of 8 voxels are NaN or infinite"):
                check_values(broken, path=path, is_mask=is_mask)
    constant = np.full(8, 7, dtype=np.int16)
    with pytest.raises(ShardError, match="constant volume, every voxel is 7"):
        check_values(constant, path=path, is_mask=False)
    check_values(constant, path=path, is_mask=True)
