"""Labels and patients of samples that others wrote: from `.cls`, from JSON, or from a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streaming_balance.errors import ConfigError
from streaming_balance.ingest.tables import read_table
from streaming_balance.storage.manifest import JSON
from streaming_balance.stream.sample_labels import text_in_json

_JSON = "json:"
_TABLE = "csv:"
_OWN_COLUMNS = ("key", "label", "patient", "split")
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is known of one sample beside its members; None where it is not said."""

    label: str | None
    """Its class."""
    patient: str | None
    """Its patient."""
    split: str | None
    """Its split."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Its strata."""


class LabelSource:
    """Says label, patient, split and strata of a sample.

    Args:
        label: `cls`, `json:FIELD` (`a.b` is `b` within `a`) or `csv:FILE`, a table with the columns
            key and label, and perhaps patient, split and strata.
        patient: `json:FIELD`; None: the table's column patient, else nothing.

    Raises:
        ConfigError: another text, or a table that cannot be used.
    """

    def __init__(self, label: str, patient: str | None = None) -> None:
        self._label_path = _json_path("label", label)
        self._patient_path = _json_path("patient", patient)
        self._rows: dict[str, Told] = {}
        self._used: set[str] = set()
        self.columns: tuple[str, ...] = ()
        """Names of the strata."""
        self.has_splits = False
        """Whether it says splits."""
        self.label, self.patient = label, patient
        self._digest: str | None = None
        if label.startswith(_TABLE):
            self.label = "csv"
            self._read_table(Path(label.removeprefix(_TABLE)), patient)
        elif label != "cls" and self._label_path is None:
            raise ConfigError(
                f"label is {label!r}; it must be 'cls', 'json:FIELD' such as json:diagnosis.grade, "
                "or 'csv:FILE', a table with the columns key and label."
            )
        if patient is not None and self._patient_path is None:
            raise ConfigError(
                f"patient is {patient!r}; it must be 'json:FIELD', such as json:patient. With "
                "label='csv:FILE' a column 'patient' says it."
            )

    @property
    def settings(self) -> dict[str, JSON]:
        """What was asked for, the table by its content."""
        digest = {} if self._digest is None else {"table": self._digest}
        return {"label": self.label, "patient": self.patient, **digest}

    def tell(self, key: str, text: bytes | None, details: bytes | None) -> Told:
        """Say what is known of one sample.

        Args:
            key: its key.
            text: its member `cls`, if it has one.
            details: its member `json`, if it has one.

        Raises:
            ValueError: a member is no text or no JSON.
        """
        told = self._rows.get(key)
        if told is not None:
            self._used.add(key)
        else:
            told = Told(label=None, patient=None, split=None)
        label, patient = told.label, told.patient
        if self.label == "cls" and text is not None:
            label = text.decode("utf-8").strip() or None
        if details is not None and (self._label_path or self._patient_path):
            document = json.loads(details)
            label = text_in_json(document, self._label_path) if self._label_path else label
            patient = text_in_json(document, self._patient_path) if self._patient_path else patient
        return Told(label=label, patient=patient, split=told.split, columns=told.columns)

    def unused(self) -> list[str]:
        """Give the keys of the table that no sample had."""
        return sorted(self._rows.keys() - self._used)

    def _read_table(self, path: Path, patient: str | None) -> None:
        """Read the table of keys."""
        table = read_table(path)
        table.require("key", "label")
        if patient is not None and "patient" in table.columns:
            raise ConfigError(
                f"patient is {patient!r}, and {path} has a column 'patient'; leave out one."
            )
        self.columns = tuple(name for name in table.columns if name not in _OWN_COLUMNS)
        self.has_splits = "split" in table.columns
        if "patient" in table.columns:
            self.patient = "csv"
        for row in table.rows:
            key = row.values["key"]
            if key in self._rows:
                raise ConfigError(f"{path}: {row.place} has the key {key!r} a second time.")
            self._rows[key] = Told(
                label=row.values["label"] or None,
                patient=row.values.get("patient") or None,
                split=row.values.get("split") or None,
                columns={name: row.values[name] for name in self.columns},
            )
        rows = [[table.columns], *([row.values[c] for c in table.columns] for row in table.rows)]
        text = json.dumps(rows, separators=(",", ":"))
        self._digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _json_path(setting: str, text: str | None) -> str | None:
    """Give what follows `json:`; None for anything else."""
    if text is None or not text.startswith(_JSON):
        return None
    path = text.removeprefix(_JSON)
    if "" in path.split("."):
        raise ConfigError(f"{setting} is {text!r}; name a field: {setting}='json:a.b'.")
    return path
