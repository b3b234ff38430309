"""Packing: from a source to shards, nothing lost on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streaming_balance.errors import ConfigError, ShardError, did_you_mean
from streaming_balance.ingest.cases import Cohort
from streaming_balance.ingest.cohort import find_cohort
from streaming_balance.ingest.encode import Recipe, Task
from streaming_balance.ingest.leaks import EqualVoxels
from streaming_balance.ingest.ordering import PackOrder, order_cases, pack_settings
from streaming_balance.ingest.processes import check_jobs, encode_in_order
from streaming_balance.ingest.volume import DEFAULT_MAX_VOLUME_BYTES
from streaming_balance.plan.keys import check_seed
from streaming_balance.storage.encoded import EncodedSample
from streaming_balance.storage.journal import finished_shards
from streaming_balance.storage.layout import AXES, codec_extension
from streaming_balance.storage.manifest import JSON, Manifest, Rejected, settings_digest
from streaming_balance.storage.rows import ArrayRow
from streaming_balance.storage.writer import PackWriter

# Files of 256 MiB: large enough for object stores, small enough to copy again.
DEFAULT_SHARD_BYTES = 268_435_456
REASONS_SHOWN = 5

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What became of a source."""

    found: int
    """How many things were found: cases, and whatever else lay there."""
    packed: int
    """Samples in the shards."""
    rejected: tuple[Rejected, ...]
    """Everything found and not packed, each with its reason; found = packed + rejected."""
    digest: str
    """The data set's content digest."""
    manifest: Manifest
    """The data set's manifest."""
    warnings: tuple[str, ...]
    """What the user should know: equal voxels, splits without a class, unused rows."""
    is_new: bool
    """False if the complete data set was there already and was left alone."""


