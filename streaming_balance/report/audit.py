"""Who was seen in a run, and how often: from the data set and a saved state alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streaming_balance.report.homes import everybody
from streaming_balance.report.runs import Leg, Run, Stretch, count_batches, rebuild_run, stretches
from streaming_balance.report.saved_states import SavedState
from streaming_balance.report.tallies import Tallies, Tally, tally_run
from streaming_balance.storage.labelling import carriers
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.state import LoaderState


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassExposure:
    """What a class was given in a run."""

    patients: int
    """Patients of the class in the split that the plan draws from; of a run that was carried over,
    in that of any of its plans."""
    seen: int
    """Patients delivered at least once; with mixing, that is as partners too."""
    delivered: int
    """Samples delivered."""
    share: float
    """Part of all deliveries; those of all classes sum to 1 unless samples have several."""
    exposure_min: int
    """Deliveries of the patient seen least, as partners too."""
    exposure_max: int
    """Deliveries of the patient seen most, as partners too."""
    as_partner: int
    """Times a sample was mixed into another one that was delivered; `delivered` has the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSubstitution:
    """A sample that was delivered in the place of a damaged one."""

    leg: int
    """Number of the leg, from 0."""
    epoch: int
    """Epoch of the batch."""
    step: int
    """Step of the batch."""
    slot: int
    """Position in the global batch."""
    key: str
    """Key of the damaged sample."""
    patient: str
    """Its patient."""
    substitute_key: str
    """Key of the sample that was delivered."""
    substitute_patient: str
    """Its patient."""
    reason: str
    """What was wrong with the damaged one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LegSummary:
    """One leg of a run: its span, and the digests that prove what it was."""

    start: tuple[int, int]
    """(epoch, step) of its first batch."""
    stop: tuple[int, int]
    """(epoch, step) of the batch after its last one."""
    skipped: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    """Jumps by `set_epoch`: from the batch that would have come next, to the one that did."""
    batches: int
    """Global batches delivered."""
    samples: int
    """Samples delivered."""
    plan_digest: str
    """Digest of the plan that was followed."""
    shards_digest: str
    """Content digest of the data set."""
    table_digest: str
    """SHA-256 of the sample table's file."""
    state_digest: str
    """BLAKE2b-256 of the state's canonical JSON."""
    settings: Mapping[str, Any]
    """The plan's settings in clear."""
    mixing: Mapping[str, Any] | None
    """How its batches were mixed: name, alpha, probability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Who was seen, and how often, up to the position of a state."""

    split: str
    """The split that was trained on."""
    epoch: int
    """Epoch of the batch that comes next."""
    step: int
    """Step of the batch that comes next."""
    exposure: Mapping[str, int]
    """patient -> samples delivered, alone or as the partner of another, sorted by patient."""
    as_partner: Mapping[str, int]
    """patient -> those of `exposure` as the partner of another; empty without mixing."""
    as_substitute: Mapping[str, int]
    """patient -> deliveries in the place of a damaged sample; who never stood in is left out."""
    substituted: Mapping[str, int]
    """patient -> times another was delivered instead; who never had to be replaced is left out."""
    substitutions: tuple[NamedSubstitution, ...]
    """Every sample that was delivered in the place of another."""
    complete: bool
    """Whether the substitutions of all ranks are known; if not, counts may be off by those."""
    mixing: Mapping[str, Any] | None
    """How batches were mixed in the last leg that mixed any; `legs` has that of each."""
    not_audited: tuple[str, ...]
    """Settings that may have changed who was seen in ways that nothing records."""
    classes: Mapping[str, ClassExposure]
    """By label, in class order, without the samples left out."""
    excluded: int
    """Samples of the split that the plan leaves out; `exposure` has their patients, too."""
    absent: tuple[str, ...]
    """Patients of the data sets trained on who are not in the one asked about."""
    legs: tuple[LegSummary, ...]
    """The plans that were followed, one after another."""
    plan_digest: str
    """Digest of the plan that was followed last."""
    shards_digest: str
    """Content digest of the data set trained on last."""
    table_digest: str
    """SHA-256 of its sample table's file."""
    state_digest: str
    """BLAKE2b-256 of the state's canonical JSON."""


def audit_run(shards: ShardSet, state: LoaderState, *, tables: Sequence[ShardSet] = ()) -> Audit:
    """Count how often each patient was delivered up to a state.

    Args:
        shards: the data set that was trained on.
        state: the state of the training loader.
        tables: other data sets the run was trained on, or their tables alone.

    Returns:
        Deliveries per patient and per class.

    Raises:
        ResumeError: the state is one of an evaluation or belongs to another data set, or its
            settings do not give the plan it names.
    """
    return audit_of(tally_run(rebuild_run(shards, SavedState.of(state), tables=tables)))


