"""The folder of an index: locked while it is made, never half there, never over a packed one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.durable import durable_file
from streaming_balance.storage.folder import (
    FolderLock,
    make_folder,
    remove_leftovers,
    remove_manifest,
    remove_stale_lock,
)
from streaming_balance.storage.layout import JOURNAL_PREFIX, MANIFEST_NAME, TABLE_NAME
from streaming_balance.storage.manifest import (
    JSON,
    Manifest,
    manifest_text,
    read_manifest,
    settings_digest,
)

# Says that a table without a manifest is an index cut short, not a pack that lost its manifest.
_MARK = f"{JOURNAL_PREFIX}index.json"


class IndexFolder:
    """A folder for an index, held by this process until `release`.

    Args:
        folder: made where it is absent.
        overwrite: replace a complete index.

    Raises:
        ConfigError: it holds a data set that is not to be replaced, or another process holds it.
        ShardError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        make_folder(folder)
        self.path = folder
        self._lock = FolderLock(folder)
        try:
            self._check(overwrite)
            remove_leftovers(folder)
        except BaseException:
            self._lock.release()
            raise

    def begin(self) -> None:
        """Make room for a new table: what stands here is no data set from now on.

        Raises:
            ShardError: the disk is failing.
        """
        with durable_file(self.path / _MARK) as file:
            file.write(b'{"index":true}\n')
        remove_manifest(self.path)

    def end(self, manifest: Manifest) -> None:
        """Write the manifest, which makes the folder a data set.

        Raises:
            ShardError: the disk is full or failing.
        """
        with durable_file(self.path / MANIFEST_NAME) as file:
            file.write(manifest_text(manifest).encode())
        (self.path / _MARK).unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let others work here; safe to call twice."""
        self._lock.release()

    def _check(self, overwrite: bool) -> None:
        """Refuse to replace what nobody asked to replace."""
        if (self.path / MANIFEST_NAME).exists():
            manifest = _manifest_or_none(self.path)
            if manifest is not None and manifest.foreign is None:
                raise ConfigError(
                    f"{self.path} holds a packed data set, which an index never replaces; index "
                    "into another folder."
                )
            if not overwrite:
                raise ConfigError(
                    f"{self.path} holds an index of other shards or settings, or a damaged one; "
                    "use another folder, or overwrite=True (--overwrite) to replace it."
                )
        elif (
            (self.path / TABLE_NAME).exists() and not (self.path / _MARK).exists() and not overwrite
        ):
            raise ConfigError(
                f"{self.path} holds a sample table without its {MANIFEST_NAME}, of an unfinished "
                "or damaged data set; use another folder, or overwrite=True (--overwrite)."
            )


def complete_index(folder: Path, settings: Mapping[str, JSON]) -> Manifest | None:
    """Give the manifest of a complete index made with equal settings, else None.

    Raises:
        ShardError: its table is damaged; index again with overwrite.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(folder)
    if manifest.foreign is None or manifest.settings_digest != settings_digest(settings):
        return None
    table = folder / manifest.table.name
    size = table.stat().st_size if table.exists() else None
    if size != manifest.table.bytes:
        raise ShardError(
            f"{table} has {size} bytes, the manifest says {manifest.table.bytes}: the index is "
            "damaged. Run the same index command again with --overwrite"
        )
    remove_stale_lock(folder)
    (folder / _MARK).unlink(missing_ok=True)
    return manifest


def _manifest_or_none(folder: Path) -> Manifest | None:
    """Give the manifest there is; None where it is damaged."""
    try:
        return read_manifest(folder)
    except ShardError:
        return None
