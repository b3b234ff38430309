"""Rebalancing shards into new shards: one pass, members copied as they are, every sample counted.

resample(urls, lambda stream: stream.accept({"LGG": 1, "HGG": 1}), out=Path("even"))
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.evaluation_shards import refuse_evaluation_shards
from streaming_balance.stream.names import KeyRule
from streaming_balance.stream.pipeline import Stream, stream
from streaming_balance.stream.recipe import Observer
from streaming_balance.stream.rules import OnError
from streaming_balance.stream.sources import ShardSource, Urls, expand
from streaming_balance.stream.writing import TarFolder

DEFAULT_SHARD_BYTES = 1 << 28
RECORD_FORMAT = "streaming-balance resample"
RECORD_VERSION = 1
_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A source shard on disk, as it was before the pass."""

    size: int
    """Its bytes."""
    changed_at: int
    """When it was changed last, in nanoseconds."""
    sha256: str
    """SHA-256 of it, 64 hex digits."""


def resample(
    urls: Urls,
    chain: Callable[[Stream], Stream],
    *,
    out: Path,
    label: str = "cls",
    seed: int = 0,
    on_error: OnError = "raise",
    keys: KeyRule = "webdataset",
    allow_pipe: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    observer: Observer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write what a chain of stages makes of some shards as new shards, for training only.

    The output is standard WebDataset tars and `resample.json`, which says what they were made of;
    it has no sample table, `streaming-balance index` makes one. Names of fields are in lower case,
    as webdataset reads them. Equal sources, chain and seed give equal bytes.

    Args:
        urls: the shards, as `stream` takes them.
        chain: adds the stages, and no `decode`, `map` or `batch`.
        out: folder for the new shards, absent or empty.
        label: where the class of a sample stands: a field, or `json:FIELD`.
        seed: integer in [0, 2**64 - 1]; keys every choice.
        on_error: `raise` at the first damage, or `skip` it, counted.
        keys: where names are cut into key and field.
        allow_pipe: whether `pipe:` may start programs.
        shard_bytes: a new shard is closed before it would grow beyond this.
        overwrite: replace what an earlier run wrote.
        observer: is shown every sample read: see `Stream.tee`.
        settings: plain values for the record: what `chain` was asked to do.

    Returns:
        The record, as in `resample.json`.

    Raises:
        ConfigError: a setting is wrong, or nothing would be written.
        SplitError: a shard is for evaluation: those are never rebalanced.
        ShardError: a shard is damaged, or was changed meanwhile, or the disk is full.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = resample(
        ...         "shards/demo/train-*.tar",
        ...         lambda demo: demo.accept({"0": 1, "1": 1}, frequencies={"0": 4, "1": 10}),
        ...         out=Path(folder) / "even",
        ...     )
        >>> record["counts"]["read"], record["counts"]["delivered"], record["counts"]["rejected"]
        (14, 8, 6)
    """
    sources = expand(urls, allow_pipe=allow_pipe)
    refuse_evaluation_shards(sources)
    _refuse_own_output(sources, Path(out))
    with TarFolder(Path(out), shard_bytes=shard_bytes, overwrite=overwrite) as folder:
        files = [_looked_at(source) for source in sources]
        plain = stream(
            sources, label=label, seed=seed, on_error=on_error, keys=keys, allow_pipe=allow_pipe
        )
        with chain(plain if observer is None else plain.tee(observer)) as chained:
            for sample in chained:
                folder.add(sample)
            stats = chained.stats()
        _refuse_changed(sources, files)
        record = {
            "format": RECORD_FORMAT,
            "version": RECORD_VERSION,
            "settings": {
                **(settings or {}),
                "label": label,
                "seed": seed,
                "on_error": on_error,
                "keys": keys,
                "shard_bytes": shard_bytes,
            },
            "sources": [_said(*pair) for pair in zip(sources, files, strict=True)],
            "counts": counts_of(stats),
            "classes": _classes_of(stats),
            "left_out": stats["read"]["skips"],
        }
        return folder.publish(record)


def counts_of(stats: Mapping[str, Any]) -> dict[str, int]:
    """Sum up what became of every sample.

    Args:
        stats: of a stream whose pass ended.

    Returns:
        `found` = `damaged` + `unlabelled` + `read`; `read` = `delivered` + `rejected`; `written` =
        `delivered` + `copies`. `shards_lost` are shards whose rest nobody can count.
    """
    shards, totals = stats["read"], stats["totals"]
    written, copies = totals["delivered"], totals["copies"]
    assert totals["buffered"] == 0, "a pass that ended holds nothing"
    return {
        "found": shards["samples_read"],
        "damaged": shards["samples_skipped"],
        "unlabelled": totals["unlabelled"],
        "read": totals["read"],
        "delivered": written - copies,
        "rejected": totals["rejected"],
        "copies": copies,
        "written": written,
        "shards_lost": shards["shards_lost"],
    }


def _classes_of(stats: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Say of every class what was read and written, what share it has, and what was asked for."""
    stages = stats["stages"]
    if not stages:
        return {}
    names = ("read", "delivered", "rejected", "copies", "wanted_share", "realised_share")
    return {
        name: {entry: counts[entry] for entry in names}
        for name, counts in stages[-1]["classes"].items()
    }


def _refuse_own_output(sources: Sequence[ShardSource], out: Path) -> None:
    """Refuse to read what is about to be replaced."""
    for source in sources:
        if source.kind == "file" and Path(source.address).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"{source.shown} lies in {out}, the folder to be written. Name another folder."
            )


def _looked_at(source: ShardSource) -> SourceFile | None:
    """Digest a file as it is before the pass; None for what is no file and passes by once."""
    path = Path(source.address)
    if source.kind != "file" or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.sha256()
            while found := file.read(_HASHED_AT_ONCE):
                digest.update(found)
    except OSError:
        # Whoever reads it says why it cannot be read, or leaves it out and counts it.
        return None
    return SourceFile(size=status.st_size, changed_at=status.st_mtime_ns, sha256=digest.hexdigest())


def _refuse_changed(sources: Sequence[ShardSource], files: Sequence[SourceFile | None]) -> None:
    """Refuse a record of files that are not what they were when they were digested."""
    for source, file in zip(sources, files, strict=True):
        if file is None:
            continue
        path = Path(source.address)
        status = path.stat() if path.exists() else None
        if status is None or (status.st_size, status.st_mtime_ns) != (file.size, file.changed_at):
            raise ShardError(
                f"{source.shown} was changed while it was read. Run the command again, and let "
                f"nobody write to it meanwhile."
            )


def _said(source: ShardSource, file: SourceFile | None) -> dict[str, Any]:
    """Say which shard was read; of what passed by, only its name is known."""
    return {
        "url": source.shown,
        "bytes": None if file is None else file.size,
        "sha256": None if file is None else file.sha256,
    }
