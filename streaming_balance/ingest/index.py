"""Indexing foreign shards in place: a table and a manifest that point at tars where they are."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.ingest.foreign_labels import LabelSource
from streaming_balance.ingest.foreign_members import HashedStream, HashedTar
from streaming_balance.ingest.index_builder import (
    IndexBuilder,
    IndexReport,
    index_report,
    index_settings,
)
from streaming_balance.ingest.index_folder import complete_index
from streaming_balance.ingest.index_rules import IndexRules
from streaming_balance.storage.elsewhere import foreign_path
from streaming_balance.stream.compressed import MAGIC_BYTES, is_compressed
from streaming_balance.stream.counts import StreamCounts
from streaming_balance.stream.grouping import ShardSamples
from streaming_balance.stream.names import KeyRule
from streaming_balance.stream.rules import UniqueKeys
from streaming_balance.stream.seen import SeenKeys
from streaming_balance.stream.sources import ShardSource, Urls, expand

Progress = Callable[[int, int, str], None]


def index_shards(
    urls: Urls,
    *,
    out: str | os.PathLike[str],
    label: str = "cls",
    patient: str | None = None,
    split: str = "train",
    classes: str | Sequence[str] | None = None,
    image: str | None = None,
    seg: str | None = None,
    axes: str | None = None,
    keys: KeyRule = "webdataset",
    unique_keys: UniqueKeys = "stream",
    train_splits: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> IndexReport:
    """Index WebDataset shards that anyone wrote, where they are.

    Reads every shard once, strictly, and writes a sample table and a manifest. The shards are
    neither copied nor written to; they may be read-only.

    Args:
        urls: paths of plain tars; `{000..012}`, `{a,b}`, `*`, `?`, `[...]` and `**` are expanded.
        out: folder for the index. Tars in it, below it, or below the folder that holds it are
            found from there, so that both can be moved together; others by their absolute path.
        label: `cls`, a number or text; `json:FIELD`, where `a.b` is b within a; `csv:FILE`, a
            table with the columns key and label, and perhaps patient, split and strata.
        patient: `json:FIELD`; None: the table's column patient, else every key is its own patient.
        split: the split of all samples, where no table says it.
        classes: every label in class order, as a list or comma separated; None orders those found.
        image: field of the image, such as `npy`; `none` for no image; None: `image.npb` or
            `image.npy`, else the only array there is.
        seg: field of the mask; None: `seg.npb` or `seg.npy`.
        axes: axes of the arrays, such as `CHW`; None takes HW, DHW, CDHW by their number.
        keys: `webdataset` cuts names at the first dot of the base name, `last_dot` at the last.
        unique_keys: `stream`: a key comes once; `shard`: keys start anew in each shard, and are
            told apart by its name in front.
        train_splits: splits that may be balanced; None takes those whose name begins with "train".
        overwrite: replace a complete index of other shards or settings.
        progress: called with (done, total, shard) after every shard.

    Returns:
        What was indexed and what was not, with reasons.

    Raises:
        ConfigError: a setting, an address or a table is wrong, or labels are missing.
        SplitError: a patient, or the same voxels, would stand in two splits.
        ShardError: a shard is damaged, cut or changed meanwhile, keys come twice, nothing could be
            indexed, or writing failed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     report = index_shards("shards/demo/*.tar", out=out, label="json:label")
        >>> report.indexed, report.manifest.classes
        (19, ('HGG', 'LGG'))
    """
    rules = IndexRules(
        label=label,
        patient=patient,
        split=split,
        classes=_names("classes", classes),
        image=image,
        seg=seg,
        axes=axes,
        keys=keys,
        unique_keys=unique_keys,
        train_splits=_names("train_splits", train_splits),
    )
    paths = [_local(source) for source in expand(_refuse_remote(urls))]
    if not overwrite:
        finished = _finished(Path(out), rules, paths)
        if finished is not None:
            return finished
    with IndexBuilder(out, rules, overwrite=overwrite) as builder:
        _add_all(builder, paths, rules, progress)
        return builder.finish()


def _add_all(
    builder: IndexBuilder, paths: Sequence[Path], rules: IndexRules, progress: Progress | None
) -> None:
    """Read every shard once: its samples, its size and its SHA-256."""
    names = {number: str(path) for number, path in enumerate(paths)}
    seen = SeenKeys()
    for number, path in enumerate(paths):
        if rules.unique_keys == "shard":
            seen = SeenKeys()
        with closing(HashedTar(HashedStream(path.open("rb", buffering=0)))) as tar:
            for sample in ShardSamples(tar, number, names, rules.tar_rules(), StreamCounts(), seen):
                builder.add(sample)
            _check_whole(tar.stream, path)
            builder.add_shard(
                path, num_bytes=tar.stream.num_read, sha256=tar.stream.sha256.hexdigest()
            )
        if progress is not None:
            progress(number + 1, len(paths), str(path))


def _check_whole(stream: HashedStream, path: Path) -> None:
    """Raise unless every byte of a file was read that it had when it was opened."""
    if stream.num_read != stream.size:
        raise ShardError(
            f"{path} had {stream.size} bytes when it was opened, and {stream.num_read} were read: "
            "it was changed meanwhile. Index again when nobody writes to it."
        )


def _finished(out: Path, rules: IndexRules, paths: Sequence[Path]) -> IndexReport | None:
    """Give the report of the complete index of the same command, if it stands there."""
    if not out.is_dir():
        return None
    shards = [(foreign_path(out, path), path.stat().st_size) for path in paths]
    settings = index_settings(rules, LabelSource(rules.label, rules.patient), shards)
    manifest = complete_index(out, settings)
    return None if manifest is None else index_report(manifest, (), is_new=False)


def _refuse_remote(urls: Urls) -> list[Any]:
    """Say of addresses that need another way of reading what to do, before they are expanded."""
    alone = isinstance(urls, str | os.PathLike | ShardSource) or hasattr(urls, "read")
    listed: list[Any] = [urls] if alone else list(cast(Iterable[Any], urls))
    for url in listed:
        is_remote = isinstance(url, str) and (
            url == "-" or url.startswith("pipe:") or ("://" in url and not url.startswith("file:"))
        )
        if is_remote or hasattr(url, "read"):
            raise ConfigError(
                f"{url!r} cannot be indexed in place: an index points at tars on local disk. Copy "
                "the shards here and index the copies, or stream them without an index: "
                "streaming_balance.stream(urls). Indexes of remote stores come in a later release."
            )
    return listed


def _local(source: ShardSource) -> Path:
    """Give the path of a plain tar on local disk."""
    path = Path(source.shown)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(
                f"{path} is not a regular file. Name the tars themselves, such as {path}/*.tar."
            )
        with path.open("rb", buffering=0) as file:
            beginning = file.read(MAGIC_BYTES)
    except OSError as error:
        raise ShardError(
            f"{path} cannot be opened: {error.strerror}. Is the path right, and mounted here?"
        ) from error
    if is_compressed(beginning):
        raise ConfigError(
            f"{path} is compressed, so no sample in it can be read at its place. Decompress it "
            "(`gunzip -k` or `zstd -dk`) and index the plain tar, or stream it without an index: "
            "streaming_balance.stream(urls)."
        )
    return path


def _names(setting: str, names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Give names as a tuple: "LGG,HGG" is a list of two."""
    if names is None:
        return None
    listed = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else names
    if (
        not isinstance(listed, Sequence)
        or not listed
        or not all(isinstance(name, str) and name for name in listed)
    ):
        raise ConfigError(f"{setting} is {names!r}; it must be a list of non-empty names.")
    return tuple(listed)
