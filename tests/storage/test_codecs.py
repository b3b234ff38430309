"""The codecs give back every value, in bytes that any thread and any run writes alike."""

from __future__ import annotations

import io
import re
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs import blosc
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.blosc import compress, zero_ends
from streaming_balance.storage.codecs import (
    CHUNK_RAW_BYTES,
    decode,
    decode_into,
    decode_member,
    encode,
    voxel_digest,
)
from streaming_balance.storage.npy import DTYPE_NAMES, array_header, parse_header

CODECS = ("blosc", "npy")
HEADER_BYTES = 128


def volume(dtype: str = "int16", shape: tuple[int, ...] = (3, 70, 60, 50)) -> NDArray[Any]:
    """Make a foreground in a background of zeros, several chunks long."""
    generator = np.random.default_rng(7)
    values = generator.integers(1, 120, shape)
    return np.asarray(np.where(generator.random(shape) < 0.2, values, 0), dtype=dtype)


def arrays() -> st.SearchStrategy[NDArray[Any]]:
    """Draw arrays of every stored dtype and of shapes with 0 to 4 sides, some of them 0."""
    return hnp.arrays(
        st.sampled_from(DTYPE_NAMES).map(np.dtype),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
    )


def frame(chunk_bytes: int, lengths: list[int], *chunks: bytes, shape: str = "(2, 4)") -> bytes:
    """Build a .npb by hand for an int16 array."""
    text = f"{{'descr': '<i2', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    table = struct.pack(f"<{2 + len(lengths)}I", chunk_bytes, len(lengths), *lengths)
    return header + table + b"".join(chunks)


@given(array=arrays(), codec=st.sampled_from(CODECS))
def test_every_dtype_and_shape_comes_back_as_it_was(array: NDArray[Any], codec: str) -> None:
    back = decode(encode(array, codec), codec)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()  # NaNs and negative zeros too


@given(array=arrays())
def test_numpy_reads_the_npy_codec(array: NDArray[Any]) -> None:
    back = np.load(io.BytesIO(encode(array, "npy")), allow_pickle=False)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@given(array=arrays())
def test_a_header_numpy_writes_is_read(array: NDArray[Any]) -> None:
    stored = io.BytesIO()
    np.save(stored, array)
    assert decode(stored.getvalue(), "npy").tobytes() == array.tobytes()


def test_version_2_headers_are_read() -> None:
    stored = io.BytesIO()
    np.lib.format.write_array(stored, np.arange(6, dtype="<i4").reshape(2, 3), version=(2, 0))
    assert decode(stored.getvalue(), "npy").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("codec", CODECS)
def test_a_volume_of_several_chunks_comes_back(codec: str) -> None:
    image = volume()
    assert image.nbytes > CHUNK_RAW_BYTES
    np.testing.assert_array_equal(decode(encode(image, codec), codec), image)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("scratch_bytes", [None, 16, CHUNK_RAW_BYTES, 4 * CHUNK_RAW_BYTES])
@pytest.mark.parametrize("dtype", ["int16", "float32", "float16", "int64"])
def test_decoding_into_memory_casts_on_the_way(
    codec: str, scratch_bytes: int | None, dtype: str
) -> None:
    image = volume()
    out = np.full(image.shape, -1, dtype=dtype)
    scratch = None if scratch_bytes is None else bytearray(scratch_bytes)
    decode_into(encode(image, codec), codec, out, scratch)
    np.testing.assert_array_equal(out, image.astype(dtype))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_decoding_into_a_strided_view_leaves_its_surroundings_alone(codec: str, dtype: str) -> None:
    image = volume(shape=(2, 5, 6, 7))
    canvas = np.full((2, 9, 10, 11), 99, dtype=dtype)
    decode_into(encode(image, codec), codec, canvas[:, 2:7, 2:8, 2:9])
    expected = np.pad(image, ((0, 0), (2, 2), (2, 2), (2, 2)), constant_values=99)
    np.testing.assert_array_equal(canvas, expected)


