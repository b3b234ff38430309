"""Which case goes to which split, in which order, and what decides the bytes of a pack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.ingest.cases import Case, Cohort
from streaming_balance.ingest.checks import (
    check_keys,
    check_labels,
    check_patients,
    check_split_names,
    check_splits,
    labels_of,
    order_classes,
)
from streaming_balance.ingest.dividing import divide_by_findings
from streaming_balance.ingest.encode import Recipe
from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.splits import (
    check_patients_apart,
    order_splits,
    parse_fractions,
    split_patients,
)
from streaming_balance.storage.labelling import SEPARATOR, join_findings
from streaming_balance.storage.manifest import JSON

TRAIN_SPLIT = "train"
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOrder:
    """What will be packed, and in which order."""

    cases: tuple[tuple[Case, str], ...]
    """Every case with its split: split after split, in keyed order within one."""
    classes: tuple[str, ...]
    """Labels in class order."""
    classes_declared: bool
    """Whether that order was given, rather than made from the labels found."""
    splits: tuple[str, ...]
    """Splits in order, each with at least one case."""
    train_splits: tuple[str, ...]
    """Splits that may be balanced."""
    multi_label: bool
    """Whether labels are findings joined by `|`, each of them a class."""
    split_rule: Mapping[str, str] | None
    """The fractions drawn with; None where the source gives the splits or there is only one."""
    warnings: tuple[str, ...]
    """What the user should know about the splits, in sentences."""


def order_cases(
    cohort: Cohort,
    *,
    classes: Sequence[str] | None,
    split: str | Mapping[str, float] | None,
    seed: int,
    train_splits: Sequence[str] | None,
    multi_label: bool = False,
) -> PackOrder:
    """Check a cohort's names and labels, assign its splits and order its cases.

    Within a split the order comes from a key per sample, so that every shard mixes the classes as
    the split does, and one case more leaves the order of the others alone.

    Args:
        cohort: labelled cases.
        classes: declared class order, or None.
        split: fractions to draw, or None.
        seed: names the random streams.
        train_splits: splits that may be balanced; None takes those that begin with "train".
        multi_label: labels are findings joined by `|`, each of them a class.

    Raises:
        ConfigError: labels, classes or splits cannot be used.
        SplitError: a patient stands in two splits, or under two ids.
    """
    cases = cohort.cases
    check_patients(cases)
    if check_splits(cases):
        # First, because a patient listed once per split has the same key twice as well.
        check_patients_apart([case.patient for case in cases], [str(case.split) for case in cases])
    check_keys(cases)
    check_labels(cases, multi_label=multi_label)
    class_order = order_classes(cases, classes, multi_label=multi_label)
    if multi_label:
        # One set of findings is one label, in whatever order its cell names them.
        cases = tuple(
            replace(case, label=join_findings(labels_of(case, multi_label), class_order))
            for case in cases
        )
    assigned, rule = _assigned_splits(cases, split, seed, multi_label=multi_label)
    present = tuple(rule) if rule else order_splits(assigned)
    check_split_names(present)
    splits = tuple(name for name in present if name in set(assigned))
    for_training = _train_splits(train_splits, splits)
    place = {name: number for number, name in enumerate(splits)}
    ordered = sorted(
        zip(cases, assigned, strict=True),
        key=lambda pair: (place[pair[1]], stream_key(seed, "pack", pair[0].key)),
    )
    return PackOrder(
        cases=tuple(ordered),
        classes=class_order,
        classes_declared=classes is not None,
        multi_label=multi_label,
        splits=splits,
        train_splits=for_training,
        split_rule=rule,
        warnings=(
            *_label_notes(cases, multi_label=multi_label),
            *_missing_classes(
                [(split, labels_of(case, multi_label)) for case, split in ordered],
                class_order,
                present,
                is_drawn=rule is not None,
            ),
            *_split_notes(splits, for_training, is_given=check_splits(cases) or rule is not None),
        ),
    )


def pack_settings(
    order: PackOrder, recipe: Recipe, *, seed: int, shard_bytes: int
) -> dict[str, JSON]:
    """List everything that decides the bytes of a pack, so that two packs can be compared.

    The cohort itself is in it as a digest of keys, labels, splits, columns and file sizes: a
    corrected label makes another pack. Where the source lies and how many processes work is not.
    """
    rows = [
        [case.key, case.patient, case.label, split, dict(case.columns), list(case.modalities)]
        + [[stamp.path.name, stamp.size_bytes] for stamp in case.stamps]
        for case, split in order.cases
    ]
    text = json.dumps(rows, sort_keys=True, separators=(",", ":"))
    return {
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(recipe).items()
        },
        "classes": list(order.classes),
        # Only where it holds: a data set packed without is still the one of the same command.
        **({"classes_declared": True} if order.classes_declared else {}),
        **({"multi_label": True} if order.multi_label else {}),
        "cohort": hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest(),
        "seed": int(seed),
        "shard_bytes": shard_bytes,
        "split": None if order.split_rule is None else dict(order.split_rule),
        "train_splits": list(order.train_splits),
    }


def _assigned_splits(
    cases: Sequence[Case],
    split: str | Mapping[str, float] | None,
    seed: int,
    *,
    multi_label: bool,
) -> tuple[list[str], dict[str, str] | None]:
    """Take every case's split from its table, from fractions, or "train"."""
    if check_splits(cases):
        if split is not None:
            raise ConfigError(
                f"split is {split!r}, but the source has a column 'split'; leave out one."
            )
        return [str(case.split) for case in cases], None
    if split is None:
        return [TRAIN_SPLIT] * len(cases), None
    fractions = parse_fractions(split)
    if multi_label:
        held: dict[str, set[str]] = {}
        for case in cases:
            held.setdefault(case.patient, set()).update(labels_of(case, multi_label))
        drawn = divide_by_findings(held, fractions=fractions, seed=seed)
    else:
        drawn = split_patients(
            [case.patient for case in cases],
            [str(case.label) for case in cases],
            fractions=fractions,
            seed=seed,
        )
    rule = {name: str(fraction) for name, fraction in fractions.items()}
    return [drawn[case.patient] for case in cases], rule


