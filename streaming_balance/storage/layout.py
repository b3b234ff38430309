"""Names, constants and limits of the shard format: where every name on disk is made.

`shards/README.md` says the same for people; a change here is a change of the format.
"""

from __future__ import annotations

import re

from streaming_balance.errors import ConfigError, did_you_mean

FORMAT_NAME = "streaming-balance"
FORMAT_VERSION = 1
# The oldest release that reads this format version; a newer format names its own.
NEEDS_VERSION = "0.1"

MANIFEST_NAME = "manifest.json"
TABLE_NAME = "samples.arrow"
LOCK_NAME = ".pack.lock"
JOURNAL_PREFIX = ".journal-"

BLOCK = 512  # bytes: every tar header and payload starts on a multiple of it
TABLE_BLOCK_ROWS = 65_536

# Blosc is the default; npy is stored raw for tools that know nothing of Blosc.
CODEC_EXTENSIONS = {"blosc": "npb", "npy": "npy"}
ARRAY_FIELDS = ("image", "seg")
# Order of a sample's members in its shard, and of their columns in the sample table.
MEMBER_FIELDS = ("image", "seg", "cls", "json")
AXES = ("CDHW", "DHW", "CHW", "HW")

_SHARD_NAME = re.compile(r"(?P<split>[A-Za-z0-9_-]+)-(?P<number>[0-9]{6})\.tar")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_MAX_SHARDS_PER_SPLIT = 1_000_000  # six digits, so that names sort like numbers


def check_split_name(split: str) -> str:
    """Give `split` back if it may stand in a file name.

    Raises:
        ConfigError: it is empty, too long, or holds something else than A-Z a-z 0-9 _ -.

    Examples:
        >>> check_split_name("train")
        'train'
    """
    if not _SPLIT_NAME.fullmatch(split):
        raise ConfigError(
            f"split {split!r} cannot name a shard: use 1 to 64 of A-Z a-z 0-9 _ -, like 'train'"
        )
    return split


def shard_name(split: str, number: int) -> str:
    """Name the `number`-th shard of a split.

    Args:
        split: name of the split, A-Z a-z 0-9 _ - only.
        number: 0 to 999,999, counted within the split.

    Returns:
        The file name, six digits wide so that names sort like numbers.

    Raises:
        ConfigError: the split's name does not fit a file name, or the number has seven digits.

    Examples:
        >>> shard_name("train", 0)
        'train-000000.tar'
    """
    if not 0 <= number < _MAX_SHARDS_PER_SPLIT:
        raise ConfigError(
            f"split {split!r} would need shard number {number}; a split holds at most "
            f"{_MAX_SHARDS_PER_SPLIT:,} shards: raise shard_bytes"
        )
    return f"{check_split_name(split)}-{number:06d}.tar"


def is_shard_name(name: str) -> bool:
    """Say whether `name` could be one of our shards.

    Examples:
        >>> is_shard_name("train-000000.tar"), is_shard_name("notes.tar")
        (True, False)
    """
    return _SHARD_NAME.fullmatch(name) is not None


def temporary_name(name: str) -> str:
    """Name a file while it is being written; a rename makes it final.

    Examples:
        >>> temporary_name("manifest.json")
        '.manifest.json.tmp'
    """
    return f".{name}.tmp"


def is_temporary_name(name: str) -> bool:
    """Say whether `name` is a file that a pack was still writing.

    Examples:
        >>> is_temporary_name(".train-000000.tar.tmp"), is_temporary_name(".notes.tmp")
        (True, False)
    """
    final = name.removeprefix(".").removesuffix(".tmp")
    return name == temporary_name(final) and (
        final in {MANIFEST_NAME, TABLE_NAME}
        or final.startswith(JOURNAL_PREFIX)
        or is_shard_name(final)
    )


def belongs_to_a_pack(name: str) -> bool:
    """Say whether a pack, finished or not, leaves files of this name.

    Examples:
        >>> belongs_to_a_pack(".pack.lock"), belongs_to_a_pack("README.md")
        (True, False)
    """
    return (
        name in {MANIFEST_NAME, TABLE_NAME, LOCK_NAME}
        or name.startswith(JOURNAL_PREFIX)
        or is_shard_name(name)
        or is_temporary_name(name)
    )


def sample_key(patient: str, sample: str | None = None) -> str:
    """Make the key of a sample from its patient and, where it has several, its own name.

    Args:
        patient: the patient's id, any text.
        sample: which of the patient's samples, or None where there is only one.

    Returns:
        ASCII without dots: A-Z a-z 0-9 _ - as they are, every other byte of the UTF-8 text as
        %XX, patient and sample joined by two underscores.

    Raises:
        ConfigError: the patient's id, or the sample's name, is empty.

    Examples:
        >>> sample_key("P1")
        'P1'
        >>> sample_key("P 1.5", "t0")
        'P%201%2E5__t0'
    """
    parts = [patient] if sample is None else [patient, sample]
    if not all(parts):
        raise ConfigError(f"a key needs text: patient {patient!r}, sample {sample!r}")
    return "__".join(_percent_encoded(part) for part in parts)


def member_name(key: str, field: str, codec: str | None = None) -> str:
    """Name a member of a sample: everything before the first dot is the key.

    Args:
        key: the sample's key, as `sample_key` makes it.
        field: `image`, `seg`, `cls` or `json`.
        codec: `blosc` or `npy` for the two arrays, None for `cls` and `json`.

    Returns:
        The member's name in the tar.

    Raises:
        ConfigError: no such codec.

    Examples:
        >>> member_name("P1", "image", "blosc"), member_name("P1", "cls")
        ('P1.image.npb', 'P1.cls')
    """
    if codec is None:
        return f"{key}.{field}"
    return f"{key}.{field}.{codec_extension(codec)}"


def codec_extension(codec: str) -> str:
    """Give the file extension of a codec.

    Raises:
        ConfigError: no such codec.

    Examples:
        >>> codec_extension("npy")
        'npy'
    """
    if codec not in CODEC_EXTENSIONS:
        raise ConfigError(
            f"codec {codec!r} is unknown; known: {', '.join(CODEC_EXTENSIONS)}."
            + did_you_mean(codec, CODEC_EXTENSIONS)
        )
    return CODEC_EXTENSIONS[codec]


def _percent_encoded(text: str) -> str:
    """Write `text` in ASCII, every byte outside A-Z a-z 0-9 _ - as %XX."""
    encoded = text.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in encoded)