def test_casting_needs_one_chunk_of_scratch_and_no_more() -> None:
    image = volume(shape=(16, 64, 64, 64))
    stored = encode(image, "blosc")
    out = np.empty(image.shape, dtype=np.float32)
    scratch = np.empty(CHUNK_RAW_BYTES, dtype=np.uint8)
    decode_into(stored, "blosc", out, scratch)
    tracemalloc.start()
    decode_into(stored, "blosc", out, scratch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < CHUNK_RAW_BYTES // 8


def test_memoryviews_and_bytearrays_are_decoded_without_a_copy_to_bytes() -> None:
    image = volume(shape=(4, 5))
    stored = encode(image, "blosc")
    np.testing.assert_array_equal(decode(memoryview(b"x" + stored)[1:], "blosc"), image)
    np.testing.assert_array_equal(decode(bytearray(stored), "blosc"), image)


@pytest.mark.parametrize("codec", CODECS)
def test_byte_order_and_strides_of_the_input_do_not_change_the_bytes(codec: str) -> None:
    image = volume(shape=(6, 7, 8))
    expected = encode(image, codec)
    assert encode(image.astype(">i2"), codec) == expected
    assert encode(np.asfortranarray(image), codec) == expected
    assert encode(image[::-1][::-1], codec) == expected


@pytest.mark.usefixtures("restored_blosc")
def test_encoding_gives_the_same_bytes_on_any_thread_and_with_any_blosc_setting() -> None:
    image = volume()
    expected = encode(image, "blosc")
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(encode(image, "blosc"))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for setting in (True, None, False):
        blosc.use_threads = setting
        blosc.set_nthreads(2)
        found.append(encode(image, "blosc"))
        assert blosc.use_threads is setting, "what other libraries set must be back"
    assert set(found) == {expected}


@pytest.fixture
def restored_blosc() -> Iterator[None]:
    """Put Blosc's process-wide settings back."""
    before = blosc.use_threads
    threads = blosc.set_nthreads(2)
    yield
    blosc.use_threads = before
    blosc.set_nthreads(threads)


def test_two_threads_decode_at_once_into_their_own_memory() -> None:
    images = [volume(shape=(2, 64, 64, 64)) + number for number in range(2)]
    stored = [encode(image.astype(np.int16), "blosc") for image in images]
    outs = [np.empty(images[0].shape, dtype=np.float32) for _ in images]

    def fill(number: int) -> None:
        for _ in range(20):
            decode_into(stored[number], "blosc", outs[number])

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for image, out in zip(images, outs, strict=True):
        np.testing.assert_array_equal(out, image)


def test_blosc_chunks_are_readable_by_any_blosc() -> None:
    image = np.arange(8, dtype=np.int16).reshape(2, 4)
    stored = encode(image, "blosc")
    chunk_bytes, count, length = struct.unpack_from("<3I", stored, HEADER_BYTES)
    assert (chunk_bytes, count) == (1 << 20, 1)
    chunk = stored[HEADER_BYTES + 12 :]
    assert len(chunk) == length
    assert np.frombuffer(blosc.decompress(chunk), "<i2").tolist() == image.ravel().tolist()


def test_webdataset_decoder_takes_npb_and_npy_and_leaves_the_rest() -> None:
    image = volume(shape=(3, 4))
    for codec, name in (("blosc", ".image.npb"), ("npy", "seg.npy")):
        decoded = decode_member(name, encode(image, codec))
        assert decoded is not None
        np.testing.assert_array_equal(decoded, image)
    assert decode_member(".cls", b"0") is None
    assert decode_member(".json", b"{}") is None
    assert decode_member(".notnpy", b"") is None


def test_the_content_digest_depends_on_axes_dtype_shape_and_values_alone() -> None:
    image = volume(shape=(4, 4, 4))
    digest = voxel_digest(image, "DHW")
    assert re.fullmatch("[0-9a-f]{32}", digest)
    assert digest == voxel_digest(np.asfortranarray(image.astype(">i2")), "DHW")
    others = {
        voxel_digest(image, "CHW"),
        voxel_digest(image.view("uint16"), "DHW"),
        voxel_digest(image.reshape(2, 8, 4), "DHW"),
        voxel_digest(image + np.int16(1), "DHW"),
    }
    assert len(others | {digest}) == 5


@pytest.mark.parametrize("dtype", ["object", "complex64", "U4", "datetime64[s]", "i2,i2"])
def test_dtypes_that_could_hide_something_are_not_stored(dtype: str) -> None:
    with pytest.raises(ConfigError, match="not stored"):
        encode(np.zeros(2, dtype=dtype), "npy")


def test_an_unknown_codec_is_named_with_what_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"'blosk' is unknown.*Did you mean 'blosc'"):
        encode(np.zeros(2), "blosk")
    with pytest.raises(ConfigError, match="'zip' is unknown"):
        decode(b"", "zip")


