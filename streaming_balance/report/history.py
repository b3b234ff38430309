"""What a run had seen by an earlier state, once that is known to be a state of the same run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from streaming_balance.errors import ResumeError
from streaming_balance.report.runs import (
    Leg,
    Run,
    Stretch,
    checked_leg,
    placed_substitutions,
    stretches,
)
from streaming_balance.report.saved_states import SavedState, check_is_of_training
from streaming_balance.report.tallies import Tallies
from streaming_balance.training.records import Substitution
from streaming_balance.training.state import LoaderState


def run_until(run: Run, earlier: SavedState) -> Run:
    """Give the part of a run that lies before an earlier state of it.

    Substitutions that only the later state knows of, because it has the records of more ranks,
    count too where they lie before the earlier one.

    Args:
        run: the run up to its later state.
        earlier: a state that the same run had before.

    Returns:
        The run up to the earlier state.

    Raises:
        ResumeError: the run never had that state; names the field, what was found, and what an
            earlier state of the run would have.
    """
    check_is_of_training(earlier.state)
    parts = _parts(earlier.state)
    _check_same_plans(parts, run.legs)
    for number, (part, leg) in enumerate(zip(parts, run.legs, strict=False)):
        if number < len(parts) - 1:
            _check_equal_paths(part, leg.state)
        else:
            _check_is_on_the_way(part, leg.state)
        _check_substitutions(part, leg.state)
    turned = len(parts) - 1
    last = run.legs[turned]
    known = _with_later_records(earlier.state, last.state)
    saved = SavedState(state=known, digest=earlier.digest)
    leg = checked_leg(replace(last, saved=saved))
    return Run(legs=(*run.legs[:turned], leg), shards=run.shards)


def seen_since(later: Tallies, earlier: Tallies) -> dict[str, int]:
    """Count how often each patient was seen between two states of a run.

    Args:
        later: counted up to the later state.
        earlier: counted up to the earlier one.

    Returns:
        patient -> times, alone or as the partner of another, sorted by patient.
    """
    times = later.by_patient("exposure").tolist()
    before = dict(zip(earlier.names, earlier.by_patient("exposure").tolist(), strict=True))
    return {
        name: count - before.get(name, 0) for name, count in zip(later.names, times, strict=True)
    }


def _parts(state: LoaderState) -> list[LoaderState]:
    """Give the states of all legs, the first leg first."""
    parts = [state]
    while (before := parts[-1].carried_from) is not None:
        parts.append(before.state)
    return parts[::-1]


def _check_same_plans(parts: Sequence[LoaderState], legs: Sequence[Leg]) -> None:
    """Refuse a state of other plans, other data, or other mixing."""
    if len(parts) > len(legs):
        raise _not_earlier("carried_from", f"{len(parts) - 1} changes of plan", len(legs) - 1)
    for part, leg in zip(parts, legs, strict=False):
        for field in ("shards_digest", "plan_digest", "mixing"):
            found, expected = getattr(part, field), getattr(leg.state, field)
            if found != expected:
                named = _differing_settings(part, leg.state) if field == "plan_digest" else ""
                raise _not_earlier(field, found, expected, named)


def _differing_settings(part: LoaderState, expected: LoaderState) -> str:
    """Name the settings in which two plans differ."""
    mine, theirs = part.settings, expected.settings
    names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return "".join(f"; {name}: {mine.get(name)!r}, not {theirs.get(name)!r}" for name in names)


def _check_equal_paths(part: LoaderState, expected: LoaderState) -> None:
    """Refuse a state whose earlier plan was left elsewhere than the run left it."""
    for field in ("position", "skipped"):
        found, wanted = getattr(part, field), getattr(expected, field)
        if found != wanted:
            raise _not_earlier(f"carried_from.{field}", found, wanted)


def _check_is_on_the_way(part: LoaderState, later: LoaderState) -> None:
    """Refuse a state that the run did not come through: jumps that differ, or a place beyond."""
    mine, theirs = _travelled(part), _travelled(later)
    if not mine:
        return
    end = len(mine) - 1
    if mine[:end] != theirs[:end] or end >= len(theirs) or mine[end].start != theirs[end].start:
        raise _not_earlier("skipped", part.skipped, later.skipped)
    if mine[end].stop > theirs[end].stop:
        stop = theirs[end].stop
        expected = f"at most epoch {stop.epoch}, step {stop.step}, from where the run went on"
        raise _not_earlier(
            "position", f"epoch {part.position.epoch}, step {part.position.step}", expected
        )


def _travelled(state: LoaderState) -> list[Stretch]:
    """Give the stretches in which batches were delivered: jumps in a row may have become one."""
    return [stretch for stretch in stretches(state) if stretch.start != stretch.stop]


def _check_substitutions(part: LoaderState, later: LoaderState) -> None:
    """Refuse a state with records that the later one lacks."""
    lacking = list((Counter(part.substitutions) - Counter(later.substitutions)).elements())
    if lacking:
        first = lacking[0]
        raise _not_earlier(
            "substitutions",
            f"{len(lacking)} that the later state lacks, first at epoch {first.epoch}, step "
            f"{first.step}, slot {first.slot}",
            "those of the later state",
            ". Where ranks saved states of their own, merge_states unites them",
        )


def _with_later_records(earlier: LoaderState, later: LoaderState) -> LoaderState:
    """Add the records of the later state that lie before the earlier one."""
    ends = list(enumerate(stretches(earlier)))
    before = Counter(
        record
        for (number, place), records in placed_substitutions(later).items()
        if any(number == mine and place in stretch for mine, stretch in ends)
        for record in records
    )
    united: Counter[Substitution] = Counter(earlier.substitutions) | before
    known = replace(earlier, substitutions=tuple(sorted(united.elements())))
    if later.complete:
        known = replace(
            known, recorders=None, complete_before=True, carried_from=later.carried_from
        )
    return known


def _not_earlier(field: str, found: object, expected: object, more: str = "") -> ResumeError:
    """Say in which field a state is none that the run had before."""
    return ResumeError(
        f"the state before is not an earlier state of this run. {field}: it has {found}, expected "
        f"{expected}{more}. Give two states of one run, the earlier one with --before."
    )
