"""Shards that others wrote, indexed where they are: their places, and what to do about damage."""

from __future__ import annotations

from pathlib import Path

from streaming_balance.errors import ConfigError
from streaming_balance.storage.descriptors import PACKED, Advice
from streaming_balance.storage.foreign import check_foreign_path
from streaming_balance.storage.manifest import Manifest

_REPACK = "restore the shard or run the same pack command with --overwrite"
_REINDEX = (
    "restore the shard, or, if it was changed on purpose, run the same index command with "
    "--overwrite"
)


def remedy_for(manifest: Manifest) -> str:
    """Say how a damaged shard of a data set is mended."""
    return _REPACK if manifest.foreign is None else _REINDEX


def advice_for(folder: Path, manifest: Manifest) -> Advice:
    """Give what errors about a data set's shards tell their reader to do.

    Args:
        folder: the data set's folder; shards that others wrote lie in another one.
        manifest: its manifest.
    """
    if manifest.foreign is None:
        return PACKED
    # The texts are filled in with the folder of the shard, which no command here takes.
    verify = f"streaming-balance verify {folder}".replace("{", "{{").replace("}", "}}")
    return Advice(
        unreadable=f"Check the kernel log, then run `{verify}`.",
        cut=f"{_REINDEX}, then `{verify}`.",
        replaced=f"Run `{verify}`, then open the index again.",
        damaged=f"The index was made of other bytes: {_REINDEX}; `{verify}` lists every one.",
        length_is_from="the index says",
    )


def foreign_path(folder: Path, tar: Path) -> str:
    """Say where a tar is, as the manifest of an index does.

    A tar in the index folder, or anywhere below the folder that holds it, is named from the index
    folder, so that both can be moved together; any other by its absolute path. Links to folders are
    followed, the tar's own name is kept.

    Args:
        folder: the index folder, which exists.
        tar: the tar, which exists.

    Raises:
        ConfigError: the path cannot be written in a manifest.
    """
    home = folder.resolve()
    place = tar.parent.resolve() / tar.name
    if place.is_relative_to(home):
        name = place.relative_to(home).as_posix()
    elif home.parent != Path(home.anchor) and place.is_relative_to(home.parent):
        name = "../" + place.relative_to(home.parent).as_posix()
    else:
        name = place.as_posix()
    try:
        name.encode()
        return check_foreign_path(name)
    except ValueError as error:
        raise ConfigError(
            f"{str(tar)!r} has a path that no manifest can hold ({error}). Rename or link it to a "
            "path of ordinary characters."
        ) from error
