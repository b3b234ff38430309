"""What `streaming-balance audit` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streaming_balance.cli.answers import print_json, print_table, print_warning
from streaming_balance.report.audit import Audit, audit_of
from streaming_balance.report.audit_files import (
    audit_document,
    patient_document,
    write_patient_table,
)
from streaming_balance.report.history import seen_since
from streaming_balance.report.methods import described_gap, methods_paragraph
from streaming_balance.report.patient import PatientAnswer, answer_for
from streaming_balance.report.sightings import Sighting, Sightings, patient_sightings
from streaming_balance.report.tallies import Tallies
from streaming_balance.report.wording import counted, spanned

# More are better read by a program.
NAMES_SHOWN = 20


def answer_about_all(
    asked: Tallies, later: Tallies | None, *, listing: bool, table: Path | None, as_json: bool
) -> None:
    """Answer for everybody.

    Args:
        asked: what was counted up to the state asked about.
        later: what was counted up to a later one; None: there is none.
        listing: whether to list every patient.
        table: where a row per patient is to be written, or None.
        as_json: whether one JSON document is wanted instead of tables.
    """
    audit = audit_of(asked)
    methods = methods_paragraph(audit, asked)
    since = None if later is None else seen_since(later, asked)
    # A walk through the batches, so only where somebody wants to know.
    seen = patient_sightings(asked) if as_json or listing or table is not None else None
    if table is not None and seen is not None:
        write_patient_table(table, audit, seen, asked)
    _warn_if_incomplete(audit, asked)
    if as_json and seen is not None:
        document = audit_document(audit, seen, methods)
        print_json(document | _since_document(since, later))
        return
    _print_classes(audit)
    _print_legs(audit)
    if since is not None and later is not None:
        seen_again = sum(times > 0 for times in since.values())
        print(
            f"since then, until {_position(later)}: {counted(seen_again, 'patient')} seen, "
            f"{sum(since.values()):,} times in all"
        )
    _print_exceptions(audit)
    if listing and seen is not None:
        _print_patients(audit, seen)
    if table is not None:
        print(f"a row per patient: {table}")
    print(f"\nfor a methods section:\n{methods}\n")
    _print_proof(audit)


def answer_about_one(
    patient: str, asked: Tallies, later: Tallies | None, *, table: Path | None, as_json: bool
) -> None:
    """Answer for one patient.

    Args:
        patient: the patient's id.
        asked: what was counted up to the state asked about.
        later: what was counted up to a later one; None: there is none.
        table: where a row for every patient is to be written, or None.
        as_json: whether one JSON document is wanted instead of tables.
    """
    answer = answer_for(patient, asked)
    audit = audit_of(asked)
    since = None if later is None else {patient: seen_since(later, asked).get(patient, 0)}
    if table is not None:
        write_patient_table(table, audit, patient_sightings(asked), asked)
    _warn_if_incomplete(audit, asked)
    if as_json:
        print_json(patient_document(audit, answer) | _since_document(since, later))
        return
    _print_answer(answer, audit)
    if since is not None and later is not None:
        print(f"since then, until {_position(later)}: {_how_often(since[patient])}")
    if answer.samples:
        _print_samples(answer, audit)
    _print_proof(audit)


def _warn_if_incomplete(audit: Audit, tallies: Tallies) -> None:
    """Say loudly that a state does not hold the records of all ranks."""
    if not audit.complete:
        print_warning(
            f"this audit is NOT COMPLETE: the state lacks the substitutions of "
            f"{described_gap(tallies)}. Whoever they put in the place of damaged samples is not "
            f"counted, and who was damaged there is. Gather the states of all ranks, and audit "
            f"what merge_states gives for them."
        )


def _print_classes(audit: Audit) -> None:
    """Print what each class was given."""
    print_table(
        f"{audit.split}: delivered before epoch {audit.epoch}, step {audit.step}",
        ("class", "patients", "seen", "delivered", "share", "least", "most"),
        (
            (
                label,
                entry.patients,
                entry.seen,
                entry.delivered,
                entry.share,
                entry.exposure_min,
                entry.exposure_max,
            )
            for label, entry in audit.classes.items()
        ),
    )


def _print_legs(audit: Audit) -> None:
    """Print what the plans of a run were that was carried over from one to another."""
    if len(audit.legs) == 1:
        return
    print_table(
        "plans followed one after another",
        ("leg", "from", "until", "batches", "plan digest", "data digest"),
        (
            (
                number,
                _pair(leg.start),
                _pair(leg.stop),
                leg.batches,
                leg.plan_digest,
                leg.shards_digest,
            )
            for number, leg in enumerate(audit.legs)
        ),
    )


def _print_exceptions(audit: Audit) -> None:
    """Print what was mixed, replaced, left out, or is not known."""
    if audit.mixing is not None:
        partners = sum(audit.as_partner.values())
        for number, leg in enumerate(audit.legs):
            if leg.mixing is not None:
                of = f" of leg {number}" if len(audit.legs) > 1 else ""
                settings = ", ".join(f"{name} {value}" for name, value in leg.mixing.items())
                print(f"mixing{of}: {settings}")
        print(f"mixed into others: {partners:,} samples, which seen, least and most count, too")
    if audit.not_audited:
        print(
            f"not audited: {', '.join(audit.not_audited)}; what that function did to batches is "
            f"recorded nowhere"
        )
    if audit.excluded:
        print(f"excluded from the plan: {counted(audit.excluded, 'sample')}")
    if audit.absent:
        print(f"no longer in the data set: {_named(audit.absent)}")
    if audit.substitutions:
        print_table(
            "delivered in the place of damaged samples",
            ("leg", "epoch", "step", "slot", "damaged", "patient", "instead", "patient", "reason"),
            (
                (
                    *(record.leg, record.epoch, record.step, record.slot),
                    *(record.key, record.patient),
                    *(record.substitute_key, record.substitute_patient, record.reason),
                )
                for record in audit.substitutions
            ),
        )


def _print_patients(audit: Audit, seen: Sightings) -> None:
    """Print a row per patient."""
    print_table(
        "by patient",
        ("patient", "times", "first", "last", "as partner", "as substitute", "replaced"),
        (
            (
                *(name, times, _when(seen.first[name], audit), _when(seen.last[name], audit)),
                audit.as_partner.get(name, 0),
                audit.as_substitute.get(name, 0),
                audit.substituted.get(name, 0),
            )
            for name, times in audit.exposure.items()
        ),
    )


def _print_answer(answer: PatientAnswer, audit: Audit) -> None:
    """Print what a run had of one patient."""
    times = answer.times
    known = "" if audit.complete else ", as far as the state knows"
    print(
        f"{answer.patient} ({answer.label}, {answer.split}): {_how_often(times.exposure)} before "
        f"epoch {audit.epoch}, step {audit.step}{known}"
    )
    if answer.seen:
        first, last = _when(times.first_seen, audit), _when(times.last_seen, audit)
        print(f"first seen: {first}; last seen: {last}")
    details = {
        "as the partner of another": times.as_partner,
        "in the place of a damaged sample": times.as_substitute,
        "replaced because damaged": times.substituted,
    }
    for what, count in details.items():
        if count:
            print(f"{what}: {spanned(count, count)}")
    if answer.split not in {str(leg.settings["split"]) for leg in audit.legs}:
        print(f"this run drew from {audit.split}, never from {answer.split}")
    if answer.excluded:
        print(f"excluded from the plan by name: {', '.join(answer.excluded)}")
    if not answer.is_present:
        print("no longer in the data set")
    if audit.not_audited:
        print(f"not audited: {', '.join(audit.not_audited)}")


def _print_samples(answer: PatientAnswer, audit: Audit) -> None:
    """Print a row per sample of a patient."""
    print_table(
        "by sample",
        ("sample", "times", "first", "last", "as partner", "as substitute", "replaced"),
        (
            (
                *(
                    key,
                    times.exposure,
                    _when(times.first_seen, audit),
                    _when(times.last_seen, audit),
                ),
                *(times.as_partner, times.as_substitute, times.substituted),
            )
            for key, times in answer.samples.items()
        ),
    )


def _print_proof(audit: Audit) -> None:
    """Print the digests that prove what was asked and answered."""
    print(f"plan digest: {audit.plan_digest}")
    print(f"data digest: {audit.shards_digest}")
    print(f"sample table digest: {audit.table_digest}")
    print(f"state digest: {audit.state_digest}")
    print(f"substitutions of all ranks known: {'yes' if audit.complete else 'NO'}")


def _since_document(since: dict[str, int] | None, later: Tallies | None) -> dict[str, Any]:
    """Give what was seen after the state asked about, where a later one was given."""
    if since is None or later is None:
        return {}
    state, last = later.run.state, later.run.last
    return {
        "since": since,
        "later": {
            "epoch": state.position.epoch,
            "step": state.position.step,
            "complete": state.complete,
            "plan_digest": last.plan.digest,
            "shards_digest": last.shards.digest,
            "state_digest": last.saved.digest,
        },
    }


def _named(patients: Sequence[str]) -> str:
    """Count patients and name the first of them."""
    names = ", ".join(patients[:NAMES_SHOWN])
    more = len(patients) - NAMES_SHOWN
    rest = f" and {more:,} more, which --json lists" if more > 0 else ""
    return f"{counted(len(patients), 'patient')}: {names}{rest}"


def _how_often(times: int) -> str:
    """Say how often somebody was seen."""
    return f"seen {spanned(times, times)}" if times else "not seen"


def _when(where: Sighting | None, audit: Audit) -> str:
    """Write a sighting; where a run has several legs, epochs may have the same number."""
    if where is None:
        return "never"
    leg = f"leg {where.leg}, " if len(audit.legs) > 1 else ""
    return f"{leg}epoch {where.epoch}, step {where.step}"


def _pair(place: tuple[int, int]) -> str:
    """Write a place in a run."""
    return f"epoch {place[0]}, step {place[1]}"


def _position(tallies: Tallies) -> str:
    """Write where a run stands."""
    position = tallies.run.state.position
    return _pair((position.epoch, position.step))