def write_shards(
    source: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    labels: str | Path | None = None,
    split: str | Mapping[str, float] | None = None,
    seed: int = 0,
    codec: str = "blosc",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    size: Sequence[int] | None = None,
    crop_or_pad: Sequence[int] | None = None,
    classes: str | Sequence[str] | None = None,
    jobs: int = 1,
    overwrite: bool = False,
    orient: str | None = None,
    axes: str | None = None,
    train_splits: Sequence[str] | None = None,
    multi_label: bool = False,
    max_volume_bytes: int = DEFAULT_MAX_VOLUME_BYTES,
    progress: Progress | None = None,
) -> PackReport:
    """Pack a cohort into shards.

    Args:
        source: a folder CLASS/CASE/CASE_MODALITY.nii.gz (layout "brats"), or a CSV or Parquet
            table with the columns patient, label and image (layout "manifest").
        out: folder for the shards; an unfinished pack there is finished, a complete one of the
            same command is left alone.
        layout: "brats" or "manifest"; None tells from the source.
        labels: table of patient and label (and split, and further columns) beside a folder.
        split: fractions such as "train=0.7,val=0.15,test=0.15", drawn per patient and label;
            None takes the source's own column `split`, else puts everything into "train".
        seed: names the random streams of split and order, in [0, 2**64 - 1].
        codec: "blosc" or "npy".
        shard_bytes: size at which the next shard begins, in bytes.
        size: voxels along D, H, W to resample to (trilinear, masks nearest).
        crop_or_pad: voxels along D, H, W to cut or pad to, around the centre.
        classes: every label in class order, as a list or comma separated; None orders those found.
        jobs: packing processes, at least 1; the bytes do not depend on it.
        overwrite: replace a complete data set of other settings.
        orient: "ras" turns volumes to right-anterior-superior; None keeps the axes of the files.
        axes: axes of NumPy files, such as "CHW"; None takes HW, DHW, CDHW by their number.
        train_splits: splits that may be balanced; None takes those whose name begins with "train".
        multi_label: labels are findings joined by "|", each of them a class; an empty one means no
            finding. `labels` of the data set are then (n, K) of 0 and 1.
        max_volume_bytes: the most memory the voxels of one file may take.
        progress: called with (done, total, key) after every case.

    Returns:
        What was packed and what was not, with reasons.

    Raises:
        ConfigError: a setting or a table is wrong.
        SplitError: a patient, or the same voxels, would stand in two splits.
        ShardError: nothing could be packed, a source file changed meanwhile, or writing failed.
    """
    recipe = Recipe(
        codec=_checked_codec(codec),
        size=_checked_size("size", size),
        crop_or_pad=_checked_size("crop_or_pad", crop_or_pad),
        orient=_one_of("orient", orient, ("ras",)),
        axes=_one_of("axes", axes, AXES),
        max_volume_bytes=_at_least_one("max_volume_bytes", max_volume_bytes),
    )
    if size is not None and crop_or_pad is not None:
        raise ConfigError("size resamples, crop_or_pad does not; give one of the two.")
    check_jobs(jobs)
    place, target = Path(source), Path(out)
    table = None if labels is None else Path(labels)
    cohort = find_cohort(place, layout=layout, labels=table, ignored=(target,))
    _check_anything_found(cohort, place)
    order = order_cases(
        cohort,
        classes=_names("classes", classes),
        split=split,
        seed=check_seed(seed),
        train_splits=_names("train_splits", train_splits),
        multi_label=_yes_or_no("multi_label", multi_label),
    )
    settings = pack_settings(
        order, recipe, seed=seed, shard_bytes=_at_least_one("shard_bytes", shard_bytes)
    )
    warnings = (*cohort.warnings, *order.warnings)
    # With overwrite a complete data set is made anew: that is how a damaged one is repaired.
    finished = None if overwrite else PackWriter.already_complete(target, settings)
    if finished is not None:
        return _report(finished, warnings, is_new=False)
    equal = EqualVoxels()
    with PackWriter(
        target,
        classes=order.classes,
        splits=order.splits,
        train_splits=order.train_splits,
        codec=codec,
        columns=cohort.columns,
        shard_bytes=shard_bytes,
        settings=settings,
        overwrite=overwrite,
        multi_label=order.multi_label,
    ) as writer:
        done = writer.finished_keys()
        _remember_finished(equal, target, settings, done)
        tasks = _tasks(order, recipe, place, done)
        outcomes = _encoded(tasks, jobs, done=len(done), progress=progress)
        with contextlib.closing(outcomes):
            rejected = [*cohort.rejected, *_write(writer, equal, outcomes)]
        _check_anything_packed(cohort, rejected, place)
        manifest = writer.finish(found=cohort.found, rejected=rejected)
    return _report(manifest, (*warnings, *equal.warnings), is_new=True)


def _tasks(order: PackOrder, recipe: Recipe, source: Path, done: Collection[str]) -> list[Task]:
    """List what is still to be encoded."""
    root = source if source.is_dir() else source.parent
    return [
        Task(case=case, split=split, root=root, recipe=recipe)
        for case, split in order.cases
        if case.key not in done
    ]


def _remember_finished(
    equal: EqualVoxels, out: Path, settings: Mapping[str, JSON], done: Collection[str]
) -> None:
    """Compare new images also with those that an interrupted pack has finished."""
    if not done:
        return
    for shard in finished_shards(out, settings_digest(settings)):
        for row in shard.rows:
            image = row.members["image"]
            assert isinstance(image, ArrayRow)
            equal.add(image.voxels, key=row.key, patient=row.patient, split=row.split)


def _encoded(
    tasks: Sequence[Task], jobs: int, *, done: int, progress: Progress | None
) -> Generator[EncodedSample | Rejected, None, None]:
    """Encode the tasks in order and tell `progress` of each one that was dealt with."""
    total = done + len(tasks)
    with contextlib.closing(encode_in_order(tasks, jobs)) as outcomes:
        for number, (task, outcome) in enumerate(zip(tasks, outcomes, strict=True), start=1):
            yield outcome
            if progress is not None:
                progress(done + number, total, task.case.key)


