"""An audit for machines: one JSON document, or a table with a row per patient."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streaming_balance.errors import ConfigError
from streaming_balance.report.audit import Audit
from streaming_balance.report.homes import Home, homes
from streaming_balance.report.patient import PatientAnswer, TimesSeen
from streaming_balance.report.sightings import Sighting, Sightings
from streaming_balance.report.tallies import Tallies
from streaming_balance.storage.durable import durable_file

COLUMNS = (
    *("patient", "split", "class", "exposure", "first_epoch", "first_step", "last_epoch"),
    *("last_step", "as_partner", "as_substitute", "substituted", "excluded", "first_leg"),
    *("last_leg", "in_data_set"),
)


def audit_document(audit: Audit, seen: Sightings, methods: str) -> dict[str, Any]:
    """Give an audit as plain values.

    Args:
        audit: who was seen, and how often.
        seen: when everybody was.
        methods: the paragraph for a methods section.

    Returns:
        What JSON can hold; `first_seen` and `last_seen` are patient -> [epoch, step] or None, and
        where a run has several legs `first_leg` and `last_leg` say which one's epochs these are.
    """
    document = asdict(audit)
    document |= _sightings(seen, with_legs=len(audit.legs) > 1)
    document["methods"] = methods
    return document


def patient_document(audit: Audit, answer: PatientAnswer) -> dict[str, Any]:
    """Give what a run had of one patient as plain values, with the digests that prove it.

    Args:
        audit: who was seen, and how often.
        answer: about the patient.

    Returns:
        The names of `audit_document` where they are about the patient, and `samples` by key.
    """
    name, times = answer.patient, answer.times
    seen = Sightings(first={name: times.first_seen}, last={name: times.last_seen})
    proof = ("epoch", "step", "complete", "not_audited", "plan_digest", "shards_digest")
    document = {field: getattr(audit, field) for field in (*proof, "table_digest", "state_digest")}
    return document | {
        "patient": name,
        "seen": answer.seen,
        "split": answer.split,
        "class": answer.label,
        "excluded_keys": list(answer.excluded),
        "in_data_set": answer.is_present,
        "exposure": {name: times.exposure},
        "as_partner": {name: times.as_partner},
        "as_substitute": {name: times.as_substitute},
        "substituted": {name: times.substituted},
        "samples": {key: _times(sample) for key, sample in answer.samples.items()},
        "substitutions": [
            asdict(record)
            for record in audit.substitutions
            if name in (record.patient, record.substitute_patient)
        ],
        "legs": [asdict(leg) for leg in audit.legs],
        **_sightings(seen, with_legs=len(audit.legs) > 1),
    }


def check_table_path(path: Path) -> None:
    """Refuse a table that could not be written, before anything is counted.

    Raises:
        ConfigError: a folder has its name, or the folder it should lie in is not there.
    """
    if path.is_dir():
        raise ConfigError(f"--csv is {path}, which is a folder; name a file, such as audit.csv.")
    if not path.parent.is_dir():
        raise ConfigError(f"--csv is {path}, but there is no folder {path.parent}; make it first.")


def write_patient_table(path: Path, audit: Audit, seen: Sightings, tallies: Tallies) -> None:
    """Write a row per patient, of all splits, as comma-separated values.

    The file is whole or not there: it is written under another name first. Whoever was never seen
    has empty places. `excluded` counts the samples that the last plan leaves out by name.

    Args:
        path: the file; an older one is replaced.
        audit: who was seen, and how often.
        seen: when everybody was.
        tallies: what the audit was summed up from.

    Raises:
        ConfigError: a folder has that name, or the folder it should lie in is not there.
        ShardError: the disk is full or failing.
    """
    check_table_path(path)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(audit, seen, tallies))
    with durable_file(path) as file:
        file.write(text.getvalue().encode())


def _rows(audit: Audit, seen: Sightings, tallies: Tallies) -> Iterator[tuple[object, ...]]:
    """Give the cells of every patient, those of the data set trained on last first."""
    run = tallies.run
    data_sets = {leg.shards.digest: leg.shards for leg in reversed(run.legs)}
    found = {digest: homes(one) for digest, one in data_sets.items()}
    present = found.get(run.shards.digest) or homes(run.shards)
    known: dict[str, Home] = {}
    for one in (*found.values(), present):
        known = known | {name: home for name, home in one.items() if name not in known}
    excluded = _excluded(tallies)
    for name, home in known.items():
        first, last = seen.first.get(name), seen.last.get(name)
        yield (
            *(name, home.split, home.label, audit.exposure.get(name, 0)),
            *(_place(first) or ("", "")),
            *(_place(last) or ("", "")),
            audit.as_partner.get(name, 0),
            audit.as_substitute.get(name, 0),
            audit.substituted.get(name, 0),
            excluded[name],
            "" if first is None else first.leg,
            "" if last is None else last.leg,
            "yes" if name in present else "no",
        )


def _excluded(tallies: Tallies) -> Counter[str]:
    """Count by patient the samples that the last plan leaves out by name."""
    owners = tallies.owners[-1][tallies.legs[-1].left_out].tolist()
    return Counter(tallies.names[owner] for owner in owners)


def _sightings(seen: Sightings, *, with_legs: bool) -> dict[str, Any]:
    """Give sightings as plain values."""
    entries: dict[str, Any] = {
        "first_seen": {name: _place(where) for name, where in seen.first.items()},
        "last_seen": {name: _place(where) for name, where in seen.last.items()},
    }
    if with_legs:
        entries["first_leg"] = _legs(seen.first)
        entries["last_leg"] = _legs(seen.last)
    return entries


def _place(where: Sighting | None) -> tuple[int, int] | None:
    """Give a sighting's epoch and step."""
    return None if where is None else (where.epoch, where.step)


def _legs(sightings: Mapping[str, Sighting | None]) -> dict[str, int | None]:
    """Give the leg of every sighting."""
    return {name: None if where is None else where.leg for name, where in sightings.items()}


def _times(times: TimesSeen) -> dict[str, Any]:
    """Give what a run had of one sample as plain values."""
    return asdict(times) | {
        "first_seen": _place(times.first_seen),
        "last_seen": _place(times.last_seen),
    }