def audit_of(tallies: Tallies) -> Audit:
    """Sum up what became of everybody in a run.

    Args:
        tallies: what was counted.

    Returns:
        Deliveries per patient and per class.
    """
    run, last, state = tallies.run, tallies.run.last, tallies.run.state
    mixings = [leg.state.mixing for leg in run.legs if leg.state.mixing is not None]
    transformed = any(leg.state.batch_transform for leg in run.legs)
    return Audit(
        split=last.split,
        epoch=state.position.epoch,
        step=state.position.step,
        exposure=_by_name(tallies, "exposure"),
        as_partner=_by_name(tallies, "as_partner") if mixings else {},
        as_substitute=_nonzero(_by_name(tallies, "as_substitute")),
        substituted=_nonzero(_by_name(tallies, "substituted")),
        substitutions=tuple(_named_substitutions(run)),
        complete=state.complete,
        mixing=mixings[-1].settings() if mixings else None,
        not_audited=("batch_transform",) if transformed else (),
        classes=_classes(tallies),
        excluded=int(tallies.legs[-1].left_out.sum()),
        absent=_absent(run),
        legs=tuple(map(_summary, run.legs, tallies.legs)),
        plan_digest=last.plan.digest,
        shards_digest=last.shards.digest,
        table_digest=last.shards.manifest.table.sha256,
        state_digest=last.saved.digest,
    )


def _classes(tallies: Tallies) -> dict[str, ClassExposure]:
    """Count by class, in the order of the last leg's classes, then of those that came before."""
    labels = [label for leg in reversed(tallies.run.legs) for label in leg.shards.classes]
    total = max(1, sum(int(tally.delivered.sum()) for tally in tallies.legs))
    return {label: _class_exposure(label, tallies, total=total) for label in dict.fromkeys(labels)}


def _class_exposure(label: str, tallies: Tallies, *, total: int) -> ClassExposure:
    """Count what a class was given over all legs."""
    exposure = np.zeros(len(tallies.names), dtype=np.int64)
    belongs = np.zeros(len(tallies.names), dtype=np.bool_)
    given = partners = 0
    for leg, tally, owner in zip(tallies.run.legs, tallies.legs, tallies.owners, strict=True):
        if label not in leg.shards.classes:
            continue
        number = leg.shards.classes.index(label)
        mine = carriers(leg.shards.labels(leg.split), number) & ~tally.left_out
        belongs[owner[mine]] = True
        np.add.at(exposure, owner[mine], tally.exposure[mine])
        given += int(tally.delivered[mine].sum())
        partners += int(tally.as_partner[mine].sum())
    times = exposure[belongs]
    return ClassExposure(
        patients=len(times),
        seen=int((times > 0).sum()),
        delivered=given,
        share=given / total,
        exposure_min=int(times.min()) if len(times) else 0,
        exposure_max=int(times.max(initial=0)),
        as_partner=partners,
    )


def _by_name(tallies: Tallies, field: str) -> dict[str, int]:
    """Add up a field of the tallies: patient -> sum."""
    return dict(zip(tallies.names, tallies.by_patient(field).tolist(), strict=True))


def _named_substitutions(run: Run) -> Iterable[NamedSubstitution]:
    """Give the records of all legs with the keys and patients they are about."""
    for number, leg in enumerate(run.legs):
        keys, patients = leg.shards.keys(leg.split), leg.shards.patients(leg.split)
        for record in sorted(leg.state.substitutions):
            yield NamedSubstitution(
                leg=number,
                epoch=record.epoch,
                step=record.step,
                slot=record.slot,
                key=str(keys[record.sample]),
                patient=str(patients[record.sample]),
                substitute_key=str(keys[record.substitute]),
                substitute_patient=str(patients[record.substitute]),
                reason=record.reason,
            )


def _absent(run: Run) -> tuple[str, ...]:
    """List the patients of a run's data sets who are not in the one asked about."""
    others = {leg.shards.digest: leg.shards for leg in run.legs}
    others.pop(run.shards.digest, None)
    if not others:
        return ()
    return tuple(sorted(set().union(*map(everybody, others.values())) - everybody(run.shards)))


def _summary(leg: Leg, tally: Tally) -> LegSummary:
    """Sum a leg up."""
    mixing = leg.state.mixing
    return LegSummary(
        start=_pair(stretches(leg.state)[0]),
        stop=(leg.state.position.epoch, leg.state.position.step),
        skipped=tuple(
            ((left.epoch, left.step), (landed.epoch, landed.step))
            for left, landed in leg.state.skipped
        ),
        batches=count_batches(leg),
        samples=int(tally.delivered.sum()),
        plan_digest=leg.plan.digest,
        shards_digest=leg.shards.digest,
        table_digest=leg.shards.manifest.table.sha256,
        state_digest=leg.saved.digest,
        settings=leg.plan.settings,
        mixing=None if mixing is None else mixing.settings(),
    )


def _pair(stretch: Stretch) -> tuple[int, int]:
    """Give where a stretch starts as plain numbers."""
    return stretch.start.epoch, stretch.start.step


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    """Leave out those who have none."""
    return {name: count for name, count in counts.items() if count}
