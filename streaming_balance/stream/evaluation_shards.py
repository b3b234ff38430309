"""Shards that are for evaluation: what is known of them, and that they are never rebalanced.

A validation set tells how a model does on patients as they come. Thinned out or repeated, it tells
something else, and nobody who reads the numbers later can see it. What a shard is for stands in the
manifest beside it; no option of a command can say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from streaming_balance.errors import BalanceError, ShardError, SplitError
from streaming_balance.storage.layout import BLOCK, MANIFEST_NAME, is_shard_name
from streaming_balance.storage.manifest import Manifest, read_manifest
from streaming_balance.storage.tar import OWNER
from streaming_balance.stream.compressed import decompressed
from streaming_balance.stream.passing import FileStream
from streaming_balance.stream.sources import ShardSource

_OWNER_FIELD = slice(265, 265 + 32)  # where a tar header names the file's owner
_COMPRESSED = (".gz", ".zst")
_TRAINING = "train"  # splits whose name begins so may be balanced unless a manifest says otherwise


def refuse_evaluation_shards(sources: Iterable[ShardSource]) -> None:
    """Refuse shards that a manifest beside them keeps for evaluation.

    Of shards that others wrote, of pipes and of web servers nothing is known, and nothing refused.

    Args:
        sources: the shards, as `expand` gives them.

    Raises:
        SplitError: a shard belongs to a split that is not for training, or was packed for one and
            lost its manifest or its name; or its manifest does not know it.
        ShardError: the manifest beside a shard is damaged, so that nobody knows.
    """
    manifests: dict[Path, Manifest | None] = {}
    for source in sources:
        if source.kind != "file":
            continue
        tar = Path(source.address)
        # A link to a shard is that shard: what it is for is said where it lies.
        folders = dict.fromkeys((tar.absolute().parent, tar.resolve().parent))
        for folder in folders:
            if folder not in manifests:
                manifests[folder] = _manifest_in(folder)
        known = [manifest for folder in folders if (manifest := manifests[folder]) is not None]
        splits = [
            (split, manifest)
            for folder in folders
            if (manifest := manifests[folder]) is not None
            for split in _splits_of(tar, folder, manifest)
        ]
        for split, manifest in splits:
            if split not in manifest.train_splits:
                raise _refusal(source, split, manifest)
        if not splits and _is_packed(tar):
            _check_without_entry(source, tar.resolve().name, has_manifest=bool(known))


def _manifest_in(folder: Path) -> Manifest | None:
    """Read the manifest in a folder; None where there is none."""
    if not (folder / MANIFEST_NAME).exists():
        return None
    try:
        return read_manifest(folder)
    except ShardError as error:
        error.add_note(
            "It says which shards are for training. Without it none of this folder is resampled."
        )
        raise


def _splits_of(tar: Path, folder: Path, manifest: Manifest) -> list[str]:
    """Give the splits that a manifest says are in a tar."""
    real = tar.resolve()
    names = {tar.name, real.name}
    return [
        entry.split
        for entry in manifest.shards
        # Only paths that end alike are followed: a manifest may list a hundred thousand shards.
        if entry.name.rpartition("/")[2] in names and (folder / entry.name).resolve() == real
    ]


def _refusal(source: ShardSource, split: str, manifest: Manifest) -> SplitError:
    """Give the error for a shard of a split that is for evaluation."""
    train = ", ".join(manifest.train_splits) or "none"
    return SplitError(
        f"{source.shown} belongs to split {split!r}, which is for evaluation: splits for training "
        f"are {train} (see {MANIFEST_NAME} beside it). Evaluation data is never rebalanced: scores "
        f"on it would not be those of patients as they come. Name training shards only."
    )


def _is_packed(tar: Path) -> bool:
    """Say whether a tar is one of our own, whatever it is called: its first header says so.

    One that was compressed since is looked into.
    """
    if not tar.is_file():
        return False
    try:
        with closing(FileStream(tar.open("rb"), str(tar), owned=True)) as stream:
            header = decompressed(stream, str(tar)).read(BLOCK)
            return header[_OWNER_FIELD].rstrip(b"\0") == OWNER
    except (OSError, BalanceError):
        # Whoever reads it next says why it cannot be read.
        return False


def _check_without_entry(source: ShardSource, name: str, *, has_manifest: bool) -> None:
    """Judge one of our own shards that no manifest lists, by the split in its name."""
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    split = name.rpartition("-")[0] if is_shard_name(name) else None
    if split is not None and split.startswith(_TRAINING):
        return
    what = "by this program under another name" if split is None else f"for split {split!r}"
    where = (
        "the manifest beside it does not list it" if has_manifest else "no manifest is beside it"
    )
    raise SplitError(
        f"{source.shown} was packed {what}, and {where}: nothing says that it may be rebalanced, "
        f"and evaluation data never is. Name training shards, or stream them from the folder they "
        f"were packed into, under the name they had there."
    )
