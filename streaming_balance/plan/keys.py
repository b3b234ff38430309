"""Random streams reached by name.

Every random decision of a plan has a name: a purpose and the things it is about. The name gives a
128-bit key, the key gives words. Two names never share a stream, so there is no seed + epoch, no
generator that remembers, and nothing that depends on who asked first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import whole_number

MAX_SEED = 2**64 - 1
KEY_BYTES = 16
# A part is written as its type, its length and its bytes; integers of up to 64 bits are many.
_INTEGER_STARTS = tuple(b"i" + length.to_bytes(4, "little") for length in range(10))


def check_seed(seed: object, *, setting: str = "seed") -> int:
    """Give `seed` as a plain integer.

    Args:
        seed: an integer in [0, 2**64 - 1]; numpy integers are welcome, floats and bools are not.
        setting: the name to use in the message.

    Raises:
        ConfigError: not an integer, or outside the range. Nothing wraps around.

    Examples:
        >>> check_seed(np.int64(42))
        42
    """
    number = whole_number(seed)
    if number is None or not 0 <= number <= MAX_SEED:
        raise ConfigError(f"{setting} is {seed!r}; it must be an integer from 0 to {MAX_SEED}.")
    return number


def stream_key(seed: int, purpose: str, *parts: int | str | bytes) -> int:
    """Name a random stream and get its 128-bit key.

    Args:
        seed: the run's seed, in [0, 2**64 - 1].
        purpose: what the stream decides, such as `"order"`.
        parts: what it is about, such as a class label and a pass number. `1` and `"1"` are two
            different parts, and so are `("ab", "c")` and `("a", "bc")`.

    Returns:
        An integer in [0, 2**128).

    Examples:
        >>> stream_key(42, "order", "LGG", 1) == stream_key(43, "order", "LGG", 0)
        False
        >>> stream_key(0, "order", 1) == stream_key(0, "order", "1")
        False
    """
    return key_family(seed, purpose)(*parts)


def key_family(seed: int, purpose: str, *parts: int | str | bytes) -> Callable[..., int]:
    """Give the keys of all streams whose names begin alike, hashing the beginning once.

    Args:
        seed: as for `stream_key`.
        purpose: as for `stream_key`.
        parts: the parts that the names have in common.

    Returns:
        A function from the remaining parts to the key that `stream_key` gives for the whole name.

    Examples:
        >>> key_family(42, "order", "LGG")(1) == stream_key(42, "order", "LGG", 1)
        True
    """
    beginning = hashlib.blake2b(digest_size=KEY_BYTES, person=b"sb-stream-v1")
    beginning.update(b"".join(map(_encoded, (seed, purpose, *parts))))

    def key(*rest: int | str | bytes) -> int:
        digest = beginning.copy()
        digest.update(b"".join(map(_encoded, rest)))
        return int.from_bytes(digest.digest(), "little")

    return key


def _encoded(part: int | str | bytes) -> bytes:
    """Write one part so that no two names read alike: its type, its length, its bytes."""
    if isinstance(part, int):
        length = part.bit_length() // 8 + 1
        start = _INTEGER_STARTS[length] if length < 10 else b"i" + length.to_bytes(4, "little")
        return start + part.to_bytes(length, "little", signed=True)
    tag, payload = (b"s", part.encode()) if isinstance(part, str) else (b"b", part)
    return tag + len(payload).to_bytes(4, "little") + payload


def words(key: int, count: int, *, first_block: int = 0) -> NDArray[np.uint64]:
    """Give `count` raw 64-bit words of a stream.

    Raw Philox words are the only thing taken from numpy's generators: their methods may change
    between releases, the raw words may not.

    Args:
        key: a 128-bit key from `stream_key`.
        count: how many words, at least 0.
        first_block: where to start, in blocks of four words.

    Returns:
        `(count,)` words, uniform on [0, 2**64).

    Source:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox 4x64-10).

    Examples:
        >>> bool((words(7, 8)[4:] == words(7, 4, first_block=1)).all())
        True
    """
    generator = np.random.Philox(key=key, counter=first_block)
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def name_hashes(names: NDArray[np.str_]) -> NDArray[np.uint64]:
    """Hash each name on its own, so that a name's hash never depends on its neighbours.

    Args:
        names: `(n,)` sample keys or patient ids.

    Returns:
        `(n,)` 64-bit hashes.

    Examples:
        >>> a, b = name_hashes(np.array(["P1", "P2"]))
        >>> bool(b == name_hashes(np.array(["P2"]))[0]), bool(a == b)
        (True, False)
    """
    digests = b"".join(
        hashlib.blake2b(name.encode(), digest_size=8, person=b"sb-name-v1").digest()
        for name in names.tolist()
    )
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
