"""Opening a data set: checked once, then plain arrays and readers.

>>> from streaming_balance.storage.shards import open_shards
>>> shards = open_shards("shards/demo")
>>> shards.splits, shards.classes
(('train', 'val'), ['LGG', 'HGG'])
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ShardError, did_you_mean
from streaming_balance.storage.descriptors import check_shard_size
from streaming_balance.storage.elsewhere import advice_for, remedy_for
from streaming_balance.storage.index import SampleTable
from streaming_balance.storage.layout import MANIFEST_NAME, MEMBER_FIELDS
from streaming_balance.storage.manifest import Manifest, read_manifest
from streaming_balance.storage.reader import Reader, Verify

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")


class ShardSet:
    """An open data set: what it holds, and readers of its splits.

    Sample numbers count within a split, from 0, in the order of the sample table. All arrays are
    read-only. Safe for many threads.
    """

    def __init__(
        self, path: Path, manifest: Manifest, table: SampleTable, *, is_whole: bool = True
    ) -> None:
        """Take what was opened and checked; use `open_shards`, or `open_table` without shards."""
        self._path = path
        self._is_whole = is_whole
        self._manifest = manifest
        self._table = table
        self._splits = tuple(split.name for split in manifest.splits)
        self._sizes = {split.name: split.samples for split in manifest.splits}
        self._readers: dict[str, Reader] = {}
        self._making_readers = threading.Lock()

    @property
    def path(self) -> Path:
        """The data set's folder."""
        return self._path

    @property
    def manifest(self) -> Manifest:
        """All the data set says about itself."""
        return self._manifest

    @property
    def table(self) -> SampleTable:
        """Where every byte of every sample lies."""
        return self._table

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return self._splits

    @property
    def train_splits(self) -> tuple[str, ...]:
        """Splits that may be balanced; all others are for evaluation."""
        return self._manifest.train_splits

    @property
    def classes(self) -> list[str]:
        """Label names in class order: the place is the class number."""
        return list(self._manifest.classes)

    @property
    def classes_declared(self) -> bool:
        """Whether the class order was given at packing, so that a list may follow it."""
        return self._manifest.settings.get("classes_declared") is True

    @property
    def multi_label(self) -> bool:
        """Whether a sample has a set of findings, each of them a class."""
        return self._manifest.multi_label

    @property
    def digest(self) -> str:
        """Digest of the content: the same whatever codec or shard size."""
        return self._manifest.digest

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the strata columns."""
        return self._manifest.columns

    @property
    def arrays(self) -> tuple[str, ...]:
        """Array fields of a sample: `("image",)` or `("image", "seg")`; an index may lack it."""
        return self._manifest.arrays

    @property
    def bytes_fields(self) -> tuple[str, ...]:
        """Fields of foreign shards without a decoder, kept as bytes; `cls` and `json` aside."""
        kept = self._manifest.kept_members or ()
        return tuple(field for field in kept if field not in MEMBER_FIELDS)

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def __reduce__(self) -> tuple[Callable[[str], ShardSet], tuple[str]]:
        """Travel to another process as a path, which is opened and checked again there."""
        reopen = open_shards if self._is_whole else open_table
        return reopen, (str(self._path.absolute()),)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {size}" for split, size in self._sizes.items())
        return f"<ShardSet {self._path}: {sizes}>"

    def size(self, split: str) -> int:
        """Count the samples of a split.

        Raises:
            ConfigError: no such split.
        """
        self._check_split(split)
        return self._sizes[split]

    def labels(self, split: str) -> NDArray[Any]:
        """Give the class of every sample of a split.

        Returns:
            `(n,)` class numbers, int64; of a multi-label data set `(n, K)` of 0 and 1, uint8, a
            column per class.

        Raises:
            ConfigError: no such split.
        """
        self._check_split(split)
        return self._table.labels(split)

    def label_words(self, split: str) -> NDArray[np.str_]:
        """Give the label of every sample of a split as text.

        Returns:
            `(n,)` class names; of a multi-label data set findings in class order joined by `|`,
            empty where a sample has none.

        Raises:
            ConfigError: no such split.
        """
        self._check_split(split)
        return self._table.label_words(split)

    def patients(self, split: str) -> NDArray[np.str_]:
        """Give the patient of every sample of a split.

        Raises:
            ConfigError: no such split.
        """
        self._check_split(split)
        return self._table.patients(split)

    def keys(self, split: str) -> NDArray[np.str_]:
        """Give the key of every sample of a split.

        Raises:
            ConfigError: no such split.
        """
        self._check_split(split)
        return self._table.keys(split)

    def column(self, split: str, name: str) -> NDArray[np.str_]:
        """Give a strata column of every sample of a split.

        Raises:
            ConfigError: no such split or column.
        """
        self._check_split(split)
        return self._table.column(split, name)

    def packed_order(self, split: str) -> NDArray[np.int64]:
        """Give the sample numbers of a split in the order they lie in its shards.

        Raises:
            ConfigError: no such split.
        """
        self._check_split(split)
        fields = self._manifest.arrays[:1] or self._manifest.kept_members or ()
        places = [self._table.members(split, field) for field in fields]
        far = np.iinfo(np.int64).max
        offset = np.min([np.where(p.present, p.offset, far) for p in places], axis=0)
        order = np.lexsort((offset, places[0].shard)).astype(np.int64)
        order.flags.writeable = False
        return order

    def read(self, split: str, sample: int) -> dict[str, NDArray[Any]]:
        """Read the arrays of one sample as they were packed, checksums compared.

        Args:
            split: name of the split.
            sample: sample number within it.

        Returns:
            An array per field the sample has: `image`, and `seg` where it was packed. Of foreign
            shards also the members without a decoder, by field, as their bytes: `(n,)` of uint8.

        Raises:
            ConfigError: no such split, or the sample is not called by a number.
            IndexError: no such sample.
            ShardError: the stored bytes are damaged.
        """
        reader = self._own_reader(split)
        number = self._sample_number(split, sample)
        fields = (*self.arrays, *self.bytes_fields)
        return {field: reader.read(number, field) for field in fields if reader.has(number, field)}

    def check_decodable(self, split: str) -> None:
        """Refuse to make tensors of samples that have no image a decoder reads.

        Raises:
            ConfigError: there is none; names what there is instead, and the ways out.
        """
        if "image" in self.arrays or not self._sizes[split]:
            return
        field, *_ = (*self.bytes_fields, *(self._manifest.kept_members or ()))
        there = self._table.members(split, field).present
        sample = int(np.argmax(there))
        name = str(self._table.member_names(split, field, [sample])[0])
        raise ConfigError(
            f"{self._path} has no image that a decoder reads: member {name!r} of sample "
            f"{str(self.keys(split)[sample])!r} has none (.npy and .npb have one). Give "
            "transform=, which gets the bytes of "
            f"{', '.join(map(repr, self.bytes_fields)) or 'each member'} as a tensor of uint8 and "
            f"returns the sample with an 'image'; shards.read({split!r}, {sample}) gives them too."
        )

    def reader(self, split: str, *, verify: Verify = "first", max_open_files: int = 64) -> Reader:
        """Make a reader of one split.

        Args:
            split: name of the split.
            verify: when checksums are compared: `first`, `always` or `never`.
            max_open_files: most shards open at once.

        Returns:
            A reader; the caller closes it.

        Raises:
            ConfigError: no such split, or a wrong setting.
        """
        self._check_split(split)
        return Reader(self, split, verify=verify, max_open_files=max_open_files)

    def close(self) -> None:
        """Close the files that `read` opened; the arrays stay. May be called twice."""
        with self._making_readers:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def _own_reader(self, split: str) -> Reader:
        """Give the reader behind `read`, made on first use."""
        with self._making_readers:
            if split not in self._readers:
                self._readers[split] = self.reader(split, verify="always", max_open_files=4)
            return self._readers[split]

    def _sample_number(self, split: str, sample: object) -> int:
        """Give a sample number of any library as a plain one; keys and booleans are none."""
        if isinstance(sample, int | np.integer) and not isinstance(sample, bool):
            return int(sample)
        raise ConfigError(
            f"sample is {sample!r}; samples of split {split!r} are called by their numbers, 0 to "
            f"{self._sizes[split] - 1}. The number of a key is its place in shards.keys({split!r})."
        )

    def _check_split(self, split: str) -> None:
        """Raise unless the data set has this split."""
        if split not in self._sizes:
            raise ConfigError(
                f"split is {split!r}, but {self._path} holds {', '.join(self._splits)}."
                + did_you_mean(split, self._splits)
            )


def open_shards(
    url: str | Path, *, storage_options: Mapping[str, object] | None = None
) -> ShardSet:
    """Open a data set and check that it is whole.

    Checked are the manifest, the sample table, the size of every shard, and that no patient is in
    two splits; not the content of the shards, which is compared with its checksums when it is read.

    Args:
        url: the folder that holds `manifest.json`.
        storage_options: kept for remote stores; a folder takes none.

    Returns:
        The open data set.

    Raises:
        ConfigError: no address, a remote URL, options for a folder, or Windows.
        ShardError: the manifest, the table or a shard is missing, damaged or of another pack.
        SplitError: a patient is in two splits.
    """
    _check_platform(sys.platform)
    folder = _local_folder(url)
    if storage_options:
        raise ConfigError(
            f"storage_options holds {', '.join(sorted(storage_options))}, but {folder} is a "
            "folder, which takes none. Leave storage_options out."
        )
    manifest = read_manifest(folder)
    _check_shards(folder, manifest)
    return ShardSet(folder, manifest, SampleTable.open(folder / manifest.table.name, manifest))


def open_table(folder: str | Path) -> ShardSet:
    """Open what a data set says about its samples, whether its shards are still there or not.

    Manifest and sample table are checked as by `open_shards`, patients in two splits included.
    Enough for a plan or an audit; reading a sample whose shard is gone fails.

    Args:
        folder: holds `manifest.json` and the sample table.

    Returns:
        The open data set.

    Raises:
        ConfigError: no folder, a remote URL, or Windows.
        ShardError: the manifest or the table is missing, damaged or of another pack.
        SplitError: a patient is in two splits.

    Examples:
        >>> open_table("shards/demo").digest == open_shards("shards/demo").digest
        True
    """
    _check_platform(sys.platform)
    path = _local_folder(folder)
    manifest = read_manifest(path)
    table = SampleTable.open(path / manifest.table.name, manifest)
    return ShardSet(path, manifest, table, is_whole=False)


def _check_platform(platform: str) -> None:
    """Refuse Windows, whose files cannot be read at an offset by several threads at once."""
    if platform == "win32":
        raise ConfigError(
            "data sets are read with calls that Windows does not have. Use the Windows Subsystem "
            "for Linux (WSL): run `wsl --install`, then install and run there."
        )


def _local_folder(url: str | Path) -> Path:
    """Give the folder an address names, or say that remote stores come later."""
    if not isinstance(url, str | os.PathLike) or not os.fspath(url):
        raise ConfigError(
            f"the data set's address is {url!r}; give the folder that holds {MANIFEST_NAME}: "
            "open_shards('cohort/')."
        )
    scheme = _URL.match(url) if isinstance(url, str) else None
    if scheme is None:
        return Path(url)
    raise ConfigError(
        f"{url}: {scheme['scheme']}:// addresses come in a later release. Copy the data set to a "
        "local folder and open that: open_shards('cohort/')."
    )


def _check_shards(folder: Path, manifest: Manifest) -> None:
    """Raise unless every shard is there and as long as the manifest says."""
    advice = advice_for(folder, manifest)
    for shard in manifest.shards:
        path = folder / shard.name
        try:
            status = path.stat()
        except OSError as error:
            raise ShardError(
                error.errno,
                f"shard {shard.name} is missing or out of reach ({error.strerror}). "
                f"{remedy_for(manifest).capitalize()}; "
                f"`streaming-balance verify {folder}` lists every damaged shard",
                str(path),
            ) from error
        check_shard_size(path, status, shard.bytes, advice)
