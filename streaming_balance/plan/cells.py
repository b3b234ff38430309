"""Groups that quotas are kept for: classes, their strata, or what several labels come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.labels import LABEL_SEPARATOR, Labels
from streaming_balance.plan.options import LABEL_SET_STRATUM, LABEL_STRATUM, listed
from streaming_balance.plan.strategy import Strategy

# No label and no value of a column holds it, so that joined names cannot be mistaken.
KEY_SEPARATOR = "\x1f"
NO_LABEL = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """The group of every sample; groups of one class stand next to each other."""

    codes: NDArray[np.int64]
    """`(N,)` group number of every sample; -1 for samples left out."""
    keys: tuple[str, ...]
    """`(G,)` name of each group, which its random streams are keyed by."""
    groups: tuple[int, ...]
    """`(G,)` class number of each group."""
    strata: tuple[tuple[str, ...], ...] | None = None
    """`(G,)` values of the strata columns; None where groups are whole classes."""
    membership: NDArray[np.bool_] | None = None
    """`(N, K)` labels of every sample, where one group holds all of them; else None."""

    @classmethod
    def of_classes(cls, codes: NDArray[np.int64], classes: Sequence[Any]) -> Cells:
        """Make every class one group."""
        return cls(codes=codes, keys=tuple(map(str, classes)), groups=tuple(range(len(classes))))

    @property
    def shown(self) -> list[str]:
        """`(G,)` names of the groups for messages."""
        return [key.replace(KEY_SEPARATOR, " / ") for key in self.keys]


def settle_labels(labels: Labels, strategy: Strategy) -> Labels:
    """Turn labels into what a strategy balances.

    Args:
        labels: one or several per sample.
        strategy: its `target_label` makes two classes of them, its `strata: label_set` a class of
            every set of labels; strategies by sample take several labels as they are.

    Raises:
        ConfigError: several labels and a strategy that needs one, or no such `target_label`.

    Examples:
        >>> from streaming_balance.plan.labels import read_labels
        >>> from streaming_balance.plan.strategies import ClassBalanced
        >>> findings = read_labels([["Mass", "Hernia"], [], ["Mass"]])
        >>> settle_labels(findings, ClassBalanced(target_label="Hernia")).classes
        ('no Hernia', 'Hernia')
        >>> settle_labels(findings, ClassBalanced(strata="label_set")).classes
        ('Hernia|Mass', 'Mass', 'none')
    """
    of_sets = strategy.strata is not None and LABEL_SET_STRATUM in strategy.strata
    if strategy.target_label is not None:
        if of_sets:
            raise ConfigError(
                f"{strategy.name}: target_label makes two classes of several labels, and strata: "
                f"{LABEL_SET_STRATUM} a class of every set of them; keep one."
            )
        return _has_or_has_not(labels, str(strategy.target_label))
    if of_sets:
        return _label_sets(labels)
    natural = strategy.name == "instance_balanced" and strategy.strata is None
    if labels.membership is None or strategy.draws_units or natural:
        return labels
    raise ConfigError(
        f"{strategy.name}: samples have several labels, and a class needs one. Use repeat_factor, "
        f"or add strata: label_set (every set of labels is a class) or target_label: "
        f"{labels.classes[0]} (samples have it or have it not)."
    )


def make_cells(
    labels: Labels, columns: Mapping[str, NDArray[np.str_]], strategy: Strategy
) -> Cells:
    """Give every sample its group.

    Args:
        labels: settled for the strategy.
        columns: name -> `(N,)` values of the columns to balance jointly with the label.
        strategy: named in messages.

    Raises:
        ConfigError: strata for a strategy or for labels that have none.
    """
    if columns and (strategy.draws_units or strategy.name == "p_k"):
        raise ConfigError(f"{strategy.name} plans by sample or by class; leave strata out.")
    if labels.membership is not None:
        if columns:
            raise ConfigError(
                f"{strategy.name}: strata divide classes, but samples have several labels. Add "
                f"{LABEL_SET_STRATUM} to the strata, or target_label: {labels.classes[0]}."
            )
        return Cells(
            codes=labels.codes,
            keys=("all samples",),
            groups=(0,),
            membership=labels.membership,
        )
    if not columns:
        return Cells.of_classes(labels.codes, labels.classes)
    return _divided(labels, columns)


def strata_columns(strategy: Strategy) -> tuple[str, ...] | None:
    """Give the columns a strategy balances jointly with the label; None if it names none."""
    if strategy.strata is None:
        return None
    return tuple(n for n in strategy.strata if n not in (LABEL_STRATUM, LABEL_SET_STRATUM))


def _divided(labels: Labels, columns: Mapping[str, NDArray[np.str_]]) -> Cells:
    """Divide every class by the values of the columns that occur in it."""
    joint = labels.codes
    for column in columns.values():
        distinct, codes = np.unique(column, return_inverse=True)
        joint = np.where(joint < 0, -1, joint * len(distinct) + codes)
        # Numbered anew after every column: many columns of many values would overflow.
        found, joint = np.unique(joint, return_inverse=True)
        joint = joint - int(found[0] < 0)
    _, first = np.unique(joint, return_index=True)
    first = first[joint[first] >= 0]
    strata = [tuple(str(column[row]) for column in columns.values()) for row in first.tolist()]
    groups = labels.codes[first].tolist()
    return Cells(
        codes=joint.astype(np.int64),
        keys=tuple(
            KEY_SEPARATOR.join([str(labels.classes[number]), *stratum])
            for number, stratum in zip(groups, strata, strict=True)
        ),
        groups=tuple(groups),
        strata=tuple(strata),
    )


def _has_or_has_not(labels: Labels, wanted: str) -> Labels:
    """Make two classes of labels: samples that have one of them, and samples that have it not."""
    names = [str(label) for label in labels.classes]
    if wanted not in names:
        raise ConfigError(
            f"target_label is {wanted!r}, but no sample has that label. Labels there: "
            f"{listed(names)}.{did_you_mean(wanted, names)}"
        )
    number = names.index(wanted)
    if labels.membership is not None:
        codes = np.where(labels.codes < 0, -1, labels.membership[:, number]).astype(np.int64)
    else:
        codes = np.where(labels.codes < 0, -1, labels.codes == number).astype(np.int64)
    return Labels(classes=(f"no {wanted}", wanted), codes=codes)


def _label_sets(labels: Labels) -> Labels:
    """Make a class of every set of labels that some sample has."""
    if labels.membership is None:
        return labels
    known = labels.codes >= 0
    packed = np.packbits(labels.membership[known], axis=1)
    whole = np.ascontiguousarray(packed).view(f"V{packed.shape[1]}").ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    names = [
        LABEL_SEPARATOR.join(
            str(label) for label, has in zip(labels.classes, row, strict=True) if has
        )
        or NO_LABEL
        for row in labels.membership[known][first].tolist()
    ]
    twice = (
        [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    )
    if twice:
        raise ConfigError(
            f"strata: {LABEL_SET_STRATUM}: two sets are both written {twice[0]!r}. Rename "
            f"labels that hold {LABEL_SEPARATOR!r} or are called {NO_LABEL!r}."
        )
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(len(names))
    codes = np.full(len(known), -1, dtype=np.int64)
    codes[known] = rank[inverse]
    return Labels(classes=tuple(names[number] for number in order), codes=codes)
