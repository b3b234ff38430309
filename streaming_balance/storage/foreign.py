"""What the manifest of an index in place says about shards that others wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streaming_balance.storage.json_values import text_of, texts_of

if TYPE_CHECKING:
    from streaming_balance.storage.manifest import ShardEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """How shards that others wrote are read: the manifest of an index in place has this."""

    keys: str
    """Where a member's name is cut into key and field: `webdataset` or `last_dot`."""
    label: str
    """Where labels came from: `cls`, `json:FIELD` or `csv`."""
    patient: str | None
    """Where patients came from: `json:FIELD` or `csv`; None: every key is its own patient."""
    members: tuple[str, ...]
    """Fields that are kept as bytes, each with columns in the table."""


def read_foreign(entry: Mapping[str, Any]) -> Foreign:
    """Read what a manifest says about foreign shards.

    Raises:
        ValueError: a name is missing or unknown.
        TypeError: a value is of another kind.
    """
    if entry.keys() != set(Foreign.__dataclass_fields__):
        raise ValueError(f"foreign has the names {sorted(entry)}")
    patient = entry["patient"]
    return Foreign(
        keys=text_of(entry["keys"]),
        label=text_of(entry["label"]),
        patient=None if patient is None else text_of(patient),
        members=texts_of(entry["members"]),
    )


def check_foreign_names(names: Sequence[str], multi_label: bool) -> None:
    """Check the names of members that have columns in the table of an index.

    Raises:
        ValueError: one is empty or there twice, or samples have sets of labels.
    """
    if multi_label or "" in names or len(set(names)) < len(names):
        raise ValueError(f"members {list(names)} are empty or listed twice, or multi_label is set")


def check_foreign_shards(shards: Sequence[ShardEntry]) -> None:
    """Check what holds for shards elsewhere: paths in one spelling, one file with one digest.

    Raises:
        ValueError: it does not.
    """
    files = {(shard.name, shard.bytes, shard.sha256) for shard in shards}
    if len({(shard.name, shard.split) for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice for one split")
    if len(files) > len({shard.name for shard in shards}):
        raise ValueError("a shard is listed with two sizes or digests")
    for shard in shards:
        check_foreign_path(shard.name)


def check_foreign_path(name: str) -> str:
    """Give back the path of a foreign shard if it is written the one way there is.

    Args:
        name: absolute, or from the index folder: below it, or below the folder that holds it,
            which is `../` at the very beginning.

    Raises:
        ValueError: anything else.

    Examples:
        >>> check_foreign_path("../tars/a.tar"), check_foreign_path("/data/a.tar")
        ('../tars/a.tar', '/data/a.tar')
    """
    parts = name.removeprefix("../").removeprefix("/").split("/")
    if {"", ".", ".."} & set(parts) or any(letter < " " for letter in name):
        raise ValueError(f"{name!r} is no path of a shard: absolute, or from here in one way")
    return name