def _write(
    writer: PackWriter, equal: EqualVoxels, outcomes: Iterable[EncodedSample | Rejected]
) -> list[Rejected]:
    """Write every case that could be encoded and give the others."""
    rejected = []
    for outcome in outcomes:
        if isinstance(outcome, Rejected):
            rejected.append(outcome)
            continue
        voxels = outcome.arrays[0].voxels
        equal.add(voxels, key=outcome.key, patient=outcome.patient, split=outcome.split)
        writer.add(outcome)
    return rejected


def _report(manifest: Manifest, warnings: Sequence[str], *, is_new: bool) -> PackReport:
    """Say what a finished data set holds, and make sure that nothing vanished."""
    packed = manifest.table.rows
    assert manifest.found == packed + len(manifest.rejected)
    return PackReport(
        found=manifest.found,
        packed=packed,
        rejected=manifest.rejected,
        digest=manifest.digest,
        manifest=manifest,
        warnings=tuple(warnings),
        is_new=is_new,
    )


def _check_anything_found(cohort: Cohort, source: Path) -> None:
    """Refuse a source without a single case."""
    if not cohort.cases:
        raise ShardError(
            f"{source}: nothing to pack: {cohort.found} thing(s) found, none of them a case. "
            "Expected CLASS/CASE/CASE_MODALITY.nii.gz below a folder, or a table with the columns "
            f"patient, label and image.{_reasons(cohort.rejected)}"
        )


def _check_anything_packed(cohort: Cohort, rejected: Sequence[Rejected], source: Path) -> None:
    """Refuse to finish a pack without a single sample."""
    if len(rejected) == cohort.found:
        raise ShardError(
            f"{source}: nothing packed: all of {cohort.found} found were rejected. Repair the "
            f"files or give another source.{_reasons(rejected)}"
        )


def _reasons(rejected: Sequence[Rejected]) -> str:
    """Write the first few rejections."""
    return "".join(f"\n  {entry.path}: {entry.reason}" for entry in rejected[:REASONS_SHOWN])


def _checked_codec(codec: str) -> str:
    """Give back the name of a codec there is."""
    codec_extension(codec)
    return codec


def _checked_size(setting: str, size: Sequence[int] | None) -> tuple[int, ...] | None:
    """Give a size as two or three numbers of voxels."""
    if size is None:
        return None
    is_listed = isinstance(size, Sequence) and not isinstance(size, str)
    numbers = tuple(size) if is_listed else ()
    if len(numbers) not in {2, 3} or not all(type(n) is int and n >= 1 for n in numbers):
        raise ConfigError(
            f"{setting} is {size!r}; it must be D, H, W (or H, W for images), each a whole "
            "number of voxels, at least 1."
        )
    return numbers


def _at_least_one(setting: str, value: int) -> int:
    """Give back a positive whole number."""
    if type(value) is not int or value < 1:
        raise ConfigError(f"{setting} is {value!r}; it must be a whole number of at least 1.")
    return value


def _yes_or_no(setting: str, value: bool) -> bool:
    """Give back True or False; anything else may be meant for another setting."""
    if type(value) is not bool:
        raise ConfigError(f"{setting} is {value!r}; it must be True or False.")
    return value


def _one_of(setting: str, value: str | None, allowed: Sequence[str]) -> str | None:
    """Give back a word that is allowed here, or None."""
    if value is not None and value not in allowed:
        raise ConfigError(
            f"{setting} is {value!r}; it must be one of {', '.join(allowed)}."
            + did_you_mean(str(value), allowed)
        )
    return value


def _names(setting: str, names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Give names as a tuple: "LGG,HGG" is a list of two."""
    if names is None:
        return None
    listed = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else names
    if not all(isinstance(name, str) and name for name in listed):
        raise ConfigError(f"{setting} is {names!r}; it must be a list of non-empty names.")
    return tuple(listed)