def test_more_dimensions_than_numpy_can_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="33 dimensions"):
        array_header(np.dtype("int8"), (1,) * 33)


def test_a_target_of_another_shape_or_a_lossy_kind_is_refused() -> None:
    stored = encode(np.ones((2, 3), dtype=np.float32), "blosc")
    with pytest.raises(ConfigError, match=r"shape \(3, 2\).*\(2, 3\)"):
        decode_into(stored, "blosc", np.empty((3, 2), dtype=np.float32))
    with pytest.raises(ConfigError, match="float32; filling int16 would lose"):
        decode_into(stored, "blosc", np.empty((2, 3), dtype=np.int16))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", "dtype '|O'.*never objects"),
        ("{'descr': '>i2', 'fortran_order': False, 'shape': (2,), }", "dtype '>i2'"),
        ("{'descr': '<i2', 'fortran_order': True, 'shape': (2,), }", "Fortran order"),
        ("{'descr': '<i2', 'fortran_order': False, 'shape': (2), }", "not a tuple"),
        ("{'descr': '<i2', 'fortran_order': False, 'shape': (2 3,), }", "no list of sides"),
        ("{'descr': '<i2', 'fortran_order': False, 'shape': (,2), }", "no list of sides"),
        ("{'descr': '<i2', 'fortran_order': False, 'shape': (-2,), }", "plain array"),
        ("{'descr': '<i2', 'fortran_order': False, 'shape': (99999999999999999999,), }", "sides"),
        ("{'descr': '<i2', 'fortran_order': False, 'shape': (" + "1," * 33 + "), }", "33 dim"),
        ("{'descr': [('a', '<i2')], 'fortran_order': False, 'shape': (2,), }", "plain array"),
        ("{'descr': '<i2', 'descr': '<i2', 'shape': (2,), }", "plain array"),
        ("{'descr': '<i2', 'shape': (2,), }", "plain array"),
        ("__import__('os').system('true')", "plain array"),
        ("(" * 5000, "plain array"),
    ],
)
def test_headers_that_are_no_plain_array_are_refused(text: str, problem: str) -> None:
    stored = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64)
    with pytest.raises(ShardError, match=problem):
        parse_header(stored)


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        (b"", "no .npy header"),
        (b"\x93NUMPY\x01\x00", "no .npy header"),
        (b"\x93NUMPY\x03\x00" + bytes(120), "no .npy header"),
        (b"\x93NUMPY\x01\x01" + bytes(120), "no .npy header"),
        (b"\x89NUMPY\x01\x00" + bytes(120), "no .npy header"),
        (b"\x93NUMPY\x01\x00\xff\xff" + bytes(120), "65,535 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(120), "4,294,967,295 bytes"),
        (b"\x93NUMPY\x01\x00\x76\x00" + bytes(100), "ends at byte 128, the bytes end at 110"),
    ],
)
def test_bytes_without_a_whole_header_are_refused(stored: bytes, problem: str) -> None:
    with pytest.raises(ShardError, match=problem):
        parse_header(stored)


@pytest.mark.parametrize("codec", CODECS)
def test_a_claim_of_terabytes_is_refused_before_memory_is_taken(codec: str) -> None:
    header = array_header(np.dtype("float64"), (1024, 1024, 1024, 480))  # 3.75 TiB
    tracemalloc.start()
    with pytest.raises(ShardError, match=r"claims shape \(1024, 1024, 1024, 480\)"):
        decode(header + bytes(1000), codec)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_npy_bytes_beyond_the_claim_are_refused() -> None:
    with pytest.raises(ShardError, match="= 4 bytes, but the npy member holds 5 bytes"):
        decode(encode(np.zeros(4, dtype=np.uint8), "npy") + b"x", "npy")


