"""What must hold before a cohort is packed: names apart, labels known, classes in order."""

from __future__ import annotations

import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from streaming_balance.errors import ConfigError, SplitError, did_you_mean
from streaming_balance.ingest.cases import Case
from streaming_balance.storage.labelling import SEPARATOR, split_findings

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


def check_labels(cases: Sequence[Case], *, multi_label: bool = False) -> None:
    """Make sure that every sample has a label, and every patient one unless samples are declared.

    Args:
        cases: what will be packed.
        multi_label: a label is findings joined by `|`; an empty cell then means none of them.

    Raises:
        ConfigError: a label is missing, differs inside a patient, differs from another label
            only in letter case or blanks, or does not name its findings one by one.
    """
    missing = (None,) if multi_label else (None, "")
    unlabelled = [case.key for case in cases if case.label in missing]
    if unlabelled:
        raise ConfigError(
            f"{len(unlabelled)} sample(s) have no label: {_shown(unlabelled)}. Give them one in "
            "the column 'label' of the manifest or of the labels table."
        )
    if multi_label:
        _check_findings(cases)
    for alike in _alike(name for case in cases for name in labels_of(case, multi_label)):
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


def order_classes(
    cases: Sequence[Case], declared: Sequence[str] | None, *, multi_label: bool = False
) -> tuple[str, ...]:
    """Put the classes in order; the place of a class is its number for ever.

    Args:
        cases: labelled cases.
        declared: every class in order, empty ones too; None orders the labels found: as numbers
            if all are numbers, else by name.
        multi_label: every finding of a label is a class.

    Raises:
        ConfigError: a label is not among the declared classes, or one is declared twice.
    """
    found = {name for case in cases for name in labels_of(case, multi_label)}
    if not found and declared is None:
        raise ConfigError(
            "no sample has a finding: every label is empty. Fill in the column 'label', or name "
            "the findings there may be with classes."
        )
    if declared is None:
        return natural_order(found)
    if len(set(declared)) < len(declared) or "" in declared:
        raise ConfigError(f"classes {list(declared)} must be different, non-empty names.")
    for label in sorted(found - set(declared)):
        owners = [case.key for case in cases if label in labels_of(case, multi_label)]
        raise ConfigError(
            f"label {label!r} of {len(owners)} sample(s) is not in classes {list(declared)}: "
            f"{_shown(owners)}. Add it to classes, or correct the label."
            + did_you_mean(label, declared)
        )
    return tuple(declared)


def labels_of(case: Case, multi_label: bool) -> tuple[str, ...]:
    """Give the class of a labelled case, or its findings."""
    assert case.label is not None
    return split_findings(case.label) if multi_label else (case.label,)


def _check_findings(cases: Sequence[Case]) -> None:
    """Refuse labels whose findings are empty, stand twice or have blanks around them."""
    for case in cases:
        names = labels_of(case, multi_label=True)
        wrong = [name for name in names if not name or name != name.strip()]
        wrong += [name for name in names if names.count(name) > 1]
        if wrong:
            raise ConfigError(
                f"the label {case.label!r} of {case.key!r} ({case.place}) has the finding "
                f"{wrong[0]!r}; write each finding once, joined by {SEPARATOR!r} without blanks, "
                "and leave the cell empty where there is none."
            )


def natural_order(labels: Iterable[str]) -> tuple[str, ...]:
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
