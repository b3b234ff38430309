"""What there is to pack: the cases of a cohort, and everything found that is not one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from streaming_balance.errors import ConfigError, ShardError, did_you_mean
from streaming_balance.ingest.cases import Cohort
from streaming_balance.ingest.folders import find_in_folders
from streaming_balance.ingest.listings import find_in_manifest
from streaming_balance.ingest.tables import Table, read_table

LAYOUTS = ("brats", "manifest")
TABLE_SUFFIXES = (".csv", ".parquet", ".pq")


def find_cohort(
    source: Path,
    *,
    layout: str | None = None,
    labels: Path | None = None,
    ignored: tuple[Path, ...] = (),
) -> Cohort:
    """List the cases of a source without reading voxels.

    Args:
        source: a folder (layout "brats") or a table (layout "manifest").
        layout: "brats", "manifest", or None to tell from the source.
        labels: a CSV or Parquet table with the columns `patient` and `label`, `split` or both,
            optionally `sample`, and further columns. It fills in or overrides what the source says.
        ignored: files and folders in the source that belong to the call, such as the output.

    Returns:
        The cohort; its cases are in the order of their places.

    Raises:
        ConfigError: the layout is unknown or does not fit the source, or a table cannot be used.
        ShardError: the source is missing.
    """
    chosen = _layout(source, layout)
    given = None if labels is None else read_table(labels)
    if chosen == "manifest":
        cohort = find_in_manifest(source)
    else:
        cohort = find_in_folders(source, ignored=ignored if labels is None else (*ignored, labels))
    if given is not None:
        cohort = apply_labels(cohort, given)
    assert cohort.found == len(cohort.cases) + len(cohort.rejected)
    return cohort


def apply_labels(cohort: Cohort, table: Table) -> Cohort:
    """Give cases the label, split and columns that a labels table has for them.

    Args:
        cohort: the cases found.
        table: rows by `patient`, or by `patient` and `sample`.

    Returns:
        The same cases; one without a row keeps what it had.

    Raises:
        ConfigError: columns are missing, or a patient has two rows.
    """
    table.require("patient")
    extra = tuple(
        name for name in table.columns if name not in {"patient", "sample", "label", "split"}
    )
    if len(table.columns) == 1:
        raise ConfigError(f"{table.path}: has only the column 'patient'; add 'label' or 'split'.")
    by_sample = "sample" in table.columns
    rows: dict[tuple[str, str | None], Mapping[str, str]] = {}
    places: dict[tuple[str, str | None], str] = {}
    for row in table.rows:
        name = (row.values["patient"], (row.values["sample"] or None) if by_sample else None)
        if name in rows:
            raise ConfigError(
                f"{table.path}: {name[0]!r} stands at {places[name]} and at {row.place}; "
                "give every patient (or patient and sample) one row."
            )
        rows[name], places[name] = row.values, row.place
    used = set()
    cases = []
    for case in cohort.cases:
        name = (case.patient, case.sample if by_sample else None)
        values = rows.get(name, {})
        used.add(name)
        cases.append(
            replace(
                case,
                label=_overriding(values.get("label"), case.label),
                split=values.get("split") or case.split,
                columns={**case.columns, **{column: values.get(column, "") for column in extra}},
            )
        )
    known = {*used, *((entry.patient, None) for entry in cohort.rejected)}
    return replace(
        cohort,
        cases=tuple(cases),
        columns=tuple(dict.fromkeys((*cohort.columns, *extra))),
        warnings=(
            *cohort.warnings,
            *_unused_rows(table, [name for name in rows if name not in known]),
        ),
    )


def _overriding(given: str | None, own: str | None) -> str | None:
    """Choose a label: an empty cell leaves the source's, and counts where the source has none."""
    return given or (given if own is None else own)


def _layout(source: Path, layout: str | None) -> str:
    """Choose the layout and make sure that the source can have it."""
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(
            f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}."
            + did_you_mean(layout, LAYOUTS)
        )
    if not source.exists():
        raise ShardError(
            f"{source}: the source is missing; give a folder, a CSV or a Parquet file."
        )
    is_table = source.is_file() and source.name.lower().endswith(TABLE_SUFFIXES)
    natural = "manifest" if is_table else "brats"
    if not is_table and not source.is_dir():
        raise ConfigError(f"{source}: neither a folder nor a table ({', '.join(TABLE_SUFFIXES)}).")
    if layout is not None and layout != natural:
        wanted = "a folder" if layout == "brats" else f"a table ({', '.join(TABLE_SUFFIXES)})"
        raise ConfigError(f"layout is {layout!r}, which needs {wanted}; the source is {source}.")
    return natural


def _unused_rows(table: Table, unused: list[tuple[str, str | None]]) -> tuple[str, ...]:
    """Say which rows of a labels table belong to nothing that was found."""
    if not unused:
        return ()
    shown = ", ".join(repr(patient) for patient, _ in unused[:5])
    return (f"{table.path.name}: {len(unused)} row(s) belong to no case found, first {shown}.",)