CHUNK = blosc.compress(np.arange(8, dtype=np.int16), b"lz4", 5, blosc.SHUFFLE, 0)


def changed(chunk: bytes, position: int, value: bytes) -> bytes:
    """Overwrite some bytes."""
    return chunk[:position] + value + chunk[position + len(value) :]


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        (frame(1 << 20, [len(CHUNK)], CHUNK)[:134], "inside its chunk table"),
        (frame(1 << 20, [len(CHUNK)])[:-2], "inside its chunk table"),
        (frame(0, [len(CHUNK)], CHUNK), "chunks of 0 raw bytes"),
        (frame(3, [len(CHUNK)], CHUNK), "cannot hold whole int16"),
        (frame(8, [len(CHUNK)], CHUNK), "counts 1 chunks, the shape needs 2"),
        (frame(1 << 20, [len(CHUNK) + 1], CHUNK), "the member at"),
        (frame(1 << 20, [len(CHUNK)], CHUNK, b"x"), "the member at"),
        (frame(1 << 20, [15], bytes(15)), "holds 15 bytes: no header"),
        (frame(1 << 20, [len(CHUNK)], changed(CHUNK, 0, b"\x05")), "not Blosc LZ4"),
        (frame(1 << 20, [len(CHUNK)], changed(CHUNK, 2, b"\x61")), "not Blosc LZ4"),
        (frame(1 << 20, [len(CHUNK)], changed(CHUNK, 3, b"\x01")), "1-byte items"),
        (frame(1 << 20, [len(CHUNK)], changed(CHUNK, 4, b"\xff\xff\xff\x7f")), "2147483647 raw"),
        (frame(1 << 20, [len(CHUNK)], changed(CHUNK, 8, b"\xff\xff\xff\x7f")), "blocks of"),
        (frame(1 << 20, [len(CHUNK)], changed(CHUNK, 8, bytes(4))), "blocks of 0"),
        (frame(1 << 20, [len(CHUNK)], changed(CHUNK, 12, b"\x01")), "1 stored bytes"),
    ],
)
def test_a_blosc_frame_that_contradicts_itself_is_refused(stored: bytes, problem: str) -> None:
    assert decode(frame(1 << 20, [len(CHUNK)], CHUNK), "blosc").ravel().tolist() == list(range(8))
    with pytest.raises(ShardError, match=problem):
        decode(stored, "blosc")


def test_a_damaged_compressed_block_is_an_error_not_a_crash() -> None:
    stored = encode(volume(shape=(40, 40, 40)), "blosc")
    start = HEADER_BYTES + 12 + 16  # where the chunk's block offsets stand
    with pytest.raises(ShardError, match="damaged"):
        decode(changed(stored, start, b"\xff\xff\xff\x7f"), "blosc")


@given(position=st.integers(0, 2**20), value=st.integers(0, 255), casting=st.booleans())
def test_any_changed_byte_gives_an_array_or_a_shard_error(
    position: int, value: int, casting: bool
) -> None:
    stored = bytearray(encode(volume(shape=(20, 20, 20)), "blosc"))
    stored[position % len(stored)] = value
    out = np.zeros((20, 20, 20), dtype=np.float64 if casting else np.int16)
    try:
        decode_into(stored, "blosc", out)
    except (ShardError, ConfigError):
        return
    assert out.shape == (20, 20, 20)


BLOCK_RAW_BYTES = 1 << 18  # what Blosc cuts a chunk of this size, level and item size into


