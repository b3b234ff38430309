"""Dividing patients who have several findings each, so that every split gets its share of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction

from streaming_balance.plan.keys import check_seed, stream_key
from streaming_balance.plan.splits import parse_fractions


def divide_by_findings(
    findings: Mapping[str, Iterable[str]],
    *,
    fractions: Mapping[str, float | Fraction],
    seed: int,
) -> dict[str, str]:
    """Assign every patient to a split, the rarest finding first.

    The finding that fewest patients still wait with is divided next: each of its patients, in keyed
    order, goes to the split that lacks most of that finding, ties to the one that lacks most
    patients. What a patient brings beside it counts for its other findings, so that these make up
    for it when their turn comes. Patients without any finding fill the splits up.

    Args:
        findings: patient -> all findings of its samples.
        fractions: split name -> fraction in (0, 1], together 1.
        seed: names the random stream, in [0, 2**64 - 1].

    Returns:
        Patient -> split. Of the rarest finding each split gets the floor or the ceiling of its
        share of patients; of another one too, unless too few patients are left to make up for
        what rarer findings brought.

    Raises:
        ConfigError: a fraction or the seed cannot be used.

    Source:
        Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-label Data", ECML PKDD
        2011, algorithm 1; here over patients, with keyed order instead of chance.

    Examples:
        >>> assigned = divide_by_findings(
        ...     {"P1": ["Hernia", "Mass"], "P2": ["Mass"], "P3": [], "P4": ["Hernia"]},
        ...     fractions={"train": 0.5, "val": 0.5}, seed=0,
        ... )
        >>> assigned["P1"] != assigned["P4"], assigned["P1"] != assigned["P2"]
        (True, True)
    """
    seed = check_seed(seed)
    needs = _Needs({patient: set(held) for patient, held in findings.items()}, fractions)
    waiting: dict[str, set[str]] = {}
    for patient, held in needs.findings.items():
        for name in held:
            waiting.setdefault(name, set()).add(patient)
    while waiting:
        rarest = min(waiting, key=lambda name: (len(waiting[name]), name))
        for patient in _in_keyed_order(waiting.pop(rarest), rarest, seed):
            needs.place(patient, rarest)
            for name in needs.findings[patient] - {rarest}:
                waiting[name].discard(patient)
        waiting = {name: left for name, left in waiting.items() if left}
    for patient in _in_keyed_order(findings.keys() - needs.assigned.keys(), "", seed):
        needs.place(patient, None)
    return {patient: needs.assigned[patient] for patient in findings}


class _Needs:
    """How many patients, and patients with each finding, every split still lacks."""

    def __init__(
        self, findings: dict[str, set[str]], fractions: Mapping[str, float | Fraction]
    ) -> None:
        self.findings = findings
        self.assigned: dict[str, str] = {}
        owners: dict[str, int] = {}
        for held in findings.values():
            for name in held:
                owners[name] = owners.get(name, 0) + 1
        shares = parse_fractions(fractions)
        self._patients = {split: share * len(findings) for split, share in shares.items()}
        self._owners = {
            split: {name: share * count for name, count in owners.items()}
            for split, share in shares.items()
        }

    def place(self, patient: str, finding: str | None) -> None:
        """Put a patient where its finding is lacked most, or where patients are."""
        # max() gives the first of equals: the split named first.
        split = max(
            self._patients,
            key=lambda name: (
                self._owners[name][finding] if finding is not None else 0,
                self._patients[name],
            ),
        )
        self.assigned[patient] = split
        self._patients[split] -= 1
        for name in self.findings[patient]:
            self._owners[split][name] -= 1


def _in_keyed_order(patients: Iterable[str], finding: str, seed: int) -> list[str]:
    """Sort patients by a key made of the seed, the finding and their ids."""
    return sorted(patients, key=lambda name: (stream_key(seed, "split", finding, name), name))
