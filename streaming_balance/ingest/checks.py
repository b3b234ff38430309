"""What must hold before a cohort is packed: names apart, labels known, classes in order."""

from __future__ import annotations

import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from streaming_balance.errors import ConfigError, SplitError, did_you_mean
from streaming_balance.ingest.cases import Case

NAMES_SHOWN = 5


def check_patients(cases: Sequence[Case]) -> None:
    """Make sure that ids which people would take for one patient are one id.

    Raises:
        SplitError: two ids differ only in letter case, in blanks around them or in how an accent
            is composed; they would count as two patients and could stand in two splits.
    """
    for folded in _alike(case.patient for case in cases):
        shown = " and ".join(
            f"{patient!r} ({next(case.place for case in cases if case.patient == patient)})"
            for patient in folded
        )
        raise SplitError(
            f"patients {shown} differ only in letter case, blanks or accents; they would count as "
            "two patients and could stand in two splits. Write one patient's id in one way."
        )


def check_keys(cases: Sequence[Case]) -> None:
    """Make sure that every sample has its own key.

    Raises:
        SplitError: one patient stands under two classes without samples of its own.
        ConfigError: two samples have the same key, whatever the letter case.
    """
    seen: dict[str, Case] = {}
    for case in cases:
        other = seen.setdefault(case.key.casefold(), case)
        if other is case:
            continue
        if case.patient == other.patient and case.label != other.label and case.sample is None:
            raise SplitError(
                f"patient {case.patient!r} stands under the classes {other.label!r} "
                f"({other.place}) and {case.label!r} ({case.place}); a patient has one label "
                "unless a column 'sample' names samples of its own."
            )
        raise ConfigError(
            f"the key {case.key!r} stands at {other.place} and at {case.place}; give the samples "
            "of one patient different names in a column 'sample'."
        )


def check_labels(cases: Sequence[Case]) -> None:
    """Make sure that every sample has a label, and every patient one unless samples are declared.

    Raises:
        ConfigError: a label is missing, differs inside a patient, or differs from another label
            only in letter case or blanks.
    """
    unlabelled = [case.key for case in cases if case.label is None]
    if unlabelled:
        raise ConfigError(
            f"{len(unlabelled)} sample(s) have no label: {_shown(unlabelled)}. Give them one in "
            "the column 'label' of the manifest or of the labels table."
        )
    for alike in _alike(_label(case) for case in cases):
        raise ConfigError(
            f"labels {' and '.join(map(repr, alike))} differ only in letter case, blanks or "
            "accents; write one class in one way."
        )
    first: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(case.patient, case)
        if other.label != case.label and (case.sample is None or other.sample is None):
            raise ConfigError(
                f"patient {case.patient!r} has the label {other.label!r} ({other.place}) and "
                f"{case.label!r} ({case.place}); labels may differ inside a patient only where a "
                "column 'sample' names every sample."
            )


def check_splits(cases: Sequence[Case]) -> bool:
    """Say whether the source gives the splits.

    Raises:
        ConfigError: it gives them to some samples only.
    """
    without = [case.key for case in cases if case.split is None]
    if without and len(without) < len(cases):
        raise ConfigError(
            f"{len(without)} of {len(cases)} samples have no split, the others do: "
            f"{_shown(without)}. Fill in the column 'split', or leave it out."
        )
    return not without


def check_split_names(splits: Iterable[str]) -> None:
    """Make sure that no two splits share a name but for letter case.

    Raises:
        ConfigError: two do; their shards would be one file on case-folding file systems.
    """
    for alike in _alike(splits):
        raise ConfigError(
            f"splits {' and '.join(map(repr, alike))} differ only in letter case; write one split "
            "in one way."
        )


def order_classes(cases: Sequence[Case], declared: Sequence[str] | None) -> tuple[str, ...]:
    """Put the classes in order; the place of a class is its number for ever.

    Args:
        cases: labelled cases.
        declared: every class in order, empty ones too; None orders the labels found: as numbers
            if all are numbers, else by name.

    Raises:
        ConfigError: a label is not among the declared classes, or one is declared twice.
    """
    found = {_label(case) for case in cases}
    if declared is None:
        return _natural_order(found)
    if len(set(declared)) < len(declared) or "" in declared:
        raise ConfigError(f"classes {list(declared)} must be different, non-empty names.")
    for label in sorted(found - set(declared)):
        owners = [case.key for case in cases if case.label == label]
        raise ConfigError(
            f"label {label!r} of {len(owners)} sample(s) is not in classes {list(declared)}: "
            f"{_shown(owners)}. Add it to classes, or correct the label."
            + did_you_mean(label, declared)
        )
    return tuple(declared)


def _label(case: Case) -> str:
    """Give the label of a case that has one."""
    assert case.label is not None
    return case.label


def _natural_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort labels as numbers if all are, else by name."""
    names = sorted(labels)
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return tuple(names)
    if not all(math.isfinite(value) for value in values.values()):
        return tuple(names)
    return tuple(sorted(names, key=lambda name: (values[name], name)))


def _alike(names: Iterable[str]) -> list[list[str]]:
    """Group different names that people would read as one."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[unicodedata.normalize("NFKC", name).strip().casefold()].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _shown(names: Sequence[str]) -> str:
    """Write the first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:NAMES_SHOWN])) + more
