"""What a run had of one patient: seen or not, when and how often, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.report.homes import describe_unknown, home_of
from streaming_balance.report.sightings import Sighting, find_sightings
from streaming_balance.report.tallies import Tallies


@dataclass(frozen=True, slots=True, kw_only=True)
class TimesSeen:
    """How often somebody was seen, and when."""

    exposure: int
    """Times delivered, alone or as the partner of another."""
    as_partner: int
    """Those of them as the partner of another."""
    as_substitute: int
    """Those of them in the place of a damaged sample."""
    substituted: int
    """Times another was delivered instead."""
    first_seen: Sighting | None
    """The batch in which it was first, in the order of training; None: never."""
    last_seen: Sighting | None
    """The batch in which it was last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientAnswer:
    """What a run had of one patient."""

    patient: str
    """The patient's id."""
    split: str
    """The patient's split, by the data set that was trained on last and has the patient."""
    label: str
    """Class of the patient's samples; where they have several, all of them joined by `|`."""
    is_present: bool
    """Whether the patient is in the data set asked about."""
    excluded: tuple[str, ...]
    """Keys of the samples that the last plan leaves out by name."""
    times: TimesSeen
    """How often the patient was seen, and when."""
    samples: dict[str, TimesSeen]
    """The same by key, for the samples in the splits that were trained on."""

    @property
    def seen(self) -> bool:
        """Whether any sample of the patient was delivered."""
        return self.times.exposure > 0


def answer_for(patient: str, tallies: Tallies) -> PatientAnswer:
    """Say what a run had of one patient.

    Args:
        patient: the patient's id.
        tallies: what became of everybody in the run.

    Returns:
        The answer; never seen is one, too.

    Raises:
        ConfigError: neither the data sets of the run nor the one asked about have the patient.
    """
    run = tallies.run
    known = (*(leg.shards for leg in reversed(run.legs)), run.shards)
    found = next((home for home in (home_of(patient, shards) for shards in known) if home), None)
    if found is None:
        raise ConfigError(describe_unknown(patient, known))
    rows = [np.flatnonzero(leg.shards.patients(leg.split) == patient) for leg in run.legs]
    keys = [
        leg.shards.keys(leg.split)[mine].tolist() for leg, mine in zip(run.legs, rows, strict=True)
    ]
    names = tuple(sorted({key for mine in keys for key in mine}))
    by_key = [[names.index(key) for key in mine] for mine in keys]
    last_out = tallies.legs[-1].left_out[rows[-1]].tolist()
    return PatientAnswer(
        patient=patient,
        split=found.split,
        label=found.label,
        is_present=home_of(patient, run.shards) is not None,
        excluded=tuple(key for key, out in zip(keys[-1], last_out, strict=True) if out),
        times=_times(tallies, rows, [[0] * len(mine) for mine in keys], (patient,))[patient],
        samples=_times(tallies, rows, by_key, names),
    )


def _times(
    tallies: Tallies,
    rows: list[NDArray[np.int64]],
    numbers: list[list[int]],
    names: tuple[str, ...],
) -> dict[str, TimesSeen]:
    """Say how often and when some were seen.

    Args:
        tallies: what became of everybody in the run.
        rows: per leg, the sample numbers that are asked about.
        numbers: per leg, whom each of them belongs to.
        names: who they are.
    """
    sums: dict[str, list[int]] = {}
    for field in ("exposure", "as_partner", "as_substitute", "substituted", "delivered"):
        totals = np.zeros(len(names), dtype=np.int64)
        for tally, mine, owner in zip(tallies.legs, rows, numbers, strict=True):
            np.add.at(totals, owner, getattr(tally, field)[mine])
        sums[field] = totals.tolist()
    owners = []
    for leg, mine, owner in zip(tallies.run.legs, rows, numbers, strict=True):
        owners.append(np.full(leg.plan.num_samples, -1, dtype=np.int64))
        owners[-1][mine] = owner
    delivered = np.array(sums.pop("delivered")) > 0
    seen = find_sightings(tallies.run, names, owners, delivered)
    return {
        name: TimesSeen(
            **{field: totals[number] for field, totals in sums.items()},
            first_seen=seen.first[name],
            last_seen=seen.last[name],
        )
        for number, name in enumerate(names)
    }
