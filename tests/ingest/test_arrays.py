"""NumPy files: every layout numpy writes, no pickle, no size believed."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.errors import ShardError
from streaming_balance.ingest.arrays import read_array_file


def values(dtype: str = "<i2", shape: tuple[int, ...] = (2, 3, 4)) -> NDArray[Any]:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def with_header(text: str, payload: bytes = b"") -> bytes:
    """An .npy file of format 1 with any header text."""
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + payload


@pytest.mark.parametrize("dtype", ["?", "<i2", ">i2", "<f4", ">f8", "u1", "<f2", ">u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_dtype_and_order_reads_exactly(tmp_path: Path, dtype: str, order: Any) -> None:
    array = np.asarray(values(dtype), order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    np.savez_compressed(tmp_path / "b.npz", image=array)
    for name in ("a.npy", "a.npz", "b.npz"):
        volume = read_array_file(tmp_path / name)
        assert volume.array.tolist() == array.tolist()
        assert volume.array.dtype == np.dtype(dtype).newbyteorder("=")
        assert volume.array.flags.c_contiguous
        assert (volume.axes, volume.affine, volume.spacing) == ("DHW", None, None)


def test_an_array_larger_than_its_first_read_is_whole(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 1000, (40, 50, 60), dtype=np.int32)
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", array)
    assert np.array_equal(read_array_file(tmp_path / "a.npy").array, array)
    assert np.array_equal(read_array_file(tmp_path / "a.npz").array, array)


@pytest.mark.parametrize(
    ("shape", "declared", "found"),
    [
        ((4, 5), None, "HW"),
        ((3, 4, 5), None, "DHW"),
        ((3, 4, 5), "CHW", "CHW"),
        ((2, 3, 4, 5), None, "CDHW"),
    ],
)
def test_axes_follow_from_their_number_or_from_the_declaration(
    tmp_path: Path, shape: tuple[int, ...], declared: str | None, found: str
) -> None:
    np.save(tmp_path / "a.npy", values(shape=shape))
    assert read_array_file(tmp_path / "a.npy", axes=declared).axes == found


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 3, 4, 5), (0, 3, 4)])
def test_a_shape_that_is_no_image_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", values(shape=shape))
    with pytest.raises(ShardError, match=r"a\.npy: array of shape"):
        read_array_file(tmp_path / "a.npy")


def test_an_array_of_objects_is_refused_without_running_its_pickle(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was_run",))

    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npy", "a.npz", "b.npy"):
        with pytest.raises(ShardError, match=r"never read|not an \.npy header"):
            read_array_file(tmp_path / name)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("dtype", ["<c8", "<f16", "<U4", "<M8[s]", "V4"])
def test_dtypes_that_are_no_voxels_are_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 2), dtype=dtype))
    with pytest.raises(ShardError, match="expected bool, integer or float"):
        read_array_file(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000, 500)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 4)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (9223372036854775807, 9)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 'a')}",
        "{'descr': '<f8', 'fortran_order': False}",
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (1, 1)}",
        "__import__('os').getcwd()",
        "(" * 110,
        "",
        "{'descr': '<f8', 'fortran_order': 1, 'shape': (2, 2)}",
        "['descr', 'fortran_order', 'shape']",
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, header: str) -> None:
    raw = with_header(header, bytes(64))
    (tmp_path / "a.npy").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", raw)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ShardError, match=name.replace(".", r"\.")):
            read_array_file(tmp_path / name)


def test_a_volume_beyond_the_cap_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values())
    np.savez(tmp_path / "a.npz", values())
    for name in ("a.npy", "a.npz"):
        assert read_array_file(tmp_path / name, max_bytes=48).array.nbytes == 48
        with pytest.raises(ShardError, match="at most 47 are allowed"):
            read_array_file(tmp_path / name, max_bytes=47)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, values())
    whole = stream.getvalue()
    for kept in range(len(whole)):
        (tmp_path / "a.npy").write_bytes(whole[:kept])
        with pytest.raises(ShardError, match=r"a\.npy"):
            read_array_file(tmp_path / "a.npy")
    stream = io.BytesIO()
    np.savez_compressed(stream, values())
    whole = stream.getvalue()
    for kept in range(len(whole)):
        (tmp_path / "a.npz").write_bytes(whole[:kept])
        with pytest.raises(ShardError, match=r"a\.npz"):
            read_array_file(tmp_path / "a.npz")


def test_a_flipped_bit_in_a_compressed_array_is_refused_or_harmless(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, values())
    whole = stream.getvalue()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x04
        (tmp_path / "a.npz").write_bytes(damaged)
        try:
            found = read_array_file(tmp_path / "a.npz").array
        except ShardError:
            continue
        assert found.tolist() == values().tolist()


@pytest.mark.parametrize(("payload", "found"), [(7999, "found 7999"), (30_000, "found more")])
def test_an_archive_with_too_few_or_too_many_values_is_refused(
    tmp_path: Path, payload: int, found: str
) -> None:
    raw = with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (20, 20, 20)}")
    assert len(raw) == 128
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", (raw + bytes(30_000))[: 128 + payload])
    with pytest.raises(ShardError, match=rf"expected 8000 bytes of values, {found}"):
        read_array_file(tmp_path / "a.npz")


def test_an_archive_of_two_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=values(), y=values())
    with pytest.raises(ShardError, match="holds 2 members"):
        read_array_file(tmp_path / "a.npz")


def test_the_source_digest_is_that_of_the_stored_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values())
    expected = hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()
    assert read_array_file(tmp_path / "a.npy").source_digest == expected