def blocks(pattern: str, dtype: str = "int16") -> NDArray[Any]:
    """Make an array of Blosc blocks: `0` all zero, `x` noise, `.` zero but for one element."""
    items = BLOCK_RAW_BYTES // np.dtype(dtype).itemsize
    generator = np.random.default_rng(3)
    made = np.zeros((len(pattern), items), dtype)
    for number, kind in enumerate(pattern):
        if kind == "x":
            made[number] = generator.integers(0, 100, items)
        elif kind == ".":
            made[number, items // 2] = 1
    return made.reshape(-1)


def test_a_chunk_is_compressed_on_the_calling_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    switches: list[object] = []
    real = blosc.compress

    def noting(*arguments: object) -> object:
        switches.append(blosc.use_threads)
        return real(*arguments)

    # Blosc's own threads would place the blocks in whatever order they finish.
    monkeypatch.setattr(blosc, "compress", noting)
    monkeypatch.setattr(blosc, "use_threads", True)
    chunk = compress(np.zeros(1 << 19, np.int16))
    assert (switches, blosc.use_threads) == ([False], True)
    assert zero_ends(memoryview(chunk)).before == 1 << 20


@pytest.fixture
def raw_bytes_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the raw bytes Blosc is asked to decode; it decodes them as ever."""
    decoded: list[int] = []
    real = blosc.decompress

    def counting(chunk: memoryview, out: memoryview) -> object:
        decoded.append(memoryview(out).nbytes)
        return real(chunk, out)

    monkeypatch.setattr(blosc, "decompress", counting)
    return decoded


@pytest.mark.parametrize("target", ["int16", "float32"])
@pytest.mark.parametrize(
    ("pattern", "needed"),
    [
        ("0000", 0),
        ("00xx", 2),
        ("xx00", 2),
        ("0x.0", 2),
        ("x00x", 4),
        (".000", 1),
        ("xxxx", 4),
        ("0000xxxx00x", 5 + 2),
    ],
)
def test_blocks_of_zeros_at_the_ends_of_a_chunk_are_never_decoded(
    raw_bytes_decoded: list[int], pattern: str, needed: int, target: str
) -> None:
    array = blocks(pattern)
    # The last chunk is shorter than a block pattern of four; its blocks are as long.
    out = np.full(array.shape, 7, target)
    decode_into(encode(array, "blosc"), "blosc", out)
    np.testing.assert_array_equal(out, array)
    assert sum(raw_bytes_decoded) <= needed * BLOCK_RAW_BYTES


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float32", "float64"])
def test_zeros_come_back_in_every_dtype(raw_bytes_decoded: list[int], dtype: str) -> None:
    for length in (CHUNK_RAW_BYTES, 3 * CHUNK_RAW_BYTES + 24, 1000):
        array = np.zeros(length // np.dtype(dtype).itemsize, dtype)
        out = np.ones_like(array)
        decode_into(encode(array, "blosc"), "blosc", out)
        np.testing.assert_array_equal(out, array)
        array[-1] = 1
        np.testing.assert_array_equal(decode(encode(array, "blosc"), "blosc"), array)
    assert sum(raw_bytes_decoded) <= CHUNK_RAW_BYTES + 5 * BLOCK_RAW_BYTES


def test_negative_zero_is_no_block_of_zeros() -> None:
    array = np.zeros(CHUNK_RAW_BYTES // 4, np.float32)
    array[: BLOCK_RAW_BYTES // 4] = -0.0
    assert np.signbit(decode(encode(array, "blosc"), "blosc")).sum() == BLOCK_RAW_BYTES // 4


@example(pattern="0", at=1, value=0)  # an unknown version of LZ4, in a chunk of nothing but zeros
@given(
    pattern=st.text("0x.", min_size=1, max_size=9),
    at=st.integers(0, 400),
    value=st.integers(0, 255),
)
def test_damage_between_zeros_gives_what_blosc_alone_gives_or_an_error(
    pattern: str, at: int, value: int
) -> None:
    """What is taken off a chunk never hides damage that Blosc would have found."""
    stored = bytearray(encode(blocks(pattern), "blosc"))
    chunks_at = len(stored) - sum(
        struct.unpack_from(f"<{-(-len(pattern) // 4)}I", stored, HEADER_BYTES + 8)
    )
    place = min(chunks_at + at, len(stored) - 1)
    stored[place] = value
    try:
        found = decode(bytes(stored), "blosc")
    except ShardError:
        return
    expected, position = np.empty_like(found), chunks_at
    for start in range(0, len(found), CHUNK_RAW_BYTES // 2):
        length = struct.unpack_from("<I", stored, position + 12)[0]
        part = expected[start : start + CHUNK_RAW_BYTES // 2]
        blosc.decompress(bytes(stored[position : position + length]), part)
        position += length
    np.testing.assert_array_equal(found, expected)
