"""Writing samples into standard WebDataset tars: a whole folder of them, or none.

    with TarFolder(Path("rebalanced"), shard_bytes=1 << 28, overwrite=False) as folder:
        for sample in stream: folder.add(sample)
        folder.publish({...})

Everything is written in a hidden folder beside the final one, which then takes its name at once: a
run that was killed at any moment leaves nothing that could be taken for a whole set of shards.
Headers hold no clock, user or machine, so the same samples give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.plan.options import whole_number
from streaming_balance.storage.durable import DurableFile, durable_file, sync_folder
from streaming_balance.storage.folder import FolderLock
from streaming_balance.storage.layout import shard_name
from streaming_balance.storage.tar import END_OF_TAR, member_header, padding
from streaming_balance.stream.seen import SeenKeys

RECORD_NAME = "resample.json"
# The split in the names of shards written here: they are for training and nothing else.
SPLIT = "train"
_NEW, _OLD = "new", "old"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenTar:
    """A tar that was written."""

    name: str
    """Its file name."""
    bytes: int
    """Its size."""
    sha256: str
    """SHA-256 of its bytes, 64 hex digits."""
    samples: int
    """Samples in it, copies included."""


class TarFolder:
    """Writes samples into tars of a new folder; a context manager that cleans up after errors.

    Args:
        out: the folder; absent or empty, or with `overwrite` one that was written here before.
        shard_bytes: a tar is closed before it would grow beyond this; one sample may.
        overwrite: replace what an earlier run wrote.

    Raises:
        ConfigError: a setting is wrong, `out` holds something, or another process writes there.
        ShardError: the place cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place, TarFolder(
        ...     Path(place) / "out", shard_bytes=1 << 20, overwrite=False
        ... ) as folder:
        ...     folder.add({"__key__": "P1", "cls": b"1"})
        ...     record = folder.publish({"seed": 0})
        ...     sorted(path.name for path in (Path(place) / "out").iterdir())
        ['resample.json', 'train-000000.tar']
    """

    def __init__(self, out: Path, *, shard_bytes: int, overwrite: bool) -> None:
        size = whole_number(shard_bytes)
        if size is None or size < 1:
            raise ConfigError(f"shard_bytes is {shard_bytes!r}; use 1 or more, like 268435456.")
        self._shard_bytes = size
        self._out = Path(out).resolve()
        self._check_place(overwrite)
        self._work = self._out.with_name(f".{self._out.name}.resample")
        self._new = self._work / _NEW
        try:
            self._work.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self._work)
            self._bring_back(overwrite)
            self._clear()
            self._new.mkdir()
        except OSError as error:
            if isinstance(error, ShardError):
                raise
            raise ConfigError(
                f"{self._out} cannot be written: {error.strerror}. Name a folder in a place that "
                f"is writable."
            ) from error
        self.tars: list[WrittenTar] = []
        """The tars that are whole."""
        self._tar: _OpenTar | None = None
        self._source_keys, self._names = SeenKeys(), SeenKeys()
        self._copies: Counter[str] = Counter()

    def add(self, sample: Mapping[str, Any]) -> None:
        """Append a sample: its fields in their order, byte for byte.

        A sample whose key was added before is a copy: it gets the key `KEY__copy1`, then
        `KEY__copy2`, and so on. A leading `./` of a key is left out.

        Args:
            sample: `__key__`, and bytes by field, as a stream gives them before `decode`.

        Raises:
            ConfigError: a field was decoded.
            ShardError: a name does not fit a plain tar header, the name of a copy is the key of
                another sample, or the disk is full or failing.
        """
        fields = {name: value for name, value in sample.items() if not name.startswith("__")}
        key = self._written_key(str(sample["__key__"]), sample.get("__url__"))
        block = b"".join(
            part for name, value in fields.items() for part in _member(key, name, value, sample)
        )
        if self._tar is not None and self._tar.size_with(block) > self._shard_bytes:
            self._close_tar()
        if self._tar is None:
            self._tar = _OpenTar(self._new, shard_name(SPLIT, len(self.tars)))
        self._tar.add(block)

    def publish(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Finish the last tar, write the record, and give the folder its final name.

        Args:
            record: plain values for `resample.json`.

        Returns:
            The record with the tars, as it was written.

        Raises:
            ConfigError: no sample was added.
            ShardError: the disk is full or failing.
        """
        self._close_tar()
        if not self.tars:
            raise ConfigError("nothing to write: not one sample went on. Check target and labels.")
        document = {**record, "shards": [asdict(tar) for tar in self.tars]}
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with durable_file(self._new / RECORD_NAME) as file:
            file.write(text.encode())
        try:
            self._take_name()
        except OSError as error:
            raise ShardError(
                f"{self._out} cannot be replaced: {error.strerror}. Name a folder that is no "
                f"mount point, and that nobody else writes to."
            ) from error
        sync_folder(self._out.parent)
        return document

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tar is not None:
            self._tar.discard()
        self._clear()
        self._lock.release()
        if not any(self._work.iterdir()):
            self._work.rmdir()

    def _check_place(self, overwrite: bool) -> None:
        """Refuse a folder with anything in it that an earlier run here did not write."""
        if self._out.exists() and not self._out.is_dir():
            raise ConfigError(f"{self._out} is a file; name a folder.")
        if self._out.is_mount():
            # It takes its name at the end, which no mount point can: found now, not hours later.
            raise ConfigError(f"{self._out} is a mount point; name a folder within it.")
        found = {path.name for path in self._out.iterdir()} if self._out.exists() else set()
        if not found:
            return
        foreign = sorted(found - _written_before(self._out / RECORD_NAME))
        if foreign:
            raise ConfigError(
                f"{self._out} holds {foreign[0]!r}, which no earlier resample wrote; name an empty "
                f"folder, or a new one."
            )
        if not overwrite:
            raise ConfigError(
                f"{self._out} holds shards of an earlier resample; name another folder, or "
                f"--overwrite to replace them."
            )

    def _bring_back(self, overwrite: bool) -> None:
        """Give back its name to what a run was about to replace as it was killed."""
        old = self._work / _OLD
        if self._out.exists() or not old.exists():
            return
        old.rename(self._out)
        try:
            self._check_place(overwrite)
        except ConfigError:
            self._lock.release()
            raise

    def _clear(self) -> None:
        """Remove what an interrupted run left, and what was replaced."""
        for name in (_NEW, _OLD):
            if (self._work / name).exists():
                shutil.rmtree(self._work / name)

    def _take_name(self) -> None:
        """Give the new folder the final name; what has that name comes back if it cannot."""
        old = self._work / _OLD
        if self._out.exists():
            self._out.rename(old)
        try:
            self._new.rename(self._out)
        except OSError:
            if old.exists():
                old.rename(self._out)
            raise

    def _written_key(self, key: str, url: object) -> str:
        """Give the key a sample is written under, its own in this folder."""
        written = key.removeprefix("./")
        if self._source_keys.remember(key, 0, 0) is not None:
            self._copies[key] += 1
            written = f"{written}__copy{self._copies[key]}"
        if self._names.remember(written, 0, 0) is not None:
            raise ShardError(
                f"{url}: sample {key!r} would be written as {written!r}, but so was another one. "
                f"Copies are called KEY__copy1, KEY__copy2, ...: rename the sample of that name."
            )
        if self._source_keys.num_forgotten or self._names.num_forgotten:
            raise ShardError(
                f"{url}: sample {key!r} is one more than the {len(self._names):,} whose keys are "
                f"told apart in one folder. Resample parts of the shards, each to its own folder."
            )
        return written

    def _close_tar(self) -> None:
        """End the open tar."""
        if self._tar is not None:
            self.tars.append(self._tar.end())
            self._tar = None


