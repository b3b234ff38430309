"""The `manifest` layout: a table with a row per sample."""

from __future__ import annotations

from pathlib import Path

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.ingest.cases import Case, Cohort, reported_path, stamps_of, without_folder
from streaming_balance.ingest.tables import Row, Table, read_table
from streaming_balance.storage.manifest import Rejected

IMAGE_PREFIX = "image."
OWN_COLUMNS = {"patient", "sample", "label", "seg", "split", "image"}


def find_in_manifest(path: Path) -> Cohort:
    """List the samples of a manifest table.

    Args:
        path: CSV or Parquet with the columns `patient`, `image` or `image.<modality>` (channel
            order = column order), and optionally `label`, `sample`, `seg`, `split`. Further
            columns are kept. File names are relative to the table's folder.

    Returns:
        A case per row whose files are there, the other rows as rejected.

    Raises:
        ConfigError: `patient` or the image columns are missing.
    """
    table = read_table(path)
    table.require("patient")
    modalities = _modalities(table)
    has_masks = any(row.values.get("seg") for row in table.rows)
    cases: list[Case] = []
    rejected: list[Rejected] = []
    for row in table.rows:
        try:
            cases.append(_case(table, row, modalities, has_masks=has_masks))
        except ShardError as error:
            rejected.append(_rejected(table, row, modalities, error))
    return Cohort(
        cases=tuple(cases),
        rejected=tuple(rejected),
        found=len(table.rows),
        columns=tuple(name for name in table.columns if not _is_own(name)),
    )


def _is_own(column: str) -> bool:
    """Say whether a column has a meaning here, rather than being kept for the user."""
    return column in OWN_COLUMNS or column.startswith(IMAGE_PREFIX)


def _modalities(table: Table) -> dict[str, str]:
    """Map each image column to its modality, in column order."""
    named = {
        column: column.removeprefix(IMAGE_PREFIX)
        for column in table.columns
        if column.startswith(IMAGE_PREFIX)
    }
    if "image" in table.columns and named:
        raise ConfigError(
            f"{table.path}: has 'image' beside {', '.join(map(repr, named))}; use 'image' for one "
            "file per sample, or 'image.<modality>' for each of several."
        )
    if not named:
        table.require("image")
        return {"image": "image"}
    return named


def _case(table: Table, row: Row, modalities: dict[str, str], *, has_masks: bool) -> Case:
    """Build the case of one row."""
    values = row.values
    if not values["patient"].strip():
        raise ShardError("the row has no patient id; without one it cannot be kept in one split.")
    missing = [modality for column, modality in modalities.items() if not values[column]]
    if missing == list(modalities.values()) and values.get("seg"):
        raise ShardError("mask without image.")
    if missing:
        raise ShardError(f"patient {values['patient']!r}: modality {missing[0]!r} is missing.")
    if has_masks and not values["seg"]:
        raise ShardError(
            "image without mask, while other rows have one; add it, or leave the column out."
        )
    images = tuple(table.path.parent / values[column] for column in modalities)
    seg = table.path.parent / values["seg"] if has_masks else None
    files = images if seg is None else (*images, seg)
    return Case(
        patient=values["patient"],
        sample=values.get("sample") or None,
        label=values.get("label"),
        images=images,
        modalities=tuple(modalities.values()),
        seg=seg,
        split=values.get("split") or None,
        columns={name: value for name, value in values.items() if not _is_own(name)},
        place=f"{table.path.name} {row.place}",
        stamps=tuple(stamp for file in files for stamp in stamps_of(file)),
    )


def _rejected(table: Table, row: Row, modalities: dict[str, str], error: ShardError) -> Rejected:
    """List a row that cannot be packed, naming the file at fault where there is one."""
    folder = table.path.parent
    files = [row.values[name] for name in (*modalities, "seg") if row.values.get(name)]
    reason = str(error)
    at_fault = [name for name in files if reason.startswith(f"{folder / name}: ")]
    path = (at_fault or files or [table.path.name])[0]
    return Rejected(
        patient=row.values["patient"],
        path=reported_path(folder / path, folder),
        reason=f"{row.place}: {without_folder(reason, tuple(folder / name for name in files))}",
    )