def _train_splits(given: Sequence[str] | None, splits: Sequence[str]) -> tuple[str, ...]:
    """Choose the splits that may be balanced."""
    if given is None:
        return tuple(name for name in splits if name.startswith(TRAIN_SPLIT))
    for name in given:
        if name not in splits:
            raise ConfigError(
                f"train_splits names {name!r}; the splits are {', '.join(splits)}."
                + did_you_mean(name, splits)
            )
    return tuple(given)


def _label_notes(cases: Sequence[Case], *, multi_label: bool) -> tuple[str, ...]:
    """Say what may be a surprise about labels that look like findings, or are empty."""
    if multi_label:
        empty = sum(not case.label for case in cases)
        said = (
            f"{empty} of {len(cases)} samples have an empty label: packed as without any finding."
        )
        return (said,) if empty else ()
    joined = sorted({str(case.label) for case in cases if SEPARATOR in str(case.label)})
    if not joined:
        return ()
    return (
        f"{len(joined)} label(s) such as {joined[0]!r} hold {SEPARATOR!r} and are packed as one "
        "class each. If they are findings, add --multi-label (multi_label=True).",
    )


def _missing_classes(
    held: Sequence[tuple[str, tuple[str, ...]]],
    classes: Sequence[str],
    splits: Sequence[str],
    *,
    is_drawn: bool,
) -> tuple[str, ...]:
    """Say which splits have no sample of a class that others have."""
    there = {(split, label) for split, labels in held for label in labels}
    anywhere = {label for _, label in there}
    why = ": too few patients to divide" if is_drawn else ""
    return tuple(
        f"split {split!r} has no sample of class {label!r}{why}."
        for split in splits
        for label in classes
        if label in anywhere and (split, label) not in there
    )


def _split_notes(
    splits: Sequence[str], for_training: Sequence[str], *, is_given: bool
) -> tuple[str, ...]:
    """Say what may be a surprise about the splits as a whole."""
    notes = []
    if not for_training:
        notes.append(
            f"no split is for training ({', '.join(splits)}): none may be balanced. Name one "
            "train..., or say which with --train-splits (train_splits=)."
        )
    if not is_given:
        notes.append(
            f"no split was asked for: all samples are in {TRAIN_SPLIT!r}. Add --split "
            "train=0.7,val=0.15,test=0.15 (split=) or a column 'split' to keep some for validation."
        )
    return tuple(notes)