class _OpenTar:
    """A tar being written, digested as it grows."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name, self._samples = name, 0
        self._file = DurableFile(folder / name)
        self._sha256 = hashlib.sha256()

    def size_with(self, block: bytes) -> int:
        """Say how large the finished tar would be with these bytes in it."""
        return self._file.size + len(block) + len(END_OF_TAR)

    def add(self, block: bytes) -> None:
        """Append a sample."""
        self._append(block)
        self._samples += 1

    def end(self) -> WrittenTar:
        """Write the end of the tar, and give the file its name."""
        self._append(END_OF_TAR)
        self._file.publish()
        return WrittenTar(
            name=self._name,
            bytes=self._file.size,
            sha256=self._sha256.hexdigest(),
            samples=self._samples,
        )

    def discard(self) -> None:
        """Remove the tar unless it is whole."""
        self._file.discard()

    def _append(self, content: bytes) -> None:
        """Write and digest."""
        self._file.write(content)
        self._sha256.update(content)


def _member(key: str, field: str, value: object, sample: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Give header, payload and padding of one member."""
    if not isinstance(value, bytes):
        raise ConfigError(
            f"sample {key!r}: field {field!r} is {type(value).__name__}, not bytes; samples are "
            f"written as they were stored: leave out decode and map."
        )
    try:
        header = member_header(f"{key}.{field}", len(value))
    except ShardError as error:
        name = f"{key}.{field}"
        raise ShardError(
            f"{sample.get('__url__')}: sample {sample['__key__']!r} cannot be written: a plain tar "
            f"holds names of printable ASCII, up to 100 characters, or 255 with a slash in the "
            f"right place; {name[:120]!r} has {len(name)}. Its source used an extension (PAX or "
            f"GNU) for it: rename the sample there."
        ) from error
    return header, value, padding(len(value))


def _written_before(record: Path) -> set[str]:
    """Name the files an earlier run wrote, by its record; none where there is no such record."""
    try:
        document = json.loads(record.read_bytes())
        return {RECORD_NAME, *(str(tar["name"]) for tar in document["shards"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
