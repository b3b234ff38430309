"""Named random streams: known answers, typed names, seeds that never wrap."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import check_seed, name_hashes, stream_key, words

# philox4x64, 10 rounds, from the known answer file (kat_vectors) of Random123 1.14:
# counter, key and answer, each with its lowest word first.
KNOWN_PHILOX = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (2**64 - 1,) * 4,
        (2**64 - 1,) * 2,
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]
PARTS = st.lists(
    st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=6), st.binary(max_size=6)), max_size=4
)


def joined(limbs: tuple[int, ...]) -> int:
    return sum(limb << (64 * place) for place, limb in enumerate(limbs))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_PHILOX)
def test_philox_words_are_those_of_the_random123_known_answer_file(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    # numpy counts up before it encrypts, so block b is the encryption of counter b + 1.
    block = (joined(counter) - 1) % 2**256
    assert tuple(words(joined(key), 4, first_block=block).tolist()) == answer


@given(key=st.integers(0, 2**128 - 1), start=st.integers(0, 50), count=st.integers(0, 30))
def test_a_stream_can_be_read_from_any_block(key: int, start: int, count: int) -> None:
    whole = words(key, 4 * start + count)
    np.testing.assert_array_equal(words(key, count, first_block=start), whole[4 * start :])


def test_a_stream_key_is_the_blake2b_digest_of_its_typed_and_measured_parts() -> None:
    name = b"i\x01\x00\x00\x00\x2a" + b"s\x05\x00\x00\x00order" + b"s\x03\x00\x00\x00LGG"
    name += b"i\x02\x00\x00\x00\xc8\x00" + b"b\x01\x00\x00\x00\xff"
    digest = hashlib.blake2b(name, digest_size=16, person=b"sb-stream-v1").digest()
    assert stream_key(42, "order", "LGG", 200, b"\xff") == int.from_bytes(digest, "little")


@given(first=PARTS, second=PARTS)
def test_different_names_have_different_keys(
    first: list[int | str | bytes], second: list[int | str | bytes]
) -> None:
    typed = [[(type(part), part) for part in parts] for parts in (first, second)]
    keys = [stream_key(0, "any", *parts) for parts in (first, second)]
    assert (keys[0] == keys[1]) == (typed[0] == typed[1])


def test_parts_that_look_alike_are_told_apart() -> None:
    names: list[tuple[int | str | bytes, ...]] = [
        (1,), ("1",), (b"1",), (-1,), (255,), (256,), (127,), (128,), (-128,), (-129,),
        ("ab", "c"), ("a", "bc"), ("abc",), (), ("",), (0,), (b"",),
    ]  # fmt: skip
    assert len({stream_key(7, "x", *name) for name in names}) == len(names)


def test_seed_and_epoch_are_not_added_up() -> None:
    grid = {stream_key(seed, "order", epoch) for seed in range(40) for epoch in range(40)}
    assert len(grid) == 1600


def test_words_of_neighbouring_names_are_unrelated() -> None:
    rows = [words(stream_key(0, "order", number), 64) for number in range(64)]
    bits = np.unpackbits(np.concatenate(rows).view(np.uint8)).reshape(64, -1).astype(int)
    equal = (bits[1:] == bits[:-1]).mean(axis=1)
    # 4096 fair bits per pair: 6 standard deviations around one half.
    assert np.abs(equal - 0.5).max() < 6 * 0.5 / 64


def test_a_hash_depends_on_its_own_name_only() -> None:
    names = np.array(["P1", "P10", "ä", "", "P1"])
    hashes = name_hashes(names)
    assert hashes[0] == hashes[4]
    assert len(set(hashes.tolist())) == 4
    np.testing.assert_array_equal(name_hashes(names[::-1]), hashes[::-1])
    np.testing.assert_array_equal(name_hashes(names.astype("U40")), hashes)
    expected = hashlib.blake2b(b"P1", digest_size=8, person=b"sb-name-v1").digest()
    assert hashes[0] == int.from_bytes(expected, "little")


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, np.int64(5), np.uint64(2**64 - 1)])
def test_every_64_bit_integer_is_a_seed(seed: int) -> None:
    checked = check_seed(seed)
    assert checked == int(seed)
    assert type(checked) is int


@pytest.mark.parametrize(
    "seed",
    [-1, 2**64, 1.0, 1.5, True, False, np.bool_(True), np.float64(3), "42", None, [1],
     np.array([1.5, 2]), torch.tensor(1.5)],
)  # fmt: skip
def test_a_seed_that_is_none_is_refused_with_its_range(seed: object) -> None:
    with pytest.raises(ConfigError, match=r"compute.seed is .* from 0 to 18446744073709551615"):
        check_seed(seed, setting="compute.seed")
